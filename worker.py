"""gunicorn's threads, of which a request gets one only when all of it has come.

By itself gunicorn gives a connection a thread, or a whole worker, as soon as it is there: whoever
sends half a request, or nothing, keeps it. Here that waits in the worker's poller, which costs
some bytes of memory, until it is whole or has had its time; so does the end of a connection.
A request of ours has 64 KiB at most, which is what makes this small.
"""

import errno
import json
import re
import selectors
import socket
import time
from contextlib import suppress
from functools import partial
from http import HTTPStatus

from gunicorn.http.errors import (
    ExpectationFailed,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.workers.gthread import TConn, ThreadWorker

REQUEST_TIME = 10  # seconds in which a request has to come; what is kept alive has `keepalive`
ANSWER_TIME = 10  # seconds in which a client has to take its answer
LINGER_TIME = 2  # seconds for which a client may still send after its answer: RFC 9112, 9.6
LARGEST = 73_728  # bytes of a request that wait; a larger one is read, or refused, in a thread
LINGER_READS = 16  # of 64 KiB, at most, meanwhile
ANSWER = 2**18  # bytes of an answer that wait in the kernel, not in a thread, for a client to read

_LENGTH = re.compile(rb"(?i)\r\ncontent-length[ \t]*:[ \t]*(\d{1,9})[ \t]*\r\n")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding[ \t]*:")
_EXPECT = re.compile(rb"(?i)\r\nexpect[ \t]*:[ \t]*100-continue[ \t]*(?=\r\n)")


class Worker(ThreadWorker):
    """One process of the service; runs in its main thread, but for `handle`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._lingering = {}  # socket: when it ends, and how many reads it may still cause

    def accept(self, listener):
        """Take a connection, which waits for its request."""
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.01)  # until a connection ends; it stays in the kernel's queue
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                raise
            return
        self.nr_conns += 1
        client = Socket(fileno=client.detach())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ANSWER)
        self._wait(Connection(self, self.cfg, client, address, listener.getsockname()))

    def on_client_socket_readable(self, conn, client):
        """Wait for the next request of a connection that was kept alive."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self._wait(conn)

    def _wait(self, conn):
        conn.timeout = time.monotonic() + REQUEST_TIME
        if conn.receive():  # mostly all of it is there already
            self._begin(conn)
        else:
            self.pending_conns.append(conn)
            on_more = partial(self._receive_more, conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, on_more)

    def _receive_more(self, conn, client):
        if conn.receive():
            self.poller.unregister(client)
            self.pending_conns.remove(conn)
            self._begin(conn)

    def _begin(self, conn):
        if conn.received:
            self.enqueue_req(conn)
        else:  # it has ended without a request
            self.nr_conns -= 1
            conn.close()

    def handle(self, conn):
        """Answer the request, in a thread of its own."""
        conn.sock.ends = time.monotonic() + REQUEST_TIME  # for what is too large to wait
        if _CHUNKED.search(conn.received, 0, conn.received.find(b"\r\n\r\n") + 1):
            conn.sock.left = LARGEST - len(conn.received)
        conn.init()
        conn.parser.unreader.unread(bytes(conn.received))
        conn.received.clear()
        conn.data_ready = True
        return super().handle(conn)

    def _keepalive_after(self, conn, keepalive):
        """Keep no connection whose request is not all read; gunicorn waits for the rest of it."""
        conn.sock.ends, conn.sock.left = 0, None
        return super()._keepalive_after(conn, keepalive)

    def handle_error(self, _req, client, _addr, error):
        """Refuse, in our shape, what the service does not see."""
        refuse(self.log, client, error)

    def murder_pending(self):
        """End what has had its time; a stopping worker has none for who has asked nothing."""
        now = time.monotonic()
        while self.pending_conns:
            conn = self.pending_conns[0]
            if now < conn.timeout and (self.alive or conn.received):
                break
            self.pending_conns.popleft()
            self.poller.unregister(conn.sock)
            self.nr_conns -= 1
            if conn.received:
                self.log.warning("A request did not come in time")
                error = "The request did not come in time", "error-request-timeout"
                answer(conn.sock, HTTPStatus.REQUEST_TIMEOUT, *error)
            conn.close(graceful=bool(conn.received))
        for client in [one for one, (ends, _) in self._lingering.items() if ends < now]:
            self._let_go(client)

    def linger(self, client):
        """Close a connection once its client has, so that nothing it still sends cuts its answer.

        gunicorn's own way does that too, and waits in the thread that accepts connections.
        """
        try:
            client.setblocking(False)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            client.close()
            return
        self.nr_conns += 1
        self._lingering[client] = time.monotonic() + LINGER_TIME, LINGER_READS
        self.poller.register(client, selectors.EVENT_READ, self._drain)

    def _drain(self, client):
        ends, reads = self._lingering[client]
        self._lingering[client] = ends, reads - 1
        try:
            more = client.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more or not reads:
            self._let_go(client)

    def _let_go(self, client):
        del self._lingering[client]
        self.poller.unregister(client)
        client.close()
        self.nr_conns -= 1


class Connection(TConn):
    """A connection with what has come of its request, which is not yet whole."""

    def __init__(self, worker, *args):
        super().__init__(*args)
        self.received = bytearray()
        self._worker = worker

    def receive(self):
        """Read what there is; return whether nothing more is to be waited for."""
        try:
            data = self.sock.recv(max(1, LARGEST + 1 - len(self.received)))
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.received += data
        if not data or is_whole(self.received):
            return True
        # A client that waits to be asked for the body is asked here, and not in a thread.
        expects = _EXPECT.search(self.received, 0, self.received.find(b"\r\n\r\n") + 2)
        if expects:
            del self.received[slice(*expects.span())]
            with suppress(OSError):
                self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return False

    def close(self, graceful=False):
        """Close it, at once or as soon as the client has its answer."""
        if graceful:
            self._worker.linger(self.sock)
        else:
            super().close()


class Socket(socket.socket):
    """A socket whose client cannot hold a thread for long."""

    ends = None  # seconds of `time.monotonic` at which nothing more is read in a thread
    left = None  # bytes that are still read in a thread; any number without one

    def recv(self, size):
        """Read as ever; a client that has had its time counts as one that is gone.

        Raise EMSGSIZE for a body in so many chunks that to read them would cost too much.
        """
        if self.gettimeout() == 0:  # in the main thread, which does not wait
            return super().recv(size)
        if self.left is not None and self.left <= 0:
            raise OSError(errno.EMSGSIZE, "too many chunks")
        self.settimeout(max(0.001, self.ends - time.monotonic()))
        try:
            data = super().recv(size)
        except TimeoutError:
            raise gone() from None
        if self.left is not None:
            self.left -= len(data)
        return data

    def sendall(self, *args):
        """Write as ever; a client that takes too long counts as one that is gone."""
        self.settimeout(ANSWER_TIME)  # for all of it
        try:
            super().sendall(*args)
        except TimeoutError:
            raise gone() from None


def gone():
    """Return the error of a client that is gone, of which gunicorn makes no noise."""
    return ConnectionResetError(errno.ECONNRESET, "too slow")


def is_whole(data):
    """Return whether a request has all come, or so much that it is for the service to refuse.

    What does not look like HTTP is whole: gunicorn refuses it. A chunked body ends with an empty
    line; where one is within, the rest is read in a thread.
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


def refuse(log, client, error):
    """Answer what does not come to the service; log its kind, where gunicorn would quote it."""
    if isinstance(error, ParseException):
        status = _STATUS.get(type(error), HTTPStatus.BAD_REQUEST)
        log.warning("Invalid request: %s", type(error).__name__)
        answer(client, status, "The request is not valid HTTP", "error-invalid-request")
    else:
        log.error("Error handling request: %s", type(error).__name__)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        answer(client, status, "Internal server error", "error-internal")


def answer(client, status, reason, kind):
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
