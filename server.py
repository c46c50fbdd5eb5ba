"""gunicorn's worker: uvicorn's connections with limits, and a greenlet for each request of the app.

A complete request runs at once, in the thread of the event loop. While it waits, for a commit or
for a long read, its greenlet gives the thread back to the loop. The writes that wait at the same
moment share one transaction.
"""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

import falcon
import uvicorn
from greenlet import getcurrent, greenlet
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn_worker import UvicornWorker

import app
import storage
from resources.errors import (
    MAX_BODY,
    Refusal,
    invalid_request,
    log,
    log_unavailable,
    log_unforeseen,
    refusal,
    to_json,
)
from settings import Settings
from storage.database import BEGIN_RETRY

REQUEST_TIME = 10  # seconds until a request that is not complete gets a 408
ANSWER_TIME = 10  # seconds that a client has to read its answer
STOP_TIME = 1  # seconds in which an open connection may send one more request at a stop
LINGER_TIME = 2  # seconds for which a client may go on sending after its last answer: RFC 9112, 9.6
MAX_LINGER = 2**23  # bytes that it may send meanwhile
CHECK_INTERVAL = 0.2  # seconds between two checks of the deadlines of all connections
MAX_URL_OR_FIELD = 8_190  # bytes of a URL, and of a header field
MAX_HEAD = 65_536  # bytes
MAX_HEADER_FIELDS = 64
MAX_CHUNKED = 73_728  # bytes of a chunked body, its chunk headers included
MAX_EMPTY_BYTES = 64  # bytes of empty lines before a request
PARSE_BYTES = 8_192  # bytes that are parsed between two checks of these limits
MAX_ACCEPTED = 20  # connections that are accepted in one turn of the loop
SPARE_FILES = 150  # descriptors for our own files and for connections that are just accepted
SLOW_COMMIT = 0.05  # seconds; after a slower one, commits are made in a thread
QUICK_COMMITS = 100  # in a row, after which commits are made on the loop again
MAX_TURNS = 3  # turns of the loop for which a group waits for more writes


class RequestGreenlet(greenlet):
    """The greenlet in which the app answers a request."""

    waits_for: asyncio.Future[Any] | None = None  # is cancelled if the client disconnects


