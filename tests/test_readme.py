"""The README tells the truth: its session gives the shown answers, its commands work."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.server import ROOT, wait_until

README = (ROOT / "README.md").read_text()
# What differs from one run to the next.
VARYING = re.compile(r'"(_id|ts|_updatedAt)":"(\w{17}|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)"')


def curl_session():
    """Return each curl command of the README with the output shown below it."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    commands = [block.removeprefix("$ ") for block in blocks if block.startswith("$ curl")]
    return [command.rstrip("\n").rpartition("\n")[::2] for command in commands]


def test_the_curl_session_gives_the_shown_answers(server):
    session = curl_session()
    assert len(session) >= 2
    for command, shown in session:
        command = command.replace("localhost:3000", f"127.0.0.1:{server.port}")
        arguments = shlex.split(command.replace("\\\n", " "))
        ran = subprocess.run([*arguments, "-sS"], capture_output=True, text=True)
        assert ran.stderr == ""
        assert VARYING.sub(r'"\1":""', ran.stdout) == VARYING.sub(r'"\1":""', shown)


def test_the_session_begins_with_the_documents_own_call():
    command, shown = curl_session()[0]
    assert command.startswith(
        "curl --location --request POST 'localhost:3000/api/v1/livechat/visitor' \\\n"
    )
    assert '"username":"guest-2"' in shown


def test_the_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, section = target.partition("#")
        if not file.endswith(".md"):
            assert (ROOT / file).exists()
            continue
        heads = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
        assert not section or section in {
            re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads
        }


def stand_in(text, folder):
    """Do what a document says of pytest, in a new project; return what its tests print."""
    (lines,) = [lines for lines in console(text) if lines[0].startswith("ln -s")]
    (folder / "tests").mkdir()
    for line in lines:
        line = line.replace("path/to/livechat-visitors", str(ROOT))
        subprocess.run(line, shell=True, cwd=folder, check=True)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (folder / "tests" / "test_chat.py").write_text(CLIENT + code)
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider"]
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take seconds to load
    ran = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


CLIENT = """
import json, urllib.request

class my_chat_client:
    def __init__(self, url):
        self.url = url

    def register(self, token):
        data = json.dumps({"visitor": {"token": token}}).encode()
        headers = {"Content-Type": "application/json"}
        path = f"{self.url}/api/v1/livechat/visitor"
        urllib.request.urlopen(urllib.request.Request(path, data, headers)).close()

"""


def test_the_readmes_stand_in_serves_a_test_suite(tmp_path):
    assert "1 passed" in stand_in(README, tmp_path)


def test_the_chat_client_of_docs_standin_is_tested_with_it(tmp_path):
    assert "5 passed" in stand_in((ROOT / "docs/standin.md").read_text(), tmp_path)


def test_the_readme_names_every_entry_of_the_top_level_that_holds_code():
    tree = README.partition("## Development")[2]
    for entry in ROOT.iterdir():
        if entry.suffix == ".py" or (entry / "__init__.py").exists():
            assert entry.name in tree


def console(text):
    """Return the commands of each block of shell lines."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [re.findall(r"^\$ (.*)$", block, re.MULTILINE) for block in blocks]


def checkout(folder):
    """Return a new checkout, whose .venv is the environment of this test."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        own = entry.name.startswith((".venv", "livechat.db", "backup.db", "damaged"))
        if not own:  # what who follows the README has made here
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    return folder


def test_from_the_first_registration_through_backup_and_disaster_to_the_restore(tmp_path):
    """Every line as it stands in the README, by a new user in a new checkout."""
    (start,) = console(README.partition("## Start")[2].partition("In another terminal")[0])
    (backup,), restore = console(README.partition("## Operating")[2].partition("\n## ")[0])
    register, shown = curl_session()[0]
    assert start == ["make run"]
    assert len(restore) == 2
    folder = checkout(tmp_path / "checkout")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if "LIVECHAT" not in name}
    environ["PORT"] = str(port)

    def shell(line):
        line = line.replace("localhost:3000", f"127.0.0.1:{port}").replace("\\\n", " ")
        ran = subprocess.run(
            line, shell=True, cwd=folder, env=environ, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    @contextlib.contextmanager
    def serving(line):
        with subprocess.Popen(
            line,
            shell=True,
            cwd=folder,
            env=environ,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            wait_until(lambda: shell_answers(port), "the service answers")
            try:
                yield
            finally:
                os.killpg(process.pid, signal.SIGTERM)

    with serving(start[0]):
        registered = shell(register)
        assert VARYING.sub(r'"\1":""', registered) == VARYING.sub(r'"\1":""', shown)
        for _ in range(2):
            assert shell(backup).startswith("backed up to backup.db")
    before = json.loads(registered)["visitor"]
    for _ in range(2):
        (folder / "livechat.db").write_bytes(b"disaster")
        assert subprocess.run(
            start[0], shell=True, cwd=folder, env=environ, capture_output=True
        ).returncode
        *lines, last = restore
        for line in lines:
            assert shell(line).startswith(
                "restored 1 visitor from backup.db; what was there is in "
            )
        with serving(last):
            again = json.loads(shell(register))["visitor"]
        assert [again[key] for key in ("_id", "username", "ts")] == [
            before[key] for key in ("_id", "username", "ts")
        ]


def shell_answers(port):
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
        return True
    return False


def test_the_table_of_commands_names_exactly_those_of_manage_py():
    table = README.partition("## Operating")[2].partition("\n## ")[0]
    helped = subprocess.run(
        [sys.executable, "manage.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    commands = re.findall(r"^    (\w+) ", helped.stdout, re.MULTILINE)
    assert re.findall(r"^\| `(\w+)", table, re.MULTILINE) == commands
