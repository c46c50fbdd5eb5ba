"""The read side, for the one agent that is configured (contract, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from hmac import compare_digest
from typing import Any

import falcon

import schemas
import storage
from resources.body import parse
from resources.errors import bare_refusal, log_erasure, refusal, to_json, unauthorized
from settings import Settings

DEFAULT_COUNT = 50
MAX_COUNT = 100
DEFAULT_DAYS = 30
MAX_DAYS = 366


def authenticate(req: falcon.Request, agent: tuple[str, str] | None) -> None:
    """Raise 401 unless both headers are the agent's, which nobody's are without one."""
    sent = (req.get_header("X-User-Id") or "", req.get_header("X-Auth-Token") or "")
    wanted = agent or ("", "")
    # Both are compared, each in a time that does not tell where it differs; PEP 3333 hands
    # headers over as Latin-1, the environment is decoded as the file system is.
    same = [
        compare_digest(one.encode("latin-1"), other.encode("utf-8", "surrogateescape"))
        for one, other in zip(sent, wanted, strict=True)
    ]
    if agent is None or not all(same):
        raise unauthorized()


class AgentResource:
    """What the calls for the agent have in common: whom they answer, and their query parameters."""

    schema: str  # the file in schemas/ that describes the parameters

    def __init__(self, store: storage.VisitorStore, settings: Settings) -> None:
        self._store = store
        self._agent = settings.agent
        self._check = schemas.ajv_checker(self.schema)

    def _query(
        self, req: falcon.Request, numbers: Collection[str] = (), may_be_empty: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return the query parameters; raise 401, or the refusal of a wrong one.

        `numbers` are the keys of numbers; an empty one of `may_be_empty` counts as not given.
        """
        authenticate(req, self._agent)
        query = {
            key: _number(value) if key in numbers else value
            for key, value in req.params.items()
            if value or key not in may_be_empty
        }
        self._check(query)
        return query


class VisitorInfoResource(AgentResource):
    """GET and DELETE /api/v1/livechat/visitors.info: one visitor by `_id`."""

    schema = "visitors.info"

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the visitor, but for the token."""
        visitor = self._call(self._store.find, req)
        del visitor["token"]
        resp.data = to_json({"visitor": visitor, "success": True})

    on_head = on_get

    def on_delete(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 when the visitor's data is gone from the files."""
        erased = self._call(self._store.erase, req)
        log_erasure(erased)
        resp.data = to_json({"visitor": erased, "success": True})

    def _call(
        self, method: Callable[[str, str], dict[str, Any]], req: falcon.Request
    ) -> dict[str, Any]:
        """Return what a method of the store returns for the `_id` that is asked for."""
        query = self._query(req)
        try:
            return method(query["visitorId"], "id")
        except storage.VisitorNotFound:
            raise bare_refusal("visitor-not-found") from None


class VisitorSearchResource(AgentResource):
    """GET /api/v1/livechat/visitors.search: a page of the visitors that a term finds."""

    schema = "visitors.search"

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the page, and with the number of all that are found."""
        numbers = ("count", "offset")
        query = self._query(req, numbers, may_be_empty=numbers)
        count = int(min(query.get("count", 0), MAX_COUNT)) or DEFAULT_COUNT
        offset = int(min(query.get("offset", 0), storage.MAX_INTEGER))
        sort = _sort(query.get("sort", ""))
        visitors, total = self._store.search(query["term"], sort, offset, count)
        resp.data = to_json(
            {
                "visitors": visitors,
                "count": len(visitors),
                "offset": offset,
                "total": total,
                "success": True,
            }
        )

    on_head = on_get


class VisitorStatisticsResource(AgentResource):
    """GET /api/v1/livechat/visitors.statistics: how many there are, and of which day."""

    schema = "visitors.statistics"

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the numbers, and with a time that moves on with every change."""
        query = self._query(req, ("days",))
        days = int(min(query.get("days", 0), MAX_DAYS)) or DEFAULT_DAYS
        resp.data = to_json({**self._store.statistics(days), "success": True})

    on_head = on_get


def _number(text: str | list[str]) -> Any:
    """Return the number that `text` is in JSON, else `text`, which the schema then refuses."""
    try:
        number = parse(str(text).encode())
    except ValueError:
        return text
    return number if isinstance(number, int | float) and not isinstance(number, bool) else text


def _sort(text: str) -> dict[str, int]:
    """Return the keys to sort by that we have, each with 1 or -1; raise a refusal."""
    try:
        sort = parse(text.encode()) if text else {}
        if all(type(way) in (int, float) and way in (1, -1) for way in sort.values()):
            return {key: sort[key] for key in sort if key in storage.SORTABLE}
    except (AttributeError, ValueError):
        pass
    details = {"helperMethod": "parseJsonQuery"}
    raise refusal("error-invalid-sort", details, sort=text[: schemas.QUOTED])
