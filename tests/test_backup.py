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
    assert out == "backed up to copy.db: 0.0 MiB, checked\n"
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

        class Bar:
            n = 0

            def update(self, pages):
                self.n += pages
                assert self.n < 20
                store.register(f"t{self.n}", JOHN)

            def close(self):
                pass

        monkeypatch.setattr(backup, "bar", lambda unit: Bar())
        backup.copy_database(path, str(tmp_path / "copy.db"))
    assert len(rows(tmp_path / "copy.db")) == 3
    assert len(rows(path)) > 3


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
        whole(*paths)
        (tmp_path / "copy.db").write_text("precious")

    monkeypatch.setattr(backup, "copy_database", slow)
    status, _, err = run("backup", "copy.db")
    assert (status, err) == (1, f"backup: {tmp_path}/copy.db: File exists; nothing was written\n")
    assert (tmp_path / "copy.db").read_text() == "precious"


def test_where_a_backup_cannot_be(run, fill, tmp_path):
    fill(*VISITORS)
    os.mkfifo("pipe")
    os.symlink("elsewhere", "link")
    os.symlink("precious", "over")
    (tmp_path / "precious").write_text("precious")
    for name in ("pipe", "link", "over"):
        assert run("backup", "--force", name)[2] == f"backup: {name}: not a regular file\n"
        assert run("backup", name)[2] == f"backup: {name}: is there; --force writes over it\n"
    assert (tmp_path / "precious").read_text() == "precious"
    assert not os.path.exists("elsewhere")
    (tmp_path / "copy.db-wal").touch()
    assert run("backup", "copy.db")[2] == (
        "backup: copy.db-wal is there: copy.db is a database in use\n"
    )
    assert run("backup", "none/copy.db")[2] == (
        f"backup: {tmp_path}/none/copy.db: No such file or directory\n"
    )


SAID = "backup: {}: its copy is not sound; see what check says of it\n"


def test_a_damaged_database_makes_no_backup(run, fill, path, tmp_path):
    fill(*((f"t{n}", JOHN, FIELD) for n in range(300)))
    damage(tmp_path / "livechat.db")
    status, out, err = run("backup", "copy.db")
    assert (status, out) == (1, "")
    assert err == SAID.format(path)
    assert files(tmp_path) == files_of_a_database(tmp_path)


def test_a_copy_that_is_not_sound_is_no_backup(run, fill, path, tmp_path, monkeypatch):
    fill(*VISITORS)
    monkeypatch.setattr(backup, "problems", lambda connection: ["row 1 missing from index"])
    assert run("backup", "copy.db")[2] == SAID.format(path)
    assert files(tmp_path) == files_of_a_database(tmp_path)


def test_a_hyphen_is_stdout_and_never_a_name(fill, path, tmp_path):
    fill(*VISITORS)
    before = files(tmp_path)
    with open(tmp_path / "copy.db", "wb") as copy:
        backing_up = spawn("backup", "-", "--db", path, stdout=copy, cwd=tmp_path)
        assert finish(backing_up)[::2] == (0, "")
    assert rows(tmp_path / "copy.db") == rows(path)
    assert set(files(tmp_path)) - set(before) == {"copy.db"}


def test_a_folder_keeps_the_last_backups_and_deletes_nothing_else(run, fill, path, tmp_path):
    fill(*VISITORS)
    folder = tmp_path / "backups"
    folder.mkdir()
    named = [f"livechat-2026112{day}T193000Z.db" for day in range(9)]
    others = ["livechat-1.db", "other-20261120T193000Z.db", "livechat-20261120T193000Z.db-wal"]
    for name in (*named, *others):
        (folder / name).touch()
    status, out, err = run("backup", "backups/")
    assert (status, err) == (0, "")
    new = out.removeprefix("backed up to backups/").partition(":")[0]
    assert files(folder) == sorted([*named[3:], *others, new])
    assert rows(folder / new) == rows(path)
    assert mode(folder / new) == 0o600
    os.unlink(folder / new)
    assert run("backup", "backups", "--keep", "2")[0] == 0
    assert len(files(folder)) == 2 + len(others)
    assert run("backup", "none/")[2].endswith(": No such file or directory\n")


def test_a_backup_that_fails_deletes_no_older_one(run, fill, path, tmp_path):
    fill(*((f"t{n}", JOHN, FIELD) for n in range(300)))
    damage(path)
    (tmp_path / "backups").mkdir()
    (tmp_path / "backups" / "livechat-20261120T193000Z.db").touch()
    assert run("backup", "backups", "--keep", "1")[0] == 1
    assert files(tmp_path / "backups") == ["livechat-20261120T193000Z.db"]
