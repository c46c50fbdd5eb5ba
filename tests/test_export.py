"""manage.py export: JSONL that loses nothing, and CSV for spreadsheets."""

import csv
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime

import pytest

import operate.files
from operate import export
from storage.migrations import newest_version
from tests.database import files_of_a_database, rows
from tests.operating import FIELD, JOHN, LATER, VISITORS, files, finish, mode, spawn
from tests.server import ROOT


def test_export_writes_a_header_and_each_visitor_as_the_api_answers_it(run, fill, tmp_path):
    answers = fill(*VISITORS)
    assert run("export", "-o", "out.jsonl") == (0, "exported 3 visitors to out.jsonl\n", "")
    assert files(tmp_path) == [*files_of_a_database(tmp_path), "out.jsonl"]
    header, *visitors = map(json.loads, (tmp_path / "out.jsonl").read_text().split("\n")[:-1])
    assert header == {"livechat-visitors": 1, "schema": newest_version(), "guest": 3, "visitors": 3}
    assert visitors == [{"number": n, **answer} for n, answer in enumerate(answers, 1)]
    assert mode("out.jsonl") == 0o600


def test_export_to_stdout_says_what_it_did_on_stderr(path, fill):
    fill(*VISITORS)
    status, out, err = finish(spawn("export", "--db", path))
    assert (status, err) == (0, "exported 3 visitors to stdout\n")
    assert len(out.split("\n")) == 5


def test_export_since_a_date_is_by_last_change(run, fill, tmp_path):
    fill(("old", {}), ("changed", {}))
    fill(("changed", {"name": "N"}), ("new", {}), at=LATER)
    moment = datetime.fromtimestamp(LATER / 1000, UTC)
    for date in (moment.isoformat(), moment.date().isoformat()):
        assert run("export", "--since", date, "-o", "out")[0] == 0
        header, *visitors = map(json.loads, (tmp_path / "out").read_text().splitlines())
        assert header["visitors"] == 2
        assert [visitor["token"] for visitor in visitors] == ["changed", "new"]


