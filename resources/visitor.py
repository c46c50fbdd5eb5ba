"""One visitor: register, read, erase, and the status that is only echoed (contract, 2 to 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import falcon

import schemas
import storage
from resources.body import read
from resources.errors import Refusal, log, refusal, to_json
from settings import Settings

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
    known = [field.column for field in storage.FIELDS if field.given]
    given = {key: visitor[key] for key in known if visitor.get(key)}
    if "email" in given:
        given["email"] = _email(given["email"])
    if "department" in given and settings.departments:
        given["department"] = _department(given["department"], settings.departments)
    return {"token": token, "given": given, "fields": visitor.get("customFields", ())}


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
        self._check = schemas.match_checker("visitor")

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the visitor, who is on the disk by then."""
        body = read(req, self._check)
        try:
            visitor = self._store.register(**registration(body["visitor"], self._settings))
        except storage.OverLimit as limit:
            raise schemas.match_limit(str(limit), "visitor.customFields") from None
        resp.data = to_json({"visitor": visitor, "success": True})


class VisitorByTokenResource:
    """GET and DELETE /api/v1/livechat/visitor/{token}: who knows the token, reads or erases."""

    def __init__(self, store: storage.VisitorStore) -> None:
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Answer 200 with the visitor."""
        try:
            visitor = self._store.find(_token(req))
        except storage.VisitorNotFound:
            raise invalid_token() from None
        resp.data = to_json({"visitor": visitor, "success": True})

    on_head = on_get

    def on_delete(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Answer 200 when the visitor's data is gone from the files."""
        try:
            erased = self._store.erase(_token(req))
        except storage.VisitorNotFound:
            raise invalid_token() from None
        log.info("Erased the visitor %s", erased["_id"])  # to be repeated after a restore
        resp.data = to_json({"visitor": erased, "success": True})


def _token(req: falcon.Request) -> str:
    """Return the token of the path, slashes included; falcon's would have U+FFFD for bad UTF-8."""
    path = req.env["PATH_INFO"].encode("latin-1")  # as PEP 3333 hands bytes over
    try:
        token: str = path.partition(b"/livechat/visitor/")[2].decode()
    except UnicodeDecodeError:
        raise storage.VisitorNotFound from None
    return token


def invalid_token() -> Refusal:
    """Return the refusal of a token that no visitor has."""
    return Refusal(400, {"error": "[invalid-token]", "errorType": "invalid-token"})


class VisitorStatusResource:
    """POST /api/v1/livechat/visitor.status: echo a status; the stored visitor does not change."""

    def __init__(self, store: storage.VisitorStore) -> None:
        self._store = store
        self._check = schemas.match_checker("visitor.status")

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the token and the status, whichever it is."""
        body = read(req, self._check)
        try:
            self._store.find(body["token"])
        except storage.VisitorNotFound:
            raise invalid_token() from None
        resp.data = to_json({"token": body["token"], "status": body["status"], "success": True})
