"""manage.py export: JSONL that loses nothing, and CSV for spreadsheets."""

import csv
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from operate import export
from tests.database import files_of_a_database, rows
from tests.operating import FIELD, JOHN, LATER, VISITORS, files, finish, mode, spawn
from tests.server import ROOT


def test_export_writes_a_header_and_each_visitor_as_the_api_answers_it(run, fill, tmp_path):
    answers = fill(*VISITORS)
    assert run("export", "-o", "out.jsonl") == (0, "exported 3 visitors to out.jsonl\n", "")
    assert files(tmp_path) == [*files_of_a_database(tmp_path), "out.jsonl"]
    header, *visitors = map(json.loads, (tmp_path / "out.jsonl").read_text().split("\n")[:-1])
    assert header == {"livechat-visitors": 1, "schema": 2, "guest": 3, "visitors": 3}
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


def test_csv_is_safe_to_open_and_has_a_column_for_each_custom_field(run, fill, tmp_path):
    starts = ("=", "+", "-", "@", "\t", "\r")
    fields = [{"key": f"{sign}k", "value": f"{sign}1+1", "overwrite": True} for sign in starts]
    name = {"key": "name", "value": "of a field", "overwrite": True}
    fill(("=token", JOHN), ("t", {"name": 'a,"b"\nc'}, *fields, name), ("last", {"name": "l-1"}))
    assert run("export", "--format", "csv", "-o", "out.csv")[0] == 0
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        columns, first, second, last = csv.reader(file)
    fixed = ["number", "_id", "username", "token", "name", "phone", "email", "department"]
    assert columns == [
        *(*fixed, "ts", "_updatedAt"),
        *(f"field:{sign}k" for sign in starts),
        "field:name",
    ]
    john = dict(zip(columns, first, strict=True))
    assert (john["token"], john["phone"]) == ("'=token", "'+37265783468")
    assert (john["number"], john["ts"]) == ("1", "2022-06-29T06:05:01.392Z")
    assert john["field:name"] == ""
    assert second[10:] == [*(f"'{sign}1+1" for sign in starts), "of a field"]
    assert second[4] == 'a,"b"\nc'
    assert last[4] == "l-1"


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


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_the_databases_own_files_are_no_place_to_write(run, fill, path, suffix):
    fill(*VISITORS)
    before = rows(path)
    own = f"{path}{suffix}"
    refused = f"{own}: belongs to the database itself\n"
    assert run("export", "-o", own) == (1, "", f"export: {refused}")
    assert run("backup", "--force", own) == (1, "", f"backup: {refused}")
    os.link(path, "other-name")
    assert run("backup", "--force", "other-name")[0] == 1
    assert rows(path) == before


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
