"""manage.py restore: the backup in the place of the database, whatever is there."""

import os
import shutil
from contextlib import closing

import pytest

import storage
from operate import restore
from tests.database import damage, look, rows
from tests.locks import held
from tests.operating import JOHN, VISITORS, mode
from tests.power_files import lay_out, recording

BACKED_UP = [visitor[0] for visitor in VISITORS]
BEFORE = [*BACKED_UP, "in the database", "in the WAL"]  # the restore
UNFINISHED = "a restore has not ended: run it again"


@pytest.fixture
def backup(run, fill, tmp_path):
    """Return a backup that the database has gone on from, as a killed service has left it."""
    fill(*VISITORS)
    assert run("backup", "copy.db")[0] == 0
    (tmp_path / "killed").mkdir()
    with closing(storage.Database(str(tmp_path / "livechat.db"))) as database:
        store = storage.VisitorStore(database)
        store.register("in the database", JOHN)  # as the first write empties the WAL
        store.register("in the WAL", JOHN)
        for suffix in ("", "-wal"):
            shutil.copy(f"livechat.db{suffix}", "killed")
    for suffix in ("", "-wal"):
        os.replace(f"killed/livechat.db{suffix}", f"livechat.db{suffix}")
    os.rmdir("killed")
    return tmp_path / "copy.db"


def tokens(database):
    return [row[2] for row in rows(database)]


def moved_away(folder):
    """Return the folders with what was there before."""
    return sorted(folder.glob("livechat.db-before-*"))


def test_a_restore_brings_the_backup_and_moves_everything_else_aside(
    run, backup, path, tmp_path, make_server
):
    litestream = tmp_path / ".livechat.db-litestream"
    litestream.mkdir()
    (litestream / "generation").touch()
    before = set(os.listdir(tmp_path))
    status, out, err = run("restore", "copy.db")
    (kept,) = moved_away(tmp_path)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"restored 3 visitors from copy.db; what was there is in {kept}/",
        "who was erased after 2022-06-29T06:05:01.392Z is there again: repeat that as"
        " docs/operating.md says under restore",
    ]
    assert set(os.listdir(tmp_path)) == (
        before - {".livechat.db-litestream", "livechat.db-wal", "livechat.db-shm"} | {kept.name}
    )
    assert rows(path) == rows(backup)
    assert (mode(path), mode(kept)) == (0o600, 0o700)
    assert (kept / ".livechat.db-litestream" / "generation").exists()
    assert tokens(kept / "livechat.db") == BEFORE
    server = make_server().wait()
    assert server.register("next")[1]["visitor"]["username"] == "guest-4"


def test_a_restore_can_be_undone_by_another(run, backup, path, tmp_path):
    assert run("restore", "copy.db")[0] == 0
    (kept,) = moved_away(tmp_path)
    kept = kept.rename(tmp_path / "kept")
    assert run("restore", "kept/livechat.db")[0] == 0
    assert tokens(path) == BEFORE


@pytest.mark.parametrize("state", ["none", "junk", "damaged", "empty"])
def test_it_works_where_there_is_no_database_or_a_damaged_one(run, backup, path, tmp_path, state):
    os.unlink("livechat.db-wal")
    if state == "none":
        os.unlink(path)
    elif state == "damaged":
        damage(path)
    else:
        (tmp_path / "livechat.db").write_bytes(b"junk" * 4096 if state == "junk" else b"")
    status, out, err = run("restore", backup)
    assert (status, err) == (0, "")
    assert rows(path) == rows(backup)
    assert len(moved_away(tmp_path)) == (state != "none")
    assert ("what was there" in out) == (state != "none")


def test_a_restore_is_refused_while_the_service_runs(run, backup, path, server, monkeypatch):
    said = f"restore: {path}: in use by process {server.worker()}: stop the service, and what else"
    assert run("restore", backup)[2] == f"{said} has it open\n"
    monkeypatch.setattr(restore, "glob", lambda pattern: [])  # where the system does not tell
    said = f"restore: {path}: in use: stop the service, and what else has it open\n"
    assert run("restore", backup) == (1, "", said)
    assert server.register("john")[1]["visitor"]["name"] == "John Doe"
    assert server.stop() == 0
    assert run("restore", backup)[0] == 0


@pytest.mark.parametrize("state", ["only opened", "has read", "older state", "transaction"])
def test_a_restore_is_refused_while_another_program_has_it_open(run, backup, path, tmp_path, state):
    before = sorted(os.listdir(tmp_path))
    with held(path, state):
        status, out, err = run("restore", backup)
        assert (status, out) == (1, "")
        assert err.startswith(f"restore: {path}: in use by process ")
    assert {"livechat.db", "livechat.db-wal", "copy.db"} <= set(before)
    assert not moved_away(tmp_path)
    assert run("restore", backup)[0] == 0


def test_the_index_of_the_wal_tells_of_a_service_whose_database_was_replaced(
    run, backup, path, server, monkeypatch
):
    os.rename(path, f"{path}.away")
    shutil.copy(backup, path)
    monkeypatch.setattr(restore, "glob", lambda pattern: [])
    assert "in use" in run("restore", backup)[2]