def pause() -> Any:
    """Give the thread back to the loop; return what this greenlet is resumed with."""
    loop: Any = getcurrent().parent
    return loop.switch()


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, from within a greenlet; the loop goes on meanwhile."""
    request: Any = getcurrent()

    def resume(done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            request.throw()  # GreenletExit, which ends it
        elif error := done.exception():
            request.throw(error)
        else:
            request.switch(done.result())

    request.waits_for = asyncio.ensure_future(awaitable)
    request.waits_for.add_done_callback(resume)
    try:
        return pause()
    finally:
        request.waits_for = None  # or the result, such as a page of a search, stays in memory


def sleep(seconds: float) -> None:
    """Return after so many seconds; the loop goes on meanwhile."""
    wait_for(asyncio.sleep(seconds))


class Turns(storage.Waiting):
    """A request waits in its greenlet while the loop goes on; writes share transactions."""

    def __init__(self) -> None:
        super().__init__()
        self._writes: list[tuple[storage.PendingWrite[Any], Any]] = []  # with their greenlets
        self._writing: asyncio.Task[None] | None = None
        # How many quick commits it takes until they are made on the loop. The first ones are not,
        # so that a slow disk is never felt.
        self._quick_missing = QUICK_COMMITS
        self._disk = ThreadPoolExecutor(1, "disk")
        self._scans = ThreadPoolExecutor(1, "scans")

    def commit(self, database: storage.Database, write: storage.PendingWrite[Any]) -> None:
        """Return when `write` is on the disk, or has an error."""
        self._writes.append((write, getcurrent()))
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write(database))
        pause()

    def in_thread(self, call: Callable[[], Any]) -> Any:
        """Return the result of a call that takes long."""
        return wait_for(asyncio.get_running_loop().run_in_executor(self._scans, call))

    async def _write(self, database: storage.Database) -> None:
        """Commit what waits, group by group, as long as anything does."""
        while self._writes:
            for _ in range(MAX_TURNS):  # a request takes a turn of the loop to come here
                seen = len(self._writes)
                await asyncio.sleep(0)
                if len(self._writes) == seen:
                    break
            group = database.run_group([write for write, _ in self._writes])
            if not group:
                await asyncio.sleep(BEGIN_RETRY)
                continue
            await self._commit(partial(database.commit_group, group))
            # It was made of the first ones, which have the earliest deadlines.
            settled, self._writes = self._writes[: len(group)], self._writes[len(group) :]
            for _, request in settled:
                request.switch()
            if database.checkpoint_due:
                await asyncio.get_running_loop().run_in_executor(self._disk, database.checkpoint)
        self._writing = None

    async def _commit(self, commit: Callable[[], None]) -> None:
        """Commit: on the loop while that is quick, else in a thread."""

        def timed() -> float:
            start = time.monotonic()
            commit()
            return time.monotonic() - start

        loop = asyncio.get_running_loop()
        took = await loop.run_in_executor(self._disk, timed) if self._quick_missing else timed()
        self._quick_missing = (
            max(0, self._quick_missing - 1) if took <= SLOW_COMMIT else QUICK_COMMITS
        )


FRAMING = (b"content-length", b"transfer-encoding")  # the app gets CONTENT_LENGTH instead
REFUSAL_HEADERS = (
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
)
ENVIRON = {
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": False,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
    "SCRIPT_NAME": "",
    "livechat.sleep": sleep,  # for resources/standin.py
}


# What a connection is doing. "upgraded" is the moment after a head that asked for another protocol,
# which it does not get; "closing" waits for a client that is still sending.
Phase = Literal["idle", "head", "upgraded", "body", "complete", "running", "sending", "closing"]


class Connection(HttpToolsProtocol):
    """A client's connection: one request at a time, and limits for its size and its time."""

    # The same for all connections; set by `Worker`.
    log_access: Callable[..., None] | None = None
    idle_time = 75.0  # seconds until the next request of a connection
    max_connections = 500
    stopping = False  # whether this process is about to end

    def connection_made(  # type: ignore[override] # as uvicorn's own, it is never for datagrams
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `resume_writing` tells of each answer
        self.request: RequestGreenlet | None = None
        self.last_request = self.loop.time()  # when it was complete; at first, of the connection
        self.discards = False  # whether what still comes is thrown away
        self.eof = False  # whether the client has ended its sending side
        self.keep_alive = False
        self.await_request(REQUEST_TIME)
        if self.stopping:
            self.shutdown()
        everyone: Any = self.connections
        if len(everyone) > self.max_connections:
            # This one is the newest, and so the last to be closed.
            others = (one for one in everyone if one.phase != "running")
            longest = min(others, key=lambda one: one.last_request)
            everyone.discard(longest)  # at once; asyncio takes a turn of the loop to close it
            longest.transport.abort()

    def await_request(self, seconds: float) -> None:
        """Wait for the next request for so many seconds."""
        self.enter("idle", seconds)
        self.size = 0  # bytes of the head so far; behind it, of the rest of the request
        self.body: bytearray | None = bytearray()  # None where it is too large

    def enter(self, phase: Phase, seconds: float = float("inf")) -> None:
        """Begin a phase, which may take so many seconds."""
        self.phase = phase
        self.deadline = self.loop.time() + seconds  # by the loop's clock

    def check(self, now: float) -> None:
        """End a phase that has taken too long; `now` is a time of the loop's clock."""
        if now < self.deadline:
            return
        if self.phase in ("head", "body"):
            self.refuse(refusal("error-request-timeout"))
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.request is not None and self.request.waits_for is not None:
            self.request.waits_for.cancel()

    def data_received(self, data: bytes) -> None:
        if self.phase == "closing":
            self.size += len(data)
            if self.size > MAX_LINGER:
                self.transport.abort()
            return
        if self.phase in ("running", "sending"):
            self.read_no_more()
            return
        try:
            for start in range(0, len(data), PARSE_BYTES):
                self.parse(data[start : start + PARSE_BYTES])
                if self.discards:
                    break
        except Refusal as refused:
            self.refuse(refused)
            return
        if self.phase == "complete":
            self.last_request = self.loop.time()
            self.enter("running")
            self.request = RequestGreenlet(self.answer)
            self.request.switch()

    def parse(self, piece: bytes) -> None:
        """Parse a piece; raise `Refusal` for what is not HTTP or beyond a limit."""
        self.size += len(piece)
        try:
            try:
                self.parser.feed_data(piece)
            except HttpParserUpgrade as upgrade:
                # This parser would skip the body, so another one reads it.
                self.parser = HttpRequestParser(self)
                self.parser.feed_data(b"POST / HTTP/1.1\r\n" + self.framing + b"\r\n\r\n")
                self.parser.feed_data(piece[upgrade.args[0] :])
        except HttpParserError as error:
            reason = error.__context__  # what a callback raised
            try:
                if self.phase == "complete":  # more than one request
                    self.read_no_more()
                elif isinstance(reason, Refusal):
                    raise reason from None
                elif self.phase == "body":
                    raise refusal("error-incomplete-body") from None
                else:
                    raise invalid_request("not HTTP", error) from None
            finally:
                del reason  # or a reference cycle would keep the piece in memory
        if self.phase == "idle" and self.size > MAX_EMPTY_BYTES:
            raise invalid_request("empty lines")
        if self.phase == "head" and self.size > MAX_HEAD:
            raise invalid_request("large head", MAX_HEAD)
        if self.phase == "body" and self.size > MAX_CHUNKED:
            self.drop_body()

    # The parser's callbacks. What they raise becomes the context of the parser's own error.

    def on_message_begin(self) -> None:
        if self.phase == "complete":
            raise invalid_request("unknown")  # the first one is answered
        if self.phase == "idle":
            self.enter("head", REQUEST_TIME)
            self.url = b""
            self.headers = []

    def on_url(self, url: bytes) -> None:
        if self.phase == "head":
            self.url += url
            if len(self.url) > MAX_URL_OR_FIELD:
                raise invalid_request("long URL", MAX_URL_OR_FIELD)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.phase != "head":  # a trailer
            return
        if len(name) + len(value) + 4 > MAX_URL_OR_FIELD:
            raise invalid_request("large field", MAX_URL_OR_FIELD)
        if len(self.headers) == MAX_HEADER_FIELDS:
            raise invalid_request("many fields", MAX_HEADER_FIELDS)
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.phase == "upgraded":  # by the second parser
            self.phase = "body"
            return
        if self.size > MAX_HEAD:  # though a part of that may be the body
            head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head > MAX_HEAD:
                raise invalid_request("large head", MAX_HEAD)
        self.version, self.method = self.parser.get_http_version(), self.parser.get_method()
        fields = dict(self.headers)
        self.check_fields(fields)
        upgraded = self.parser.should_upgrade()
        self.phase, self.size = ("upgraded" if upgraded else "body"), 0
        self.keep_alive = not upgraded and self.version != "1.0"
        # The parser has checked that it is a number, and that there is no Transfer-Encoding too.
        length = fields.get(b"content-length", b"0")
        chunked = b"transfer-encoding" in fields
        self.framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: " + length
        if int(length) > MAX_BODY:
            self.drop_body()
        elif b"expect" in fields and self.version == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def check_fields(self, fields: dict[bytes, bytes]) -> None:
        """Raise `Refusal` for header fields that are wrong though the parser accepts them."""
        if len(fields) < len(self.headers):
            names = [name for name, _ in self.headers]
            for name in (b"host", b"content-type", b"transfer-encoding", b"expect"):
                if names.count(name) > 1:
                    raise invalid_request("twice", name.decode().title())
        if self.version not in ("1.0", "1.1"):
            raise invalid_request("version")
        if b"host" not in fields and self.version == "1.1":
            raise invalid_request("no host")
        if fields.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            raise invalid_request("coding")
        if b"transfer-encoding" in fields and self.version == "1.0":
            raise invalid_request("coding in 1.0")
        if fields.get(b"expect", b"100-continue").strip().lower() != b"100-continue":
            raise invalid_request("expect")
        try:
            self.parts = parse_url(self.url)
        except HttpParserError:
            raise invalid_request("URL") from None

    def on_body(self, body: bytes) -> None:
        if self.body is not None:
            self.body += body
            if len(self.body) > MAX_BODY:
                self.drop_body()

    def on_message_complete(self) -> None:
        if self.phase != "upgraded":  # else the second parser says when
            self.phase = "complete"
        self.keep_alive &= self.parser.should_keep_alive()  # a trailer can change it

    def drop_body(self) -> None:
        """Hand a body that is too large over to the app as that, and throw away the rest of it."""
        self.body = None
        self.phase = "complete"
        self.read_no_more()

    def read_no_more(self) -> None:
        """Throw away what still comes, and close after the answer."""
        self.discards = True
        self.keep_alive = False

    def eof_received(self) -> bool:  # type: ignore[override] # asyncio's own returns it too
        """Return whether the connection stays open, for an answer."""
        self.eof = True
        if self.phase == "body":
            self.refuse(refusal("error-incomplete-body"))
            return True
        if self.phase in ("running", "sending"):
            self.read_no_more()
            return True
        return False

    def answer(self) -> None:
        """Run the app, in a greenlet, and send its answer."""
        start = time.monotonic()
        begun: list[Any] = []
        wsgi: Any = self.app
        try:
            environ = self.environ()
            parts = wsgi(environ, lambda *head: begun.extend(head))
            body = b"".join(parts)
            if hasattr(parts, "close"):
                parts.close()
            status, headers = begun[:2]
            if self.transport.is_closing():
                return
            self.send(status, headers, body)
            self.server_state.total_requests += 1
            if self.log_access is not None:
                took = timedelta(seconds=time.monotonic() - start)
                said = SimpleNamespace(status=status, sent=len(body), headers=headers)
                asked = [
                    (name.decode("latin-1"), value.decode("latin-1"))
                    for name, value in self.headers
                ]
                self.log_access(said, SimpleNamespace(headers=asked), environ, took)
        except Exception as error:  # else it would be raised wherever the greenlet is resumed
            log_unforeseen(error)
            self.transport.abort()

    def environ(self) -> dict[str, Any]:
        """Return the environment of the request for the app (PEP 3333)."""
        path = self.parts.path or b"/"  # RFC 9112, 3.2.1
        body = b"" if self.body is None else self.body
        environ = ENVIRON | {
            "REQUEST_METHOD": self.method.decode(),
            "PATH_INFO": (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1"),
            "QUERY_STRING": (self.parts.query or b"").decode("latin-1"),
            "RAW_URI": self.url.decode("latin-1"),
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
            "SERVER_NAME": self.server[0] if self.server else "",
            "SERVER_PORT": str(self.server[1]) if self.server else "",
            "REMOTE_ADDR": self.client[0] if self.client else "",
            "CONTENT_LENGTH": str(MAX_BODY + 1 if self.body is None else len(body)),
            "wsgi.input": io.BytesIO(body),
            "livechat.drop": self.transport.abort,
        }
        for name, value in self.headers:
            if name in FRAMING or b"_" in name:  # X_Forwarded_For would count as X-Forwarded-For
                continue
            key = name.decode("latin-1").upper().replace("-", "_")
            if key != "CONTENT_TYPE":
                key = f"HTTP_{key}"
            text = value.decode("latin-1").strip(" \t")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
        return environ

    def refuse(self, refused: Refusal) -> None:
        """Answer a request that the app never sees, and close."""
        log.warning("Refused with %d: %s", refused.status, refused.body["error"])
        self.read_no_more()
        body = to_json(refused.body)
        headers = [*REFUSAL_HEADERS, ("Content-Length", str(len(body)))]
        self.send(falcon.code_to_http_status(refused.status), headers, body)

    def send(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Send an answer at once; then wait for the next request, or close."""
        self.keep_alive = self.keep_alive and not self.stopping
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
        lines += [] if self.keep_alive else ["Connection: close"]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1:
            raise ValueError("a header with a line break")
        date = b"".join(b"\r\n%s: %s" % field for field in self.server_state.default_headers)
        self.await_request(self.idle_time)
        self.transport.write(head.encode("latin-1") + date + b"\r\n\r\n" + body)
        if self.transport.get_write_buffer_size():
            self.enter("sending", ANSWER_TIME)
        elif not self.keep_alive:
            self.end()

    def end(self) -> None:
        """Close, but only after a client that is still sending could read its answer."""
        if self.discards and not self.eof:
            self.enter("closing", LINGER_TIME)
            with suppress(OSError):
                self.transport.write_eof()
        else:
            self.transport.close()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.phase == "sending":
            self.enter("idle", self.idle_time)
            if not self.keep_alive or self.stopping:
                self.end()

    def shutdown(self) -> None:
        """Allow one more request before a stop; uvicorn calls this."""
        if self.phase == "idle":
            self.deadline = min(self.deadline, self.loop.time() + STOP_TIME)


class Server(uvicorn.Server):
    """uvicorn's server, which also checks all deadlines and closes the database at a stop."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker.config)
        self._worker = worker
        self._looked_after = 0.0

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Stop at a signal, and start the checks; uvicorn's own would raise the signal again."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(report)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.call_soon(self._check_all)
        yield

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen, but accept only as many connections in a turn as there are descriptors for."""
        await super().startup(sockets)
        for listener in sockets or ():  # asyncio made the backlog `MAX_ACCEPTED`
            listener.listen(self._worker.cfg.backlog)

    def _check_all(self) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(CHECK_INTERVAL, self._check_all)
        now = loop.time()
        connections: Any = list(self.server_state.connections)
        for connection in connections:
            connection.check(now)
        if now - self._looked_after > 1:
            self._looked_after = now
            self._worker.notify()  # or the master would end this process
            RequestGreenlet(self._look_after_database).switch()
            if os.getppid() != self._worker.ppid:  # the master has ended
                self.should_exit = True

    def _look_after_database(self) -> None:
        try:
            self._worker.database.look_after()
        except storage.Unavailable:
            pass  # a commit is running, or there is a fault that the next request logs
        except Exception as error:
            log_unforeseen(error)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Finish the running requests; then close the database, which moves the WAL into it."""
        Connection.stopping = True
        await super().shutdown(sockets)
        self._worker.database.close()


def report(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the loop itself, without data of a client."""
    error = context.get("exception")
    if isinstance(error, OSError):  # such as no more files for connections
        log.error("%s: %s", context["message"], error.strerror)
    elif isinstance(error, Exception):
        log_unforeseen(error)


class Worker(UvicornWorker):  # type: ignore[misc] # it has no types
    """The one process that serves the visitors."""

    CONFIG_KWARGS = {  # noqa: RUF012 # uvicorn's
        "http": Connection,
        "loop": "asyncio",
        "lifespan": "off",
        "ws": "none",
        "interface": "asgi3",  # uvicorn never calls the app; `Connection` does, as a WSGI app
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
    }
    settings: Settings  # both are set by gunicorn.conf.py, before this process is forked
    identity: storage.Identity

    def load_wsgi(self) -> None:
        """Open the database, and make the app that serves it."""
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        # No log line shows these, so they need not be looked up: "Optimization" in logging's HOWTO.
        logging.logThreads = logging.logMultiprocessing = False
        logging._srcfile = None  # which the HOWTO names
        Connection.idle_time = self.cfg.keepalive
        Connection.log_access = self.log.access if self.cfg.accesslog else None
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = max(soft, min(hard, 2 * self.cfg.worker_connections + SPARE_FILES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        Connection.max_connections = max(1, min(self.cfg.worker_connections, soft - SPARE_FILES))
        path = self.settings.database
        self.database = storage.Database(path, Turns(), self.identity)
        try:
            self.database.open()
        except storage.Unavailable as fault:
            log_unavailable(fault)  # and serve, as the files may be put back
        self.wsgi = app.serve(self.database, self.settings)
        # A request leaves next to no reference cycles. Searching for them, also in what is there
        # from the start, took a tenth of the CPU and made the slowest answers half as slow again.
        gc.freeze()
        gc.set_threshold(5_000, 10, 10)

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        self.config.backlog = MAX_ACCEPTED
        await Server(self).serve(sockets=self.sockets)
