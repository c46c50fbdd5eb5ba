"""The README tells the truth: its session gives the shown answers, its table names what is read."""

import re
import shlex
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from settings import Settings
from tests.server import ROOT

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
    assert len(session) >= 3
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


def test_the_configuration_table_names_exactly_the_variables_that_are_read():
    asked = set()

    class Recorder(dict):
        def get(self, name, default=None):
            asked.add(name)
            return default

    Settings.from_environ(Recorder())
    table = README.partition("## Configuration")[2].partition("##")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == asked


def test_the_table_of_differences_says_what_the_contract_says():
    def rows(text):
        return re.findall(r"^\|.*\|$", text, re.MULTILINE)

    contract = rows((ROOT / "docs" / "contract.md").read_text().partition("## 9.")[2])
    readme = rows(README.partition("## Differences")[2].partition("\n## ")[0])
    not_yet = [row for row in contract if row.startswith("| no rate limit")]
    assert [*readme, *not_yet] == [row for row in contract if row not in not_yet] + not_yet


def test_the_readmes_stand_in_serves_a_test_suite(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(code, names)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    checkout = tmp_path / "checkout"  # whose .venv is the environment of this test
    checkout.mkdir()
    for entry in ROOT.iterdir():
        if entry.name != ".venv":
            (checkout / entry.name).symlink_to(entry)
    (checkout / ".venv").symlink_to(Path(sys.prefix))
    with (
        names["livechat"](tmp_path, port, checkout) as url,
        urllib.request.urlopen(f"{url}/readyz"),
    ):
        pass
    assert (
        "LIVECHAT_MATCH=token,phone,email LIVECHAT_DB=$(mktemp -d)/livechat.db make run" in README
    )


def test_the_readme_names_every_entry_of_the_top_level_that_holds_code():
    tree = README.partition("## Development")[2]
    for entry in ROOT.iterdir():
        if entry.suffix == ".py" or (entry / "__init__.py").exists():
            assert entry.name in tree
