"""The errors of answers: status, text and shape, and how they are logged; but for schemas/'s."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import falcon

import schemas
import storage

MAX_BODY = 65_536  # bytes
RETRY_AFTER = 5  # seconds

# A child of gunicorn's logger: the lines go where gunicorn's own go, in its format.
log = logging.getLogger("gunicorn.error.livechat")

# The refusals, by their type: the status and the text, which the type in brackets follows, as
# Meteor has it. The wording of what a JSON schema refuses is in schemas/.
REFUSALS = {
    "error-invalid-token": (400, "Token cannot be empty"),
    "error-invalid-email": (400, "Invalid email {email}"),
    "error-invalid-department": (400, "The provided department is invalid"),
    "error-invalid-sort": (400, 'Invalid sort parameter provided: "{sort}"'),
    "error-invalid-json": (400, "The request body is not valid JSON: {reason}"),
    "error-incomplete-body": (400, "The request body is incomplete"),
    "error-standin-refused": (
        403,
        "Only programs on this machine are admitted, with LIVECHAT_STANDIN=any those on others too,"
        " but no web pages",
    ),
    "error-not-found": (404, "Resource not found"),
    "error-method-not-allowed": (405, "Method not allowed"),
    "error-request-timeout": (408, "The request did not come in time"),
    "error-body-too-large": (413, f"The request body is larger than {MAX_BODY} bytes"),
    "error-unsupported-media-type": (415, "The request body must {rule}"),
    "error-too-many-requests": (
        429,
        "Error, too many requests. Please slow down."
        " You must wait {seconds} seconds before trying this endpoint again.",
    ),
    "error-internal": (500, "Internal server error"),
    "error-not-supported": (501, "Only the service's own server delays and drops requests"),
    "error-database-unavailable": (503, "The visitor database is unavailable"),
}
# The refusals whose type is "error-invalid-request": what is not HTTP, or beyond a limit.
INVALID_REQUESTS = {
    "unknown": (400, "The request is invalid"),
    "not HTTP": (400, "The request is not valid HTTP: {}"),
    "empty lines": (400, "There are too many empty lines before the request"),
    "no host": (400, "The request has no Host header"),
    "twice": (400, "The request has two {} headers"),
    "version": (400, "The request's version of HTTP is neither 1.0 nor 1.1"),
    "URL": (400, "The request's URL is not valid"),
    "coding in 1.0": (400, "A request in HTTP/1.0 has a Transfer-Encoding"),
    "long URL": (414, "The request's URL is longer than {} bytes"),
    "expect": (417, "The request's Expect is not 100-continue"),
    "large field": (431, "A header field is larger than {} bytes"),
    "many fields": (431, "The request has more than {} header fields"),
    "large head": (431, "The request's head is larger than {} bytes"),
    "coding": (501, "The request's Transfer-Encoding is not chunked"),
}


def to_json(value: Any) -> bytes:
    """Return a value as every body has it: compact JSON in UTF-8."""
    return storage.to_json(value).encode()


class Refusal(falcon.HTTPError):
    """An answer in the contract's failure shape; `body` is what follows `success`."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status)
        self.body = {"success": False, **body}


def refusal(kind: str, details: dict[str, str] | None = None, **values: object) -> Refusal:
    """Return the refusal of that type; `details` are answered, and both fill in its text."""
    status, text = REFUSALS[kind]
    error = f"{text.format(**(details or {}), **values)} [{kind}]"
    shown = {"details": details} if details else {}
    return Refusal(status, {"error": error, "errorType": kind, **shown})


def invalid_request(rule: str, value: object = "") -> Refusal:
    """Return the refusal of a request that breaks a rule of HTTP; `value` quotes no data."""
    status, text = INVALID_REQUESTS[rule]
    kind = "error-invalid-request"
    return Refusal(status, {"error": f"{text.format(value)} [{kind}]", "errorType": kind})


def bare_refusal(kind: str, error: str | None = None) -> Refusal:
    """Return a 400 that says its type and no more, as Rocket.Chat does for some."""
    return Refusal(400, {"error": error or kind, "errorType": kind})


def unknown_token() -> Refusal:
    """Return the refusal of a token that no visitor has; custom fields have their own."""
    return bare_refusal("invalid-token", "[invalid-token]")


def unauthorized() -> Refusal:
    """Return the 401, which has a shape of its own, as Rocket.Chat's has."""
    error = "You must be logged in to do this."
    return Refusal(401, {"error": error, "status": "error", "message": error})


def serialize_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """Give every error its body: JSON in one shape, whatever the client accepts."""
    if not isinstance(error, Refusal):  # falcon's own: unknown paths, wrong methods, bad headers
        types = {404: "error-not-found", 405: "error-method-not-allowed"}
        kind = types.get(falcon.http_status_to_code(error.status))
        error = refusal(kind) if kind else invalid_request("unknown")
    if error.status == 503:
        resp.set_header("Retry-After", str(RETRY_AFTER))
    resp.data = to_json(error.body)


def answer_wrong_method(
    req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: dict[str, Any]
) -> None:
    """Answer 405; but 404 to a POST below `visitor/`, as Rocket.Chat has no such path."""
    if req.method == "POST" and "token" in params:
        raise refusal("error-not-found")
    raise error


def refuse_params(
    req: falcon.Request, resp: falcon.Response, error: schemas.InvalidParams, params: Any
) -> None:
    """Answer what a schema refused."""
    raise Refusal(400, {"error": str(error), "errorType": "invalid-params"})


def log_erasure(erased: dict[str, Any]) -> None:
    """Log whose data was erased, by `_id` alone, so that it can be repeated after a restore."""
    log.info("Erased the visitor %s", erased["_id"])


def log_unavailable(error: storage.Unavailable) -> None:
    """Say what is at fault, which SQLite words without any data, and what to do."""
    log.error("The visitor database is unavailable: %s", error)


def answer_unavailable(
    req: falcon.Request, resp: falcon.Response, error: storage.Unavailable, params: Any
) -> None:
    """Answer a fault of the database."""
    log_unavailable(error)
    raise refusal("error-database-unavailable")


def answer_unforeseen(
    req: falcon.Request, resp: falcon.Response, error: Exception, params: Any
) -> None:
    """Answer a bug."""
    log_unforeseen(error)
    raise refusal("error-internal")


def log_unforeseen(error: Exception) -> None:
    """Log a bug: where it happened, and not its text, which could quote the visitor."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.critical("Unforeseen %s, please report it:\n%s", type(error).__name__, frames)
