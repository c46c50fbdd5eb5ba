"""manage.py backup: one sound file, of one moment."""

import os
from contextlib import closing

import storage
from operate import backup
from storage.scrubber import scrub
from tests.database import damage, files_of_a_database, rows
from tests.operating import FIELD, JOHN, VISITORS, files, finish, mode, spawn


def test_a_backup_is_one_sound_private_file_that_serves_again(run, fill, tmp_path, make_server):
    fill(*VISITORS)
    status, out, err = run("backup", "copy.db")
    assert (status, err) == (0, "")
    assert out.startswith("backed up to copy.db: 0.0 MiB, looked through and sound")
    assert files(tmp_path) == ["copy.db", *files_of_a_database(tmp_path)]
    assert mode("copy.db") == 0o600
    assert rows("copy.db") == rows("livechat.db")
    server = make_server(LIVECHAT_DB=str(tmp_path / "copy.db")).wait()
    assert server.register("next")[1]["visitor"]["username"] == "guest-4"


def test_a_backup_holds_what_was_answered_before_it_while_the_service_writes(
    server, path, tmp_path
):
    answered = []
    for n in range(60):
        assert server.register(f"t{n}", **JOHN)[0] == 200
        answered.append(f"t{n}")
    copying = spawn("backup", "--db", path, tmp_path / "copy.db")
    n = 60
    while copying.poll() is None:
        assert server.register(f"t{n}", **JOHN)[0] == 200
        n += 1
    assert finish(copying)[0] == 0
    tokens = [row[2] for row in rows(tmp_path / "copy.db")]
    assert tokens[:60] == answered
    assert tokens == [f"t{n}" for n in range(len(tokens))]


def test_a_backup_ends_however_much_is_written_meanwhile(path, fill, monkeypatch, tmp_path):
    fill(*VISITORS)
    monkeypatch.setattr(backup, "PAGES", 1)
    (tmp_path / "copy.db").touch()
    with closing(storage.Database(path)) as database:
        store = storage.VisitorStore(database)
        for step, _ in enumerate(backup.copy_database(path, str(tmp_path / "copy.db"))):
            store.register(f"t{step}", JOHN)
            assert step < 20
    assert len(rows(tmp_path / "copy.db")) == 3


def test_a_backup_is_scrubbed_like_the_database(run, fill, path, tmp_path):
    """Pages in the WAL are not yet: they keep copies of cells that were moved, and later erased."""
    fill(("first", {}))
    with closing(storage.Database(path)) as database:
        store = storage.VisitorStore(database)
        for n in range(300):
            token = f"{n * 2_654_435_761 % 2**32:032x}"  # in no order, as real ones
            store.register(token, {"name": f"Visitor {n}"})
        assert run("backup", "copy.db")[0] == 0
    held = (tmp_path / "copy.db").read_bytes()
    pages = [held[start : start + 4096] for start in range(0, len(held), 4096)]
    assert len(pages) > 10
    assert [number for number, page in enumerate(pages) if scrub(page) != page] == []


def test_a_backup_is_never_written_over_a_file_without_force(run, fill, tmp_path):
    fill(*VISITORS)
    (tmp_path / "copy.db").write_text("precious")
    said = "backup: copy.db: is there; --force writes over it\n"
    assert run("backup", "copy.db") == (1, "", said)
    assert (tmp_path / "copy.db").read_text() == "precious"
    assert run("backup", "copy.db", "--force")[0] == 0
    assert rows("copy.db") == rows("livechat.db")


def test_a_file_that_comes_in_between_is_not_written_over(run, fill, tmp_path, monkeypatch):
    fill(*VISITORS)
    whole = backup.copy_database

    def slow(*paths):
        yield from whole(*paths)
        (tmp_path / "copy.db").write_text("precious")

    monkeypatch.setattr(backup, "copy_database", slow)
    status, _, err = run("backup", "copy.db")
    assert (status, err) == (1, f"backup: {tmp_path}/copy.db: File exists; nothing was written\n")
    assert (tmp_path / "copy.db").read_text() == "precious"


def test_where_a_backup_cannot_be(run, fill, tmp_path):
    fill(*VISITORS)
    assert run("backup", tmp_path)[2] == f"backup: {tmp_path}: a folder, not a file\n"
    os.mkfifo("pipe")
    assert run("backup", "--force", "pipe")[2] == "backup: pipe: not a regular file\n"
    (tmp_path / "copy.db-wal").touch()
    assert run("backup", "copy.db")[2] == (
        "backup: copy.db-wal is there: copy.db is a database in use\n"
    )
    assert run("backup", "none/copy.db")[2] == (
        f"backup: {tmp_path}/none/copy.db: No such file or directory\n"
    )


def test_a_damaged_database_makes_no_backup(run, fill, tmp_path):
    fill(*((f"t{n}", JOHN, FIELD) for n in range(300)))
    damage(tmp_path / "livechat.db")
    status, out, err = run("backup", "copy.db")
    assert (status, out) == (1, "")
    assert err == "backup: the copy is not sound; check the database\n"
    assert files(tmp_path) == files_of_a_database(tmp_path)


def test_a_copy_that_is_not_sound_is_no_backup(run, fill, tmp_path, monkeypatch):
    fill(*VISITORS)
    monkeypatch.setattr(backup, "problems", lambda connection: ["row 1 missing from index"])
    assert run("backup", "copy.db")[2] == "backup: the copy is not sound; check the database\n"
    assert files(tmp_path) == files_of_a_database(tmp_path)