def table(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def test_csv_has_a_column_for_each_custom_field(run, fill, tmp_path):
    name = {"key": "name", "value": "of a field", "overwrite": True}
    equals = {"key": "=k", "value": "v", "overwrite": True}
    fill(("=token", JOHN), ("t", {"name": 'a,"b"\nc'}, equals, name), ("last", {"name": "l-1"}))
    assert run("export", "--format", "csv", "-o", "out.csv")[0] == 0
    columns, first, second, last = table("out.csv")
    fixed = ["number", "_id", "username", "token", "name", "phone", "email", "department"]
    assert columns[: len(fixed)] == fixed
    assert columns[-4:] == ["ts", "_updatedAt", "field:=k", "field:name"]
    john = dict(zip(columns, first, strict=True))
    assert (john["token"], john["phone"]) == ("'=token", "'+37265783468")
    assert (john["number"], john["ts"]) == ("1", "2022-06-29T06:05:01.392Z")
    assert john["field:name"] == ""
    assert second[-2:] == ["v", "of a field"]
    assert second[4] == 'a,"b"\nc'
    assert last[4] == "l-1"


def test_csv_is_utf_8_to_excel_and_every_cell_is_quoted(run, fill, tmp_path):
    fill(("t;t", {"name": "Zoë"}))
    assert run("export", "--format", "csv", "-o", "out.csv")[0] == 0
    held = (tmp_path / "out.csv").read_bytes()
    assert held.startswith(b'\xef\xbb\xbf"number","_id",')
    assert held.count(b"\xef\xbb\xbf") == 1
    assert '"t;t","Zoë",'.encode() in held


CELLS = {
    **{f"{sign}1+1": f"'{sign}1+1" for sign in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"},
    "  =1+1": "'  =1+1",
    "\u00a0@x": "'\u00a0@x",
    "\r\n\t-1": "'\r\n\t'-1",
    "a\n=1+1": "a\n'=1+1",
    "a;=1+1;b": "a;'=1+1;b",
    "a\t +1": "a\t' +1",
    "0049 30": "'0049 30",
    "007": "'007",
    "0": "0",
    "0.5": "0.5",
    "12345678901": "12345678901",
    "123456789012": "'123456789012",
    " 49123456789012": "' 49123456789012",
    "12e34": "'12e34",
    "12e34f": "12e34f",
    "2022-06-29": "2022-06-29",
    "a-b=c;d": "a-b=c;d",
    "one\ntwo": "one\ntwo",
}


@pytest.mark.parametrize("text", CELLS)
def test_no_cell_is_run_or_rounded_by_a_spreadsheet(run, fill, tmp_path, text):
    fill(("t", {"name": text}, {"key": "k", "value": text, "overwrite": True}))
    assert run("export", "--format", "csv", "-o", "out.csv")[0] == 0
    columns, row = table("out.csv")
    assert row[columns.index("name")] == row[columns.index("field:k")] == CELLS[text]


def test_more_columns_than_a_spreadsheet_has_are_refused(run, fill, monkeypatch, tmp_path):
    fill(("t", {}, FIELD, FIELD | {"key": "other"}))
    monkeypatch.setattr(export, "MAX_COLUMNS", 11)
    status, out, err = run("export", "--format", "csv", "-o", "out.csv")
    assert (status, out) == (1, "")
    assert err == (
        "export: there are more custom fields than a spreadsheet has columns; export JSONL\n"
    )
    assert files(tmp_path) == files_of_a_database(tmp_path)


def test_a_broken_export_leaves_the_one_before(run, fill, tmp_path, monkeypatch):
    fill(*VISITORS)
    (tmp_path / "out").write_text("before")
    whole = export.as_wire

    def broken(visitor):
        if visitor["number"] == 3:
            raise OSError(28, "No space left on device")
        return whole(visitor)

    monkeypatch.setattr(export, "as_wire", broken)
    said = f"export: {tmp_path}/out: No space left on device; nothing was written\n"
    assert run("export", "-o", "out") == (1, "", said)
    assert (tmp_path / "out").read_text() == "before"
    assert files(tmp_path) == [*files_of_a_database(tmp_path), "out"]


def test_a_full_disk_is_one_line_and_no_file(path, fill, tmp_path):
    fill(*((f"t{n}", JOHN, FIELD) for n in range(200)))

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    status, out, err = finish(
        spawn("export", "--db", path, "-o", tmp_path / "out", preexec_fn=no_room)
    )
    assert (status, out) == (1, "")
    assert err == f"export: {tmp_path}/out: File too large; nothing was written\n"
    status, out, err = finish(
        spawn("backup", "--db", path, tmp_path / "copy.db", preexec_fn=no_room)
    )
    assert (status, out) == (1, "")
    assert err.startswith("backup: IOError: disk I/O error")
    assert err.count("\n") == 1
    assert files(tmp_path) == files_of_a_database(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [["export", "-o"], ["backup"]])
def test_an_interrupted_command_clears_up_behind_itself(path, fill, tmp_path, command, number):
    fill(*VISITORS)
    # It is held up where it syncs what it wrote, by a debugger's means.
    code = (
        "import manage, operate.files, os, signal, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"  # which a shell's & may ignore
        "    signal.signal(number, signal.default_int_handler)\n"
        "def wait():\n"  # not signal.pause, which a signal just before it would not end
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "operate.files.sync = lambda path: (print(path, flush=True), wait())\n"
        "sys.exit(manage.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, command[0], "--db", path, *command[1:], tmp_path / "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        assert os.path.basename(process.stdout.readline()).startswith(".livechat-")
        process.send_signal(number)
        assert finish(process) == (130, "", f"{command[0]}: interrupted\n")
    assert files(tmp_path) == files_of_a_database(tmp_path)


def test_export_into_a_pipe_and_over_a_link(run, fill, path, tmp_path):
    fill(*VISITORS)
    os.mkfifo(tmp_path / "pipe")
    exporting = spawn("export", "--db", path, "-o", tmp_path / "pipe")
    assert len((tmp_path / "pipe").read_text().split("\n")) == 5
    assert finish(exporting)[0] == 0
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert run("export", "-o", "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == (tmp_path / "link").read_text() != "before"
    assert mode("target") == 0o600


def test_a_reader_that_goes_away_is_one_line(path, fill):
    fill(*((f"t{n}", JOHN, FIELD) for n in range(500)))
    reading, writing = os.pipe()
    os.close(reading)
    status, _, err = finish(spawn("export", "--db", path, stdout=writing))
    os.close(writing)
    assert (status, err) == (1, "export: Broken pipe\n")


@pytest.fixture
def attacker():
    """A user who is not root, and may write the folder of the database."""
    if os.geteuid() != 0:
        pytest.skip("only root can make files of others")
    return 12345


def test_no_link_or_pipe_of_another_user_is_followed(run, fill, tmp_path, attacker):
    fill(*VISITORS)
    (tmp_path / "victim").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "pipe"):
        os.chown(tmp_path / name, attacker, attacker, follow_symlinks=False)
        reason = f"{name}: a link or pipe of another user, who could lead it anywhere"
        for command in (["export", "-o"], ["backup", "--force"]):
            assert run(*command, name) == (1, "", f"{command[0]}: {reason}\n")
        said = (1, "", f"replay: {reason}\n")
        assert run("replay", "http://127.0.0.1:9", "--state", name) == said
    assert (tmp_path / "victim").read_text() == "before"
    assert not (tmp_path / "made").exists()


def test_a_link_that_comes_in_between_is_not_followed(run, fill, tmp_path, monkeypatch):
    fill(*VISITORS)
    make = operate.files.tempfile.mkstemp

    def attacked(*arguments):
        descriptor, copy = make(*arguments)
        os.unlink(copy)
        os.symlink(tmp_path / "made", copy)
        return descriptor, copy

    monkeypatch.setattr(operate.files.tempfile, "mkstemp", attacked)
    said = f"export: {tmp_path}/out: Too many levels of symbolic links; nothing was written\n"
    assert run("export", "-o", "out") == (1, "", said)
    assert files(tmp_path) == files_of_a_database(tmp_path)


@pytest.mark.parametrize("name", ["livechat.db", "other.db"])
@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_a_name_that_sqlite_takes_for_its_own_is_no_place_to_write(run, fill, path, name, suffix):
    fill(*VISITORS)
    before = rows(path)
    own = f"{os.path.dirname(path)}/{name}{suffix}"
    os.symlink(own, "link")
    for target in (own, "link"):
        reason = f"{target}: a name that SQLite gives to a part of a database\n"
        assert run("export", "-o", target) == (1, "", f"export: {reason}")
        assert run("backup", "--force", target) == (1, "", f"backup: {reason}")
        assert run("replay", "http://127.0.0.1:9", "--state", target)[2] == f"replay: {reason}"
    assert rows(path) == before


def test_the_database_itself_is_no_place_to_write(run, fill, path):
    fill(*VISITORS)
    before = rows(path)
    os.link(path, "other-name")
    os.symlink(path, "link")
    for own in (path, "other-name", "link"):
        refused = f"{own}: belongs to the database itself\n"
        assert run("export", "-o", own) == (1, "", f"export: {refused}")
        assert run("backup", "--force", own) == (1, "", f"backup: {refused}")
    assert rows(path) == before


def test_a_hyphen_is_stdout_and_no_name_of_a_file(run, path, fill, tmp_path):
    fill(*VISITORS)
    status, out, err = finish(spawn("export", "--db", path, "-o", "-", cwd=tmp_path))
    assert (status, err) == (0, "exported 3 visitors to stdout\n")
    assert len(out.split("\n")) == 5
    said = "replay: -: not the name of a file; ./- is one\n"
    assert run("replay", "http://127.0.0.1:9", "--state", "-") == (1, "", said)
    assert files(tmp_path) == files_of_a_database(tmp_path)


@pytest.mark.parametrize("redirected", ["a pipe", "a file"])
def test_the_name_of_stdout_is_stdout(path, fill, tmp_path, redirected):
    fill(*VISITORS)
    stdout = subprocess.PIPE if redirected == "a pipe" else (tmp_path / "out").open("wb")
    process = spawn("export", "--db", path, "-o", "/dev/stdout", stdout=stdout)
    status, out, err = finish(process)
    if redirected == "a file":
        stdout.close()
        out = (tmp_path / "out").read_text()
    assert (status, err) == (0, "")
    assert len(re.findall(r"^{", out, re.MULTILINE)) == 4


def test_an_export_is_of_one_state_while_the_service_writes(path, server, tmp_path):
    for n in range(50):
        server.register(f"t{n}", **JOHN)
    os.mkfifo(tmp_path / "pipe")
    exporting = spawn("export", "--db", path, "-o", tmp_path / "pipe")
    with open(tmp_path / "pipe", "rb") as pipe:  # nothing is read yet, and the state is chosen
        header = pipe.readline()
        for n in range(50):
            assert server.register(f"t{n}", name="Changed")[0] == 200
            assert server.register(f"new{n}")[0] == 200
        text = (header + pipe.read()).decode()
    assert finish(exporting)[0] == 0
    header, *visitors = map(json.loads, text.splitlines())
    assert header["visitors"] == len(visitors) == 50
    assert {visitor["name"] for visitor in visitors} == {"John Doe"}