def test_what_is_no_sound_backup_changes_nothing(run, backup, path, tmp_path, fill):
    before = sorted(os.listdir(tmp_path)), (tmp_path / "livechat.db").read_bytes()
    (tmp_path / "junk").write_text("junk" * 4096)
    look(tmp_path / "other", "CREATE TABLE t (x)")
    shutil.copy(backup, "newer")
    look("newer", "PRAGMA user_version = 99")
    (tmp_path / "many").mkdir()
    fill(*((f"t{n}", JOHN) for n in range(300)), path=str(tmp_path / "many" / "livechat.db"))
    damage("many/livechat.db")
    os.mkfifo("pipe")
    reasons = {
        "-": "give the name of a file; stdin will not do",
        "none": "none: there is no database",
        "pipe": "pipe: not a regular file",
        "junk": "junk: not a SQLite database; if it was, restore a backup",
        "other": "other: the database of another application",
        "newer": "newer: written by a newer version of this service",
        "many/livechat.db": "many/livechat.db: its copy is not sound; see what check says of it",
        path: f"{path}: belongs to the database itself",
    }
    for file, reason in reasons.items():
        assert run("restore", file) == (1, "", f"restore: {reason}\n")
    for name in ("junk", "other", "newer", "many", "pipe"):
        shutil.rmtree(name) if name == "many" else os.unlink(name)
    after = sorted(os.listdir(tmp_path)), (tmp_path / "livechat.db").read_bytes()
    assert after == before


def test_no_power_cut_loses_a_database_or_leaves_one_beside_another_wal(
    run, backup, path, tmp_path, monkeypatch
):
    (tmp_path / ".livechat.db-litestream").mkdir()
    with recording(tmp_path) as recorder:
        assert run("restore", backup)[0] == 0
    monkeypatch.setattr(restore, "STAMP", "again")
    seen = set()

    for number, (is_over, files) in enumerate(recorder.cuts()):
        cut = tmp_path / f"cut {number}"
        lay_out(files, cut)
        path = str(cut / "livechat.db")
        served = None
        try:
            storage.prepare(path)
            served = tokens(path)
        except storage.PrepareError as error:
            said = str(error)
        if served is None:
            assert said == f"{path}: {UNFINISHED}"
            assert run("check", "--db", path)[2] == f"check: {path}: {UNFINISHED}\n"
        assert served in ((BACKED_UP,) if is_over else (BEFORE, BACKED_UP, None))
        seen.add(str(served))
        status, _, err = run("restore", "--db", path, backup)
        assert (status, err) == (0, "")
        assert tokens(path) == BACKED_UP
        assert BEFORE in map(tokens, cut.glob("livechat.db-before-*/livechat.db"))
    assert seen == {str(BEFORE), str(BACKED_UP), "None"}


def failing(function, calls, number):
    """Return a function that fails once there were more than so many calls."""

    def call(*arguments, **more):
        calls.append(arguments)
        if len(calls) > number:
            raise OSError(5, "Input/output error")
        return function(*arguments, **more)

    return call


@pytest.mark.parametrize("number", range(12))
def test_a_restore_that_fails_half_way_says_so_and_can_be_run_again(
    run, backup, path, tmp_path, monkeypatch, number
):
    """Any call of the system may fail."""
    calls = []
    with monkeypatch.context() as patched:
        for name in ("mkdir", "rename", "replace", "fsync"):
            patched.setattr(os, name, failing(getattr(os, name), calls, number))
        status, out, err = run("restore", backup)
    if len(calls) <= number:
        pytest.skip("it has no more calls")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "Input/output error" in err
    monkeypatch.setattr(restore, "STAMP", "again")
    assert run("restore", backup)[0] == 0
    assert rows(path) == rows(backup)
    assert BEFORE in map(tokens, tmp_path.glob("livechat.db-before-*/livechat.db"))


def test_a_restore_by_root_belongs_to_the_databases_owner(run, backup, path, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can do this to others")
    os.chown(path, 12345, 12346)
    assert run("restore", backup)[0] == 0
    for made in (path, *moved_away(tmp_path)):
        assert (os.stat(made).st_uid, os.stat(made).st_gid) == (12345, 12346)


def test_a_restore_follows_no_link_that_lies_in_its_way(run, backup, path, tmp_path):
    os.unlink(path)
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "livechat.db-before-x").mkdir()
    os.symlink(tmp_path / "precious", tmp_path / "livechat.db-before-x" / "restored")
    assert run("restore", backup)[0] == 1
    assert (tmp_path / "precious").read_text() == "precious"
    os.rename("livechat.db-before-x", "elsewhere")
    os.symlink("elsewhere", "livechat.db-before-x")
    assert run("restore", backup)[0] == 1
    os.unlink("livechat.db-before-x")
    os.unlink("livechat.db-wal")
    os.symlink("precious", "livechat.db-wal")
    os.symlink("precious", "livechat.db-shm")
    assert run("restore", backup)[2] == f"restore: {path}-shm: Too many levels of symbolic links\n"
    assert (tmp_path / "precious").read_text() == "precious"
