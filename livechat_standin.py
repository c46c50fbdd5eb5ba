"""livechat-visitors as a stand-in for Rocket.Chat in tests (docs/standin.md).

Link or copy this file beside your tests: it needs nothing but Python's standard library, and runs
the service from its checkout. It is a pytest plugin with the fixture `livechat`; `start` is a
context manager for other tests; `python livechat_standin.py [CHECKOUT] [NAME=value ...]` is a
command for any language, which prints the URL and ends with its parent or its standard input.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen, run
from typing import Any

# What would change the service, or keep it from starting, when it was set for something else.
FOREIGN = ("LIVECHAT_", "PYTHON", "GUNICORN_", "PORT", "WEB_CONCURRENCY", "MAKE")


class Standin:
    """A running service at `url`, which logs into the file `log_path`."""

    def __init__(self, url: str, log_path: str) -> None:
        self.url = url
        self.log_path = log_path

    def reset(self) -> None:
        """Forget all visitors, requests and failures; the next guest is guest-2 again."""
        self._call("DELETE", "/standin/visitors")

    def visitors(self) -> list[dict[str, Any]]:
        """Return the newest 1,000 visitors, in the order of creation."""
        return list(self._call("GET", "/standin/visitors")["visitors"])

    def requests(self) -> list[dict[str, Any]]:
        """Return the last 1,000 requests: method, route, path, headers, body and status."""
        return list(self._call("GET", "/standin/requests")["requests"])

    def fail(self, **failure: Any) -> None:
        """Let the next requests fail: `route`, `method`, `status`, `delay`, `drop`, `times`."""
        self._call("POST", "/standin/failures", json.dumps(failure))

    def _call(self, method: str, path: str, body: str | None = None) -> Any:
        # http.client, as urllib would ask the proxy that the environment names.
        client = http.client.HTTPConnection(self.url.partition("//")[2], timeout=30)
        with contextlib.closing(client):
            client.request(method, path, body, {"Content-Type": "application/json"})
            answer = client.getresponse()
            found = json.loads(answer.read())
        if answer.status != 200:
            raise ValueError(f"{method} {path}: {found['error']}")
        return found


@contextlib.contextmanager
def start(checkout: str = "", **settings: str) -> Iterator[Standin]:
    """Yield a `Standin` with a port and a database of its own.

    `checkout` is the folder of livechat-visitors; by default that of LIVECHAT_STANDIN_HOME, or of
    this file. `settings` are environment variables for the service. Raise `RuntimeError` with one
    line that says why it does not start.
    """
    command = [sys.executable, "-I", os.path.abspath(__file__)]
    command += [f"{name}={value}" for name, value in settings.items()]
    command += [checkout] if checkout else []
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:  # noqa: S603 # this very file
        output: Any = process.stdout
        errors: Any = process.stderr
        try:
            url, log_path = output.readline().strip(), output.readline().strip()
            if not log_path:
                raise RuntimeError(errors.read().strip())
            yield Standin(url, log_path)
        finally:
            process.terminate()
            output.read()  # which ends with the last of its processes


def main() -> None:
    """Become the service; a forked child prints its URL, watches the parent and stops it."""
    parent, master = os.getppid(), os.getpid()
    environ = {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN)}
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    folders += [os.environ.get("LIVECHAT_STANDIN_HOME", ""), f"{os.path.realpath(__file__)}/.."]
    checkout = os.path.realpath(next(filter(None, folders)))
    _prepare(checkout, environ)
    folder = tempfile.mkdtemp(prefix="livechat-")
    environ |= {"LIVECHAT_DB": f"{folder}/livechat.db", "LIVECHAT_STANDIN": "1"}
    environ["LIVECHAT_MATCH"] = "token,phone,email"  # as Rocket.Chat's
    environ |= dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    # As the socket is bound here and handed over, no other server can get the port, and early
    # clients wait for the start.
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        standin = Standin(f"http://127.0.0.1:{listener.getsockname()[1]}", f"{folder}/livechat.log")
        log = os.open(standin.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if os.fork():
            for copy, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
                os.dup2(descriptor, copy)
            listener.set_inheritable(True)
            os.chdir(checkout)
            command = [f"{checkout}/.venv/bin/python", "-m", "gunicorn", "--graceful-timeout", "1"]
            command += ["--bind", f"fd://{listener.fileno()}"]
            os.execve(command[0], command, environ)  # noqa: S606 # no shell is wanted
    _watch(standin, folder, master, parent)


def _prepare(checkout: str, environ: dict[str, str]) -> None:
    """Make the checkout's environment at its first use, or exit with one line that says why not."""
    if not os.path.exists(f"{checkout}/gunicorn.conf.py"):
        sys.exit(f"{checkout} is no livechat-visitors: name its folder in LIVECHAT_STANDIN_HOME")
    lock = os.open(checkout, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as several may start at one moment
    if not os.path.exists(f"{checkout}/.venv/run"):
        if not shutil.which("make"):
            sys.exit(f"make, which prepares {checkout}, is not installed")
        python = sys.executable if sys.version_info >= (3, 11) else "python3"
        command = ["make", "-s", "-C", checkout, ".venv/run", f"PYTHON={python}"]
        made = run(command, env=environ, capture_output=True, text=True)  # noqa: S603 # our own words
        if made.returncode:
            sys.exit(" ".join((made.stdout + made.stderr).split())[:500])
    os.close(lock)


def _watch(standin: Standin, folder: str, master: int, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # this ends after the service, which gets them too
    try:
        standin.requests()
        print(standin.url, standin.log_path, sep="\n", flush=True)
        while os.getppid() == master and _is_there(parent):
            pass
    except (OSError, ValueError, http.client.HTTPException):
        lines = Path(standin.log_path).read_text(errors="replace").split("\n")
        print("The service does not start:", *lines[-2:], file=sys.stderr)
    while os.getppid() == master:
        os.kill(master, signal.SIGTERM)
        time.sleep(0.05)
    while os.path.exists(folder):  # the worker, which ends after a killed master, may write there
        shutil.rmtree(folder, ignore_errors=True)


def _is_there(parent: int) -> bool:
    """Wait a moment; return whether the parent is there, and the pipe to it, if there is one."""
    mode = os.fstat(0).st_mode
    pipe = [0] if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else []
    if select.select(pipe, [], [], 0.05)[0] and not os.read(0, 65_536):
        return False
    try:
        os.kill(parent, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is another user's, and there
    return True


if __name__ == "__main__":
    main()
    sys.exit()
try:
    import pytest
except ImportError:
    pass  # whoever tests with something else has `start`
else:
    TESTED = pytest.StashKey[tuple[str, int]]()  # the log, and its size before the test
    SHARED = pytest.StashKey[Standin]()

    def pytest_addoption(parser: pytest.Parser) -> None:
        """Add what pytest.ini may hold, or `-o NAME=value`."""
        parser.addini("livechat_settings", "NAME=value for the service, a line each", "linelist")
        parser.addini("livechat_shared", "one stand-in for all workers of pytest-xdist", "bool")

    def _start(config: pytest.Config) -> Any:
        return start(**dict(line.split("=", 1) for line in config.getini("livechat_settings")))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(node: Any) -> None:
        """Tell a worker of pytest-xdist of the shared stand-in, if that is asked for."""
        config = node.config
        if config.getini("livechat_shared") and SHARED not in config.stash:
            stack = contextlib.ExitStack()
            config.add_cleanup(stack.close)
            try:
                config.stash[SHARED] = stack.enter_context(_start(config))
            except RuntimeError as error:
                raise pytest.UsageError(str(error)) from None
        if SHARED in config.stash:
            node.workerinput["livechat"] = vars(config.stash[SHARED])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(item: pytest.Item) -> Any:
        """Show the log with a test that fails."""
        report = (yield).get_result()
        if report.failed and TESTED in item.stash:
            path, size = item.stash[TESTED]
            log = Path(path).read_bytes()[size:].decode(errors="replace")
            report.sections.append(("Log of livechat-visitors", log))

    @pytest.fixture(scope="session")
    def livechat_server(pytestconfig: pytest.Config) -> Iterator[Standin]:
        """Yield the stand-in of the session, which this fixture does not reset."""
        shared = getattr(pytestconfig, "workerinput", {}).get("livechat")
        with contextlib.ExitStack() as stack:
            try:
                standin = Standin(**shared) if shared else stack.enter_context(_start(pytestconfig))
            except RuntimeError as error:
                pytest.fail(str(error), pytrace=False)
            yield standin

    @pytest.fixture
    def livechat(request: pytest.FixtureRequest, livechat_server: Standin) -> Standin:
        """Return the stand-in; it is reset before each test, unless workers share it."""
        if not request.config.getini("livechat_shared"):
            livechat_server.reset()
        path = livechat_server.log_path
        request.node.stash[TESTED] = (path, os.path.getsize(path))
        return livechat_server
