"""The door: one bounded, strict read of a request's body (contract, section 1)."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import falcon

from resources.errors import MAX_BODY, refusal

MAX_NESTING = 100  # levels of arrays and objects, the body itself is the first
TOO_DEEP = f"nested deeper than {MAX_NESTING} levels"
MAX_DOUBLE_DIGITS = 309  # an integer of more digits is beyond any double


class BodyLimit:
    """Falcon middleware that refuses a body that is too large, also where nobody would read it."""

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raise 413 for a known route and method."""
        if (req.content_length or 0) > MAX_BODY and hasattr(resource, f"on_{req.method.lower()}"):
            raise refusal("error-body-too-large")


def read(req: falcon.Request, check: Callable[[Any], None]) -> Any:
    """Read the body once, bounded and strict, and return the JSON value that passes `check`.

    Falcon's own media is not enough: it takes a chunked body for an empty one and a short one for
    whole, has no limit, and its JSON takes NaN and lone surrogates. The order is the contract's.
    """
    data, complete = receive(req)
    if len(data) > MAX_BODY:
        raise refusal("error-body-too-large")
    if data or not complete:
        _check_type(req)
    if not complete:
        raise refusal("error-incomplete-body")
    try:
        body = parse(data) if data else {}
    except ValueError as reason:
        raise refusal("error-invalid-json", reason=reason) from None
    check(body)
    return body


def receive(req: falcon.Request) -> tuple[bytes, bool]:
    """Return the body, at most a byte above the limit, and whether all of it came."""
    announced = req.content_length
    if announced is None and not req.env.get("wsgi.input_terminated"):
        return b"", True  # nobody says where it would end
    wanted = MAX_BODY + 1 if announced is None else announced
    data = b""
    try:
        while len(data) < wanted and (more := req.stream.read(wanted - len(data))):
            data += more
    except TimeoutError:
        raise refusal("error-request-timeout") from None
    except Exception:  # each server has its own for a body that breaks off, or several
        return data, False
    return data, announced is None or len(data) == announced


def _check_type(req: falcon.Request) -> None:
    """Raise 415 for what is not plain JSON."""
    if (req.content_type or "").partition(";")[0].strip().lower() != "application/json":
        raise refusal("error-unsupported-media-type", rule="be sent as application/json")
    if (req.get_header("Content-Encoding") or "identity").strip().lower() != "identity":
        raise refusal("error-unsupported-media-type", rule="not be compressed or encoded")


def parse(data: bytes) -> Any:
    """Return the value of a JSON text, which may begin with a byte order mark.

    Raise `ValueError`, which says what is not strict JSON and where, and quotes no data.
    """
    try:
        text = data.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    try:
        value = _decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    # Both look at the text and not at the value, where a key that stands twice has hidden one.
    if any(_LONE_SURROGATE.findall(text)):
        raise ValueError("half a surrogate pair")
    if _nesting(text) > MAX_NESTING:
        raise ValueError(TOO_DEEP)
    return value


class _Constant(Exception):
    """NaN or Infinity, which Python takes for JSON; the decoder does not tell where it stands."""


_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', re.DOTALL)
# The escapes of a JSON text in turn; the group is there where half a surrogate pair stands alone.
_LONE_SURROGATE = re.compile(
    r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u([dD][89a-fA-F]..)|.)", re.DOTALL
)
_ALL_BUT_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[^][{}]', re.DOTALL)


def _nesting(text: str) -> int:
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return 0  # most bodies, at the cost of two counts
    brackets = _ALL_BUT_BRACKETS.sub("", text)
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DOUBLE_DIGITS else float(digits)


def _refuse_constant(name: str) -> None:
    raise _Constant


# Made once; json.loads would make one for each body.
_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_parse_int)


def _decode(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except _Constant:
        found = (match for match in _CONSTANT.finditer(text) if match[0][0] != '"')
        raise json.JSONDecodeError("", text, next(found).start()) from None
