"""manage.py: what all commands have in common, and each failure that they name."""

import os
import subprocess
import sys
import termios
import time
from contextlib import closing, contextmanager

import pytest

import manage
import storage
from operate import database as operating
from operate import rocketchat
from storage import migrations
from tests.database import look, rows, version
from tests.locks import held
from tests.operating import JOHN, VISITORS, files, finish, spawn
from tests.server import ROOT

# Root may do everything; this is one command without that right.
NO_RIGHTS = "-dac_override,-dac_read_search"
UNPRIVILEGED = ["setpriv", f"--bounding-set={NO_RIGHTS}", f"--inh-caps={NO_RIGHTS}"]


COMMANDS = (
    ["export", "-o", "out"],
    ["backup", "copy.db"],
    ["purge", "--older-than", "90d"],
    ["erase", "a"],
    ["check"],
    ["replay", "http://127.0.0.1:9"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_database_that_is_none_is_one_line_and_none_is_made(run, tmp_path, path, command):
    cases = {
        "missing.db": "there is no database",
        "none/missing.db": "there is no database",
        "folder": "a folder, not a file",
        "empty": "an empty file, and no database yet",
        "junk": "not a SQLite database; if it was, restore a backup",
        "other": "the database of another application",
        "newer": "written by a newer version of this service",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "junk").write_text("junk" * 4096)
    look(tmp_path / "other", "CREATE TABLE t (x)")
    storage.prepare(str(tmp_path / "newer"))
    look(tmp_path / "newer", "PRAGMA user_version = 99")
    before = {name: os.stat(name).st_size for name in files(tmp_path)}
    for name, reason in cases.items():
        said = f"{command[0]}: {tmp_path}/{name}: {reason}\n"
        assert run(*command, "--db", name) == (1, "", said)
    assert {
        name: os.stat(name).st_size
        for name in files(tmp_path)
        if not name.endswith(("-wal", "-shm"))
    } == before


@pytest.mark.parametrize("command", COMMANDS[:4], ids=lambda command: command[0])
def test_an_older_database_is_backed_up_and_not_touched_otherwise(
    run, fill, path, command, monkeypatch
):
    fill(*VISITORS)
    before = version(path)
    steps = (*migrations.STEPS, "ALTER TABLE visitor ADD COLUMN x")
    monkeypatch.setattr(migrations, "STEPS", steps)
    status, _, err = run(*command)
    assert version(path) == before
    if command[0] == "backup":
        assert status == 0
    else:
        said = "of an older version; a start of the service brings it up"
        assert (status, err) == (1, f"{command[0]}: {path}: {said}\n")


@pytest.mark.parametrize(
    "command", [["purge", "--older-than", "90d"], ["erase", "john"]], ids=lambda command: command[0]
)
def test_a_lock_of_another_program_is_one_line(run, fill, path, command, monkeypatch):
    fill(*VISITORS)
    monkeypatch.setattr("storage.database.TIMEOUT", 0.2)
    with held(path, "transaction"):
        began = time.monotonic()
        status, out, err = run(*command)
        assert time.monotonic() - began < operating.FORGETTING  # nothing is to be forgotten
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "BusyError" in err
    assert len(rows(path)) == 3


@contextmanager
def read_only(folder):
    folder.chmod(0o500)
    yield
    folder.chmod(0o700)


def test_a_folder_that_cannot_be_written_is_one_line(path, fill, tmp_path):
    fill(*VISITORS)
    (tmp_path / "out").mkdir()
    command = UNPRIVILEGED if os.geteuid() == 0 else []
    with read_only(tmp_path / "out"):
        for arguments in (["export", "-o"], ["backup"]):
            out = tmp_path / "out" / "x"
            process = spawn(*arguments, out, "--db", path, command=command)
            assert finish(process) == (1, "", f"{arguments[0]}: {out}: Permission denied\n")


@pytest.mark.parametrize("command", COMMANDS[:5], ids=lambda command: command[0])
def test_root_leaves_the_files_beside_it_to_the_databases_owner(path, fill, run, command):
    """Or the service could no longer write."""
    if os.geteuid() != 0:
        pytest.skip("only root can do this to others")
    fill(("a", JOHN), ("b", JOHN))
    os.chown(path, 12345, 12346)
    with closing(storage.Database(path)) as database:
        database.open()  # which makes them
        assert run(*command)[0] == 0
        for suffix in ("", "-wal", "-shm"):
            owner = os.stat(path + suffix)
            assert (owner.st_uid, owner.st_gid) == (12345, 12346)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["export", "--since", "yesterday"],
        ["export", "--format", "xml"],
        ["purge"],
        ["purge", "--older-than", "0d"],
        ["purge", "--older-than", "90"],
        ["purge", "--older-than", "-1d"],
        ["backup", "--keep", "0", "folder/"],
        ["restore"],
        ["erase"],
        ["erase", " "],
        ["erase", "\udcff"],
        ["import"],
    ],
)
def test_what_is_typed_wrong_is_said_with_exit_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        manage.main(arguments)
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["export", "import", "backup", "restore", "purge", "erase", "check", "replay"]
)
def test_each_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as raised:
        manage.main([command, "--help"])
    assert raised.value.code == 0
    assert f"example: python manage.py {command}" in capsys.readouterr().out


