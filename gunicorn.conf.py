"""The server's settings. Beware: every top-level name here that is a gunicorn setting is one."""

import json
import sys
from http import HTTPStatus
from types import MethodType

from gunicorn.http.errors import (
    ExpectationFailed,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)

import storage
from settings import SettingError, Settings

try:
    _settings = Settings.from_environ()
except SettingError as _error:
    sys.exit(str(_error))

wsgi_app = "app:get_app()"  # so that `gunicorn` alone starts the service
bind = _settings.bind
workers = _settings.workers
timeout = 30  # seconds until a worker that does not answer is killed; a write waits 5 at most
graceful_timeout = 30  # seconds that a running request has after TERM
control_socket_disable = True  # it is on by default, at one path in HOME for all services
access_log_format = "%(t)s %(s)s %(B)s bytes %(M)s ms"  # no URL: the path can hold a token


def on_starting(server):
    """Make the database ready once, before the fork; nothing of it stays open."""
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
    """Let any class of worker answer in our shape what it refuses before the service sees it."""
    worker.handle_error = MethodType(_handle_error, worker)


_STATUS = {
    LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
}


def _handle_error(worker, req, client, addr, error):
    """Answer in JSON and log the kind of the error; gunicorn's own line quotes the request."""
    if isinstance(error, ParseException):
        status = _STATUS.get(type(error), HTTPStatus.BAD_REQUEST)
        reason, kind = "The request is not valid HTTP", "error-invalid-request"
        worker.log.warning("Invalid request: %s", type(error).__name__)
    else:
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        reason, kind = "Internal server error", "error-internal"
        worker.log.error("Error handling request: %s", type(error).__name__)
    body = {"success": False, "error": f"{reason} [{kind}]", "errorType": kind}
    data = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Connection: close\r\n"
        "Content-Type: application/json\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    try:
        client.sendall(head.encode() + data)
    except OSError:
        worker.log.debug("The client did not wait for its error.")
