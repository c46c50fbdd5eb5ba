"""Writes that wait at the same moment share a transaction, and no client pays for another's fault."""

import subprocess
import sys
import time
from contextlib import closing

import pytest

import storage
from storage import database as module
from tests import failing_disk
from tests.failing_disk import CLIENTS
from tests.power import Groups


@pytest.fixture
def groups():
    return Groups()


@pytest.fixture
def database(path, groups, monkeypatch):
    monkeypatch.setattr(module, "GROUP_TIME", 60)  # so that no group is parted by a slow machine
    storage.prepare(path)
    database = storage.Database(path, groups)
    yield database
    database.close()


@pytest.fixture
def at_once(database, groups):
    """Return a function that makes calls of the store at once, and returns what becomes of each."""

    def at_once(*calls):
        outcomes = [None] * len(calls)

        def client(number):
            try:
                outcomes[number] = calls[number](storage.VisitorStore(database))
            except Exception as error:
                outcomes[number] = error

        groups.sizes.clear()
        groups.run(database, [lambda n=n: client(n) for n in range(len(calls))])
        return outcomes

    return at_once


def on_disk(path):
    """Return what a process finds that opens the files after the one before was killed."""
    storage.prepare(path)
    with closing(storage.Database(path)) as database:
        store = storage.VisitorStore(database)
        sql = "SELECT token FROM visitor"
        tokens = database.scan(lambda connection: connection.execute(sql).fetchall())
        return {token: store.find(token) for (token,) in tokens}


def register(token, **given):
    return lambda store: store.register(token, given)


@pytest.mark.parametrize("fault", ["sync", "write"])
def test_where_a_commit_fails_all_in_it_are_refused_and_only_what_was_answered_is_on_the_disk(
    path, fault
):
    before, failing, after = failing_disk.run(path, fault, "small")
    for answered, refused, sizes, syncs in (before, after):
        assert (len(answered), refused, sizes) == (CLIENTS, {}, [CLIENTS])
        assert syncs <= 2  # one for all, and one where the WAL is new
    answered, refused, sizes, _ = failing
    assert (answered, len(refused), sizes) == ({}, CLIENTS, [CLIENTS])
    reason = {"sync": "IOError: not synced", "write": "FullError: no room; make room on its disk"}
    assert set(refused.values()) == {reason[fault]}
    assert on_disk(path) == before[0] | after[0]
    usernames = [visitor["username"] for visitor in (before[0] | after[0]).values()]
    assert usernames == [f"guest-{number}" for number in range(2, 2 + 2 * CLIENTS)]


def test_a_disk_that_fills_in_the_middle_of_a_group_undoes_it_and_the_rest_join_the_next(path):
    before, failing, after = failing_disk.run(path, "write", "large")
    assert [len(answered) for answered, *_ in (before, after)] == [CLIENTS, CLIENTS]
    answered, refused, sizes, _ = failing
    assert on_disk(path) == before[0] | answered | after[0]
    assert sizes == [len(refused), len(answered)]
    assert min(sizes) > 0  # SQLite has undone it all with some clients still to come
    assert sum(sizes) == CLIENTS
    first = sizes[0]  # who came first was in it, also those whose own write had gone well
    assert list(refused) == [f"1-{number}" for number in range(first)]
    assert set(refused.values()) == {"FullError: no room; make room on its disk"}


