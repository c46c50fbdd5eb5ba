"""The server's settings. Beware: every top-level name here that is a gunicorn setting is one."""

import ctypes
import gc
import os
import signal
import socket
import sys
from http import HTTPStatus
from pathlib import Path
from types import MethodType

from gunicorn import systemd, util
from gunicorn.http.errors import ParseException

sys.path.insert(0, str(Path(__file__).resolve().parent))  # gunicorn may start in any folder

import app
import storage
from server import Worker

_settings = app.read_settings()

wsgi_app = f"{__name__}:_get_app()"  # for other classes of worker; ours makes its own
bind = _settings.bind
workers = 1  # SQLite has one writer; whatever WEB_CONCURRENCY says, which hosts set by themselves
worker_class = Worker
worker_connections = 500  # beyond, the one without a whole request for longest makes room
keepalive = 75  # seconds: longer than clients and proxies keep a connection they use again
timeout = 30  # seconds until a worker that does not answer is killed; a write waits 5 at most
graceful_timeout = 30  # seconds that a running request has after TERM
control_socket_disable = True  # it is on by default, at one path in HOME for all services
# For the file by whose time a worker shows that it lives. On a read-only root /tmp cannot be
# written, and maybe nothing but the database's folder.
_MEMORY = "/dev/shm"  # noqa: S108 # the file has a random name
worker_tmp_dir = _MEMORY if os.access(_MEMORY, os.W_OK) else os.path.dirname(_settings.database)
access_log_format = "%(t)s %(s)s %(B)s bytes %(M)s ms"  # no URL: the path can hold a token

Worker.settings = _settings


def _get_app():
    return app.open_app(_settings)


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
    """Prepare the database once, before the fork; nothing of it stays open."""
    if server.cfg.is_ssl and issubclass(server.worker_class, Worker):
        sys.exit("TLS is for a proxy in front, or for another class of worker: -k gthread")
    if server.cfg.reload:
        sys.exit("--reload would not load the code again, as it is loaded before the fork: restart")
    _try_to_bind(server)
    app.prepare(_settings)
    Worker.identity = storage.identity(_settings.database)


def when_ready(server):
    """Say where the service and its page answer."""
    for listener in server.LISTENERS:
        url = str(listener).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        page = f" and shows visitors at {url}/inbox" if url.startswith("http") else ""
        server.log.info("answers at %s%s", url, page)


def _try_to_bind(server):
    """Exit with one line where an address is taken, instead of gunicorn's 5 tries."""
    if "GUNICORN_FD" in os.environ or systemd.listen_fds(unset_environment=False):
        return  # the sockets are inherited
    for address in server.cfg.address:
        if not isinstance(address, tuple):
            continue  # a path, where gunicorn replaces what is there, or a descriptor
        try:
            family, kind, _, _, name = socket.getaddrinfo(*address[:2], type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as trying:
                trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trying.bind(name)
        except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
            reason = getattr(error, "strerror", None) or "not a host's name"
            sys.exit(
                f"{address[0]}:{address[1]}: cannot listen there: {reason};"
                " PORT and LIVECHAT_HOST name another address"
            )


def nworkers_changed(server, new_value, old_value):
    """Keep one worker, after `--workers` and TTIN too."""
    if new_value > 1:
        server.log.warning("there is always one worker: SQLite has one writer")
        server.cfg.set("workers", 1)
        server.num_workers = 1


def pre_fork(server, worker):
    """Let master and worker share their memory, which the garbage collector would write to."""
    gc.collect()
    gc.freeze()


def post_fork(server, worker):
    """Let a worker end with its master, which else it notices only after a second.

    Let one of another class log what it refuses without quoting the client.
    """
    if not isinstance(worker, Worker):
        worker.handle_error = MethodType(_refuse, worker)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: prctl(2)


def _refuse(worker, request, client, address, error):
    status = 400 if isinstance(error, ParseException) else 500
    worker.log.warning("Refused with %d: %s", status, type(error).__name__)
    util.write_error(client, status, HTTPStatus(status).phrase, "")
