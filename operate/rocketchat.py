"""Another server with the same API, and how to send it a visitor."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from storage.visitors import FIELDS

PATH = "/api/v1/livechat/visitor"
TIMEOUT = 30  # seconds for each answer
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before each new try, where the server fails
SHORTEST, LONGEST = 1, 600  # seconds to wait at a rate limit, whatever the server says
MAX_ITEMS = 64  # custom fields in one request (contract, 2.1)
MAX_BYTES = 60_000  # of one request, of the 65,536 that the contract grants
MAX_ANSWER = 2**20  # bytes that are read of an answer
# No visitor is to blame for these, and each one would get the same.
ELSEWHERE = (401, 404, 405, 407)


class Refused(Exception):
    """The server will not have this visitor: its error, in one line."""


class Stopped(Exception):
    """The server cannot go on, or is none of this API: why, in one line."""


class Server:
    """The server at `url`, such as `https://chat.example.org`; raise `ValueError` for no URL."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not a URL: {error}") from None
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL such as https://chat.example.org")
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError("the URL may hold a host, a port and a path, and nothing else")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix(PATH).rstrip('/')}"
        self.host = parts.netloc
        self._path = urlsplit(self.url).path + PATH
        self._connection = kinds[parts.scheme](parts.hostname, port, timeout=TIMEOUT)

    def register(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send one registration until it is answered; return the visitor of the answer.

        Wait where the server limits the rate; where it fails, or the connection does, try again
        after each of `PAUSES`. Raise `Refused` or `Stopped`.
        """
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        pauses = iter(PAUSES)
        while True:
            wait = None
            try:
                status, headers, answer = self._post(data)
                if 200 <= status < 500 and status not in (408, 429):
                    return _visitor(status, headers, answer)
                reason = f"it answers {_error(status, answer)}"
                wait = _wait(headers) if status in (429, 503) else None
            except (OSError, http.client.HTTPException) as fault:
                self._connection.close()
                reason = str(fault) or type(fault).__name__
            if wait is None or status != 429:  # a rate limit ends by itself
                pause = next(pauses, None)
                if pause is None:
                    raise Stopped(f"tried {1 + len(PAUSES)} times: {_line(reason)}")
                wait = max(pause, wait or 0)
            time.sleep(wait)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _post(self, data: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {"Content-Type": "application/json", "User-Agent": "livechat-visitors"}
        self._connection.request("POST", self._path, data, headers)
        answer = self._connection.getresponse()
        body = answer.read(MAX_ANSWER)
        if answer.length and len(body) < MAX_ANSWER:  # which a read of so many bytes takes
            raise http.client.IncompleteRead(body, answer.length)
        if not answer.isclosed():
            self._connection.close()
        return answer.status, answer.headers, body


def bodies(visitor: Mapping[str, Any], guests: int) -> Iterator[dict[str, Any]]:
    """Yield the registrations that make a visitor, as the contract answers it, elsewhere.

    A username that was made here, one of the first `guests`, is left out: the other server would
    give the same one to somebody else.
    """
    given = {"token": visitor["token"]}
    for known in FIELDS:
        if known.given and known.key in visitor:
            value = visitor[known.key]
            given[known.column] = value[0][known.list_of] if known.list_of else value
    guest = re.fullmatch(r"guest-([0-9]{1,16})", visitor["username"])
    if guest and int(guest[1]) <= guests:
        del given["username"]
    fields: list[dict[str, Any]] = []
    size = _size(given)
    for key, value in visitor.get("livechatData", {}).items():
        field = {"key": key, "value": value, "overwrite": True}
        size += _size(field) + 1
        if fields and (size > MAX_BYTES or len(fields) == MAX_ITEMS):
            yield {"visitor": given | {"customFields": fields}}
            given = {"token": visitor["token"]}
            fields = []
            size = _size(given) + _size(field)
        fields.append(field)
    yield {"visitor": given | ({"customFields": fields} if fields else {})}


def _size(value: Mapping[str, Any]) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())


def _visitor(status: int, headers: http.client.HTTPMessage, answer: bytes) -> dict[str, Any]:
    """Return the visitor of an answer below 500; raise `Refused` or `Stopped`."""
    if 300 <= status < 400:
        raise Stopped(f"it sends on to {_line(headers.get('Location', 'nowhere'))}: give that URL")
    if status in ELSEWHERE:
        raise Stopped(f"it does not speak this API: {_error(status, answer)}")
    if status >= 400:
        raise Refused(_error(status, answer))
    try:
        visitor: dict[str, Any] = json.loads(answer)["visitor"]
        visitor["token"], visitor["_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Stopped("it does not speak this API: its answer holds no visitor") from None
    return visitor


def _wait(headers: http.client.HTTPMessage) -> float | None:
    """Return the seconds to wait, if the server says so: by its own clock, where it tells it."""
    try:
        if "Retry-After" in headers:
            wait = float(headers["Retry-After"])
        else:
            now = time.time()
            if "Date" in headers:
                now = parsedate_to_datetime(headers["Date"]).timestamp()
            wait = float(headers["X-RateLimit-Reset"]) / 1000 - now
    except (TypeError, ValueError, OverflowError):
        return None
    return max(SHORTEST, min(wait, LONGEST))


def _error(status: int, answer: bytes) -> str:
    """Return status and error of an answer."""
    try:
        error = json.loads(answer)["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        error = http.client.responses.get(status, "")
    return f"{status} {_line(str(error))}".rstrip()


def _line(text: str) -> str:
    """Return a text of somebody else as one short line that no terminal obeys."""
    return "".join(char if char.isprintable() else "?" for char in text[:200])