def test_an_invalid_setting_is_one_line(run, monkeypatch):
    monkeypatch.setenv("LIVECHAT_DB", "")
    status, out, err = run("check")
    assert (status, out) == (1, "")
    assert err.startswith("check: LIVECHAT_DB: '' is empty; it has to be the path of a file")
    assert err.count("\n") == 1


def test_the_bar_is_for_terminals_alone(path, fill):
    fill(*VISITORS)
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    code = (
        "import functools, operate, sys; "
        "operate.bar = functools.partial(operate.bar, delay=0, mininterval=0); "
        "import manage; sys.exit(manage.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, "export", "--db", path]
    for stderr, seen in ((terminal, True), (subprocess.PIPE, False)):
        process = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        shown = os.read(master, 65536) if seen else process.stderr
        assert (b"3/3" in shown or b"%|" in shown) == seen
        assert b"exported 3 visitors to stdout" in shown
    os.close(master)
    os.close(terminal)


def test_a_closed_stream_is_no_traceback_and_no_failure_of_a_check(path, fill, tmp_path):
    fill(*VISITORS)
    manage_py = f"{sys.executable} {ROOT}/manage.py"
    lines = {
        "check >&-": (0, "", ""),
        "check 2>&-": (0, "sound: 3 visitors", ""),
        "check <&- >&- 2>&-": (0, "", ""),
        "check --db none 2>&-": (1, "", ""),
        "check >/dev/full": (1, "", "check: No space left on device\n"),
        "backup - >/dev/full": (1, "", "backup: No space left on device\n"),
        "backup - >&-": (1, "", "backup: Bad file descriptor\n"),
        "export >&-": (1, "", "export: Bad file descriptor\n"),
        "export -o out 2>&- >&-": (0, "", ""),
        "erase nobody >&-": (1, "", "erase: nobody has that"),
        "erase - <&-": (0, "erased 0 visitors", ""),
    }
    environ = os.environ | {"LIVECHAT_DB": path}
    before = rows(path)
    for line, (status, out, err) in lines.items():
        ran = subprocess.run(
            f"{manage_py} {line}", shell=True, cwd=tmp_path, env=environ, capture_output=True
        )
        assert (ran.returncode, line) == (status, line)
        assert ran.stdout.decode()[: len(out) or None].startswith(out), line
        assert ran.stderr.decode()[: len(err) or None].startswith(err), line
        assert ran.stderr.count(b"\n") <= 1
        assert bool(ran.stdout) == bool(out)
        assert bool(ran.stderr) == bool(err)
    assert rows(path) == before
    assert not [name for name in files(tmp_path) if ".part" in name]


def test_a_name_that_is_no_utf_8_is_no_traceback(path, fill, tmp_path):
    fill(*VISITORS)
    name = os.fsdecode(b"\xff.db")
    backing_up = spawn("backup", name, "--db", path, cwd=tmp_path)
    assert finish(backing_up) == (0, "backed up to \\udcff.db: 0.0 MiB, checked\n", "")
    assert os.path.getsize(tmp_path / name) > 4096


def test_a_reader_that_goes_away_is_one_line(path, fill):
    fill(*VISITORS)
    reading, writing = os.pipe()
    os.close(reading)
    ran = finish(spawn("check", "--db", path, stdout=writing))
    os.close(writing)
    assert ran == (1, None, "check: Broken pipe\n")


def test_another_python_says_which_one_to_run():
    line = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "manage.py", "check"], capture_output=True, text=True
    )
    assert line.returncode == 1
    assert line.stderr.endswith(
        ": run .venv/bin/python manage.py, which `make .venv/run` sets up\n"
    )
    assert line.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_no_command_follows_what_lies_in_the_way_of_the_databases_files(
    run, fill, path, tmp_path, command, suffix, kind, monkeypatch
):
    monkeypatch.setattr(rocketchat, "PAUSES", ())  # as there is no server to send to
    fill(*VISITORS)
    (tmp_path / "precious").write_text("precious")
    if kind == "pipe":
        os.mkfifo(path + suffix)
    else:
        os.symlink("precious" if kind == "link" else "made", path + suffix)
    status, _, err = run(*command)
    reads = command[0] in ("export", "backup", "check", "replay")
    assert status == 1 or (kind == "pipe" and reads)  # which is an empty WAL for who only reads
    assert err.count("\n") == status or command[0] == "replay"
    assert (tmp_path / "precious").read_text() == "precious"
    assert not os.path.exists("made")
