"""A stand-in for Rocket.Chat: reset, look at what came, fail on demand (contract, section 10).

Nothing here runs unless `LIVECHAT_STANDIN` is set. What came is kept in memory only.
"""

from __future__ import annotations

import io
import re
import threading
from collections import deque
from typing import Any

import falcon

import schemas
import storage
from resources.body import read, receive
from resources.errors import MAX_BODY, log, refusal, to_json
from resources.rate_limit import set_headers
from settings import VERSION, Settings

PREFIX = "/standin/"
NAMES = ("visitors", "requests", "failures")  # of the routes below it
MOST = 1_000  # requests and failures that are kept, and visitors that are answered
WAIT = 1  # second that a 429 says to wait: the test of a client that does so stays quick
LOOPBACK = re.compile(r"(::ffff:)?127\..+|::1")
# What this machine is called by its own programs; a web page whose name leads here has another.
HOST = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d*)?", re.IGNORECASE)
UNSHOWN = {"CONNECTION", "CONTENT-LENGTH", "HOST", "TRANSFER-ENCODING"}  # headers
FAILURES = {  # what a status says
    404: "error-not-found",
    429: "error-too-many-requests",
    500: "error-internal",
    503: "error-database-unavailable",
}


class Standin:
    """The resource of every route below /standin/, and falcon's middleware for all others.

    `names` has the resource of each of the others with the route as the documents write it.
    """

    def __init__(
        self, store: storage.VisitorStore, settings: Settings, names: dict[Any, str]
    ) -> None:
        self._store = store
        self._names = names
        self._any = settings.standin == "any"
        self._check = schemas.ajv_checker("standin.failures")
        self._requests: deque[dict[str, Any]] = deque(maxlen=MOST)
        self._failures: deque[dict[str, Any]] = deque(maxlen=MOST)
        self._lock = threading.Lock()
        whoever = "whoever reaches this service" if self._any else "every program on this machine"
        log.warning("LIVECHAT_STANDIN: %s can read and delete all visitors at /standin/", whoever)

    def on_get_visitors(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the newest 1,000 `visitors`, in the order of creation."""
        resp.data = to_json({"visitors": self._store.newest(MOST), "success": True})

    on_head_visitors = on_get_visitors

    def on_delete_visitors(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Forget all visitors, requests and failures; the next guest is guest-2 again."""
        self._store.reset()
        self._failures.clear()
        self._requests.clear()
        resp.data = to_json({"success": True})

    def on_get_requests(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the last 1,000 `requests`, the oldest first; `status` is null for no answer."""
        resp.data = to_json({"requests": list(self._requests), "success": True})

    on_head_requests = on_get_requests

    def on_post_failures(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Let the next requests fail; answer all `failures` that are still to come."""
        failure = read(req, self._check)
        handler = f"on_{failure.get('method', '').lower()}"
        if not any(
            failure.get("route", name) == name
            and ("method" not in failure or hasattr(resource, handler))
            for resource, name in self._names.items()
        ):
            raise schemas.InvalidParams("must be a route and a method of it [invalid-params]")
        if not failure.keys().isdisjoint({"delay", "drop"}) and "livechat.drop" not in req.env:
            raise refusal("error-not-supported")
        self._failures.append({"times": 1, **failure})
        resp.data = to_json({"failures": list(self._failures), "success": True})

    def on_delete_failures(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Forget all failures."""
        self._failures.clear()
        resp.data = to_json({"success": True})

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Keep the request, and its body for whoever reads it next."""
        if req.path.startswith(PREFIX):
            return
        data = b""
        if (req.content_length or 0) <= MAX_BODY:
            data, complete = receive(req)
            if complete:
                req.stream = io.BytesIO(data)
        headers = {name.lower(): text for name, text in req.headers.items() if name not in UNSHOWN}
        path = req.env.get("RAW_URI", req.relative_uri)
        req.context.kept = {"method": req.env["REQUEST_METHOD"], "route": None, "path": path}
        req.context.kept |= {"headers": headers, "body": data.decode(errors="replace")}
        req.context.kept["status"] = None  # for now
        self._requests.append(req.context.kept)

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raise the failure that is asked for, or 403 for who may not ask for one."""
        if resource is self:
            near = (
                LOOPBACK.fullmatch(req.remote_addr)
                and HOST.fullmatch(req.get_header("Host", default="localhost"))
                and not req.get_header("X-Forwarded-For")
            )
            if req.get_header("Origin") or not (near or self._any):
                raise refusal("error-standin-refused")
            return
        route = req.context.kept["route"] = self._names[resource]
        failure = {}
        if hasattr(resource, f"on_{req.method.lower()}"):  # no wrong method, and no preflight
            failure = self._take(route, req.method)
        if "delay" in failure:
            req.env["livechat.sleep"](failure["delay"])
        if "drop" in failure:
            log.info("Dropped, as was asked for:")
            del req.context.kept  # so that its status stays null
            req.env["livechat.drop"]()
            raise refusal("error-internal")  # which nobody gets
        if failure.get("status") == 429:
            set_headers(resp, 5, 0, storage.milliseconds() + 1000 * WAIT)
            resp.set_header("Retry-After", str(WAIT))
        if "status" in failure:
            raise refusal(FAILURES[failure["status"]], seconds=WAIT)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Keep how the request was answered."""
        if "kept" in req.context:
            req.context.kept["status"] = falcon.http_status_to_code(resp.status)

    def _take(self, route: str, method: str) -> dict[str, Any]:
        """Return the oldest failure that is for a request, and count it; {} for none."""
        with self._lock:
            for failure in list(self._failures):  # as another thread may add one
                if failure.get("route", route) == route and failure.get("method", method) == method:
                    failure["times"] -= 1
                    if not failure["times"]:
                        self._failures.remove(failure)
                    return failure
        return {}


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of a stand-in."""
    document = schemas.openapi(VERSION)
    failure = {"application/json": {"schema": {"$ref": "#/components/schemas/Failure"}}}
    refused = {"description": "Why not.", "content": failure}
    for name in NAMES:
        item = document["paths"][PREFIX + name] = {}
        for method in ("get", "post", "delete"):
            if handler := getattr(Standin, f"on_{method}_{name}", None):
                item[method] = {"summary": handler.__doc__, "tags": ["service"]}
                item[method]["responses"] = {"200": {"description": "Done."}, "default": refused}
    body = {"application/json": {"schema": schemas.load("standin.failures")}}
    document["paths"][f"{PREFIX}failures"]["post"]["requestBody"] = {"content": body}
    return document
