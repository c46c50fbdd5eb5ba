"""The HTTP side: the door, the resources, the shape of an error, and how they are wired."""

from __future__ import annotations

import atexit
import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import falcon
from falcon.media import JSONHandler

import schemas
import storage
from settings import Settings

MAX_BODY = 65_536  # bytes
MAX_NESTING = 100  # levels of arrays and objects, the body itself is the first
MAX_DOUBLE_DIGITS = 309  # an integer of more digits is beyond any double

# A child of gunicorn's logger: the lines go where gunicorn's own go, in its format.
log = logging.getLogger("gunicorn.error.livechat")


# Every refusal that carries a type of its own: its status and what it says, by its type.
REFUSALS = {
    "error-invalid-token": (400, "Token cannot be empty"),
    "error-invalid-email": (400, "Invalid email {email}"),
    "error-invalid-department": (400, "The provided department is invalid"),
    "error-invalid-json": (400, "The request body is not valid JSON"),
    "error-incomplete-body": (400, "The request body is incomplete"),
    "error-invalid-request": (400, "The request is invalid"),
    "error-not-found": (404, "Resource not found"),
    "error-method-not-allowed": (405, "Method not allowed"),
    "error-body-too-large": (413, f"The request body is larger than {MAX_BODY} bytes"),
    "error-unsupported-media-type": (415, "The request body must be sent as application/json"),
    "error-internal": (500, "Internal server error"),
    "error-database-unavailable": (503, "The visitor database is unavailable"),
}


class Refusal(falcon.HTTPError):
    """An answer in the contract's failure shape."""

    def __init__(self, status: int, error: str, error_type: str, **more: Any) -> None:
        super().__init__(status)
        self.body = {"success": False, "error": error, "errorType": error_type, **more}


def refusal(error_type: str, **details: str) -> Refusal:
    """Return the refusal of that type, worded as Meteor does: with its type in brackets."""
    status, reason = REFUSALS[error_type]
    more = {"details": details} if details else {}
    return Refusal(status, f"{reason.format(**details)} [{error_type}]", error_type, **more)


def serialize_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """Give every error its body: JSON in one shape, whatever the client accepts."""
    if not isinstance(error, Refusal):  # falcon's own: unknown paths, wrong methods, bad headers
        types = {404: "error-not-found", 405: "error-method-not-allowed"}
        status = falcon.http_status_to_code(error.status)
        error = refusal(types.get(status, "error-invalid-request"))
    if error.status == 503:
        resp.set_header("Retry-After", "5")  # seconds
    resp.media = error.body


def refuse_params(
    req: falcon.Request, resp: falcon.Response, error: schemas.InvalidParams, params: Any
) -> None:
    """Answer what a schema refused."""
    raise Refusal(400, str(error), "invalid-params")


def answer_unavailable(
    req: falcon.Request, resp: falcon.Response, error: storage.Unavailable, params: Any
) -> None:
    """Answer a fault of the database, which SQLite words without any data."""
    log.error("The visitor database is unavailable: %s", error)
    raise refusal("error-database-unavailable")


def answer_unforeseen(
    req: falcon.Request, resp: falcon.Response, error: Exception, params: Any
) -> None:
    """Answer a bug; where it happened is logged, not its text, which could quote the visitor."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.critical("Unforeseen %s, please report it:\n%s", type(error).__name__, frames)
    raise refusal("error-internal")


def read(req: falcon.Request, check: Callable[[Any], None]) -> Any:
    """Read the body once, bounded and strict, and return the JSON value that passes `check`.

    Falcon's own media is not enough: it takes a chunked body for an empty one and a short one for
    whole, has no limit, and its JSON takes NaN and lone surrogates. The order is the contract's.
    """
    data, complete = _receive(req)
    if len(data) > MAX_BODY or (req.content_length or 0) > MAX_BODY:
        raise refusal("error-body-too-large")
    if (data or not complete) and not _is_json(req):
        raise refusal("error-unsupported-media-type")
    if not complete:
        raise refusal("error-incomplete-body")
    try:
        body = parse(data) if data else {}
    except (ValueError, RecursionError):
        raise refusal("error-invalid-json") from None
    check(body)
    return body


def _receive(req: falcon.Request) -> tuple[bytes, bool]:
    """Return the body, at most a byte above the limit, and whether all of it came."""
    announced = req.content_length
    if announced is None and not req.env.get("wsgi.input_terminated"):
        return b"", True  # nobody says where it would end
    if announced is not None and announced > MAX_BODY:
        return b"", False
    wanted = MAX_BODY + 1 if announced is None else announced
    data = b""
    try:
        while len(data) < wanted and (more := req.stream.read(wanted - len(data))):
            data += more
    except Exception:  # each server has its own for a body that breaks off; gunicorn several
        return data, False
    return data, announced is None or len(data) == announced


def _is_json(req: falcon.Request) -> bool:
    media_type = (req.content_type or "*/*").partition(";")[0].strip().lower()
    encoded = req.get_header("Content-Encoding")
    return media_type in ("application/json", "*/*") and not encoded


def parse(data: bytes) -> Any:
    """Return the JSON value; raise ValueError or RecursionError where it is not strict JSON."""
    text = data.decode()
    value = json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_int)
    # Both look at the text and not at the value, where a key that stands twice has hidden one.
    if any(_LONE_SURROGATE.findall(text)) or _nesting(text) > MAX_NESTING:
        raise ValueError
    return value


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
    raise ValueError(f"{name} is not JSON")


# JavaScript's white space, which is not Python's (ECMA-262, WhiteSpace and LineTerminator).
_TRIMMED = (
    "\t\n\v\f\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)


def registration(visitor: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return what `VisitorStore.register` takes, or raise the first refusal of contract 2.2."""
    token = visitor["token"]
    if not token.strip(_TRIMMED):
        raise refusal("error-invalid-token", method="livechat/visitor")
    known = ("username", "name", "email", "phone", "department")
    given = {key: visitor[key] for key in known if visitor.get(key)}
    if "email" in given:
        given["email"] = _email(given["email"])
    if "department" in given and settings.departments:
        given["department"] = _department(given["department"], settings.departments)
    custom_fields = [
        field
        for field in visitor.get("customFields", ())
        if not settings.custom_fields or field["key"] in settings.custom_fields
    ]
    return {"token": token, "given": given, "custom_fields": custom_fields}


