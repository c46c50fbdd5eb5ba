"""livechat_standin.py as other projects use it (docs/standin.md), in folders of their own."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import livechat_standin
from tests.server import PATH, ROOT, wait_until

KIT = "livechat_standin.py"
XDIST = ("-p", "xdist", "-n2")
REGISTER = f"""
import json, urllib.error, urllib.request

def register(url, token):
    data = json.dumps({{"visitor": {{"token": token}}}}).encode()
    request = urllib.request.Request(url + "{PATH}", data, {{"Content-Type": "application/json"}})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["visitor"]["username"]
"""


@pytest.fixture
def project(tmp_path):
    """Return a folder that has nothing of ours but a link to the kit, and modules named as ours."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / KIT).symlink_to(ROOT / KIT)
    (folder / "conftest.py").write_text('pytest_plugins = ["livechat_standin"]\n')
    for name in ("app", "settings", "storage", "server", "gunicorn"):
        (folder / f"{name}.py").write_text("mine = True\n")
    return folder


def run_tests(project, code, *arguments, **environ):
    """Run tests in a project; return the exit status and what was printed."""
    (project / "test_it.py").write_text(REGISTER + code)
    # What the shell of a developer may hold.
    own = {"PYTHONPATH": str(project), "LIVECHAT_DB": "mine.db", "PORT": "no port"}
    # The other plugins that are installed here take seconds to load.
    environ = {**os.environ, **own, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environ}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=project,
        env=environ,
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stdout + ran.stderr


def refuses(url):
    """Return whether nobody listens at a URL."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) != 0


def test_a_test_has_a_stand_in_of_its_own_that_is_reset_before_it(project):
    code = """
import app, settings, storage

def test_mine():
    assert app.mine and settings.mine and storage.mine

def test_first(livechat):
    assert register(livechat.url, "t") == "guest-2"
    assert [one["token"] for one in livechat.visitors()] == ["t"]
    (request,) = livechat.requests()
    assert json.loads(request["body"]) == {"visitor": {"token": "t"}}
    livechat.fail(status=429, times=5)

def test_second(livechat):
    assert livechat.visitors() == livechat.requests() == []
    assert register(livechat.url, "t") == "guest-2"
"""
    status, printed = run_tests(project, code)
    assert status == 0, printed
    assert not list(project.rglob("*.db*"))


def test_the_log_of_a_test_that_fails_is_shown_and_of_no_other(project):
    code = """
def test_good(livechat):
    register(livechat.url, "t")

def test_bad(livechat):
    livechat.fail(status=503)
    register(livechat.url, "t")
"""
    status, printed = run_tests(project, code)
    assert status == 1
    log = printed.partition("Log of livechat-visitors")[2]
    assert re.findall(rf"POST {PATH} (\d+)", log) == ["503"]


def test_settings_of_pytest_ini_reach_the_service(project):
    (project / "pytest.ini").write_text(
        "[pytest]\nlivechat_settings =\n  LIVECHAT_RATE_LIMIT=1\n  LIVECHAT_AGENT=a:b=c\n"
    )
    code = """
def test_limit(livechat):
    register(livechat.url, "t")
    try:
        register(livechat.url, "t")
    except urllib.error.HTTPError as error:
        assert error.code == 429
    else:
        raise AssertionError
"""
    status, printed = run_tests(project, code)
    assert status == 0, printed


@pytest.mark.parametrize("shared", ["false", "true"])
def test_each_worker_has_one_or_all_share_one(project, tmp_path, shared):
    code = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(8))
def test_it(livechat, number):
    register(livechat.url, str(number))
    worker = os.environ["PYTEST_XDIST_WORKER"]
    pathlib.Path(os.environ["URLS"], worker).write_text(livechat.url)
"""
    urls = tmp_path / "urls"
    urls.mkdir()
    status, printed = run_tests(
        project, code, *XDIST, "-o", f"livechat_shared={shared}", URLS=str(urls)
    )
    assert status == 0, printed
    seen = [file.read_text() for file in urls.iterdir()]
    assert len(seen) == 2
    assert len(set(seen)) == (1 if shared == "true" else 2)
    assert all(refuses(url) for url in seen)


@pytest.mark.parametrize("arguments", [(), (*XDIST, "-o", "livechat_shared=true")])
def test_what_is_missing_is_said_in_one_line(project, tmp_path, arguments):
    (project / KIT).unlink()
    shutil.copy(ROOT / KIT, project)
    code = "def test_it(livechat): pass"
    status, printed = run_tests(project, code, *arguments, LIVECHAT_STANDIN_HOME="")
    line = f"{project} is no livechat-visitors: name its folder in LIVECHAT_STANDIN_HOME"
    assert status != 0
    assert line in printed
    assert "Traceback" not in printed
    status, printed = run_tests(project, code, *arguments, LIVECHAT_STANDIN_HOME=str(ROOT))
    assert status == 0, printed


