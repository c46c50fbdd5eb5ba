"""gunicorn's worker: connections of HTTP with limits, and a greenlet for each request of the app.

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
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from email.utils import formatdate
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

import falcon
from greenlet import getcurrent, greenlet
from gunicorn.workers import base
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url

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
LINGER_TIME = 2  # seconds for which a client may go on sending after its last answer
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
MAX_SPARE = 128  # greenlets that are kept for later requests
MAX_TURNS = 3  # turns of the loop for which a group waits for more writes


class RequestGreenlet(greenlet):
    """The greenlet in which the app answers a request."""

    scan: asyncio.Future[Any] | None = None  # is cancelled if the client disconnects


spare: list[RequestGreenlet] = []  # that wait for a request: a new one costs 10 microseconds more


def run_requests(answer: Callable[[], None]) -> None:
    """Run one request after another, in a greenlet."""
    while True:
        answer()
        del answer  # or the connection would stay in memory
        if len(spare) == MAX_SPARE:
            return
        request: Any = getcurrent()
        spare.append(request)
        answer = request.parent.switch()


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, from within a greenlet; the loop goes on meanwhile."""
    request: Any = getcurrent()
    asyncio.ensure_future(awaitable).add_done_callback(request.switch)
    return request.parent.switch().result()


class Turns(storage.Waiting):
    """A request waits in its greenlet while the loop goes on; writes share transactions."""

    def __init__(self) -> None:
        super().__init__()
        self._writes: dict[storage.PendingWrite[Any], Any] = {}  # with their greenlets
        self._writing: asyncio.Task[None] | None = None
        # How many quick commits it takes until they are made on the loop. The first ones are not,
        # so that a slow disk is never felt.
        self._quick_missing = QUICK_COMMITS
        self._disk = ThreadPoolExecutor(1, "disk")
        self._scans = ThreadPoolExecutor(1, "scans")

    def commit(self, database: storage.Database, write: storage.PendingWrite[Any]) -> None:
        """Return when `write` is on the disk, or has an error."""
        request: Any = getcurrent()
        self._writes[write] = request
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write(database))
        request.parent.switch()  # which returns when `_write` is done with it

    def in_thread(self, call: Callable[[], Any], scans: bool = False) -> Any:
        """Return the result of a call that takes long; one that `scans` ends with its client."""
        future = asyncio.get_running_loop().run_in_executor(self._scans, call)
        request: Any = getcurrent()
        request.scan = future if scans else None
        try:
            return wait_for(future)
        finally:
            request.scan = None  # or its result, such as a page, stays in memory

    async def _write(self, database: storage.Database) -> None:
        """Commit what waits, group by group, as long as anything does."""
        loop = asyncio.get_running_loop()
        while self._writes:
            for _ in range(MAX_TURNS):  # a request takes a turn of the loop to come here
                seen = len(self._writes)
                await asyncio.sleep(0)
                if len(self._writes) == seen:
                    break
            group = database.run_group(list(self._writes))
            if not group:
                await asyncio.sleep(BEGIN_RETRY)
                continue
            # On the loop while that is quick, else in a thread.
            start = time.monotonic()
            if self._quick_missing:
                await loop.run_in_executor(self._disk, database.commit_group, group)
            else:
                database.commit_group(group)
            slow = time.monotonic() - start > SLOW_COMMIT
            self._quick_missing = QUICK_COMMITS if slow else max(0, self._quick_missing - 1)
            for write in group:
                self._writes.pop(write).switch()
            if database.checkpoint_due:
                await loop.run_in_executor(self._disk, database.checkpoint)
        self._writing = None


ONCE = ("host", "content-type", "transfer-encoding", "expect")  # a request has one at most
FRAMING = ("content-length", "transfer-encoding")  # the app gets CONTENT_LENGTH instead
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
    "SERVER_NAME": "localhost",  # for a request without Host, which has no use for it
    "SERVER_PORT": "80",
    "livechat.sleep": lambda seconds: wait_for(asyncio.sleep(seconds)),  # for resources/standin.py
}


@lru_cache(128)
def environ_key(name: str) -> str:
    """Return how the app knows a header field (PEP 3333)."""
    key = name.upper().replace("-", "_")
    return key if key == "CONTENT_TYPE" else f"HTTP_{key}"


