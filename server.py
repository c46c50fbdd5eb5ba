"""gunicorn's worker: HTTP connections with limits, and a greenlet for each request of the app.

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
from collections.abc import Awaitable, Callable, Sequence
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

REQUEST_TIME = 10  # seconds from the first byte of a request until it is complete, else a 408
ANSWER_TIME = 10  # seconds that a client has to read an answer that could not be sent at once
STOP_TIME = 1  # seconds that an idle connection stays open at a stop, for one more request
LINGER_TIME = 2  # seconds for which a client may go on sending after its last answer
MAX_LINGER = 2**23  # bytes that it may send meanwhile
CHECK_INTERVAL = 0.2  # seconds between two checks of the deadlines of all connections
MAX_URL_OR_FIELD = 8_190  # bytes of a URL, and of a header field
MAX_HEAD = 65_536  # bytes
MAX_HEADER_FIELDS = 64
MAX_CHUNKED = 73_728  # bytes of a chunked body, its chunk headers included
MAX_EMPTY_BYTES = 64  # bytes of empty lines before a request
PARSE_BYTES = 8_192  # bytes that are parsed between two checks of these limits
MAX_ACCEPTED = 20  # connections that asyncio accepts in one iteration of the loop
SPARE_FILES = 150  # descriptors for our own files and for connections that were just accepted
SLOW_COMMIT = 0.05  # seconds; after a slower one, commits are made in a thread
QUICK_COMMITS = 100  # in a row, after which commits are made on the loop again
MAX_IDLE_GREENLETS = 128  # that are kept for later requests
MAX_ITERATIONS = 3  # of the loop, for which a group waits for more writes


class RequestGreenlet(greenlet):
    """The greenlet in which the app answers a request, or the database is looked after."""

    # Is cancelled if the client resets the connection. A client that closes it is not noticed
    # before its answer, as it may have closed only its sending side.
    cancellable: asyncio.Future[Any] | None = None


idle_greenlets: list[RequestGreenlet] = []  # that wait for a request; a new one costs 10 µs


def run_requests(run_app: Callable[[], None]) -> None:
    """Run one request after another, in a greenlet that is idle in between."""
    while True:
        run_app()
        del run_app  # or an idle greenlet would keep its last connection in memory
        if len(idle_greenlets) == MAX_IDLE_GREENLETS:
            return
        this: Any = getcurrent()
        idle_greenlets.append(this)
        run_app = this.parent.switch()


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, from within a greenlet; the loop goes on meanwhile."""
    this: Any = getcurrent()
    asyncio.ensure_future(awaitable).add_done_callback(this.switch)
    return this.parent.switch().result()


