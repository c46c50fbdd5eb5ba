"""gunicorn's worker with greenlets: a connection costs some KB of memory, and no thread.

Whoever sends half a request, or reads no answer, holds up nobody else, has some seconds for it, and
is told what happened.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer
from gevent.util import wrap_errors
from greenlet import greenlet
from gunicorn.http import get_parser
from gunicorn.http.errors import (
    ExpectationFailed,
    InvalidRequestLine,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.workers.ggevent import GeventWorker

REQUEST_TIME = 10  # seconds in which a request has to come; the next one may wait `keepalive`
ANSWER_TIME = 10  # seconds in which a client has to take its answer
LINGER_TIME = 2  # seconds for which a client may still send after its answer: RFC 9112, 9.6
LINGER_READS = 64  # pieces, at most, meanwhile
LARGEST_HEAD = 65_536  # bytes
LARGEST_BODY = 65_536  # bytes; what is larger, the service refuses
LARGEST_CHUNKED = 73_728  # bytes of a body with what is around its chunks, each of which costs CPU
EMPTY = 64  # bytes of empty lines that may stand before a request
PIECE = 16_384  # bytes that are read at a time
STOP_TIME = 1  # seconds in which an open connection may still ask something at a stop
REST_TIME = 1  # seconds in which the rest of a body may come that nobody reads


class RequestTimeout(ParseException, TimeoutError):
    """A request that did not come in time."""


class Worker(GeventWorker):
    """One process of the service."""

    has_greenlets = False  # whether this is the class of the workers here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stopping = Event()
        self._waiting: set[greenlet] = set()  # for clients that ask nothing, or nothing more

    @classmethod
    def setup(cls) -> None:
        """Let locks be those of greenlets; gunicorn calls this before it loads the service.

        The rest follows in the worker: a master with gevent's fork notices no worker's end.
        """
        if not cls.has_greenlets:  # else it is a HUP
            monkey.patch_thread()
            cls.has_greenlets = True

    def run(self) -> None:
        """Serve until it is told to stop, and then finish the requests that have begun to come."""
        pool = Pool(self.worker_connections)
        servers = [
            StreamServer(listener, partial(self._handle, listener.getsockname()), spawn=pool)
            for listener in self.sockets
        ]
        for server in servers:
            server.max_accept = 1  # at a time, so that the other workers get their share
            server.start()
        while self.alive:
            self.notify()
            self._stopping.wait(1)
        for server in servers:
            server.close()
        pool.join(timeout=STOP_TIME)  # for what is on the way, which is answered as the last one
        gevent.killall(list(self._waiting))
        ends = time.monotonic() + self.cfg.graceful_timeout
        while len(pool) and time.monotonic() < ends:
            self.notify()
            pool.join(timeout=1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order."""
        super().handle_exit(sig, frame)
        self._stopping.set()

    def _handle(self, name: Any, client: Any, address: Any) -> None:
        """Answer the requests of a connection to the address `name`, one after the other."""
        connection = Connection(client)
        try:
            self._serve(connection, name, address)
        except RequestTimeout as error:
            self.handle_error(None, connection, address, error)
        except (StopIteration, OSError):
            pass  # it ends here, as either side wants
        except Exception as error:
            self.handle_error(None, connection, address, error)
        connection.close()

    def _serve(self, connection: Connection, name: Any, address: Any) -> None:
        as_socket: Any = connection  # of which gunicorn asks no more than that
        parser = get_parser(self.cfg, as_socket, address)
        patience = REQUEST_TIME
        while self._is_asked(connection, patience):
            request = next(parser)
            connection.limit(request)
            self.handle_request(name, request, as_socket, address)
            connection.send_answer()
            connection.take_back(parser)
            patience = self.cfg.keepalive if self.alive else STOP_TIME

    def _is_asked(self, connection: Connection, seconds: float) -> bool:
        """Return whether a request begins within so many seconds."""
        current = gevent.getcurrent()
        self._waiting.add(current)
        try:
            return connection.begins(seconds)
        finally:
            self._waiting.discard(current)

    def handle_error(self, _req: Any, client: Any, _addr: Any, error: BaseException) -> None:
        """Refuse, in our shape, what the service does not see."""
        refuse(self.log, client, error)


