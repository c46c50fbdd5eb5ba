"""manage.py: each command, beside the running service, and each failure that it names."""

import csv
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import termios
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime

import pytest

import manage
import storage
from storage import maintenance, transfer
from storage.scrubber import scrub
from tests.server import ROOT
from tests.test_database import held
from tests.test_migrations import look, version

JOHN = {"name": "John Doe", "email": "john.doe@email.com", "phone": "+37265783468"}
FIELD = {"key": "address", "value": "Rocket.Chat street", "overwrite": True}
LATER = 1_700_000_000_000
# Root may do everything; this is one command without that right.
NO_RIGHTS = "-dac_override,-dac_read_search"
UNPRIVILEGED = ["setpriv", f"--bounding-set={NO_RIGHTS}", f"--inh-caps={NO_RIGHTS}"]


def spawn(*arguments, command=(), **options):
    """Start manage.py as an operator does."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    line = [*command, sys.executable, ROOT / "manage.py", *map(str, arguments)]
    return subprocess.Popen(line, text=True, **(pipes | options))


def finish(process):
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def rows(path):
    return look(path, "SELECT * FROM visitor ORDER BY number")


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def files(folder):
    return sorted(os.listdir(folder))


def bytes_of(path):
    """Return what the database and its WAL hold; nobody has them open here."""
    held = b""
    for name in (path, f"{path}-wal"):
        if os.path.exists(name):
            with open(name, "rb") as file:
                held += file.read()
    return held


VISITORS = (
    ("867ad6a09fc4af29f6f1f2a9cf1deaba", {}),
    ("john", JOHN | {"department": "Support", "username": "kim.jane"}, FIELD),
    ('quoted "\n\u2028 王小明', {"name": "Zoë"}, {"key": "é\r", "value": "", "overwrite": True}),
)


# export


def test_export_writes_a_header_and_each_visitor_as_the_api_answers_it(run, fill, tmp_path):
    answers = fill(*VISITORS)
    assert run("export", "-o", "out.jsonl") == (0, "exported 3 visitors to out.jsonl\n", "")
    assert files(tmp_path) == [*files_of_a_database(tmp_path), "out.jsonl"]
    header, *visitors = map(json.loads, (tmp_path / "out.jsonl").read_text().split("\n")[:-1])
    assert header == {"livechat-visitors": 1, "schema": 1, "guest": 3, "visitors": 3}
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
    monkeypatch.setattr(transfer, "MAX_COLUMNS", 11)
    status, out, err = run("export", "--format", "csv", "-o", "out.csv")
    assert (status, out) == (1, "")
    assert err == (
        "export: there are more custom fields than a spreadsheet has columns; export JSONL\n"
    )
    assert files(tmp_path) == files_of_a_database(tmp_path)


def files_of_a_database(folder):
    return [name for name in files(folder) if name.startswith("livechat.db")]


def test_a_broken_export_leaves_the_one_before(run, fill, tmp_path, monkeypatch):
    fill(*VISITORS)
    (tmp_path / "out").write_text("before")
    whole = transfer.as_wire

    def broken(visitor):
        if visitor["number"] == 3:
            raise OSError(28, "No space left on device")
        return whole(visitor)

    monkeypatch.setattr(transfer, "as_wire", broken)
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
        "import manage, os, signal, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"  # which a shell's & may ignore
        "    signal.signal(number, signal.default_int_handler)\n"
        "def wait():\n"  # not signal.pause, which a signal just before it would not end
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "manage.sync = lambda path: (print(path, flush=True), wait())\n"
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


# import


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
NO_HEADER = "line 1: not the beginning of an export as JSONL"
LONE = "not UTF-8, or half of a surrogate pair"


def line(**changes):
    record = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return json.dumps(record).encode() + b"\n"


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
    "no number": (line(number=None), "number: not a whole number from 1 to 9007199254740992"),
    "number 0": (line(number=0), "number: not a whole number from 1 to 9007199254740992"),
    "true": (line(number=True), "number: not a whole number from 1 to 9007199254740992"),
    "huge": (line(number=2**63), "number: not a whole number from 1 to 9007199254740992"),
    "no time": (line(ts="today"), "ts: not a time such as 2022-06-29T06:05:01.392Z"),
    "other time": (line(ts="2022-06-29"), "ts: not a time such as 2022-06-29T06:05:01.392Z"),
    "phone": (line(phone="+1"), 'phone: not [{"phoneNumber":"..."}]'),
    "two phones": (line(phone=[{}, {}]), 'phone: not [{"phoneNumber":"..."}]'),
    "email": (line(visitorEmails=[{"address": 1}]), "visitorEmails: not a text, or empty"),
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


# backup


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
    monkeypatch.setattr(maintenance, "PAGES", 1)
    (tmp_path / "copy.db").touch()
    with closing(storage.Database(path)) as database:
        store = storage.VisitorStore(database)
        for step, _ in enumerate(maintenance.backup(path, str(tmp_path / "copy.db"))):
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
    whole = maintenance.backup

    def slow(*paths):
        yield from whole(*paths)
        (tmp_path / "copy.db").write_text("precious")

    monkeypatch.setattr(maintenance, "backup", slow)
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
    monkeypatch.setattr(maintenance, "_problems", lambda connection: ["row 1 missing from index"])
    assert run("backup", "copy.db")[2] == "backup: the copy is not sound; check the database\n"
    assert files(tmp_path) == files_of_a_database(tmp_path)


def damage(path):
    with open(path, "r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\xa5" * 4096)


# purge and erase


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
        assert sum(maintenance.purge(database, LATER)) == 1
    assert [row[2] for row in rows(path)] == ["seen again"]


def test_many_writes_take_turns_with_others(fill, path, monkeypatch):
    fill(("a", {}))
    paused = []
    monkeypatch.setattr(maintenance.time, "sleep", paused.append)

    def slow(connection, item):
        end = time.perf_counter() + maintenance.SLICE / 4
        while time.perf_counter() < end:
            pass
        return item

    with closing(storage.Database(path)) as database, closing(storage.Database(path)) as service:
        storage.VisitorStore(database).register("b", {})  # so that nothing is left to be tidied up
        batches = []
        for batch in maintenance.in_turns(database, range(40), slow):
            batches.append(batch)
            if len(batches) in (3, 4):
                storage.VisitorStore(service).register(f"t{len(batches)}", {})
    assert [item for batch in batches for item in batch] == list(range(40))
    assert max(map(len, batches)) <= 6
    # The first one knows nothing of others; the 4th and the 5th see that one wrote.
    assert [pause > maintenance.SLICE for pause in paused[:6]] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert paused[1] == maintenance.PAUSE > 0.002


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
    monkeypatch.setattr(maintenance, "FORGETTING", 0)
    with closing(storage.Database(path)) as service:
        storage.VisitorStore(service).register("other", {})  # so that the WAL is in use
        with maintenance.snapshot(path):
            status, out, err = run("erase", "a")
            assert (status, out.count("\n")) == (1, 2)
            assert err.startswith("erase: their bytes are still in the WAL")
        assert run("erase", "a")[2] == "erase: nobody has that token, phone or email\n"
    assert b"Secret" not in bytes_of(path)


def test_a_purge_that_was_killed_leaves_no_trace_after_the_next(run, fill, path):
    fill(*((f"old{n}", {"name": f"Old{n}"}) for n in range(50)))
    with closing(storage.Database(path)) as service:
        storage.VisitorStore(service).register("new", {})
        next(maintenance.purge(service, LATER))  # and no more of it
        assert run("purge", "--older-than", "1d")[1].startswith("purged ")
    assert b"Old" not in bytes_of(path)


# check


def test_check_finds_nothing_and_says_what_there_is(run, fill, server, path):
    server.register("a")
    status, out, err = run("check")
    assert (status, err) == (0, "")
    assert out.startswith("sound: 1 visitor, schema version 1, 0.0 MiB, 0.")


def test_check_names_each_finding_and_what_to_do(run, fill, path, tmp_path, monkeypatch):
    fill(*((f"t{n}", JOHN, FIELD) for n in range(300)))
    damage(path)
    look(path, "PRAGMA user_version = 1")
    monkeypatch.setattr("storage.migrations.STEPS", ("",))
    monkeypatch.setattr(maintenance.apsw, "sqlite_lib_version", lambda: "3.40.1")
    monkeypatch.setattr(manage, "LEAST_FREE", 2**60)
    monkeypatch.setattr(manage, "MUCH_WAL", -1)
    status, out, err = run("check")
    assert (status, err) == (1, "check: 5 findings\n")
    damaged, schema, sqlite, free, wal = out.splitlines()
    assert damaged.startswith("damaged, first of all ")
    assert damaged.endswith(": stop the service and restore a backup")
    assert schema == "schema version 1, of 2: restart the service, which brings it up"
    assert sqlite == "SQLite 3.40.1 can damage a database; install a newer apsw"
    assert free.endswith("free on its disk: make room until there are 1,099,511,627,776.0 MiB")
    assert wal.startswith("0.0 MiB in the WAL: end what reads an older state")


def test_check_sees_a_wal_that_grows_under_a_reader(run, fill, path, monkeypatch):
    fill(("a", {}))
    monkeypatch.setattr(manage, "MUCH_WAL", 100_000)
    with closing(storage.Database(path)) as database, maintenance.snapshot(path):
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


# what all have in common

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
    monkeypatch.setattr("storage.migrations.STEPS", ("ALTER TABLE visitor ADD COLUMN x",))
    status, _, err = run(*command)
    assert version(path) == 1
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
        assert time.monotonic() - began < maintenance.FORGETTING  # nothing is to be forgotten
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
    "command", ["export", "import", "backup", "purge", "erase", "check", "replay"]
)
def test_each_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as raised:
        manage.main([command, "--help"])
    assert raised.value.code == 0
    assert f"example: python manage.py {command}" in capsys.readouterr().out


def test_a_setting_that_cannot_be_meant_is_one_line(run, monkeypatch):
    monkeypatch.setenv("LIVECHAT_DB", "")
    assert run("check") == (1, "", "check: LIVECHAT_DB: the name is empty\n")


def test_the_bar_is_for_terminals_alone(path, fill):
    fill(*VISITORS)
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    code = (
        "import functools, manage, sys; "
        "manage.bar = functools.partial(manage.bar, delay=0, mininterval=0); "
        "sys.exit(manage.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, "export", "--db", path]
    for stderr, seen in ((terminal, True), (subprocess.PIPE, False)):
        process = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        shown = os.read(master, 65536) if seen else process.stderr
        assert (b"3/3" in shown or b"%|" in shown) == seen
        assert b"exported 3 visitors to stdout" in shown
    os.close(master)
    os.close(terminal)


# a million


def test_many_visitors_go_out_and_in_again_in_flat_memory(path, run, tmp_path, often):
    visitors = often(3000, 1_000_000)
    with (tmp_path / "1.jsonl").open("wb") as file:
        head = {"livechat-visitors": 1, "schema": 1, "guest": visitors + 1, "visitors": visitors}
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
