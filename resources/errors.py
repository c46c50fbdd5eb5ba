"""The shape of an error, in one place (contract, section 1): errors are raised, never returned."""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any

import falcon

import schemas
import storage

MAX_BODY = 65_536  # bytes
RETRY_AFTER = 5  # seconds

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: Any) -> bytes:
    """Return a value as every body has it: compact JSON in UTF-8."""
    return _encode(value).encode()


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
    "error-request-timeout": (408, "The request did not come in time"),
    "error-body-too-large": (413, f"The request body is larger than {MAX_BODY} bytes"),
    "error-unsupported-media-type": (415, "The request body must be sent as application/json"),
    "error-internal": (500, "Internal server error"),
    "error-database-unavailable": (503, "The visitor database is unavailable"),
}


class Refusal(falcon.HTTPError):
    """An answer in the contract's failure shape; `body` is what follows `success`."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status)
        self.body = {"success": False, **body}


def refusal(error_type: str, **details: str) -> Refusal:
    """Return the refusal of that type, worded as Meteor does: with its type in brackets."""
    status, reason = REFUSALS[error_type]
    error = f"{reason.format(**details)} [{error_type}]"
    more = {"details": details} if details else {}
    return Refusal(status, {"error": error, "errorType": error_type, **more})


def invalid_request(reason: str, status: int = 400) -> Refusal:
    """Return the refusal of what is not HTTP, or beyond a limit; `reason` quotes no data."""
    kind = "error-invalid-request"
    return Refusal(status, {"error": f"{reason} [{kind}]", "errorType": kind})


def bare_refusal(error_type: str) -> Refusal:
    """Return a 400 that says its type and no more, as Rocket.Chat does for some."""
    return Refusal(400, {"error": error_type, "errorType": error_type})


def serialize_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """Give every error its body: JSON in one shape, whatever the client accepts."""
    if not isinstance(error, Refusal):  # falcon's own: unknown paths, wrong methods, bad headers
        types = {404: "error-not-found", 405: "error-method-not-allowed"}
        status = falcon.http_status_to_code(error.status)
        error = refusal(types.get(status, "error-invalid-request"))
    if error.status == 503:
        resp.set_header("Retry-After", str(RETRY_AFTER))
    resp.data = to_json(error.body)


def refuse_params(
    req: falcon.Request, resp: falcon.Response, error: schemas.InvalidParams, params: Any
) -> None:
    """Answer what a schema refused."""
    raise Refusal(400, {"error": str(error), "errorType": "invalid-params"})


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
