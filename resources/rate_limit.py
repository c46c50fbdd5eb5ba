"""The rate limit: so many calls a minute of one client to one route and method (contract, 1)."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Callable
from hashlib import blake2b
from ipaddress import IPv6Address, ip_address

import falcon

import storage
from resources.errors import Refusal

PREFIX = "/api/v1/livechat/"
WINDOW = 60_000  # milliseconds
SLOTS = 2**19  # of 16 bytes: more than a machine of this kind answers calls in a minute
PROBES = 64  # slots that are looked at for one client


class Calls:
    """Counts of calls in windows of a minute, shared by all processes that are forked later.

    A hash table in memory that belongs to no file: nothing of it is left when the service stops,
    and a window that has passed makes room by itself. No kept library counts over processes
    without a server or the standard library's sqlite3, which is not ours (a second SQLite in one
    process is unsafe).
    """

    _slot = struct.Struct("=8sII")  # whose, in which window, how many

    def __init__(self, clock: Callable[[], int] = storage.milliseconds) -> None:
        self._clock = clock
        self._table = mmap.mmap(-1, SLOTS * self._slot.size)
        self._threads = threading.Lock()
        # A file without a name, of no content, for its lock: that of lockf(3) belongs to a process
        # and ends with it, also where it is killed.
        self._processes, name = tempfile.mkstemp()
        os.unlink(name)

    def count(self, key: bytes) -> tuple[int, int]:
        """Count a call of `key`, 8 bytes; return the calls it has had and when the window ends.

        The end is in milliseconds since 1970. Where a machine is so fast that the table is full,
        a call counts as a first one.
        """
        with self._threads:
            fcntl.lockf(self._processes, fcntl.LOCK_EX)
            try:
                window = self._clock() // WINDOW  # read here, so that it never goes back
                return self._count(key, window), (window + 1) * WINDOW
            finally:
                fcntl.lockf(self._processes, fcntl.LOCK_UN)

    def _count(self, key: bytes, window: int) -> int:
        first = int.from_bytes(key)
        for probe in range(PROBES):
            offset = (first + probe) % SLOTS * self._slot.size
            holder, held_in, calls = self._slot.unpack_from(self._table, offset)
            if held_in != window:  # free, as no slot is freed before its window has passed
                calls = 0
            elif holder != key:
                continue
            self._slot.pack_into(self._table, offset, key, window, calls + 1)
            return int(calls + 1)
        return 1


class RateLimit:
    """Falcon middleware that refuses the calls beyond `limit`, before a body is looked at."""

    def __init__(self, limit: int, proxies: int, clock: Callable[[], int]) -> None:
        self._limit = limit
        self._proxies = proxies
        self._clock = clock
        self._calls = Calls(clock)
        self._secret = os.urandom(16)  # so that no address can be read from the table

    def process_resource(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        resource: object,
        params: dict[str, object],
    ) -> None:
        """Count the call of a route and method there is; raise its 429."""
        route = (req.uri_template or "").rstrip("/")
        if not route.startswith(PREFIX) or not hasattr(resource, f"on_{req.method.lower()}"):
            return
        whose = f"{client(req, self._proxies)} {req.method} {route}".encode()
        calls, end = self._calls.count(blake2b(whose, digest_size=8, key=self._secret).digest())
        resp.set_header("X-RateLimit-Limit", str(self._limit))
        resp.set_header("X-RateLimit-Remaining", str(max(0, self._limit - calls)))
        resp.set_header("X-RateLimit-Reset", str(end))
        if calls > self._limit:
            wait = max(1, -((self._clock() - end) // 1000))  # rounded up
            resp.set_header("Retry-After", str(wait))
            kind = "error-too-many-requests"
            error = (
                "Error, too many requests. Please slow down."
                f" You must wait {wait} seconds before trying this endpoint again. [{kind}]"
            )
            raise Refusal(429, {"error": error, "errorType": kind})


def client(req: falcon.Request, proxies: int) -> str:
    """Return whose call it is: the connection's address, or what so many proxies say of it.

    Each proxy appends to `X-Forwarded-For` whom it was asked by, so that only the last entries can
    be trusted; `Forwarded` is not looked at. An IPv6 address counts by its /64, which is what one
    client is given.
    """
    address: str = req.remote_addr
    forwarded = req.get_header("X-Forwarded-For")
    if proxies and forwarded:
        entries = forwarded.split(",")
        if len(entries) >= proxies:  # else it has come past a proxy
            address = entries[-proxies].strip()
    return _network(address)


def _network(address: str) -> str:
    if address.startswith("["):
        address = address[1:].partition("]")[0]  # some proxies write [address]:port
    elif address.count(":") == 1:
        address = address.partition(":")[0]
    try:
        ip = ip_address(address)
    except ValueError:
        return address  # a name, such as "unknown": the proxy's word for whom it does not tell
    if not isinstance(ip, IPv6Address):
        return str(ip)
    return str(ip.ipv4_mapped or ip.packed[:8].hex())
