"""The HTTP side: every route, and what all answers have in common."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from typing import Any

import falcon

import schemas
import storage
from resources import custom_fields, errors, inbox, service, standin, visitor, visitors
from resources.body import BodyLimit
from resources.errors import log
from resources.rate_limit import RateLimit
from settings import VERSION, SettingError, Settings


class Request(falcon.Request):
    """A request that falcon takes for what it is.

    A method that no standard knows counts as one that no resource has, for falcon answers it with
    400; so it is 405 on a known path, and 404 elsewhere. A path that begins with several slashes
    is unknown, for falcon takes them for one.
    """

    def __init__(self, env: dict[str, Any], options: falcon.RequestOptions | None = None) -> None:
        super().__init__(env, options)
        if self.method not in falcon.HTTP_METHODS:
            self.method = "TRACE"
        if env["PATH_INFO"].startswith("//"):
            self.path = "/%2F"  # no route has it: falcon has decoded the path by now


class Common:
    """What every answer has: its headers, and one line in the log that names no client."""

    def __init__(self, settings: Settings) -> None:
        # Which answer a browser gets then depends on its origin, and a cache has to know.
        self._varies = settings.cors_origins != "*"

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Start the clock of the log line."""
        req.context.start = time.perf_counter()

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Log the route's template, never the path: a path can hold a token."""
        resp.set_header("Cache-Control", "no-store")
        resp.set_header("X-Content-Type-Options", "nosniff")
        if self._varies:
            resp.append_header("Vary", "Origin")
        took = 1000 * (time.perf_counter() - req.context.start)
        status = falcon.http_status_to_code(resp.status)
        log.info("%s %s %d %.0f ms", req.method, template(req.uri_template), status, took)


def template(route: str | None) -> str:
    """Return a route as the documents write it, without falcon's converters; "-" for none."""
    return (route or "-").replace(":path}", "}")


def routes(store: storage.VisitorStore, settings: Settings) -> dict[str, object]:
    """Return the resource of every path."""
    return {
        "/": service.IndexResource(service.INDEX),
        "/inbox": inbox.InboxResource(settings),
        "/livez": service.FixedResource(service.ALIVE),
        "/health": service.FixedResource(service.ALIVE),
        "/readyz": service.ReadyResource(store),
        "/api/info": service.FixedResource(service.INFO),
        "/api/openapi.json": service.FixedResource(schemas.openapi(VERSION)),
        "/api/v1/livechat/visitor": visitor.VisitorResource(store, settings),
        "/api/v1/livechat/visitor/{token:path}": visitor.VisitorByTokenResource(store),
        "/api/v1/livechat/visitor.status": visitor.VisitorStatusResource(store),
        "/api/v1/livechat/custom.field": custom_fields.CustomFieldResource(store),
        "/api/v1/livechat/custom.fields": custom_fields.CustomFieldsResource(store),
        "/api/v1/livechat/visitors.info": visitors.VisitorInfoResource(store, settings),
        "/api/v1/livechat/visitors.search": visitors.VisitorSearchResource(store, settings),
        "/api/v1/livechat/visitors.statistics": visitors.VisitorStatisticsResource(store, settings),
    }


def create_app(
    store: storage.VisitorStore,
    settings: Settings,
    clock: Callable[[], int] = storage.milliseconds,
) -> falcon.App[Any, Any]:
    """Return the WSGI application that serves `store` as `settings` say; nothing is opened.

    `clock` returns milliseconds since 1970, by which the rate limit counts.
    """
    middleware: list[Any] = [falcon.CORSMiddleware(settings.cors_origins), Common(settings)]
    served = routes(store, settings)
    if settings.standin:
        served["/api/openapi.json"] = service.FixedResource(standin.openapi())
        names = {resource: template(route) for route, resource in served.items()}
        own = standin.Standin(store, settings, names)
        middleware.append(own)
    if settings.rate_limit:
        middleware.append(RateLimit(settings.rate_limit, settings.trusted_proxies, clock))
    middleware.append(BodyLimit())
    app = falcon.App(middleware=middleware, request_type=Request)
    app.req_options.strip_url_path_trailing_slash = True  # a token keeps it: see visitor.py
    app.set_error_serializer(errors.serialize_error)
    app.add_error_handler(Exception, errors.answer_unforeseen)
    app.add_error_handler(falcon.HTTPMethodNotAllowed, errors.answer_wrong_method)
    app.add_error_handler(schemas.InvalidParams, errors.refuse_params)
    app.add_error_handler(storage.Unavailable, errors.answer_unavailable)
    for path, resource in served.items():
        app.add_route(path, resource)
    for name in standin.NAMES if settings.standin else ():
        app.add_route(standin.PREFIX + name, own, suffix=name)
    return app


def serve(database: storage.Database, settings: Settings) -> falcon.App[Any, Any]:
    """Return the application that serves the visitors in `database` as `settings` say."""
    store = storage.VisitorStore(database, settings.match, settings.custom_fields)
    return create_app(store, settings)


def read_settings() -> Settings:
    """Return what the environment configures. Exit with one line where it is invalid."""
    try:
        return Settings.from_environ()
    except SettingError as error:
        sys.exit(str(error))


def prepare(settings: Settings) -> None:
    """Create or upgrade the database; log where it is, what it holds, and what is configured.

    Exit with one line where the database cannot be used.
    """
    try:
        new, visitors = storage.prepare(settings.database, settings.match)
    except storage.PrepareError as error:
        sys.exit(str(error))
    if new:
        log.info("new database at %s", settings.database)
    else:
        log.info("opened %s (%d visitors)", settings.database, visitors)
    log.info("configured: %s", " ".join(settings.configured) or "nothing")
    if settings.agent is None:
        log.info("LIVECHAT_AGENT is not set: /inbox and the calls for the agent answer nobody")
    if settings.unknown:
        log.warning("unknown variables, which have no effect: %s", " ".join(settings.unknown))


def open_app(settings: Settings) -> falcon.App[Any, Any]:
    """Return the application on the prepared database, which is closed when the process ends."""
    database = storage.Database(settings.database)
    atexit.register(database.close)  # which moves the WAL into the database file
    return serve(database, settings)


def get_app() -> falcon.App[Any, Any]:
    """Return the application that the environment describes, for any WSGI server with threads.

    Exit with one line where the environment or the database is not as it has to be.
    """
    settings = read_settings()
    prepare(settings)
    return open_app(settings)
