"""The server's settings. Beware: every top-level name here that is a gunicorn setting is one."""

import ctypes
import os
import signal
import sys
from types import MethodType

import storage
from settings import SettingError, Settings
from worker import Worker

try:
    _settings = Settings.from_environ()
except SettingError as _error:
    sys.exit(str(_error))

wsgi_app = "app:get_app()"  # so that `gunicorn` alone starts the service
preload_app = True  # a worker boots at once then, and opens no file for it
bind = _settings.bind
workers = _settings.workers
worker_class = Worker
worker_connections = 500  # of a worker; more wait until one has ended
keepalive = 5  # seconds in which the next request of a connection may come
timeout = 30  # seconds until a worker that does not answer is killed; a write waits 5 at most
graceful_timeout = 30  # seconds that a running request has after TERM
limit_request_fields = 64  # of 8 KB each; a head of gunicorn's 100 costs 80 ms of CPU to refuse
permit_unconventional_http_method = True  # the service says 405, where gunicorn says 400
control_socket_disable = True  # it is on by default, at one path in HOME for all services
access_log_format = "%(t)s %(s)s %(B)s bytes %(M)s ms"  # no URL: the path can hold a token


_STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


def _reset_stops():
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


# A new worker has the master's handlers until it sets its own, and a signal meanwhile would be
# lost: the stop would wait for it until `graceful_timeout`.
os.register_at_fork(
    before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS),
    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS),
    after_in_child=_reset_stops,
)


def on_starting(server):
    """Make the database ready once, before the fork; nothing of it stays open."""
    if server.cfg.is_ssl and issubclass(server.worker_class, Worker):
        sys.exit("TLS is for a proxy in front, or for another class of worker: -k gthread")
    try:
        new, visitors = storage.prepare(_settings.database, _settings.match)
    except storage.PrepareError as error:
        sys.exit(str(error))
    if new:
        server.log.info("new database at %s", _settings.database)
    else:
        server.log.info("opened %s (%d visitors)", _settings.database, visitors)
    if _settings.agent is None:
        server.log.info("LIVECHAT_AGENT is not set: visitors.info and visitors.search answer 401")


def post_fork(server, worker):
    """Let a worker end with its master, and one of another class than ours refuse in our shape.

    By itself it notices the end of its master after a second, or 15, in which no other could have
    the port.
    """
    if not isinstance(worker, Worker):
        worker.handle_error = MethodType(Worker.handle_error, worker)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: prctl(2)


def pre_request(worker, req):
    """Close a connection after some requests, or one worker could have all of them for ever."""
    if req.req_number >= 64:
        req.force_close()
