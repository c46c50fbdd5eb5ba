"""manage.py purge and erase: deleted, without a trace."""

import os
import re
import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime

import pytest

import storage
from operate import database as operating
from operate import purge
from tests.database import bytes_of, look, rows
from tests.operating import FIELD, JOHN, LATER, VISITORS, finish, spawn
from tests.server import PATH, ROOT


class Lines:
    """A stdin with the same lines whenever it is read."""

    def __init__(self, *lines):
        self.buffer = [f"{line}\n".encode() for line in lines] + [b"\xff\n"]


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
        for batch in operating.in_slices(database, range(40), slow):
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


NOBODY = (
    "erase: nobody has that _id or token (exactly), email (letter case aside) or phone (by its"
    " digits; exactly, if they are fewer than 7)\n"
)


@pytest.mark.parametrize(
    ("who", "left"),
    [
        (" John.Doe@Email.com", ["token", "phone"]),
        ("+37265783468", ["token", "email"]),
        ("+37 265-783468", ["token", "email"]),
        ("(37) 265 78 34 68", ["token", "email"]),
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
    said = [line.removeprefix("Erased the visitor ")[:17] for line in receipt]
    assert said == [before[token][1] for token in gone]
    assert last.startswith(f"erased {len(gone)} visitor")
    assert [row[2] for row in rows(path)] == left
    held = bytes_of(path)
    for token, row in before.items():
        assert (row[4].encode() in held) == (token in left)
    for said in (*JOHN.values(), "Secret", "address", "john", "token"):
        assert said not in out
    status, out, err = run("erase", who)
    assert (status, err) == (1, NOBODY)
    assert out.endswith("; nobody was there for 1 of 1\n")


def test_the_receipt_says_what_went(run, fill):
    fill(("a", JOHN, FIELD, FIELD | {"key": "k"}))
    receipt, last = run("erase", "a")[1].splitlines()
    assert receipt.startswith("Erased the visitor ")
    assert receipt[36:] == (
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


@pytest.mark.parametrize("who", ["token-a", "+37 265 783468", "JOHN.DOE@email.com", "-"])
def test_bytes_that_another_program_keeps_are_said_and_go_the_next_time(
    run, fill, path, monkeypatch, who
):
    (answer,) = fill(("token-a", JOHN | {"name": "Secret"}))
    monkeypatch.setattr(operating, "FORGETTING", 0)
    monkeypatch.setattr(storage.database, "ERASE_TIME", 0)
    monkeypatch.setattr(sys, "stdin", Lines(answer["_id"]))
    with closing(storage.Database(path)) as service:
        storage.VisitorStore(service).register("other", {})  # so that the WAL is in use
        with operating.snapshot(path):
            for _ in range(2):
                status, _, err = run("erase", who)
                assert status == 1
                assert err.startswith("erase: their bytes are still in the files, as another prog")
                assert "(an export, a shell, Litestream): end it and run this again" in err
        assert b"Secret" in bytes_of(path)
        assert run("erase", who)[::2] == (0, "")
        assert b"Secret" not in bytes_of(path)
        assert run("erase", who)[::2] == ((0, "") if who == "-" else (1, NOBODY))


def test_a_phone_of_few_digits_and_a_token_are_compared_exactly(run, fill, path):
    fill(("1234567", {"phone": "12-34"}), ("b", {"phone": "n/a"}), ("c", {"phone": "1234 (567)"}))
    for who in ("1234", "12 34", "a-1234567", "1 2", "/"):
        assert run("erase", who)[0] == 1
    assert len(rows(path)) == 3
    assert run("erase", "12-34")[0] == 0
    assert [row[2] for row in rows(path)] == ["b", "c"]
    assert run("erase", "1234567")[0] == 0
    assert [row[2] for row in rows(path)] == ["b"]
    assert run("erase", "n/a")[0] == 0


def test_an_email_that_was_stored_in_capitals_is_found(run, fill, path):
    fill(("a", {"email": "John.Doe@Email.com"}), ("b", {"email": "other@email.com"}))
    assert run("erase", "john.doe@EMAIL.com")[0] == 0
    assert [row[2] for row in rows(path)] == ["b"]


def test_several_are_erased_and_who_is_unknown_is_counted(run, fill, path, monkeypatch):
    answers = fill(*((f"t{n}", {}) for n in range(6)))
    ids = [answer["_id"] for answer in answers]
    status, out, err = run("erase", "t0", ids[1], "unknown")
    assert (status, err) == (1, NOBODY)
    assert out.splitlines()[-1].startswith("erased 2 visitors at ")
    assert out.endswith("; nobody was there for 1 of 3\n")
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", Lines(ids[1], f" {ids[2]} ", "", ids[3], "\0", "é"))
        status, out, err = run("erase", "-")
        assert (status, err) == (0, "")
    assert out.startswith("erased 0 visitors at ")
    assert [row[2] for row in rows(path)] == ["t4", "t5"]


def test_an_erasure_is_repeated_from_the_log_as_the_document_says(
    server, run, path, tmp_path, make_server
):
    """The lines of docs/operating.md, as they stand there but for where the log is."""
    for token in ("by the API", "by the command", "stays"):
        server.register(token, name=f"Secret {token}")
    assert run("backup", "copy.db")[0] == 0
    assert server.request("DELETE", f"{PATH}/by%20the%20API")[0] == 200
    (tmp_path / "erased.log").write_text(run("erase", "by the command")[1])
    ids = {row[2]: row[1] for row in rows("copy.db")}
    assert server.log().count(f"Erased the visitor {ids['by the API']}\n") == 1
    assert "Secret" not in server.log()
    assert server.stop() == 0
    assert run("restore", "copy.db")[0] == 0
    assert len(rows(path)) == 3
    document = (ROOT / "docs" / "operating.md").read_text()
    pipelines = re.findall(r"^    (.*\| .*manage\.py erase .*-)$", document, re.M)
    assert len(pipelines) == 2
    for _ in range(2):
        for line in pipelines:
            line = re.sub("^journalctl [^|]*", f"cat {server.output} ", line)
            line = line.replace(".venv/bin/python manage.py", f"{sys.executable} {ROOT}/manage.py")
            line = line.replace("/var/lib/livechat-visitors/livechat.db", path)
            ran = subprocess.run(line, shell=True, capture_output=True, text=True)
            assert (ran.returncode, ran.stderr) == (0, "")
    assert [row[2] for row in rows(path)] == ["stays"]
    assert b"Secret by" not in bytes_of(path)


def test_a_purge_on_a_terminal_asks_and_names_the_number(fill, path):
    fill(*VISITORS)
    purge_all = ("purge", "--older-than", "1y", "--db", path)
    for answer, status, left in (("\n", 1, 3), ("n\n", 1, 3), ("y\n", 0, 0), ("", 0, 0)):
        master, terminal = os.openpty()
        purging = spawn(*purge_all, stdin=terminal)
        os.write(master, answer.encode())
        ended, _, err = finish(purging)
        os.close(master)
        os.close(terminal)
        assert (ended, len(rows(path))) == (status, left)
        if answer:  # else there is nobody to be asked for
            assert err.startswith("purge 3 visitors last changed before 20")
            assert "? [y/N] " in err
        assert ("purge: nothing was purged" in err) == (status == 1)
    fill(*VISITORS)
    master, terminal = os.openpty()
    assert finish(spawn(*purge_all, "--yes", stdin=terminal))[::2] == (0, "")
    assert rows(path) == []


@pytest.mark.parametrize("text", ["6m", "30M", "90", "1 d", "0d", "-1d", "d", "1000000d", "1mo"])
def test_an_age_that_is_refused_names_those_that_are_not(run, text, capsys):
    with pytest.raises(SystemExit):
        run("purge", f"--older-than={text}")
    said = capsys.readouterr().err
    assert f"{text!r}: give 12h, 90d, 52w or 2y; m could be minutes or months" in said


@pytest.mark.parametrize(
    ("text", "hours"),
    [("1h", 1), ("2d", 48), ("3w", 504), ("2y", 17_520), ("99999y", 99_999 * 8760)],
)
def test_an_age_is_in_hours_days_weeks_or_years(run, fill, text, hours):
    assert purge.age(text) == hours * 3600
    fill(*VISITORS)
    assert run("purge", "--older-than", text)[0] == 0


def test_a_purge_that_was_killed_leaves_no_trace_after_the_next(run, fill, path):
    fill(*((f"old{n}", {"name": f"Old{n}"}) for n in range(50)))
    with closing(storage.Database(path)) as service:
        storage.VisitorStore(service).register("new", {})
        next(purge.delete_older(service, LATER))  # and no more of it
        assert run("purge", "--older-than", "1d")[1].startswith("purged ")
    assert b"Old" not in bytes_of(path)