def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns that waits for the disk; other requests go on meanwhile."""
    if not Worker.has_greenlets:
        return call(*arguments)
    # gevent prints what a thread raises, so nothing does.
    outcome = gevent.get_hub().threadpool.apply(wrap_errors((Exception,), call), arguments)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class Connection:
    """A client's socket, as gunicorn's parser and answers use it; no client holds it for long."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._received = b""  # of the next request, and not yet parsed
        self._answer = bytearray()  # and not yet sent
        self._ends = 0.0  # seconds of `time.monotonic` at which nothing more is read of a request
        self._given = 0  # bytes of it that the parser has
        self._most: int | None = None  # bytes of it that are read; any number without one
        self._request: Any = None  # gunicorn's, once its head is there

    def begins(self, seconds: float) -> bool:
        """Wait for the first bytes of a request; return whether they have come.

        Raise what is wrong with bytes that are none of HTTP, such as those of TLS: the line that
        they begin may never end.
        """
        self._ends = time.monotonic() + seconds
        self._given, self._most, self._request = 0, None, None
        self._received = self._received.lstrip(b"\r\n")
        empty = 0
        with suppress(TimeoutError):
            while not self._received and empty <= EMPTY and (data := self._read()):
                self._received = data.lstrip(b"\r\n")
                empty += len(data) - len(self._received)
        self._ends = time.monotonic() + REQUEST_TIME
        if empty > EMPTY or (self._received and not b"!" <= self._received[:1] <= b"~"):
            raise InvalidRequestLine("")
        return bool(self._received)

    def limit(self, request: Any) -> None:
        """Limit what is read of the body of a request, whose head is there."""
        headers = dict(request.headers)
        if "TRANSFER-ENCODING" in headers:
            self._most = self._given + LARGEST_CHUNKED
        elif int(headers.get("CONTENT-LENGTH", 0)) > LARGEST_BODY:
            request.force_close()  # as nobody reads so much
        self._request = request

    def take_back(self, parser: Any) -> None:
        """Take from the parser what it has read of the next request.

        Raise `OSError` where the end of this one is not there, and does not come at once.
        """
        if self._most is not None:
            self._most = 0  # in chunks it would cost too much
        self._ends = time.monotonic() + REST_TIME
        try:
            finished = parser.finish_body()
        except ParseException:
            finished = False
        if not finished:
            raise ConnectionResetError(errno.ECONNRESET, "a request was not read to its end")
        self._received = parser.unreader.take_buffered() + self._received

    def recv(self, size: int) -> bytes:
        """Return bytes of the request; raise `RequestTimeout` where they do not come in time.

        Raise EMSGSIZE for a body in so many chunks that to read them would cost too much, and
        `LimitRequestHeaders` for a head that is too large: gunicorn looks it through at each piece.
        """
        if self._request is None and self._given > LARGEST_HEAD:
            raise LimitRequestHeaders("")
        data, self._received = self._received[:size], self._received[size:]
        if not data:
            try:
                if self._most is not None and self._given >= self._most:
                    raise OSError(errno.EMSGSIZE, "too many chunks")
                data = self._read(size)
            except OSError as error:
                if self._request is not None:
                    self._request.force_close()  # which its answer says
                if isinstance(error, TimeoutError):
                    raise RequestTimeout from None
                raise
        self._given += len(data)
        return data

    def _read(self, size: int = PIECE) -> bytes:
        """Return what comes next, nothing at the end; raise `TimeoutError`."""
        left = self._ends - time.monotonic()
        if left <= 0:  # which gevent does not look at as long as something is there
            raise TimeoutError
        self._client.settimeout(left)
        data: bytes = self._client.recv(min(size, PIECE))
        return data

    def send(self, data: bytes | bytearray) -> None:
        """Send at once."""
        self._client.settimeout(ANSWER_TIME)  # for all of it
        self._client.sendall(data)

    def sendall(self, data: bytes) -> None:
        """Keep a part of an answer, which is sent as one."""
        self._answer += data

    def send_answer(self) -> None:
        """Send the answer; raise `OSError` where the client does not take it in time."""
        data, self._answer = self._answer, bytearray()
        if data:
            self.send(data)

    def shutdown(self, _how: int) -> None:
        """Forget an answer that has failed half way."""
        self._answer.clear()

    def close(self) -> None:
        """Send the answer and close, once the client has, so that nothing it sends cuts the answer.

        A client that goes on sending has `LINGER_TIME`.
        """
        with suppress(OSError):
            self.send_answer()
            self._client.shutdown(socket.SHUT_WR)
            self._ends = time.monotonic() + LINGER_TIME
            for _ in range(LINGER_READS):
                if not self._read():
                    break
        self._client.close()


_STATUS = {
    LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG,
    LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    UnsupportedTransferCoding: HTTPStatus.NOT_IMPLEMENTED,
}


def refuse(log: Any, client: Any, error: BaseException) -> None:
    """Answer what does not come to the service; log its kind, where gunicorn would quote it."""
    if isinstance(error, RequestTimeout):
        log.warning("A request did not come in time")
        status = HTTPStatus.REQUEST_TIMEOUT
        answer(client, status, "The request did not come in time", "error-request-timeout")
    elif isinstance(error, ParseException):
        status = _STATUS.get(type(error), HTTPStatus.BAD_REQUEST)
        log.warning("Invalid request: %s", type(error).__name__)
        answer(client, status, "The request is not valid HTTP", "error-invalid-request")
    else:
        log.error("Error handling request: %s", type(error).__name__)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        answer(client, status, "Internal server error", "error-internal")


def answer(client: Any, status: HTTPStatus, reason: str, kind: str) -> None:
    """Send an error in the service's shape (contract, section 1), if the client is still there."""
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
    with suppress(OSError):
        client.sendall(head.encode() + data)
