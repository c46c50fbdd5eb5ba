"""The rate limit: so many calls a minute of one client to one route and method (contract, 1)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from hashlib import blake2b
from ipaddress import IPv6Address, ip_address

import falcon

from resources.errors import refusal

PREFIX = "/api/v1/livechat/"
WINDOW = 60_000  # milliseconds
MOST_KEYS = 100_000  # that are counted in one window: some 15 MB


class Calls:
    """Counts of calls in windows of a minute, for any number of threads; they end with the process.

    At most `MOST_KEYS` are counted in one window: a call of one more counts as its first one.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._window: int | None = None
        self._counts: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def count(self, key: bytes) -> tuple[int, int]:
        """Count a call of `key`; return the calls it has had and when the window ends.

        The end is in milliseconds since 1970.
        """
        with self._lock:
            window = self._clock() // WINDOW
            if window != self._window:
                self._window, self._counts = window, {}
            calls = self._counts.get(key, 0) + 1
            if calls > 1 or len(self._counts) < MOST_KEYS:
                self._counts[key] = calls
            return calls, (window + 1) * WINDOW


class RateLimit:
    """Falcon middleware that refuses the calls beyond `limit`, before a body is looked at."""

    def __init__(self, limit: int, proxies: int, clock: Callable[[], int]) -> None:
        self._limit = limit
        self._proxies = proxies
        self._clock = clock
        self._calls = Calls(clock)
        self._secret = os.urandom(16)  # so that nobody can choose an address that counts as another

    def process_resource(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        resource: object,
        params: dict[str, object],
    ) -> None:
        """Count the call of a route and method there is; raise its 429."""
        route = req.uri_template or ""
        if not route.startswith(PREFIX) or not hasattr(resource, f"on_{req.method.lower()}"):
            return
        whose = f"{client(req, self._proxies)} {req.method} {route}".encode()
        calls, end = self._calls.count(blake2b(whose, digest_size=8, key=self._secret).digest())
        set_headers(resp, self._limit, max(0, self._limit - calls), end)
        if calls > self._limit:
            wait = max(1, -((self._clock() - end) // 1000))  # rounded up
            resp.set_header("Retry-After", str(wait))
            raise refusal("error-too-many-requests", seconds=wait)


def set_headers(resp: falcon.Response, limit: int, remaining: int, end: int) -> None:
    """Say how many calls are left until `end`, in milliseconds since 1970."""
    resp.set_header("X-RateLimit-Limit", str(limit))
    resp.set_header("X-RateLimit-Remaining", str(remaining))
    resp.set_header("X-RateLimit-Reset", str(end))


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
