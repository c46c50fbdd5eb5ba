"""manage.py check: what it finds, and what to do."""

from contextlib import closing

import storage
from operate import check
from operate import database as operating
from storage.migrations import newest_version
from tests.database import damage, look
from tests.operating import FIELD, JOHN, VISITORS


def test_check_finds_nothing_and_says_what_there_is(run, fill, server, path):
    server.register("a")
    status, out, err = run("check")
    assert (status, err) == (0, "")
    assert out.startswith(f"sound: 1 visitor, schema version {newest_version()}, 0.0 MiB, 0.")


def test_check_names_each_finding_and_what_to_do(run, fill, path, tmp_path, monkeypatch):
    fill(*((f"t{n}", JOHN, FIELD) for n in range(300)))
    damage(path)
    look(path, "PRAGMA user_version = 1")
    monkeypatch.setattr("storage.migrations.STEPS", ("", ""))
    monkeypatch.setattr(check, "LEAST_FREE", 2**60)
    monkeypatch.setattr(check, "MUCH_WAL", -1)
    status, out, err = run("check")
    assert (status, err) == (1, "check: 4 findings\n")
    schema, damaged, free, wal = out.splitlines()
    assert damaged.startswith("damaged, first of all ")
    assert damaged.endswith(": stop the service and restore a backup")
    assert schema == "schema version 1, of 2: restart the service, which brings it up"
    assert free.endswith("free on its disk: make room until there are 1,099,511,627,776.0 MiB")
    assert wal.startswith("0.0 MiB in the WAL: end what reads an older state")


def test_check_sees_a_wal_that_grows_under_a_reader(run, fill, path, monkeypatch):
    fill(("a", {}))
    monkeypatch.setattr(check, "MUCH_WAL", 100_000)
    with closing(storage.Database(path)) as database, operating.snapshot(path):
        for n in range(30):
            storage.VisitorStore(database).register(f"t{n}", {})
        status, out, _ = run("check")
    assert status == 1
    assert out.endswith(
        "in the WAL: end what reads an older state for so long, such as an export or a shell\n"
    )


def test_check_changes_nothing_of_a_backup(run, fill, tmp_path):
    fill(*VISITORS)
    run("backup", "copy.db")
    before = (tmp_path / "copy.db").read_bytes()
    assert run("check", "--db", "copy.db")[0] == 0
    assert run("export", "--db", "copy.db", "-o", "out")[0] == 0
    assert (tmp_path / "copy.db").read_bytes() == before
