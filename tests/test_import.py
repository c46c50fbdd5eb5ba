"""manage.py import: what export wrote, into a new database or an old one."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing

import pytest

import storage
from storage.migrations import newest_version
from tests.database import look, rows
from tests.operating import FIELD, JOHN, LATER, VISITORS, files, finish, mode, spawn
from tests.server import ROOT


def line(**changes):
    record = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return json.dumps(record).encode() + b"\n"


def test_export_import_and_export_again_give_the_same_bytes(run, fill, tmp_path):
    fill(*VISITORS, ("gone", {}), ("numbers stay", {}))
    with closing(storage.Database(str(tmp_path / "livechat.db"))) as database:
        storage.VisitorStore(database).erase("gone")
    assert run("export", "-o", "1.jsonl")[0] == 0
    said = "imported 4 new, 0 replaced, 0 unchanged, 0 kept as changed later here\n"
    assert run("import", "1.jsonl", "--db", "folder/new.db") == (0, said, "")
    assert run("export", "-o", "2.jsonl", "--db", "folder/new.db")[0] == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert rows("folder/new.db") == rows("livechat.db")
    assert mode("folder/new.db") == 0o600
    # guest-4 was erased, guest-5 is there
    assert fill(("next", {}), path=str(tmp_path / "folder" / "new.db"))[0]["username"] == "guest-6"


def test_an_import_run_twice_changes_nothing(run, fill, tmp_path):
    fill(*VISITORS)
    run("export", "-o", "out")
    before = rows("livechat.db")
    said = "imported 0 new, 0 replaced, 3 unchanged, 0 kept as changed later here\n"
    for _ in range(2):
        assert run("import", "out") == (0, said, "")
    assert rows("livechat.db") == before
    with (tmp_path / "out").open() as file:
        process = spawn("import", "-", "--db", tmp_path / "livechat.db", stdin=file)
        assert finish(process) == (0, said, "")


def test_of_two_states_of_a_visitor_the_one_changed_later_stays_whole(run, fill):
    fill(("a", {"name": "old"}, FIELD), ("b", {"name": "old"}))
    run("export", "-o", "old")
    fill(("a", {"name": "new"}, FIELD | {"key": "other"}), at=LATER)
    run("export", "-o", "new")
    newer = rows("livechat.db")
    said = "imported 0 new, {} replaced, 1 unchanged, {} kept as changed later here\n"
    assert run("import", "old") == (0, said.format(0, 1), "")
    assert rows("livechat.db") == newer
    assert run("import", "old", "--db", "other.db")[0] == 0
    assert run("import", "new", "--db", "other.db") == (0, said.format(1, 0), "")
    assert rows("other.db") == newer


def test_a_taken_number_becomes_the_next_one_and_guests_go_on_from_the_larger(run, fill, tmp_path):
    fill(("a", {}), ("b", {}))
    run("export", "-o", "out")
    other = str(tmp_path / "other.db")
    fill(("c", {}), ("d", {}), ("e", {}), path=other)
    before = rows(other)
    assert run("import", "out", "--db", other)[1].startswith("imported 2 new, 0 replaced")
    assert rows(other)[:3] == before
    assert [(row[0], row[2]) for row in rows(other)[3:]] == [(4, "a"), (5, "b")]
    assert look(other, "SELECT last FROM guest") == [(4,)]
    assert run("import", "out", "--db", other)[1].startswith("imported 0 new, 0 replaced, 2 unch")


def test_a_visitor_whose_token_was_replaced_is_still_the_same(run, fill, path):
    fill(("old", JOHN))
    run("export", "-o", "out")
    with closing(storage.Database(path)) as database:
        store = storage.VisitorStore(database, match=("token", "email"))
        store.register("new", {"email": JOHN["email"]})
    assert run("import", "out")[1].startswith("imported 0 new, 0 replaced, 0 unchanged, 1 kept")
    assert [row[2] for row in rows(path)] == ["new"]


def test_a_visitor_of_a_time_without_a_limit_of_bytes_moves_whole(run, fill, path, tmp_path):
    fill(("a", {"name": "N"}))
    fields = {f"k{n:03}": "v" * 4096 for n in range(256)}
    with closing(storage.Database(path)) as database:
        text = json.dumps(fields, separators=(",", ":"))
        database.write(lambda c: c.execute("UPDATE visitor SET fields = ?", (text,)).get)
    assert run("export", "-o", "1.jsonl")[0] == 0
    assert run("import", "1.jsonl", "--db", "new.db")[0] == 0
    with closing(storage.Database(str(tmp_path / "new.db"))) as database:
        assert storage.VisitorStore(database).find("a")["livechatData"] == fields


GOOD = {
    "number": 2,
    "_id": "hN4kQ7rTzWm2XcY9a",
    "username": "guest-3",
    "status": "online",
    "ts": "2022-06-29T06:05:01.392Z",
    "_updatedAt": "2022-06-29T06:05:01.408Z",
    "token": "second",
}
HEAD = b'{"livechat-visitors":1,"schema":1,"guest":3,"visitors":2}\n'
NO_ROOM = "line 1: a number above 4503599627370496, after which there is no room"
NO_HEADER = "line 1: not the beginning of an export as JSONL"
LONE = "not UTF-8, or half of a surrogate pair"


BAD_LINES = {
    "csv": (b"1,a,b\n", "not JSON at column 2"),
    "empty": (b"\n", "not JSON at column 1"),
    "no object": (b"[]\n", "not an object"),
    "cut": (line()[:40] + b"\n", "not JSON at column 41"),
    "deep": (b"[" * 100_000 + b"\n", "nested too deeply"),
    "no UTF-8": (b'{"token":"\xff"}\n', LONE),
    "surrogate": (line(token="\ud800"), LONE),
    "surrogate in a field": (line(livechatData={"\ud800": ""}), LONE),
    "NUL": (line(name="a\0b"), "name: with a NUL character"),
    "unknown key": (line(nmae="x"), "unknown key 'nmae'"),
    "no token": (line(token=None), "token: not a text, or empty"),
    "empty token": (line(token=""), "token: not a text, or empty"),
    "name a number": (line(name=5), "name: not a text, or empty"),
    "no number": (line(number=None), "number: not a whole number from 1 to 4503599627370496"),
    "number 0": (line(number=0), "number: not a whole number from 1 to 4503599627370496"),
    "true": (line(number=True), "number: not a whole number from 1 to 4503599627370496"),
    "huge": (line(number=2**63), "number: not a whole number from 1 to 4503599627370496"),
    "no time": (line(ts="today"), "ts: not a time such as 2022-06-29T06:05:01.392Z"),
    "other time": (line(ts="2022-06-29"), "ts: not a time such as 2022-06-29T06:05:01.392Z"),
    "phone": (line(phone="+1"), 'phone: not [{"phoneNumber":"..."}]'),
    "two phones": (line(phone=[{}, {}]), 'phone: not [{"phoneNumber":"..."}]'),
    "email": (line(visitorEmails=[{"address": 1}]), "visitorEmails: not a text, or empty"),
    "no email": (line(visitorEmails=[{"address": "john"}]), "visitorEmails: not an email"),
    "blank email": (line(visitorEmails=[{"address": " "}]), "visitorEmails: not an email"),
    "fields": (
        line(livechatData={str(n): "" for n in range(257)}),
        "livechatData: not an object with 256 keys at most",
    ),
    "field": (
        line(livechatData={"k": 1}),
        "livechatData: an empty key, or a value that is no text",
    ),
    "long": (b" " * 2**24 + line(), "longer than 16777216 bytes"),
}


@pytest.mark.parametrize("email", ["\ufeff\u3000John.Doe@Email.com\u2028", "JOHN.DOE@EMAIL.COM"])
def test_an_email_is_kept_as_a_registration_does(run, make_service, path, email):
    visitor = line(number=1, visitorEmails=[{"address": email}])
    with open("in", "wb") as file:
        file.write(HEAD.replace(b'"visitors":2', b'"visitors":1') + visitor)
    assert run("import", "in")[0] == 0
    service = make_service(LIVECHAT_MATCH="token,email")
    service.register("registered", email=email)  # meets the one of the file
    assert [row[2:6:3] for row in rows(path)] == [("registered", "john.doe@email.com")]


def test_the_largest_numbers_that_are_taken_leave_room(run, fill, tmp_path):
    largest = 4503599627370496
    head = {"livechat-visitors": 1, "schema": 1, "guest": largest, "visitors": 1}
    (tmp_path / "in").write_bytes(json.dumps(head).encode() + b"\n" + line(number=largest))
    assert run("import", "in")[0] == 0
    assert fill(("next", {}))[0]["username"] == f"guest-{largest + 1}"
    assert [row[0] for row in rows("livechat.db")] == [largest, largest + 1]


@pytest.mark.parametrize("case", BAD_LINES, ids=str)
def test_a_bad_line_is_named_and_those_before_it_are_in(run, tmp_path, case):
    bad, reason = BAD_LINES[case]
    first = line(number=1, _id="b3c7SMriL729R3J8w", token="first")
    (tmp_path / "in").write_bytes(HEAD + first + bad)
    before = "1 new, 0 replaced, 0 unchanged, 0 kept as changed later here"
    assert run("import", "in") == (1, "", f"import: in, line 3: {reason}; before it: {before}\n")
    assert [row[2] for row in rows("livechat.db")] == ["first"]
    (tmp_path / "in").write_bytes(HEAD + first + line())
    assert run("import", "in")[1].startswith("imported 1 new, 0 replaced, 1 unchanged")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", NO_HEADER),
        (b"number,_id\n", NO_HEADER),
        (line(), NO_HEADER),
        (b"[1]\n", NO_HEADER),
        (HEAD.replace(b'"guest":3', b'"guest":"x"'), NO_HEADER),
        (HEAD.replace(b'"guest":3', b'"guest":-1'), NO_HEADER),
        (HEAD.replace(b'"guest":3', b'"guest":9007199254740992'), NO_ROOM),
        (HEAD.replace(b'"guest":3', b'"guest":4503599627370497'), NO_ROOM),
        (HEAD.replace(b'"schema":1', b'"schema":99'), "line 1: written by a newer version"),
        (b"SQLite format 3\0" + bytes(5000), NO_HEADER),
    ],
)
def test_what_is_no_export_makes_no_database(run, tmp_path, content, reason):
    (tmp_path / "in").write_bytes(content)
    status, out, err = run("import", "in")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"import: in, {reason}")
    assert files(tmp_path) == ["in"]


def test_a_file_that_breaks_off_or_goes_on_is_named(run, tmp_path):
    first, second = line(number=1, _id="x", token="first"), line()
    (tmp_path / "short").write_bytes(HEAD + first)
    assert (
        "line 2: the file breaks off here: the header says 2 visitors" in run("import", "short")[2]
    )
    (tmp_path / "long").write_bytes(HEAD + first + second + line(number=3))
    assert "line 4: the header says 2 visitors, and here is one more" in run("import", "long")[2]


def test_an_import_takes_turns_with_the_service(path, server, tmp_path):
    with (tmp_path / "in").open("wb") as file:
        file.write(b'{"livechat-visitors":1,"schema":1,"guest":9,"visitors":4000}\n')
        for n in range(4000):
            file.write(line(number=n + 1, token=f"t{n}", _id=f"i{n}"))
    server.register("before")
    importing = spawn("import", "--db", path, tmp_path / "in")
    start = time.monotonic()
    longest = count = 0
    while importing.poll() is None:
        began = time.monotonic()
        count += 1
        assert server.register(f"beside{count}")[0] == 200
        longest = max(longest, time.monotonic() - began)
    took = time.monotonic() - start
    assert finish(importing)[0] == 0
    assert count > 10
    assert longest < took / 2
    assert server.query("SELECT count(*) FROM visitor") == [[4001 + count]]


def test_many_visitors_go_out_and_in_again_in_flat_memory(path, run, tmp_path, often):
    visitors = often(3000, 1_000_000)
    with (tmp_path / "1.jsonl").open("wb") as file:
        head = {"livechat-visitors": 1, "schema": newest_version()}
        head |= {"guest": visitors + 1, "visitors": visitors}
        file.write(json.dumps(head, separators=(",", ":")).encode() + b"\n")
        for n in range(1, visitors + 1):
            record = GOOD | {"number": n, "_id": f"{n:017}", "username": f"guest-{n + 1}"}
            token = f"{n * 2_654_435_761 % 2**32:032x}"  # in no order, as real ones
            record = {key: record[key] for key in record if key != "token"} | {"token": token}
            record |= {"name": f"Visitor {n}", "livechatData": {"address": "x" * 40}}
            file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    # By a process in between, as a process begins with the peak of the one it comes from.
    code = (
        "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
    )
    for command in (["import", "1.jsonl"], ["export", "-o", "2.jsonl"], ["backup", "copy.db"]):
        line = [sys.executable, "-c", code, sys.executable, ROOT / "manage.py", *command]
        environ = os.environ | {"LIVECHAT_DB": path}
        ran = subprocess.run(line, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert int(ran.stdout.splitlines()[-1]) < 50 * 1024  # KiB; 30 MiB are Python and SQLite
    assert subprocess.run(["cmp", "1.jsonl", "2.jsonl"], cwd=tmp_path).returncode == 0
    assert look(tmp_path / "copy.db", "SELECT count(*) FROM visitor") == [(visitors,)]