class GreenletWaiting(storage.Waiting):
    """A request waits by suspending its greenlet; writes that wait at one moment share a commit."""

    def __init__(self) -> None:
        super().__init__()
        self._writes: dict[storage.PendingWrite[Any], Any] = {}  # each with its greenlet
        self._writing: asyncio.Task[None] | None = None
        # How many quick commits it takes until they are made on the loop. The first ones are not,
        # so that a slow disk never blocks the loop.
        self._quick_commits_needed = QUICK_COMMITS
        self._disk_thread = ThreadPoolExecutor(1, "disk")
        self._scan_thread = ThreadPoolExecutor(1, "scans")

    def commit(self, database: storage.Database, write: storage.PendingWrite[Any]) -> None:
        """Return when `write` is on the disk, or has an error."""
        this: Any = getcurrent()
        self._writes[write] = this
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(database))
        this.parent.switch()  # until `_write` is done with it

    def in_thread(self, call: Callable[[], Any], cancellable: bool = False) -> Any:
        """Return the result of a call that takes long.

        One that is `cancellable` ends where the client resets the connection.
        """
        future = asyncio.get_running_loop().run_in_executor(self._scan_thread, call)
        this: Any = getcurrent()
        this.cancellable = future if cancellable else None
        try:
            return wait_for(future)
        finally:
            this.cancellable = None  # or an idle greenlet would keep its result, such as a page

    async def _write(self, database: storage.Database) -> None:
        """Commit what waits, group by group, as long as anything does."""
        while self._writes:
            # A request whose bytes are there comes to `commit` within an iteration of the loop.
            for _ in range(MAX_ITERATIONS):
                seen = len(self._writes)
                await asyncio.sleep(0)
                if len(self._writes) == seen:
                    break
            group = database.run_group(list(self._writes))
            if not group:
                await asyncio.sleep(BEGIN_RETRY)
                continue
            await self._commit(database, group)
            for write in group:
                self._writes.pop(write).switch()
            if database.checkpoint_due:  # no transaction may be open meanwhile
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._disk_thread, database.checkpoint)

    async def _commit(
        self, database: storage.Database, group: Sequence[storage.PendingWrite[Any]]
    ) -> None:
        """Commit a group: on the loop while that is quick, else in a thread."""
        start = time.monotonic()
        if self._quick_commits_needed:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._disk_thread, database.commit_group, group)
        else:
            database.commit_group(group)
        if time.monotonic() - start > SLOW_COMMIT:
            self._quick_commits_needed = QUICK_COMMITS
        elif self._quick_commits_needed:
            self._quick_commits_needed -= 1


SINGLE_FIELDS = ("host", "content-type", "transfer-encoding", "expect")  # of which one is allowed
FRAMING_FIELDS = ("content-length", "transfer-encoding")  # the app gets CONTENT_LENGTH instead
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
    "SERVER_NAME": "localhost",  # PEP 3333 asks for it
    "SERVER_PORT": "80",
    "livechat.sleep": lambda seconds: wait_for(asyncio.sleep(seconds)),  # for resources/standin.py
}


@lru_cache(128)
def environ_key(name: str) -> str:
    """Return the key of a header field in the environment of the app (PEP 3333)."""
    key = name.upper().replace("-", "_")
    return key if key == "CONTENT_TYPE" else f"HTTP_{key}"


Phase = Literal["idle", "head", "body", "running", "sending", "lingering"]


