"""Another server with the same API, and how to send it a visitor."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

from operate import Failed
from storage.fields import FIELDS, to_json

PATH = "/api/v1/livechat/visitor"
URL = re.compile(r"(https?)://([\w.-]+|\[[\da-fA-F:.]+\])(?::(\d{1,5}))?((?:/[^\s?#]*)?)")
TIMEOUT = 30  # seconds for each whole answer
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before each new try, where the server fails
SHORTEST, LONGEST = 1, 600  # seconds to wait at a rate limit, whatever the server says
MAX_ITEMS = 64  # custom fields in one request (contract, 2.1)
MAX_BYTES = 60_000  # of one request, of the 65,536 that the contract grants
MAX_ANSWER = 2**20  # bytes that are read of an answer
# Of a fault of the connection, what another try does not mend, and what of that it may mend.
LASTING = (ssl.SSLError, socket.gaierror, UnicodeError, http.client.HTTPException)
PASSING = (ssl.SSLEOFError, http.client.RemoteDisconnected, http.client.IncompleteRead)
# No visitor is to blame for these, and each one would get the same.
ELSEWHERE = (401, 404, 405, 407)


class Refused(Exception):
    """The server will not have this visitor: its error, in one line."""


class Stopped(Exception):
    """The server cannot go on, or is none of this API: why, in one line."""


class Server:
    """The server at `url`, such as `https://chat.example.org`; raise `Failed` for no URL.

    `wait` is called with seconds and a reason before a request is sent again.
    It takes the process's alarm signal for its limit of time, so it is for the main thread.
    """

    def __init__(self, url: str, wait: Callable[[float, str], None]) -> None:
        match = URL.fullmatch(url)
        if not match or not url.isascii() or int(match[3] or 0) > 65_535:
            raise Failed("not a URL such as https://chat.example.org, with port and path alone")
        scheme, host, port, path = match.groups()
        path = path.removesuffix(PATH).rstrip("/")
        self.host = f"{host}:{port}" if port else host
        self.url = f"{scheme}://{self.host}{path}"
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host.strip("[]"), int(port) if port else None)
        self._path = path + PATH
        self._wait = wait
        signal.signal(signal.SIGALRM, _late)

    def register(self, visitor: Mapping[str, Any]) -> str:
        """Send one registration until it is answered; return the token of the answer.

        Wait where the server limits the rate; where it fails, or the connection does, try again
        after each of `PAUSES`. Raise `Refused` or `Stopped`.
        """
        data = to_json({"visitor": visitor}).encode()
        pauses = list(PAUSES)
        while True:
            wait = None
            try:
                status, headers, answer = self._post(data)
                if status < 500 and status not in (408, 429):
                    return _token(status, headers, answer)
                reason = f"it answers {_error(status, answer)}"
                wait = _seconds(headers) if status in (429, 503) else None
            except (OSError, UnicodeError, http.client.HTTPException) as fault:
                self._connection.close()
                status, reason = 0, _reason(fault)
            if wait is None or status != 429:  # a rate limit ends by itself
                if not pauses:
                    raise Stopped(f"tried {1 + len(PAUSES)} times: {reason}")
                wait = max(pauses.pop(0), wait or 0)
            self._wait(wait, reason)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _post(self, data: bytes) -> tuple[int, http.client.HTTPMessage, dict[str, Any]]:
        """Return status, headers and JSON object of an answer; {} where there is none."""
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
        try:
            headers = {"Content-Type": "application/json", "User-Agent": "livechat-visitors"}
            self._connection.request("POST", self._path, data, headers)
            answer = self._connection.getresponse()
            content = body = answer.read(MAX_ANSWER)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if answer.length:  # it is cut, or too large
            raise http.client.IncompleteRead(body, answer.length)
        if not answer.isclosed():
            self._connection.close()
        with suppress(ValueError, RecursionError):
            content = json.loads(body)
        return answer.status, answer.headers, content if isinstance(content, dict) else {}


def bodies(visitor: Mapping[str, Any], guests: int) -> Iterator[dict[str, Any]]:
    """Yield what the registrations that make a visitor elsewhere give, but for the token.

    A username that was made here, one of the first `guests`, is left out: the other server would
    give the same one to somebody else.
    """
    given = {field.column: visitor[field.column] for field in FIELDS if field.given}
    given = {key: value for key, value in given.items() if value}
    guest = re.fullmatch(r"guest-([0-9]{1,16})", visitor["username"])
    if guest and int(guest[1]) <= guests:
        del given["username"]
    fields: list[dict[str, Any]] = []
    size = len(to_json(given).encode())
    for key, value in visitor["fields"].items():
        field = {"key": key, "value": value, "overwrite": True}
        length = len(to_json(field).encode()) + 1
        if fields and (size + length > MAX_BYTES or len(fields) == MAX_ITEMS):
            yield given | {"customFields": fields}
            given, fields, size = {}, [], 0
        fields.append(field)
        size += length
    yield given | ({"customFields": fields} if fields else {})


def _late(*_: Any) -> NoReturn:
    raise TimeoutError(f"no whole answer within {TIMEOUT} seconds")


def _reason(fault: Exception) -> str:
    """Return why there is no answer; raise `Stopped` where another try would be in vain."""
    if isinstance(fault, ssl.SSLCertVerificationError):
        raise Stopped(
            f"its certificate is not trusted: {_line(fault.verify_message)}; SSL_CERT_FILE names"
            " the file of an authority of your own"
        )
    reason = _line(f"{type(fault).__name__}: {fault}")
    passing = isinstance(fault, PASSING) or getattr(fault, "errno", 0) == socket.EAI_AGAIN
    if isinstance(fault, LASTING) and not passing:
        raise Stopped(f"another try would not help: {reason}")
    return reason


def _token(status: int, headers: http.client.HTTPMessage, answer: Mapping[str, Any]) -> str:
    """Return the token in an answer below 500; raise `Refused` or `Stopped`."""
    if 300 <= status < 400:
        raise Stopped(f"it sends on to {_line(headers.get('Location', 'nowhere'))}: give that URL")
    # A 400 that is no JSON comes from a proxy, such as of plain HTTP to its port for TLS.
    if status in ELSEWHERE or (status == 400 and not answer):
        raise Stopped(f"it does not speak this API: {_error(status, answer)}")
    if status >= 400:
        raise Refused(_error(status, answer))
    try:
        token, _ = answer["visitor"]["token"], answer["visitor"]["_id"]
        return str(token)
    except (TypeError, KeyError):
        raise Stopped("it does not speak this API: its answer holds no visitor") from None


def _seconds(headers: http.client.HTTPMessage) -> float | None:
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


def _error(status: int, answer: Mapping[str, Any]) -> str:
    """Return status and error of an answer."""
    error = answer.get("error") or http.client.responses.get(status, "")
    return f"{status} {_line(str(error))}".rstrip()


def _line(text: str) -> str:
    """Return a text of somebody else as one short line that no terminal obeys."""
    return "".join(char if char.isprintable() else "?" for char in text[:200])
