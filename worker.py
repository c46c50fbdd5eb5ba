"""gunicorn's worker with greenlets: a connection costs some KB of memory, and no thread.

Here a request is handed to the service when all of it has come, or has had its time; so nobody who
sends half a request, or reads no answer, holds up anybody else, and each is told what happened.
A request of ours has 64 KiB at most, which is what makes this small.
"""

from __future__ import annotations

import errno
import json
import re
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
LINGER_READS = 16  # of 64 KiB, at most, meanwhile
LARGEST = 73_728  # bytes of a request that are waited for; what is larger, the service refuses
LONGEST_LINE = 8_192  # bytes of the first line that are waited for; gunicorn takes 4,094
PIECE = 16_384  # bytes that are read at a time

_FIRST_BYTE = re.compile(rb"[!-~\r]")  # and so not of TLS
_FIRST_LINE = re.compile(rb"\r\n|[!-~]+ [^ \r\n]+ HTTP/\d\.\d\r\n")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length[ \t]*:[ \t]*(\d{1,9})[ \t]*\r\n")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding[ \t]*:")
_EXPECT = re.compile(rb"(?i)\r\nexpect[ \t]*:[ \t]*100-continue[ \t]*(?=\r\n)")


class RequestTimeout(ParseException):
    """A request that did not come in time."""


class Worker(GeventWorker):
    """One process of the service."""

    has_greenlets = False  # whether this is the class of the workers here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stopping = Event()
        self._idle: set[greenlet] = set()  # whose clients ask nothing, or nothing more

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
            StreamServer(listener, partial(self.handle, listener), spawn=pool)
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
        gevent.killall(list(self._idle))
        ends = time.monotonic() + self.cfg.graceful_timeout
        while len(pool) and time.monotonic() < ends:
            self.notify()
            pool.join(timeout=1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order."""
        super().handle_exit(sig, frame)
        self._stopping.set()

    def handle(self, listener: Any, client: Any, address: Any) -> None:
        """Answer the requests of a connection, one after the other."""
        connection = Connection(client)
        try:
            self._serve(connection, listener.getsockname(), address)
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
            connection.receive_all()
            self.handle_request(name, next(parser), as_socket, address)
            connection.send_answer()
            if not self.alive:
                break
            connection.take_back(parser)
            patience = self.cfg.keepalive

    def _is_asked(self, connection: Connection, patience: float) -> bool:
        """Return whether a request begins within so many seconds."""
        current = gevent.getcurrent()
        self._idle.add(current)
        try:
            return connection.begins(patience)
        finally:
            self._idle.discard(current)

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
        self._received = bytearray()  # of the next request, and not yet parsed
        self._answer = bytearray()  # and not yet sent
        self._ends = 0.0  # seconds of `time.monotonic` at which nothing more is read of a request
        self._left: int | None = None  # bytes that are still read of it; any number without one

    def begins(self, seconds: float) -> bool:
        """Wait for the first bytes of a request; return whether they have come."""
        self._ends = time.monotonic() + seconds
        if not self._received:
            with suppress(TimeoutError):
                self._received += self._read()
        self._ends = time.monotonic() + REQUEST_TIME
        return bool(self._received)

    def receive_all(self) -> None:
        """Wait until all of the request is there, or so much that it is for the service to refuse.

        Raise `RequestTimeout`, or at once what is wrong with a first line that is none of HTTP.
        """
        while not is_whole(self._received):
            check_first_line(self._received)
            # A client that waits to be asked for the body is asked here.
            expects = _EXPECT.search(self._received, 0, self._received.find(b"\r\n\r\n") + 2)
            if expects:
                del self._received[slice(*expects.span())]
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            try:
                data = self._read()
            except TimeoutError:
                raise RequestTimeout from None
            if not data:
                break
            self._received += data
        chunked = _CHUNKED.search(self._received, 0, self._received.find(b"\r\n\r\n") + 1)
        self._left = LARGEST - len(self._received) if chunked else None

    def take_back(self, parser: Any) -> None:
        """Take from the parser what it has read of the next request.

        Raise `OSError` where the end of this one is not there.
        """
        self._left = 0
        if not parser.finish_body():
            raise gone()
        self._received[:0] = parser.unreader.take_buffered()

    def recv(self, size: int) -> bytes:
        """Return bytes of the request; a client that has had its time counts as one that is gone.

        Raise EMSGSIZE for a body in so many chunks that to read them would cost too much.
        """
        if self._received:
            data = bytes(self._received[:size])
            del self._received[:size]
            return data
        if self._left is not None and self._left <= 0:
            raise OSError(errno.EMSGSIZE, "too many chunks")
        try:
            data = self._read()
        except TimeoutError:
            raise gone() from None
        if self._left is not None:
            self._left -= len(data)
        return data

    def _read(self) -> bytes:
        """Return what comes next, nothing at the end; raise `TimeoutError`."""
        self._client.settimeout(max(0.001, self._ends - time.monotonic()))
        data: bytes = self._client.recv(PIECE)
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


def gone() -> ConnectionResetError:
    """Return the error of a client that is gone, of which gunicorn makes no noise."""
    return ConnectionResetError(errno.ECONNRESET, "too slow")


def check_first_line(data: bytearray) -> None:
    """Raise what is wrong with a first line that is none of HTTP: its end may never come."""
    end = data.find(b"\n")
    if end > LONGEST_LINE or (end < 0 and len(data) > LONGEST_LINE):
        raise LimitRequestLine(len(data), LONGEST_LINE)
    line = data[: end + 1] if end >= 0 else data[:1]
    if not (_FIRST_LINE if end >= 0 else _FIRST_BYTE).fullmatch(line):
        raise InvalidRequestLine("")


def is_whole(data: bytearray) -> bool:
    """Return whether a request has all come, or so much that it is for the service to refuse.

    A chunked body ends with an empty
    line; where one is within, the rest is read as the service asks for it.
    """
    if len(data) > LARGEST:
        return True
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return False
    body = len(data) - head - 4
    length = _LENGTH.search(data, 0, head + 2)
    if length:
        return body >= int(length[1]) or int(length[1]) > LARGEST
    return not _CHUNKED.search(data, 0, head) or data.endswith(b"\r\n\r\n", head + 4)


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
