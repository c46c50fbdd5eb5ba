"""What several tests need: the real app on a real file, and the real server on a free port."""

import json
import os
import signal
from contextlib import closing

import pytest
from webtest import TestApp

import manage
import storage
from app import create_app
from settings import Settings
from tests import openapi
from tests.server import Server

PATH = "/api/v1/livechat/visitor"

# A shell ignores interrupts for what it runs in the background, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the long versions: make soak")


@pytest.fixture
def often(request):
    """Return a function that says how often to repeat: `often(ci, soak)`."""
    return lambda ci, soak: soak if request.config.getoption("--soak") else ci


class CheckedApp(TestApp):
    """Holds every answer against the OpenAPI document."""

    def do_request(self, req, status=None, expect_errors=None):
        answer = super().do_request(req, status, expect_errors)
        if req.method in ("GET", "HEAD", "POST", "DELETE"):
            body = None if req.method == "HEAD" else answer.json
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
                for table in ("visitor", "guest")
            ]
        )


@pytest.fixture
def make_service(tmp_path):
    services = []

    def make(path=tmp_path / "livechat.db", **environ):
        services.append(Service(path, environ))
        return services[-1]

    yield make
    for service in services:
        service.database.close()


@pytest.fixture
def service(make_service):
    return make_service()


@pytest.fixture
def make_server(tmp_path):
    servers = []

    def make(**options):
        servers.append(Server(tmp_path, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
def server(make_server):
    return make_server().wait()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "livechat.db")


@pytest.fixture
def run(path, capsys, monkeypatch):
    """Run a command in this process; return exit status, stdout and stderr."""
    monkeypatch.setenv("LIVECHAT_DB", path)
    monkeypatch.chdir(os.path.dirname(path))

    def run(*arguments):
        capsys.readouterr()
        status = manage.main(map(str, arguments))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def fill(path):
    """Register visitors at a time; return the store's answers."""

    def fill(*visitors, at=1_656_482_701_392, path=path):
        storage.prepare(path)
        with closing(storage.Database(path)) as database:
            store = storage.VisitorStore(database, clock=lambda: at)
            answers = []
            for visitor in visitors:
                token, given, *fields = visitor
                answers.append(store.register(token, given, fields))
        return answers

    return fill