class Connection(asyncio.Protocol):
    """A client's connection: one request at a time, and limits for its size and its time.

    Its phases:
    - idle, until the first byte of a request;
    - head and body, until the request is complete, within `REQUEST_TIME`;
    - running, while the app works on it, which has no deadline here;
    - sending, until the answer has left. What follows is in `after_answer`: idle again ("keep"),
      the end ("close"), or lingering ("linger", also until a request is complete: for a refusal);
    - lingering: the answer was the last one, and the client may still be sending. What it sends is
      thrown away for a moment; closed at once, it might lose the answer (RFC 9112, 9.6).
    """

    phase: Phase
    after_answer: Literal["keep", "linger", "close"]

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.loop = asyncio.get_running_loop()
        self.parser = HttpRequestParser(self)
        self.greenlet: RequestGreenlet | None = None  # in which its request runs

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        transport.set_write_buffer_limits(high=0)  # so that `resume_writing` tells of each answer
        peer = transport.get_extra_info("peername")
        self.client = peer[0] if isinstance(peer, tuple) else ""  # "" for a Unix socket
        self.wait_for_request(REQUEST_TIME)
        everyone = self.worker.connections
        everyone.add(self)
        if len(everyone) > self.worker.max_connections:
            # The one that has waited for a complete request for longest makes room. This one is the
            # newest, and so the last.
            others = (one for one in everyone if one.phase != "running")
            longest = min(others, key=lambda one: one.waits_since)
            everyone.discard(longest)  # at once, as `connection_lost` comes an iteration later
            longest.transport.abort()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.worker.connections.discard(self)
        del self.parser  # which refers to this
        if self.greenlet is not None and self.greenlet.cancellable is not None:
            self.greenlet.cancellable.cancel()

    def wait_for_request(self, seconds: float) -> None:
        """Wait for the next request for so many seconds."""
        self.enter("idle", seconds)
        self.waits_since = self.loop.time()
        self.after_answer = "linger"
        self.size = 0  # bytes of the head; then of the body; then of what is thrown away
        self.body = bytearray()

    def enter(self, phase: Phase, seconds: float) -> None:
        """Begin a phase, which may take so many seconds."""
        self.phase = phase
        self.deadline = self.loop.time() + seconds  # by the loop's clock

    def check_deadline(self, now: float) -> None:
        """End a phase that has taken too long; `now` is a time of the loop's clock."""
        if self.phase == "idle" and not self.worker.alive:
            self.deadline = min(self.deadline, now + STOP_TIME)
        if self.phase == "running" or now < self.deadline:
            return
        if self.phase in ("head", "body"):
            self.refuse(refusal("error-request-timeout"))
        else:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.phase == "running":
            self.after_answer = "linger"
        elif self.phase == "sending":
            self.linger()
        elif self.phase == "lingering":
            self.size += len(data)
            if self.size > MAX_LINGER:
                self.transport.abort()
        else:
            self.receive(data)

    def receive(self, data: bytes) -> None:
        """Parse what has come of a request, and run it if it is complete."""
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
                self.after_answer = "linger"
            self.worker.running += 1
            idle = idle_greenlets.pop() if idle_greenlets else RequestGreenlet(run_requests)
            self.greenlet = idle
            idle.switch(self.run_app)

    def parse(self, piece: bytes) -> None:
        """Parse a piece; raise `Refusal` for what is not HTTP or beyond a limit."""
        self.size += len(piece)
        try:
            self.parser.feed_data(piece)
        except HttpParserUpgrade as upgrade:
            # httptools skips the body, so another parser reads it. That gets of the head only what
            # says how long the body is.
            framing = [f"{name}: {value}" for name, value in self.headers if name in FRAMING_FIELDS]
            head = "\r\n".join(["POST / HTTP/1.1", "Connection: close", *framing, "\r\n"])
            self.parser = HttpRequestParser(
                SimpleNamespace(on_body=self.on_body, on_message_complete=self.on_message_complete)
            )
            self.parse(head.encode("latin-1") + piece[upgrade.args[0] :])
        except HttpParserError as error:
            if isinstance(error.__context__, Refusal):  # which a callback has raised
                raise error.__context__ from None
            if self.phase == "running":
                self.after_answer = "linger"  # as more has come behind the request
            elif self.phase == "body":
                raise refusal("error-incomplete-body") from None
            else:
                raise invalid_request("not HTTP", error) from None
        if self.phase == "idle" and self.size > MAX_EMPTY_BYTES:
            raise invalid_request("empty lines")
        if self.phase == "head" and self.size == MAX_HEAD:  # `receive` never passes more
            raise invalid_request("large head", MAX_HEAD)
        if self.phase == "body" and self.size > MAX_CHUNKED:
            self.drop_body()

    # The parser's callbacks, which it finds by name. What one raises is the `__context__` of the
    # parser's own error.

    def on_message_begin(self) -> None:
        if self.phase == "running":
            raise ValueError("the next request, before this one is answered")
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
        self.phase, self.size = "body", 0  # within the deadline of the head
        self.version = self.parser.get_http_version()
        self.method = self.parser.get_method().decode()
        fields = dict(self.headers)
        self.check_fields(fields)
        self.may_be_kept = self.version == "1.1" and "upgrade" not in fields
        try:
            self.parts = parse_url(self.url)
        except HttpParserError:
            raise invalid_request("URL") from None
        # The parser has checked that it is a number, and comes without Transfer-Encoding.
        if int(fields.get("content-length", 0)) > MAX_BODY:
            self.drop_body()
        elif "expect" in fields and self.version == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def check_fields(self, fields: dict[str, str]) -> None:
        """Raise `Refusal` for header fields that are wrong though the parser accepts them."""
        if len(fields) < len(self.headers):
            names = [name for name, _ in self.headers]
            for name in SINGLE_FIELDS:
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

    def on_body(self, body: bytes) -> None:
        if self.phase == "body":
            self.body += body
            if len(self.body) > MAX_BODY:
                self.drop_body()

    def on_message_complete(self) -> None:
        # Not where the body was too large, nor of the first parser at an upgrade.
        if self.phase == "body" and not self.parser.should_upgrade():
            self.phase = "running"
            kept = self.may_be_kept and self.parser.should_keep_alive()
            self.after_answer = "keep" if kept else "close"

    def drop_body(self) -> None:
        """Run the request with a body above the limit, for the app to refuse; drop what follows."""
        self.body = bytearray(MAX_BODY + 1)
        self.phase = "running"

    def eof_received(self) -> bool:
        """Return whether the connection stays open, for an answer."""
        self.after_answer = "close"
        if self.phase == "body":
            self.refuse(refusal("error-incomplete-body"))
        return self.phase == "running"  # else asyncio closes it, when all is sent

    def run_app(self) -> None:
        """Run the app, in a greenlet, and send its answer."""
        start = time.monotonic()
        wsgi: Any = self.worker.wsgi
        head: list[Any] = []
        try:
            environ = self.environ()
            body = b"".join(wsgi(environ, lambda *begun: head.extend(begun)))
            status, headers = head
            self.send(status, headers, body)
            self.worker.nr += 1
            if self.worker.log.access_log_enabled:
                took = timedelta(seconds=time.monotonic() - start)
                answer: Any = SimpleNamespace(status=status, sent=len(body), headers=headers)
                request: Any = self  # which has the `headers` that the log reads
                self.worker.log.access(answer, request, environ, took)
        except asyncio.CancelledError:
            pass  # the client has reset the connection during a long read
        except Exception as error:  # or it would be raised wherever the greenlet is resumed
            log_unforeseen(error)
            self.transport.abort()
        self.greenlet = None
        self.worker.running -= 1

    def environ(self) -> dict[str, Any]:
        """Return the environment of the request for the app (PEP 3333)."""
        path = self.parts.path or b"/"  # RFC 9112, 3.2.1
        environ = ENVIRON | {
            "REQUEST_METHOD": self.method,
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": (self.parts.query or b"").decode("latin-1"),
            "RAW_URI": self.url.decode("latin-1"),
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
            "REMOTE_ADDR": self.client,
            "CONTENT_LENGTH": str(len(self.body)),
            "wsgi.input": io.BytesIO(self.body),
            "livechat.drop": self.transport.abort,
        }
        for name, value in self.headers:
            # X_Forwarded_For would have the key of X-Forwarded-For.
            if name in FRAMING_FIELDS or "_" in name:
                continue
            key = environ_key(name)
            text = value.strip(" \t")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
        return environ

    def refuse(self, refused: Refusal) -> None:
        """Answer a request that the app does not get to see, and close."""
        log.warning("Refused with %d: %s", refused.status, refused.body["error"])
        body = to_json(refused.body)
        headers = [*REFUSAL_HEADERS, ("Content-Length", str(len(body)))]
        self.send(falcon.code_to_http_status(refused.status), headers, body)

    def send(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Send an answer at once; then wait for the next request, or close."""
        if self.after_answer == "keep" and not self.worker.alive:
            self.after_answer = "close"
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
        lines += [f"Date: {self.worker.date}", "\r\n"]
        if self.after_answer != "keep":
            lines.insert(1, "Connection: close")
        self.enter("sending", ANSWER_TIME)
        self.transport.write("\r\n".join(lines).encode("latin-1") + body)
        if self.after_answer == "linger":
            self.linger()
        elif self.after_answer == "close":
            self.transport.close()  # which asyncio does when all is sent
        elif not self.transport.get_write_buffer_size():
            self.wait_for_request(self.worker.idle_time)

    def linger(self) -> None:
        """Close the sending side, and throw away what the client sends before it closes its own."""
        unsent = self.transport.get_write_buffer_size()
        self.enter("lingering", ANSWER_TIME if unsent else LINGER_TIME)
        with suppress(OSError):
            self.transport.write_eof()

    def resume_writing(self) -> None:
        if self.phase == "sending":
            self.wait_for_request(self.worker.idle_time)


class Worker(base.Worker):
    """The one process that serves the visitors."""

    # Both are set by gunicorn.conf.py, in the master.
    settings: Settings
    identity: storage.Identity

    handle_quit = base.Worker.handle_exit  # INT and QUIT, too, let running requests finish

    def load_wsgi(self) -> None:
        """Open the database, make the app that serves it, and tune this process for both."""
        # No log line shows thread, process or caller, so logging need not look them up ("Logging
        # HOWTO", Optimization).
        logging.logThreads = logging.logMultiprocessing = False
        logging._srcfile = None
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = max(soft, min(hard, 2 * self.cfg.worker_connections + SPARE_FILES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.max_connections = max(1, min(self.cfg.worker_connections, soft - SPARE_FILES))
        self.idle_time = self.cfg.keepalive
        self.connections: set[Connection] = set()
        self.running = 0  # requests, also those whose client has gone
        self.database = storage.Database(self.settings.database, GreenletWaiting(), self.identity)
        try:
            self.database.open()
        except storage.Unavailable as fault:
            log_unavailable(fault)  # and serve, as the files may be put back
        self.wsgi: Any = app.serve(self.database, self.settings)
        self.date = formatdate(usegmt=True)
        self.last_look = self.last_report = 0.0  # by the loop's clock
        self.caretaker = RequestGreenlet(lambda: None)  # which looks after the database
        self.caretaker.switch()
        # A request leaves next to no reference cycles. Searching for them, also in what is there
        # from the start, took a tenth of the CPU and made the slowest answers 50 % slower.
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
        for one in self.sockets:  # for asyncio, `backlog` is also how many it accepts at once
            one.listen(self.cfg.backlog)
        while self.alive:
            await self.tick()
        for one in listening:
            one.close()
        await self.tick()  # in which connections that were just accepted come to `connections`
        while self.connections or self.running or not self.caretaker.dead:
            await self.tick()
        self.database.close()

    async def tick(self) -> None:
        """Wait `CHECK_INTERVAL`, then look whether anything has to end, and once a second more."""
        await asyncio.sleep(CHECK_INTERVAL)
        loop = asyncio.get_running_loop()
        for connection in list(self.connections):
            connection.check_deadline(loop.time())
        if os.getppid() != self.ppid or self.nr >= self.max_requests:  # where the master has ended
            self.alive = False
        if loop.time() > self.last_look + 1:
            self.last_look = loop.time()
            self.date = formatdate(usegmt=True)
            self.notify()  # or the master would kill this process
            if self.alive and self.caretaker.dead:
                self.caretaker = RequestGreenlet(self.finish_erasures)
                loop.call_soon(self.caretaker.switch)  # not from here: an error comes to `report`

    def report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the loop itself, without data of a client."""
        error = context.get("exception")
        if isinstance(error, OSError):  # such as no more files; asyncio says it twenty times
            if loop.time() > self.last_report + 1:
                self.last_report = loop.time()
                log.error("%s: %s", context["message"], error.strerror)
        elif isinstance(error, Exception):
            log_unforeseen(error)
        else:
            log.error("asyncio: %s", context["message"])

    def finish_erasures(self) -> None:
        """Finish erasures, in a greenlet."""
        with suppress(storage.Unavailable):  # the writer is in use, or the next request says why
            self.database.finish_erasures()
