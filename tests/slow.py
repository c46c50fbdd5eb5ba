"""Clients that are slow, stubborn or very many, against a server that runs."""

import contextlib
import re
import selectors
import socket
import statistics
import struct
import threading
import time
from collections import Counter

import storage
from storage import fields, visitors
from tests.server import PATH

REGISTER = b'{"visitor":{"token":"slow"}}'
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(REGISTER) + REGISTER
LARGE = b"GET /api/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"

# What a client sends at once, and what it sends then, a byte a second; it never reads.
ATTACKS = {
    "nothing": (b"", b""),
    "half a head": (HEAD, b""),
    "half a body": (WHOLE[:-5], b""),
    "half a chunked body": (HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"vis', b""),
    "a body that is asked for": (HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n", b""),
    "a head byte by byte": (b"", b"GET / HTTP/1.1\r\nX: " + b"x" * 1000),
    "a body byte by byte": (HEAD + b"Content-Length: 999\r\n\r\n", b" " * 999),
    "a request, and reads no answer": (LARGE, b""),
    "requests in one go, and reads no answer": (3 * LARGE, b""),
    "a request, and never closes": (
        WHOLE.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost"),
        b"",
    ),
    "a request, and is silent": (WHOLE, b""),
    "a body that is too large": (
        HEAD + b"Content-Length: 99999\r\n\r\n" + b" " * 50_000,
        b" " * 999,
    ),
}


class Attack:
    """So many connections, divided among the ATTACKS named; a connection that ends comes again.

    A context, in which they are open; `answers` are the bytes each attack was answered, by name.
    """

    def __init__(self, port, connections, names=tuple(ATTACKS), again=True):
        self._port = port
        self._names = [names[number % len(names)] for number in range(connections)]
        self._again = again
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers = {name: [] for name in names}
        self.failed = 0  # connections that were refused or reset

    def __enter__(self):
        self._selector = selectors.DefaultSelector()
        for name in self._names:
            self._connect(name)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _connect(self, name):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            client.connect(("127.0.0.1", self._port))
            first, rest = ATTACKS[name]
            client.sendall(first)
        except OSError:
            self.failed += 1
            client.close()
            return
        client.setblocking(False)
        self._selector.register(client, selectors.EVENT_READ, (name, iter(rest)))

    def _run(self):
        while not self._over.wait(1):
            for key in list(self._selector.get_map().values()):
                name, rest = key.data
                with contextlib.suppress(OSError, StopIteration):
                    key.fileobj.send(bytes([next(rest)]))
                if "reads no answer" not in name and self._is_over(name, key.fileobj):
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()
                    if self._again:
                        self._connect(name)

    def _is_over(self, name, client):
        """Look whether the server has closed the connection; keep what it said."""
        try:
            answer = client.recv(65_536)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if answer and "never" not in name:
            self.answers[name].append(answer)
        return not answer


def wait_of_others(server, seconds, ask=None):
    """Register visitors, or `ask`, one after the other for so long; return the seconds of each."""
    ask = ask or (lambda: server.register(f"other-{time.monotonic()}")[0])
    waits = []
    end = time.monotonic() + seconds
    while not waits or time.monotonic() < end:
        start = time.monotonic()
        try:
            assert ask() == 200
            waits.append(time.monotonic() - start)
        except OSError:
            waits.append(float("inf"))
        time.sleep(0.05)
    return waits


def longest(idle):
    """Return the seconds that nobody may wait longer than, from the waits of an idle run.

    That is half a second or so, more where the machine is busy: others take their time too.
    """
    return max(200 * statistics.median(idle), 20 * max(idle))


class Asking:
    """So many connections, each of which sends `request` again as soon as it is answered.

    A context, in which they run; one that ends comes again. With `once` each asks once.
    `statuses` counts the answers.
    """

    def __init__(self, server, connections, request, once=False):
        self.statuses = Counter()
        self._server = server
        self._connections = connections
        self._request = request
        self._once = once
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._selector = selectors.DefaultSelector()
        for _ in range(self._connections):
            self._connect()
        self._thread.start()
        return self

    def __exit__(self, *exception):
        """End all connections, whoever is still waiting with a reset."""
        self._over.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            key.fileobj.close()
        self._selector.close()

    def _connect(self):
        client = self._server.connect()
        client.setblocking(False)
        self._selector.register(client, selectors.EVENT_READ, bytearray())
        self._send(client)

    def _send(self, client):
        with contextlib.suppress(OSError):
            client.send(self._request)  # or as much of it as there is room for

    def _run(self):
        while not self._over.is_set():
            for key, _ in self._selector.select(0.02):
                self._receive(key.fileobj, key.data)

    def _receive(self, client, answer):
        try:
            data = client.recv(2**20)
        except OSError:
            data = b""
        answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if length and len(body) >= int(length[1]):
            self.statuses[int(head[9:12])] += 1
            answer.clear()
            if not self._once:
                self._send(client)
        if not data:
            self._selector.unregister(client)
            client.close()
            if not self._once:
                self._connect()


def fill(path, number, custom=()):
    """Make a database with so many visitors, each with these custom fields."""
    rows = []
    for each in range(number):
        visitor = dict.fromkeys(fields.COLUMNS) | {
            "id": visitors.random_id(),
            "token": f"t{each}",
        }
        visitor |= {"username": f"guest-{each}", "name": f"{each * 7919 % number} of many"}
        rows.append(fields.as_row(visitor | {"ts": 1, "updated": 1, "fields": dict(custom)}))
    storage.prepare(path)
    with contextlib.closing(storage.Database(path)) as database:
        database.write(lambda connection: connection.executemany(fields.INSERT, rows) and None)