def unprepared(folder, recipe):
    """Return a checkout without .venv, which `make .venv/run` prepares by a shell command."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.suffix == ".py" or entry.name in ("resources", "schemas", "storage"):
            (folder / entry.name).symlink_to(entry)
    (folder / "Makefile").write_text(f".venv/run:\n\t{recipe}\n")
    return str(folder)


def test_the_first_use_prepares_a_checkout_once(project, tmp_path):
    link = f"echo made >>{tmp_path}/made; ln -s {sys.prefix} .venv"
    checkout = unprepared(tmp_path / "checkout", link)
    code = "def test_it(livechat): pass\ndef test_other(livechat): pass"
    status, printed = run_tests(project, code, *XDIST, LIVECHAT_STANDIN_HOME=checkout)
    assert status == 0, printed
    assert (tmp_path / "made").read_text() == "made\n"


@pytest.mark.parametrize(
    ("recipe", "path", "line"),
    [("@echo no; echo network >&2; exit 1", os.environ["PATH"], "no network"), ("", "", "make,")],
)
def test_why_a_checkout_is_not_prepared_is_said_in_one_line(
    tmp_path, monkeypatch, recipe, path, line
):
    checkout = unprepared(tmp_path / "checkout", recipe)
    monkeypatch.setenv("PATH", path)
    with pytest.raises(RuntimeError) as raised, livechat_standin.start(checkout):
        pass
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


def test_a_setting_that_does_not_start_is_said_in_one_line():
    with (
        pytest.raises(RuntimeError) as raised,
        livechat_standin.start(str(ROOT), LIVECHAT_MATCH="all"),
    ):
        pass
    assert str(raised.value).startswith("The service does not start: LIVECHAT_MATCH: 'all' is")
    assert "\n" not in str(raised.value)


def test_the_folder_of_a_stand_in_is_its_own_and_goes_with_it():
    with livechat_standin.start() as one, livechat_standin.start() as other:
        folders = [Path(standin.log_path).parent for standin in (one, other)]
        assert one.url != other.url
        assert folders[0] != folders[1]
        assert all((folder / "livechat.db").exists() for folder in folders)
        one.fail(status=500)
        with pytest.raises(ValueError, match="must be a route"):
            one.fail(status=500, route="/nothing")
    assert not any(folder.exists() for folder in folders)
    assert refuses(one.url)
    assert refuses(other.url)


PARENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import livechat_standin
with livechat_standin.start() as standin:
    print(standin.url, standin.log_path, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_its_parent_however_that_ends(number):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(ROOT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        url, log_path = parent.stdout.readline().split()
        assert not refuses(url)
        parent.send_signal(number)
    wait_until(lambda: refuses(url), "nobody serves it")
    wait_until(lambda: not Path(log_path).parent.exists(), "its folder is gone")


def command(*arguments, **options):
    """Start the command; return the process, its URL and the path of its log."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / KIT), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    return process, process.stdout.readline().strip(), process.stdout.readline().strip()


@pytest.mark.parametrize("end", ["input", "term", "kill"])
def test_the_command_ends_with_its_input_or_a_signal(end):
    process, url, log_path = command("LIVECHAT_RATE_LIMIT=7", stdin=subprocess.PIPE)
    with process:
        assert not refuses(url)
        assert "LIVECHAT_STANDIN: every program" in Path(log_path).read_text()
        if end == "input":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM if end == "term" else signal.SIGKILL)
        wait_until(lambda: refuses(url), "nobody serves it")
        wait_until(lambda: not Path(log_path).parent.exists(), "its folder is gone")


def test_the_command_ends_with_a_parent_that_gives_it_no_input(tmp_path):
    output = tmp_path / "output"
    output.touch()
    script = f'"$@" </dev/null >{output} & sleep 600'
    shell = subprocess.Popen(
        ["sh", "-c", script, "sh", sys.executable, str(ROOT / KIT)], start_new_session=True
    )
    try:
        url, log_path = wait_until(
            lambda: output.read_text().count("\n") == 2 and output.read_text().split(), "the URL"
        )
        assert not refuses(url)
        shell.kill()
        shell.wait()
        wait_until(lambda: refuses(url), "nobody serves it")
        wait_until(lambda: not Path(log_path).parent.exists(), "its folder is gone")
    finally:
        os.killpg(shell.pid, signal.SIGKILL)  # the sleep
        shell.wait()


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_recipe_for_nodes_test_runner(tmp_path):
    recipe = re.search(
        r"```javascript\n(.*?)```", (ROOT / "docs/standin.md").read_text(), re.DOTALL
    )
    (tmp_path / "chat.test.mjs").write_text(recipe[1])
    ran = subprocess.run(
        ["node", "--test"],
        cwd=tmp_path,
        env={**os.environ, "LIVECHAT_STANDIN_HOME": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"pass [1-9]", ran.stdout)
