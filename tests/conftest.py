"""What several tests need: the real app on a real file, and the real server on a free port."""

import os
import signal
from contextlib import closing

import pytest

import manage
import storage
from tests.server import Server
from tests.service import Service

# A shell ignores interrupts for what it runs in the background, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the long versions: make soak")


@pytest.fixture
def often(request):
    """Return a function that says how often to repeat: `often(ci, soak)`."""
    return lambda ci, soak: soak if request.config.getoption("--soak") else ci


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
