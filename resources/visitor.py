"""One visitor: register, read, erase, and the status that is only echoed (contract, 2 to 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import falcon

import schemas
import storage
from resources.body import read
from resources.errors import Refusal, log_erasure, refusal, to_json, unknown_token
from settings import Settings

GIVEN = [field.column for field in storage.FIELDS if field.given]  # keys of a registration


def registration(visitor: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return what `VisitorStore.register` takes, or raise the first refusal of contract 2.2."""
    token = visitor["token"]
    if not token.strip(storage.WHITE_SPACE):
        raise refusal("error-invalid-token", {"method": "livechat/visitor"})
    given = {key: visitor[key] for key in GIVEN if visitor.get(key)}
    if "email" in given:
        try:
            given["email"] = storage.normalize_email(given["email"])
        except ValueError as error:
            details = {"function": "Livechat.validateEmail", "email": str(error)}
            raise refusal("error-invalid-email", details) from None
    if "department" in given and settings.departments:
        given["department"] = _department(given["department"], settings.departments)
    return {"token": token, "given": given, "fields": visitor.get("customFields", ())}


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
            raise _unknown(req) from None
        resp.data = to_json({"visitor": visitor, "success": True})

    on_head = on_get

    def on_delete(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Answer 200 when the visitor's data is gone from the files."""
        try:
            erased = self._store.erase(_token(req))
        except storage.VisitorNotFound:
            raise _unknown(req) from None
        log_erasure(erased)
        resp.data = to_json({"visitor": erased, "success": True})


def _raw_token(req: falcon.Request) -> bytes:
    """Return all of the path behind `visitor/`, where falcon has stripped a slash."""
    path = req.env["PATH_INFO"].encode("latin-1")  # as PEP 3333 hands bytes over
    return bytes(path.partition(b"/livechat/visitor/")[2])


def _token(req: falcon.Request) -> str:
    """Return the token of the path; falcon's would have U+FFFD for bytes that are not UTF-8."""
    try:
        return _raw_token(req).decode()
    except UnicodeDecodeError:
        raise storage.VisitorNotFound from None


def _unknown(req: falcon.Request) -> Refusal:
    """Return the refusal of an unknown token: with a slash it is an unknown path.

    WSGI does not tell a slash of the path from an encoded one, which is part of a token.
    """
    return refusal("error-not-found") if b"/" in _raw_token(req) else unknown_token()


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
            raise unknown_token() from None
        resp.data = to_json({"token": body["token"], "status": body["status"], "success": True})
