"""A file of an older version: brought up to date by steps that only add, each whole or not at all.

tests/fixtures/version-1.db was written by the first version, and is never made anew.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

import storage
from storage import migrations
from tests.database import look, refused, version
from tests.server import PATH, ROOT

# What the next two versions may bring; a step may hold several statements.
ADDED = (
    "ALTER TABLE visitor ADD COLUMN country TEXT;"
    "CREATE TABLE visit (number INTEGER PRIMARY KEY, visitor INTEGER NOT NULL) STRICT;"
    "CREATE INDEX visitor_country ON visitor (country)",
    "ALTER TABLE visitor ADD COLUMN visits INTEGER NOT NULL DEFAULT 0",
)
NOW = migrations.newest_version()
FAILING = "CREATE TABLE visit (number); ALTER TABLE visitor ADD COLUMN token TEXT"


@pytest.fixture
def path(tmp_path):
    fixture = ROOT / "tests" / "fixtures" / "version-1.db"
    return str(shutil.copy(fixture, tmp_path / "livechat.db"))


@pytest.fixture
def steps(monkeypatch):
    """Return a function that adds steps to those there are."""
    there = migrations.STEPS
    return lambda *steps: monkeypatch.setattr(migrations, "STEPS", (*there, *steps))


def schema(path):
    """Return each table's columns, however their SQL is written, and each trigger and index."""
    sql = (
        "SELECT t.name, c.* FROM sqlite_schema t, pragma_table_xinfo(t.name) c"
        " WHERE t.type = 'table' ORDER BY t.name, c.cid"
    )
    others = (
        "SELECT type, name, tbl_name, sql FROM sqlite_schema"
        " WHERE type != 'table' ORDER BY type, name"
    )
    others = [[" ".join(str(part).split()) for part in row] for row in look(path, others)]
    return look(path, sql), others


def test_the_first_versions_file_serves_today(path, make_service):
    service = make_service(path)
    paths = {
        "867ad6a09fc4af29f6f1f2a9cf1deaba": {
            "_id": "b3c7SMriL729R3J8w",
            "username": "guest-2",
            "status": "online",
            "ts": "2022-06-29T06:05:01.392Z",
            "_updatedAt": "2022-06-29T06:05:01.408Z",
        },
        "erdsfdjs43828492": {
            "_id": "hN4kQ7rTzWm2XcY9a",
            "username": "kim.jane",
            "name": "John Doe",
            "phone": [{"phoneNumber": "+37265783468"}],
            "visitorEmails": [{"address": "john.doe@email.com"}],
            "department": "Support",
            "livechatData": {"address": "Rocket.Chat street", "a.dot": ""},
        },
        "token/with a slash?": {"_id": "Zp6vD3sFgJ8LxBn5e", "name": "Zoë 王小明"},
    }
    for token, expected in paths.items():
        quoted = token.replace(" ", "%20").replace("?", "%3F")
        visitor = service.http.get(f"{PATH}/{quoted}").json["visitor"]
        assert visitor["token"] == token
        assert expected.items() <= visitor.items()
    # guest-4 was erased there, and no number is used twice
    assert service.register("new")["username"] == "guest-5"


def test_today_is_the_first_version_with_its_steps(path, tmp_path):
    storage.prepare(path)
    storage.prepare(str(tmp_path / "new.db"))
    assert schema(path) == schema(tmp_path / "new.db")
    assert version(path) == version(tmp_path / "new.db") == NOW


