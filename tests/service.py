"""The real app on a real file, without a server, whose every answer is held against OpenAPI."""

import json

from webtest import TestApp

import storage
from app import create_app
from settings import Settings
from tests import openapi
from tests.server import PATH


class CheckedApp(TestApp):
    """Holds every answer against the OpenAPI document."""

    def do_request(self, req, status=None, expect_errors=None):
        answer = super().do_request(req, status, expect_errors)
        if req.method in ("GET", "HEAD", "POST", "DELETE"):
            is_json = answer.body and answer.content_type == "application/json"
            body = answer.json if is_json else answer.text
            path = req.environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
            openapi.check(req.method, path, answer.status_int, answer.headers, body)
        return answer


class Service:
    """The app that `environ` describes, on the database at `path`; `now` is its clock, in ms."""

    def __init__(self, path, environ):
        settings = Settings.from_environ({"LIVECHAT_DB": str(path), **environ})
        storage.prepare(settings.database, settings.match)
        self.now = 1_656_482_701_392
        self.database = storage.Database(settings.database)
        store = storage.VisitorStore(
            self.database, settings.match, settings.custom_fields, clock=lambda: self.now
        )
        self.http = CheckedApp(create_app(store, settings, clock=lambda: self.now))

    def post(self, body, path=PATH, content_type="application/json", **headers):
        """Send `body`, bytes as they are and all else as JSON; return the answer, whatever it is."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if content_type:
            headers["Content-Type"] = content_type
        return self.http.request(
            path, method="POST", body=data, headers=headers, expect_errors=True
        )

    def register(self, token, **fields):
        """Register a visitor, which has to go well; return the visitor of the answer."""
        answer = self.post({"visitor": {"token": token, **fields}})
        assert answer.status_int == 200, answer.text
        return answer.json["visitor"]

    def refused(self, body):
        """Send a body that has to be refused with 400 and write nothing; return the answer's."""
        before = self.content()
        answer = self.post(body)
        assert answer.status_int == 400, answer.text
        assert self.content() == before
        return answer.text

    def content(self):
        """Return every row of every table."""
        return self.database.read(
            lambda connection: [
                connection.execute(f"SELECT * FROM {table}").fetchall()
                for table in ("visitor", "guest", "day")
            ]
        )
