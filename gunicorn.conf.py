"""Settings and hooks of gunicorn: each top-level name that it knows as a setting is used as one."""

import ctypes
import gc
import os
import signal
import socket
import sys
from pathlib import Path

from gunicorn import systemd, util
from gunicorn.http.errors import ParseException

sys.path.insert(0, str(Path(__file__).resolve().parent))  # gunicorn may start in any folder

import app
import storage
from server import Worker

_settings = app.read_settings()

wsgi_app = f"{__name__}:_get_app()"  # for other classes of worker; ours makes its own
bind = _settings.bind
workers = 1  # SQLite has one writer; this overrides WEB_CONCURRENCY, which some hosts set
worker_class = Worker
worker_connections = 500  # beyond, the one that has waited for a request for longest is closed
keepalive = 75  # seconds that an idle connection is kept: longer than clients and proxies use one
timeout = 30  # seconds without a sign of life until the worker is killed; a write waits 5 at most
graceful_timeout = 30  # seconds that a running request has after TERM
control_socket_disable = True  # by default it is on, at the same path in HOME for every service
# The folder of the file by whose time a worker shows that it lives. With a read-only root nothing
# but the database's folder may be writable.
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 # the file has a random name
worker_tmp_dir = (
    _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else os.path.dirname(_settings.database)
)
access_log_format = "%(t)s %(s)s %(B)s bytes %(M)s ms"  # no URL: the path can hold a token

Worker.settings = _settings


def _get_app():
    return app.open_app(_settings)


def on_starting(server):
    """Refuse what cannot work, and prepare the database once, before the fork."""
    if server.cfg.is_ssl and issubclass(server.worker_class, Worker):
        sys.exit("TLS is for a proxy in front, or for another class of worker: -k gthread")
    if server.cfg.reload:
        sys.exit("--reload would not load the code again, as it is loaded before the fork: restart")
    # Else the sockets are inherited.
    if "GUNICORN_FD" not in os.environ and not systemd.listen_fds(unset_environment=False):
        for address in server.cfg.address:
            if isinstance(address, tuple):  # neither a path nor a descriptor
                _try_to_bind(*address)
    app.prepare(_settings)
    Worker.identity = storage.identity(_settings.database)
    # Master and worker share memory until one of them writes to it, as the garbage collector would.
    gc.collect()
    gc.freeze()


def _try_to_bind(host, port):
    """Exit with one line if the address cannot be used; gunicorn would try for 5 seconds."""
    try:
        family, kind, _, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trying:
            trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trying.bind(name)
    except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
        reason = getattr(error, "strerror", None) or "not a host's name"
        sys.exit(
            f"{host}:{port}: cannot listen there: {reason};"
            " PORT and LIVECHAT_HOST name another address"
        )


def when_ready(server):
    """Say where the service and its page answer."""
    for listener in server.LISTENERS:
        url = str(listener).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        page = f" and shows visitors at {url}/inbox" if url.startswith("http") else ""
        server.log.info("answers at %s%s", url, page)


def nworkers_changed(server, new_value, old_value):
    """Keep one worker, after `--workers` and TTIN too."""
    if new_value > 1:
        server.log.warning("there is always one worker: SQLite has one writer")
        server.cfg.set("workers", 1)
        server.num_workers = 1


def post_fork(server, worker):
    """End the worker with its master, and let a stop end it while it boots.

    Let other classes of worker log what they refuse without data of the client.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: prctl(2)
    # Until it sets its own handlers it has the master's, which would lose the signal.
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(stop, signal.SIG_DFL)

    def log_and_refuse(request, client, address, error):
        bad = isinstance(error, ParseException)
        status, phrase = (400, "Bad Request") if bad else (500, "Internal Server Error")
        worker.log.warning("Refused with %d: %s", status, type(error).__name__)
        util.write_error(client, status, phrase, "")

    if not isinstance(worker, Worker):
        worker.handle_error = log_and_refuse