def _email(email: str) -> str:
    email = email.strip(_TRIMMED).lower()
    if not re.fullmatch("[^@]+@[^@]+", email):
        raise refusal("error-invalid-email", function="Livechat.validateEmail", email=email)
    return email


def _department(name: str, departments: Mapping[str, str]) -> str:
    if name not in departments:
        raise refusal("error-invalid-department")
    return departments[name]


class VisitorResource:
    """POST /api/v1/livechat/visitor: register a visitor, or update the one there is."""

    def __init__(self, store: storage.VisitorStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._check = schemas.checker("visitor")

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the visitor, who is on the disk by then."""
        body = read(req, self._check)
        try:
            visitor = self._store.register(**registration(body["visitor"], self._settings))
        except storage.TooManyFields:
            raise schemas.InvalidParams(
                f"Match error: Expected at most {storage.MAX_FIELDS} items"
                " in field visitor.customFields"
            ) from None
        resp.media = {"visitor": visitor, "success": True}


class Request(falcon.Request):
    """A request whose method, where no standard knows it, counts as one that no resource has.

    Falcon answers 400 to a made-up method; so it is 405 on a known path, and 404 elsewhere.
    """

    def __init__(self, env: dict[str, Any], options: falcon.RequestOptions | None = None) -> None:
        super().__init__(env, options)
        if self.method not in falcon.HTTP_METHODS:
            self.method = "TRACE"


class Common:
    """What every answer has: two headers, and one line in the log that names no client."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Start the clock of the log line."""
        req.context.start = time.perf_counter()

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Log the route's template, never the path: a path can hold a token."""
        resp.set_header("Cache-Control", "no-store")
        resp.set_header("X-Content-Type-Options", "nosniff")
        took = 1000 * (time.perf_counter() - req.context.start)
        status = falcon.http_status_to_code(resp.status)
        log.info("%s %s %d %.0f ms", req.method, req.uri_template or "-", status, took)


def create_app(store: storage.VisitorStore, settings: Settings) -> falcon.App[Any, Any]:
    """Return the WSGI application that serves `store` as `settings` say; nothing is opened."""
    app = falcon.App(middleware=[Common()], request_type=Request)
    compact = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    app.resp_options.media_handlers[falcon.MEDIA_JSON] = JSONHandler(dumps=compact)
    app.set_error_serializer(serialize_error)
    app.add_error_handler(Exception, answer_unforeseen)
    app.add_error_handler(schemas.InvalidParams, refuse_params)
    app.add_error_handler(storage.Unavailable, answer_unavailable)
    visitor = VisitorResource(store, settings)
    for path in ("/api/v1/livechat/visitor", "/api/v1/livechat/visitor/"):
        app.add_route(path, visitor)
    return app


def get_app() -> falcon.App[Any, Any]:
    """Return the application that the environment describes; gunicorn's `wsgi_app` calls it."""
    settings = Settings.from_environ()
    database = storage.Database(settings.database)
    atexit.register(database.close)  # who closes last moves the WAL into the database file
    return create_app(storage.VisitorStore(database, settings.match), settings)