class Connection(asyncio.Protocol):
    """A client's connection: one request at a time, and limits for its size and its time.

    It is idle until a request begins, then comes the head, then the body. The app runs when all of
    it is there. The answer is being sent until the client has taken it. Lingering is the wait for a
    client that sends more than is read to take the last answer: RFC 9112, 9.6.
    """

    phase: Literal["idle", "head", "body", "running", "sending", "lingering"]
    next: Literal["idle", "lingering", "closed"]  # what follows the answer

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.loop = asyncio.get_running_loop()
        self.parser = HttpRequestParser(self)
        self.request: RequestGreenlet | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        transport.set_write_buffer_limits(high=0)  # so that `resume_writing` tells of each answer
        peer = transport.get_extra_info("peername")
        self.client = peer[0] if isinstance(peer, tuple) else ""  # of a Unix socket
        self.await_request(REQUEST_TIME)
        everyone = self.worker.connections
        everyone.add(self)
        if len(everyone) > self.worker.max_connections:
            # This one is the newest, and so the last to be closed.
            others = (one for one in everyone if one.phase != "running")
            longest = min(others, key=lambda one: one.idle_since)
            everyone.discard(longest)  # at once; asyncio takes a turn of the loop to close it
            longest.transport.abort()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.worker.connections.discard(self)
        del self.parser  # which refers to this
        if self.request is not None and self.request.scan is not None:
            self.request.scan.cancel()

    def await_request(self, seconds: float) -> None:
        """Wait for the next request for so many seconds."""
        self.enter("idle", seconds)
        self.idle_since = self.loop.time()
        self.next = "lingering"  # until all of the request has come
        self.size = 0  # bytes of the head so far; behind it, of the rest of the request
        self.body = bytearray()

    def enter(self, phase: Any, seconds: float) -> None:
        """Begin a phase, which may take so many seconds."""
        self.phase = phase
        self.deadline = self.loop.time() + seconds  # by the loop's clock

    def check(self, now: float) -> None:
        """End a phase that has taken too long; `now` is a time of the loop's clock."""
        if self.phase == "idle" and not self.worker.alive:
            self.deadline = min(self.deadline, now + STOP_TIME)
        if now < self.deadline or self.phase == "running":
            return
        if self.phase in ("head", "body"):
            self.refuse(refusal("error-request-timeout"))
        else:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.phase == "running":
            self.next = "lingering"
        elif self.phase == "sending":
            self.linger()
        elif self.phase == "lingering":
            self.size += len(data)
            if self.size > MAX_LINGER:
                self.transport.abort()
        else:
            self.receive(data)

    def receive(self, data: bytes) -> None:
        """Parse what comes of a request, and run it if that is all of it."""
        start = 0
        try:
            while start < len(data) and self.phase != "running":
                room = PARSE_BYTES if self.phase == "body" else MAX_HEAD - self.size
                end = start + min(PARSE_BYTES, room)
                self.parse(data[start:end])
                start = end
        except Refusal as refused:
            self.refuse(refused)
            return
        if self.phase == "running":
            if start < len(data):
                self.next = "lingering"
            self.request = spare.pop() if spare else RequestGreenlet(run_requests)
            self.request.switch(self.answer)

    def parse(self, piece: bytes) -> None:
        """Parse a piece; raise `Refusal` for what is not HTTP or beyond a limit."""
        self.size += len(piece)
        try:
            self.parser.feed_data(piece)
        except HttpParserUpgrade as upgrade:
            # This parser would skip the body, so another one reads it.
            fields = [f"{name}: {value}\r\n" for name, value in self.headers if name in FRAMING]
            head = "".join(["POST / HTTP/1.1\r\nConnection: close\r\n", *fields, "\r\n"])
            self.parser = HttpRequestParser(
                SimpleNamespace(on_body=self.on_body, on_message_complete=self.on_message_complete)
            )
            self.parse(head.encode("latin-1") + piece[upgrade.args[0] :])
        except HttpParserError as error:
            if isinstance(error.__context__, Refusal):  # what a callback raised
                raise error.__context__ from None
            if self.phase == "running":
                self.next = "lingering"  # as there is more behind the request
            elif self.phase == "body":
                raise refusal("error-incomplete-body") from None
            else:
                raise invalid_request("not HTTP", error) from None
        if self.phase == "idle" and self.size > MAX_EMPTY_BYTES:
            raise invalid_request("empty lines")
        if self.phase == "head" and self.size == MAX_HEAD:
            raise invalid_request("large head", MAX_HEAD)
        if self.phase == "body" and self.size > MAX_CHUNKED:
            self.drop_body()

    # The parser's callbacks. What they raise becomes the context of the parser's own error.

    def on_message_begin(self) -> None:
        if self.phase == "running":
            raise ValueError("a request before the answer to the one before")
        self.enter("head", REQUEST_TIME)
        self.url = b""
        self.headers: list[tuple[str, str]] = []

    def on_url(self, url: bytes) -> None:
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
        self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.phase, self.size = "body", 0
        self.version = self.parser.get_http_version()
        self.method = self.parser.get_method().decode()
        fields = dict(self.headers)
        self.check_fields(fields)
        # The parser has checked that it is a number, and that there is no Transfer-Encoding too.
        if int(fields.get("content-length", 0)) > MAX_BODY:
            self.drop_body()
        elif "expect" in fields and self.version == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def check_fields(self, fields: dict[str, str]) -> None:
        """Raise `Refusal` for header fields that are wrong though the parser accepts them."""
        if len(fields) < len(self.headers):
            names = [name for name, _ in self.headers]
            for name in ONCE:
                if names.count(name) > 1:
                    raise invalid_request("twice", name.title())
        if self.version not in ("1.0", "1.1"):
            raise invalid_request("version")
        if "host" not in fields and self.version == "1.1":
            raise invalid_request("no host")
        if fields.get("transfer-encoding", "chunked").lower() != "chunked":
            raise invalid_request("coding")
        if "transfer-encoding" in fields and self.version == "1.0":
            raise invalid_request("coding in 1.0")
        if fields.get("expect", "100-continue").strip().lower() != "100-continue":
            raise invalid_request("expect")
        try:
            self.parts = parse_url(self.url)
        except HttpParserError:
            raise invalid_request("URL") from None

    def on_body(self, body: bytes) -> None:
        if self.phase == "body":
            self.body += body
            if len(self.body) > MAX_BODY:
                self.drop_body()

    def on_message_complete(self) -> None:
        # Not where the body is too large, nor at an upgrade, where the other parser says it.
        if self.phase == "body" and not self.parser.should_upgrade():
            self.phase = "running"
            lasts = self.version == "1.1" and self.parser.should_keep_alive()
            self.next = "idle" if lasts else "closed"

    def drop_body(self) -> None:
        """Hand a body that is too large over to the app as that, and throw away the rest of it."""
        self.body = bytearray(MAX_BODY + 1)
        self.phase = "running"

    def eof_received(self) -> bool:
        """Return whether the connection stays open, for an answer."""
        self.next = "closed"
        if self.phase == "body":
            self.refuse(refusal("error-incomplete-body"))
        return self.phase == "running"  # else asyncio closes it, when all is sent

    def answer(self) -> None:
        """Run the app, in a greenlet, and send its answer."""
        start = time.monotonic()
        wsgi: Any = self.worker.wsgi
        begun: list[Any] = []
        try:
            environ = self.environ()
            body = b"".join(wsgi(environ, lambda *head: begun.extend(head)))
            status, headers = begun
            self.send(status, headers, body)
            self.worker.nr += 1
            if self.worker.log.access_log_enabled:
                took = timedelta(seconds=time.monotonic() - start)
                said: Any = SimpleNamespace(status=status, sent=len(body), headers=headers)
                asked: Any = self  # which has the `headers` of a request
                self.worker.log.access(said, asked, environ, took)
        except asyncio.CancelledError:
            pass  # a long read, as the client has gone
        except Exception as error:  # else it would be raised wherever the greenlet is resumed
            log_unforeseen(error)
            self.transport.abort()
        self.request = None

    def environ(self) -> dict[str, Any]:
        """Return the environment of the request for the app (PEP 3333)."""
        path = self.parts.path or b"/"  # RFC 9112, 3.2.1
        environ = ENVIRON | {
            "REQUEST_METHOD": self.method,
            "PATH_INFO": (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1"),
            "QUERY_STRING": (self.parts.query or b"").decode("latin-1"),
            "RAW_URI": self.url.decode("latin-1"),
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
            "REMOTE_ADDR": self.client,
            "CONTENT_LENGTH": str(len(self.body)),
            "wsgi.input": io.BytesIO(self.body),
            "livechat.drop": self.transport.abort,
        }
        for name, value in self.headers:
            if name in FRAMING or "_" in name:  # X_Forwarded_For would count as X-Forwarded-For
                continue
            key = environ_key(name)
            text = value.strip(" \t")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
        return environ

    def refuse(self, refused: Refusal) -> None:
        """Answer a request that the app never sees, and close."""
        log.warning("Refused with %d: %s", refused.status, refused.body["error"])
        body = to_json(refused.body)
        headers = [*REFUSAL_HEADERS, ("Content-Length", str(len(body)))]
        self.send(falcon.code_to_http_status(refused.status), headers, body)

    def send(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Send an answer at once; then wait for the next request, or close."""
        if self.next == "idle" and not self.worker.alive:
            self.next = "closed"
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
        lines += [f"Date: {self.worker.date}", "\r\n"]
        if self.next != "idle":
            lines.insert(1, "Connection: close")
        self.enter("sending", ANSWER_TIME)
        self.transport.write("\r\n".join(lines).encode("latin-1") + body)
        if self.next == "lingering":
            self.linger()
        elif self.next == "closed":
            self.transport.close()  # when all is sent
        elif not self.transport.get_write_buffer_size():
            self.await_request(self.worker.idle_time)

    def linger(self) -> None:
        """Close, but only after a client that is still sending could read its answer."""
        unsent = self.transport.get_write_buffer_size()
        self.enter("lingering", ANSWER_TIME if unsent else LINGER_TIME)
        with suppress(OSError):
            self.transport.write_eof()

    def resume_writing(self) -> None:
        if self.phase == "sending":
            self.await_request(self.worker.idle_time)


class Worker(base.Worker):
    """The one process that serves the visitors."""

    settings: Settings  # both are set by gunicorn.conf.py, before this process is forked
    identity: storage.Identity
    handle_quit = base.Worker.handle_exit  # after Ctrl-C, too, what runs is finished

    def load_wsgi(self) -> None:
        """Open the database, and make the app that serves it."""
        # No log line shows these, so they need not be looked up: "Optimization" in logging's HOWTO.
        logging.logThreads = logging.logMultiprocessing = False
        logging._srcfile = None  # which the HOWTO names
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = max(soft, min(hard, 2 * self.cfg.worker_connections + SPARE_FILES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.max_connections = max(1, min(self.cfg.worker_connections, soft - SPARE_FILES))
        self.idle_time = self.cfg.keepalive
        self.connections: set[Connection] = set()
        self.database = storage.Database(self.settings.database, Turns(), self.identity)
        try:
            self.database.open()
        except storage.Unavailable as fault:
            log_unavailable(fault)  # and serve, as the files may be put back
        self.wsgi: Any = app.serve(self.database, self.settings)
        self.date = formatdate(usegmt=True)
        self.looked_after = self.reported = 0.0  # by the loop's clock
        # A request leaves next to no reference cycles. Searching for them, also in what is there
        # from the start, took a tenth of the CPU and made the slowest answers half as slow again.
        gc.freeze()
        gc.set_threshold(5_000, 10, 10)

    def run(self) -> None:
        """Serve until the process is to end."""
        asyncio.run(self.serve())

    async def serve(self) -> None:
        """Serve; at a stop finish what runs, then close the database: the WAL moves into it."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.report)
        listening: Any = [
            await loop.create_server(partial(Connection, self), sock=one, backlog=MAX_ACCEPTED)
            for one in self.sockets
        ]
        for one in self.sockets:  # now it is how many asyncio accepts in a turn
            one.listen(self.cfg.backlog)
        while self.alive:
            await self.check()
        for one in listening:
            one.close()
        await self.check()  # while those come who are just accepted
        while self.connections:
            await self.check()
        self.database.close()

    async def check(self) -> None:
        """After a moment, look at all deadlines, and once a second at the database."""
        await asyncio.sleep(CHECK_INTERVAL)
        loop = asyncio.get_running_loop()
        for connection in list(self.connections):
            connection.check(loop.time())
        if os.getppid() != self.ppid or self.nr >= self.max_requests:  # the master has ended
            self.alive = False
        if loop.time() > self.looked_after + 1:
            self.looked_after = loop.time()
            self.date = formatdate(usegmt=True)
            self.notify()  # or the master would end this process
            loop.call_soon(RequestGreenlet(self.look_after_database).switch)

    def report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the loop itself, without data of a client."""
        error = context.get("exception")
        if isinstance(error, OSError):  # such as no more files; asyncio says it twenty times
            if loop.time() > self.reported + 1:
                self.reported = loop.time()
                log.error("%s: %s", context["message"], error.strerror)
        elif isinstance(error, Exception):
            log_unforeseen(error)

    def look_after_database(self) -> None:
        """Finish erasures, in a greenlet."""
        with suppress(storage.Unavailable):  # a commit is running, or the next request logs a fault
            self.database.look_after()