def test_the_second_version_counts_the_visitors_of_each_day(path, make_service):
    before = look(path, "SELECT ts FROM visitor")
    make_service(path).database.close()
    days = {}
    for (ts,) in before:
        days[ts // 86_400_000] = days.get(ts // 86_400_000, 0) + 1
    assert dict(look(path, "SELECT number, registered FROM day")) == days
    assert sum(days.values()) == 3


def test_visitors_of_the_first_version_are_found_as_those_of_today(path, make_service):
    service = make_service(path)
    store = storage.VisitorStore(service.database)
    terms = ("372 6578 3468", "zoe\u0308", "GUEST-2")
    before = [store.search(term, {}, 0, 10)[1] for term in terms]
    for visitor in store.search("", {}, 0, 100)[0]:
        token = store.find(visitor["_id"], "id")["token"]
        store.register(token, {})  # which writes what is searched anew
    assert before == [store.search(term, {}, 0, 10)[1] for term in terms]
    assert 0 not in before


def test_every_step_is_taken_once_and_keeps_every_visitor(path, steps):
    storage.prepare(path)
    before = look(path, "SELECT * FROM visitor")
    steps(*ADDED)
    assert storage.prepare(path) == (False, 3)
    assert version(path) == NOW + 2
    assert look(path, "SELECT * FROM visitor") == [(*row, None, 0) for row in before]
    assert storage.prepare(path) == (False, 3)


def test_a_file_between_takes_what_it_lacks(path, steps):
    steps(ADDED[0])
    storage.prepare(path)
    assert version(path) == NOW + 1
    steps(*ADDED)
    storage.prepare(path)
    assert version(path) == NOW + 2


def test_a_failing_step_leaves_the_file_as_it_was(path, steps):
    storage.prepare(path)
    with open(path, "rb") as file:
        before = file.read()
    steps(FAILING, ADDED[1])
    said = refused(path)
    assert said.startswith(
        f"{path}: stays at version {NOW}, the step to {NOW + 1} failed: SQLError: "
    )
    with open(path, "rb") as file:
        assert file.read() == before
    steps()
    assert storage.prepare(path) == (False, 3)


def test_a_failing_second_step_leaves_the_first_ones_version(path, steps):
    steps(ADDED[1], FAILING)
    assert f"{path}: stays at version {NOW + 1}, the step to {NOW + 2} failed: " in refused(path)
    assert version(path) == NOW + 1
    assert look(path, "SELECT sum(visits) FROM visitor") == [(0,)]
    assert look(path, "SELECT name FROM sqlite_schema WHERE name = 'visit'") == []


@pytest.mark.parametrize("fields", ["", "[]", '{"k": 1}'])
def test_a_visitor_that_a_step_cannot_read_stops_it_with_one_line(path, fields):
    look(path, f"UPDATE visitor SET fields = '{fields}' WHERE number = 1")
    said = refused(path)
    assert said.startswith(f"{path}: stays at version 1, the step to 2 failed: ")
    assert "\n" not in said
    assert version(path) == 1


def test_a_newer_file_is_refused_and_left_alone(path, steps):
    steps(*ADDED)
    storage.prepare(path)
    with open(path, "rb") as file:
        before = file.read()
    steps(ADDED[0])
    assert refused(path) == f"{path}: written by a newer version of this service"
    with open(path, "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_that_never_was_is_refused(path, version):
    look(path, f"PRAGMA user_version = {version}")
    assert refused(path) == f"{path}: damaged: it is of version {version}; restore a backup"


def test_old_and_new_code_side_by_side_lose_nothing(path, make_server, steps):
    # The old code is a server of today; the new one, which has the steps, migrates under it.
    server = make_server(LIVECHAT_DB=path).wait()
    registered = [server.register(f"before{n}", name="N")[1] for n in range(8)]
    steps(*ADDED)
    assert storage.prepare(path) == (False, 11)
    registered += [server.register(f"after{n}", name="N")[1] for n in range(8)]
    assert server.request("DELETE", f"{PATH}/after0")[0] == 200
    for answer in [*registered[:8], *registered[9:]]:
        visitor = answer["visitor"]
        assert server.request("GET", f"{PATH}/{visitor['token']}")[2]["visitor"] == visitor
    changed = {"token": "after1", "key": "k", "value": "v", "overwrite": True}
    status, _, _ = server.request(
        "POST",
        "/api/v1/livechat/custom.field",
        json.dumps(changed),
        {"Content-Type": "application/json"},
    )
    assert status == 200
    assert server.stop() == 0
    new = storage.Database(path)
    assert storage.VisitorStore(new).find("after1")["livechatData"] == {"k": "v"}
    assert new.read(
        lambda c: c.execute("SELECT count(*), sum(visits) FROM visitor").fetchone()
    ) == (18, 0)
    new.close()
    assert storage.prepare(path) == (False, 18)


def test_what_was_rebuilt_from_a_dump_becomes_ours_again_as_the_refusal_says(path, tmp_path):
    storage.prepare(path)
    rebuilt = str(tmp_path / "rebuilt.db")
    shell = [sys.executable, "-m", "apsw"]
    dumped = subprocess.run([*shell, path, ".dump"], check=True, capture_output=True).stdout
    # sqlite3's own leaves these out.
    kept = [line for line in dumped.splitlines() if not re.match(rb"(?i)pragma \w+_", line)]
    assert len(kept) < len(dumped.splitlines())
    subprocess.run([*shell, rebuilt], input=b"\n".join(kept), check=True)
    said = refused(rebuilt)
    assert said.startswith(f"{rebuilt}: has our tables without our marks")
    for pragma in re.findall(r"PRAGMA [^;]+;", said):
        look(rebuilt, pragma)
    assert storage.prepare(rebuilt) == storage.prepare(path)
    for table in ("visitor", "guest"):
        sql = f"SELECT * FROM {table}"
        assert look(rebuilt, sql) == look(path, sql) != []
