"""The service itself: what it is, whether it lives, and what its API is (contract, section 7)."""

from __future__ import annotations

from typing import Any

import falcon

import storage
from resources.errors import RETRY_AFTER, log_unavailable, to_json
from settings import VERSION

API_VERSION = "8.8"  # of the Rocket.Chat API that is spoken here, which clients check


class FixedResource:
    """GET of what never changes: `/api/info`, `/livez`, `/health`, `/api/openapi.json`."""

    def __init__(self, media: dict[str, Any]) -> None:
        self._body = to_json(media)  # once, as the OpenAPI document takes some milliseconds

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200; nothing is touched."""
        resp.data = self._body

    on_head = on_get


class IndexResource(FixedResource):
    """GET /: what this is, or for a browser the page."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200, or send to the page who would rather have HTML."""
        resp.append_header("Vary", "Accept")
        if req.client_prefers(("application/json", "text/html")) == "text/html":
            resp.status = falcon.HTTP_302
            resp.location = "/inbox"
        else:
            super().on_get(req, resp)

    on_head = on_get


INDEX = {
    "name": "livechat-visitors",
    "version": VERSION,
    "register": "POST /api/v1/livechat/visitor",
    "openapi": "/api/openapi.json",
    "success": True,
}
INFO = {"version": API_VERSION, "service": f"livechat-visitors {VERSION}", "success": True}
ALIVE = {"status": "ok"}


class ReadyResource:
    """GET /readyz: whether the database can be read."""

    def __init__(self, store: storage.VisitorStore) -> None:
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200, or 503 while the database is at fault."""
        try:
            self._store.ping()
            status = "ok"
        except storage.Unavailable as error:
            log_unavailable(error)
            status = "unavailable"
            resp.status = falcon.HTTP_503
            resp.set_header("Retry-After", str(RETRY_AFTER))
        resp.data = to_json({"status": status, "checks": {"database": {"status": status}}})

    on_head = on_get