def test_a_write_that_fails_undoes_only_itself(database, at_once, groups):
    def fails(store):
        def work(connection):
            connection.execute("UPDATE guest SET last = 99")
            connection.execute("DELETE FROM visitor")
            raise ZeroDivisionError

        database.write(work)

    fields = [{"key": f"k{number}", "value": "v", "overwrite": True} for number in range(257)]
    a, failed, unknown, many, b, again = at_once(
        register("a", name="A"),
        fails,
        lambda store: store.set_fields("unknown", fields[:1]),
        lambda store: store.register("many", {}, fields),
        register("b"),
        register("a", phone="1"),
    )
    assert groups.sizes == [6]
    assert [type(one) for one in (failed, unknown, many)] == [
        ZeroDivisionError,
        storage.VisitorNotFound,
        storage.OverLimit,
    ]
    assert (a["username"], b["username"]) == ("guest-2", "guest-3")
    assert again["_id"] == a["_id"]
    store = storage.VisitorStore(database)
    assert (store.find("a"), store.find("b")) == (again, b)
    with pytest.raises(storage.VisitorNotFound):
        store.find("many")
    assert at_once(register("c"))[0]["username"] == "guest-4"


@pytest.mark.parametrize(
    "damage",
    ["fields = '{'", "ts = 1 << 60", "name = CAST(x'ff' AS TEXT)", "ts = -(1 << 60)"],
)
def test_a_damaged_visitor_is_a_fault_for_that_one_alone(database, at_once, groups, damage):
    at_once(register("damaged", name="N"), register("sound", name="N"))
    sql = f"UPDATE visitor SET {damage} WHERE token = 'damaged'"
    at_once(lambda store: database.write(lambda connection: connection.execute(sql).get))
    new, damaged, sound = at_once(register("new"), register("damaged"), register("sound"))
    assert groups.sizes == [3]
    assert isinstance(damaged, storage.Unavailable)
    store = storage.VisitorStore(database)
    assert (store.find("new"), store.find("sound")) == (new, sound)
    with pytest.raises(storage.Unavailable):
        store.find("damaged")


def write_into(path, offset, content):
    """Write into the file by a process of its own: a close in this one would end its locks."""
    code = (
        "import sys; file = open(sys.argv[1], 'r+b'); file.seek(int(sys.argv[2])); "
        "file.write(sys.stdin.buffer.read())"
    )
    command = [sys.executable, "-c", code, path, str(offset)]
    subprocess.run(command, check=True, input=content)


def test_a_damaged_page_is_a_fault_for_those_on_it_and_for_no_longer_than_it_lasts(
    database, at_once, path
):
    for number in range(20):
        at_once(*[register(f"t{number}-{n}", name=f"Name{number}-{n};" * 5) for n in range(20)])
    database.close()
    with open(path, "rb") as file:
        pages = [*iter(lambda: file.read(4096), b"")]
    number = next(number for number, page in enumerate(pages) if b"Name10-10;" in page)
    on_it = [register(f"t10-{n}") for n in range(20) if f"Name10-{n};".encode() in pages[number]]
    write_into(path, number * 4096, b"\xa5" * 4096)
    store = storage.VisitorStore(database)
    # SQLite goes on with no transaction that has met such a page.
    before, *outcomes, after = at_once(register("before"), *on_it, register("after"))
    assert {type(outcome) for outcome in outcomes} == {storage.Unavailable}
    for token, outcome in (("before", before), ("after", after)):
        try:
            assert store.find(token) == outcome
        except storage.VisitorNotFound:
            assert isinstance(outcome, storage.Unavailable)
    sound = at_once(register("t1-1"), register("new"))
    assert [store.find(visitor["token"]) for visitor in sound] == sound
    write_into(path, number * 4096, pages[number])
    assert [visitor["token"][:4] for visitor in at_once(*on_it)] == ["t10-"] * len(on_it)


def test_what_takes_long_ends_its_group_and_nobody_else_waits_for_more_of_it(
    database, at_once, groups, monkeypatch
):
    monkeypatch.setattr(module, "GROUP_TIME", 0.01)

    def slow(store):
        def work(connection):
            end = time.monotonic() + 2 * module.GROUP_TIME
            while time.monotonic() < end:
                pass
            return connection.execute("UPDATE guest SET last = last + 1 RETURNING last").get

        return database.write(work)

    assert at_once(slow, slow, slow) == [2, 3, 4]
    assert groups.sizes == [1, 1, 1]
