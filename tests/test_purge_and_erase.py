"""manage.py purge and erase: deleted, without a trace."""

import time
from contextlib import closing
from datetime import datetime

import pytest

import storage
from operate import database as operating
from operate import purge
from tests.database import bytes_of, look, rows
from tests.operating import FIELD, JOHN, LATER, finish, spawn


def test_a_purge_deletes_by_last_change_without_a_trace(run, fill, path):
    fill(*((f"old{n}", JOHN | {"name": f"Old{n}"}, FIELD) for n in range(50)))
    now = int(time.time() * 1000)
    fill(("old7", {"name": "Seen again"}), ("new", {"name": "New"}), at=now)
    dry = run("purge", "--older-than", "90d", "--dry-run")
    assert (dry[0], dry[2]) == (0, "")
    assert dry[1].startswith("would purge 49 visitors last changed before 20")
    assert len(rows(path)) == 51
    status, out, err = run("purge", "--older-than", "90d")
    assert (status, err) == (0, "")
    assert out.startswith("purged 49 visitors last changed before 20")
    assert [row[2] for row in rows(path)] == ["old7", "new"]
    held = bytes_of(path)
    assert b"Seen again" in held
    assert b"Old1" not in held
    assert look(path, "SELECT last FROM guest") == [(52,)]


def test_a_purge_beside_the_service_leaves_no_trace(make_server, fill, path):
    fill(*((f"old{n}", JOHN | {"name": f"Old{n}"}, FIELD) for n in range(1500)))
    server = make_server(LIVECHAT_DB=path).wait()
    server.register("new", name="New")
    purging = spawn("purge", "--older-than", "1h", "--db", path)
    count = 0
    while purging.poll() is None:
        assert server.register(f"beside{count}", name="New")[0] == 200
        count += 1
    status, out, _ = finish(purging)
    assert (status, out[:20]) == (0, "purged 1500 visitors")
    server.kill()  # as it is: nothing is cleared up at the end
    assert b"Old" not in bytes_of(path)
    assert len(rows(path)) == count + 1


def test_an_erasure_beside_the_service_leaves_no_trace(server, run, path):
    server.register("a", name="Secret")
    server.register("b", name="Open")
    assert run("erase", "a")[0] == 0
    server.kill()
    held = bytes_of(path)
    assert b"Open" in held
    assert b"Secret" not in held


def test_who_registers_while_a_purge_looks_is_kept(fill, path, monkeypatch):
    fill(("old", {}), ("seen again", {}))
    with closing(storage.Database(path)) as database:
        look = database.read

        def read(work):
            found = look(work)
            storage.VisitorStore(database).register("seen again", {"name": "N"})
            return found

        monkeypatch.setattr(database, "read", read)
        assert sum(purge.delete_older(database, LATER)) == 1
    assert [row[2] for row in rows(path)] == ["seen again"]


def test_many_writes_take_turns_with_others(fill, path, monkeypatch):
    fill(("a", {}))
    paused = []
    monkeypatch.setattr(operating.time, "sleep", paused.append)

    def slow(connection, item):
        end = time.perf_counter() + operating.SLICE / 4
        while time.perf_counter() < end:
            pass
        return item

    with closing(storage.Database(path)) as database, closing(storage.Database(path)) as service:
        storage.VisitorStore(database).register("b", {})  # so that nothing is left to be tidied up
        batches = []
        for batch in operating.in_turns(database, range(40), slow):
            batches.append(batch)
            if len(batches) in (3, 4):
                storage.VisitorStore(service).register(f"t{len(batches)}", {})
    assert [item for batch in batches for item in batch] == list(range(40))
    assert max(map(len, batches)) <= 6
    # The first one knows nothing of others; the 4th and the 5th see that one wrote.
    assert [pause > operating.SLICE for pause in paused[:6]] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert paused[1] == operating.PAUSE > 0.002


@pytest.mark.parametrize(
    ("who", "left"),
    [
        (" John.Doe@Email.com", ["token", "phone"]),
        ("+37265783468", ["token", "email"]),
        ("token", ["john", "phone", "email"]),
    ],
)
def test_erase_takes_every_visitor_of_a_person_without_a_trace(run, fill, path, who, left):
    fill(
        ("john", JOHN | {"name": "Secret1"}, FIELD),
        ("token", {"name": "Secret2"}),
        ("phone", {"phone": JOHN["phone"], "name": "Secret3"}),
        ("email", {"email": JOHN["email"], "name": "Secret4"}),
    )
    before = {row[2]: row for row in rows(path)}
    gone = [token for token in before if token not in left]
    status, out, err = run("erase", who)
    assert (status, err) == (0, "")
    *receipt, last = out.splitlines()
    assert [line[:17] for line in receipt] == [before[token][1] for token in gone]
    assert last.startswith(f"erased {len(gone)} visitor")
    assert [row[2] for row in rows(path)] == left
    held = bytes_of(path)
    for token, row in before.items():
        assert (row[4].encode() in held) == (token in left)
    for said in (*JOHN.values(), "Secret", "address", "john", "token"):
        assert said not in out
    assert run("erase", who) == (1, "", "erase: nobody has that token, phone or email\n")


def test_the_receipt_says_what_went(run, fill):
    fill(("a", JOHN, FIELD, FIELD | {"key": "k"}))
    receipt, last = run("erase", "a")[1].splitlines()
    assert receipt[17:] == (
        ": registered 2022-06-29T06:05:01.392Z, last changed 2022-06-29T06:05:01.392Z,"
        " 2 custom fields"
    )
    assert (
        abs(
            datetime.fromisoformat(last.removeprefix("erased 1 visitor at ")).timestamp()
            - time.time()
        )
        < 60
    )


def test_bytes_that_another_program_keeps_are_said_and_go_the_next_time(
    run, fill, path, monkeypatch
):
    fill(("a", {"name": "Secret"}))
    monkeypatch.setattr(operating, "FORGETTING", 0)
    with closing(storage.Database(path)) as service:
        storage.VisitorStore(service).register("other", {})  # so that the WAL is in use
        with operating.snapshot(path):
            status, out, err = run("erase", "a")
            assert (status, out.count("\n")) == (1, 2)
            assert err.startswith("erase: their bytes are still in the WAL")
        assert run("erase", "a")[2] == "erase: nobody has that token, phone or email\n"
    assert b"Secret" not in bytes_of(path)


def test_a_purge_that_was_killed_leaves_no_trace_after_the_next(run, fill, path):
    fill(*((f"old{n}", {"name": f"Old{n}"}) for n in range(50)))
    with closing(storage.Database(path)) as service:
        storage.VisitorStore(service).register("new", {})
        next(purge.delete_older(service, LATER))  # and no more of it
        assert run("purge", "--older-than", "1d")[1].startswith("purged ")
    assert b"Old" not in bytes_of(path)
