"""One SQLite file: prepared once, private, durable, and shared by processes and threads."""

import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import apsw
import pytest

import storage
from storage import database as module
from tests.server import ROOT, wait_until


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "livechat.db")


@pytest.fixture
def database(path):
    storage.prepare(path)
    database = storage.Database(path)
    yield database
    database.close()


def count(connection):
    return connection.execute("SELECT count(*) FROM visitor").get


def store(database):
    return storage.VisitorStore(database)


def test_a_new_database_is_made_with_its_folders_and_opened_the_next_time(tmp_path):
    path = str(tmp_path / "a" / "b" / "livechat.db")
    assert storage.prepare(path) == (True, 0)
    assert storage.prepare(path) == (False, 0)
    database = storage.Database(path)
    store(database).register("a", {})
    database.close()
    assert storage.prepare(path) == (False, 1)


def test_an_empty_file_is_a_new_database(path):
    open(path, "w").close()
    assert storage.prepare(path) == (True, 0)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_every_file_is_readable_by_its_owner_alone(path, umask):
    before = os.umask(umask)
    try:
        open(path, "w").close()  # with whatever rights
        storage.prepare(path)
        database = storage.Database(path)
        store(database).register("a", {})
    finally:
        os.umask(before)
    names = {f"livechat.db{suffix}" for suffix in ("", "-wal", "-shm", "-lock")}
    folder = os.path.dirname(path)
    assert set(os.listdir(folder)) == names
    modes = {stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) for name in names}
    database.close()
    assert modes == {0o600}


def test_every_connection_has_the_settings_that_make_an_answer_durable(database):
    def settings(connection):
        names = ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
        return [connection.pragma(name) for name in names]

    assert database.write(settings) == ["wal", 2, 1, 1]
    assert database.read(settings) == ["wal", 2, 1, 1]


def test_the_file_says_whose_it_is_and_its_tables_are_strict(database):
    assert database.read(lambda connection: connection.pragma("user_version")) == 1
    assert database.read(lambda connection: connection.pragma("application_id")) == 0x4C435631
    tables = database.read(
        lambda connection: connection.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND name != 'sqlite_schema'"
        ).fetchall()
    )
    assert sorted(tables) == [("guest", 1), ("visitor", 1)]


def test_only_what_registrations_are_matched_by_has_an_index(path):
    def indexes():
        connection = apsw.Connection(path)
        sql = "SELECT name FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL"
        names = {name for (name,) in connection.execute(sql)}
        connection.close()
        return names

    for match in (("token",), ("token", "phone"), ("token", "email"), ("token",)):
        storage.prepare(path, match)
        assert indexes() == {f"visitor_{column}" for column in match[1:]}


def refused(path):
    with pytest.raises(storage.PrepareError) as raised:
        storage.prepare(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_is_refused(tmp_path):
    assert refused(str(tmp_path)) == f"{tmp_path}: a folder, not a file"


def test_what_is_no_regular_file_is_refused_and_left_alone(tmp_path):
    path = str(tmp_path / "pipe")
    os.mkfifo(path, 0o644)
    mode = os.stat(path).st_mode
    assert refused(path) == f"{path}: not a regular file"
    assert os.stat(path).st_mode == mode
    assert os.listdir(tmp_path) == ["pipe"]


def test_another_applications_wal_is_left_alone(path):
    code = (
        "import apsw, os, sys; connection = apsw.Connection(sys.argv[1]); "
        "connection.pragma('journal_mode', 'wal'); connection.execute('CREATE TABLE t (x)'); "
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
    before = [os.stat(path + suffix).st_size for suffix in ("", "-wal")]
    assert refused(path) == f"{path}: the database of another application"
    assert [os.stat(path + suffix).st_size for suffix in ("", "-wal")] == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(path):
    with open(path, "w") as file:
        file.write("something else\n" * 100)
    assert refused(path) == f"{path}: not a SQLite database; if it was, restore a backup"
    with open(path) as file:
        assert file.read() == "something else\n" * 100


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE visitor (token)",
        "PRAGMA application_id = 5",
        "PRAGMA user_version = 1; CREATE TABLE t (x)",
    ],
)
def test_another_applications_database_is_refused_and_left_alone(path, statement):
    connection = apsw.Connection(path)
    connection.execute(f"{statement}; PRAGMA journal_mode = DELETE")
    connection.close()
    with open(path, "rb") as file:
        before = file.read()
    assert refused(path) == f"{path}: the database of another application"
    with open(path, "rb") as file:
        assert file.read() == before


def test_a_database_of_a_newer_version_is_refused(database, path):
    database.write(lambda connection: connection.pragma("user_version", 2))
    database.close()
    assert refused(path) == f"{path}: written by a newer version of this service"


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "livechat.db"
    assert refused(str(path)) == f"{path}: its folder is a file, not a folder"


@pytest.mark.parametrize("version", ["3.40.1", "3.51.2", "3.52.0"])
def test_an_sqlite_that_can_damage_a_database_is_refused(path, version, monkeypatch):
    monkeypatch.setattr(module.apsw, "sqlite_lib_version", lambda: version)
    assert refused(path) == f"SQLite {version} can damage a database; install a newer apsw"
    assert not os.path.exists(path)


@pytest.mark.parametrize("version", ["3.51.3", "3.52.1", "3.53.0", "4.0.0"])
def test_a_sound_sqlite_is_taken(path, version, monkeypatch):
    monkeypatch.setattr(module.apsw, "sqlite_lib_version", lambda: version)
    assert storage.prepare(path) == (True, 0)


def test_a_database_that_vanished_is_never_made_anew_empty(database, path):
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(path + suffix):
            os.unlink(path + suffix)
    with pytest.raises(storage.Unavailable, match="FileNotFoundError"):
        database.read(count)
    open(path, "w").close()
    with pytest.raises(storage.Unavailable, match="is not the database that the start prepared"):
        database.read(count)


@pytest.mark.parametrize("also", [(), ("-wal", "-shm")])
def test_a_database_that_is_removed_while_it_is_open_is_a_fault_and_no_200(database, path, also):
    store(database).register("a", {})
    assert database.read(count) == 1
    for suffix in ("", *also):
        os.rename(path + suffix, path + suffix + ".away")
    for use in (lambda: store(database).register("b", {}), lambda: database.read(count)):
        with pytest.raises(storage.Unavailable, match="FileNotFoundError"):
            use()
    for suffix in ("", *also):
        os.rename(path + suffix + ".away", path + suffix)
    assert store(database).register("c", {})["username"] == "guest-3"
    assert database.read(count) == 2


def test_a_database_that_was_replaced_is_the_one_that_is_used(database, path, tmp_path):
    store(database).register("a", {})
    database.read(count)
    other = str(tmp_path / "other.db")
    storage.prepare(other)
    os.rename(path, f"{path}.old")
    os.unlink(f"{path}-wal")
    os.unlink(f"{path}-shm")
    os.rename(other, path)
    assert database.read(count) == 0
    assert store(database).register("b", {})["username"] == "guest-2"
    database.close()
    assert storage.prepare(path) == (False, 1)


def test_a_database_that_is_gone_at_the_start_is_not_made_anew_until_its_lock_file_is_removed(path):
    storage.prepare(path)
    database = storage.Database(path)
    store(database).register("a", {})
    database.close()
    os.rename(path, f"{path}.away")
    assert "gone or empty, and was not; put it back, or to begin anew" in refused(path)
    assert not os.path.exists(path)
    open(path, "w").close()
    assert "gone or empty, and was not" in refused(path)
    os.rename(f"{path}.away", path)
    assert storage.prepare(path) == (False, 1)
    os.unlink(path)
    os.unlink(f"{path}-lock")
    assert storage.prepare(path) == (True, 0)


def test_nothing_is_written_to_a_wal_that_somebody_has_cut(database, path):
    for token in "ab":
        store(database).register(token, {})
    database.read(count)
    os.truncate(f"{path}-wal", 0)
    for _ in range(3):
        with pytest.raises(storage.Unavailable, match=r"-wal was (removed or )?cut"):
            store(database).register("c", {})


def test_an_orderly_stop_saves_a_wal_that_somebody_has_removed(database, path):
    for token in "ab":
        store(database).register(token, {})
    os.unlink(f"{path}-wal")
    os.unlink(f"{path}-shm")
    database.close()
    assert storage.prepare(path) == (False, 2)


@contextmanager
def another_with_its_wal_removed(path):
    """Let a process register two visitors, of whom the second is in the WAL alone; remove that."""
    storage.prepare(path)
    code = (
        "import storage, sys, os; database = storage.Database(sys.argv[1]);"
        "[storage.VisitorStore(database).register(token, {}) for token in 'ab'];"
        "print(flush=True); input(); os._exit(0)"
    )
    command = [sys.executable, "-c", code, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        os.unlink(f"{path}-wal")
        yield
        process.communicate(b"\n")


def test_a_start_waits_for_nobody_where_a_removed_wal_is_lost(path):
    with another_with_its_wal_removed(path):
        assert "-wal was removed: the process that still has it open" in refused(path)
    assert storage.prepare(path) == (False, 1)  # the second one was in the WAL alone


def test_a_worker_waits_for_nobody_where_a_removed_wal_is_lost(path):
    database = storage.Database(path)
    with another_with_its_wal_removed(path):
        for use in (lambda: store(database).register("c", {}), lambda: database.read(count)):
            with pytest.raises(storage.Unavailable, match="the process that still has it open"):
                use()
    assert database.read(count) == 1
    assert store(database).register("c", {})["username"] == "guest-3"
    database.close()


def test_a_database_that_is_cut_is_noticed_also_where_the_wal_has_more_pages(database, path):
    big = [{"key": "k", "value": "v" * 4096, "overwrite": True}]
    for number in range(20):
        store(database).register(f"t{number}", {}, big)
    database.close()
    store(database).register("a", {})
    for number in range(20):
        store(database).register(f"t{number}", {}, big)
    os.truncate(path, os.stat(path).st_size - 4096)
    with pytest.raises(storage.Unavailable, match="was cut; stop the service"):
        store(database).find("a")


@pytest.mark.parametrize(
    "damage",
    ["fields = '{'", "ts = 1 << 60", "name = CAST(x'ff' AS TEXT)", "ts = -(1 << 60)"],
)
def test_a_damaged_visitor_is_a_fault_of_the_database(database, damage):
    store(database).register("a", {"name": "N"})
    store(database).register("b", {"name": "N"})
    database.write(
        lambda connection: connection.execute(f"UPDATE visitor SET {damage} WHERE token = 'a'").get
    )
    for use in (store(database).find, lambda token: store(database).register(token, {})):
        with pytest.raises(storage.Unavailable):
            use("a")
        use("b")


def test_writes_that_wait_share_a_commit_and_fail_alone(database):
    inside, waiting = threading.Event(), []

    def first(connection):
        inside.set()
        wait_until(lambda: len(database._waiting) == 3, "three more wait")
        waiting.append(None)

    def change(name):
        def work(connection):
            connection.execute("UPDATE guest SET last = last + 1")
            if name == "fails":
                raise ZeroDivisionError
            return connection.execute("SELECT last FROM guest").get

        return work

    commits = []
    with ThreadPoolExecutor(4) as pool:
        leading = pool.submit(database.write, first)
        inside.wait(5)
        database._accesses.writer._connection.set_commit_hook(lambda: bool(commits.append(None)))
        others = [pool.submit(database.write, change(name)) for name in ("a", "fails", "b")]
        assert leading.result(5) is None
        with pytest.raises(ZeroDivisionError):
            others[1].result(5)
        assert sorted((others[0].result(5), others[2].result(5))) == [2, 3]
    assert len(commits) == 2  # that of the first one, and one for all others
    assert database.read(lambda connection: connection.execute("SELECT last FROM guest").get) == 3


def test_the_wal_stays_short_also_where_one_reader_follows_the_other(database, path):
    store(database).register("first", {})
    sql = (
        "WITH RECURSIVE n(v) AS (SELECT number FROM visitor WHERE number = 1"
        " UNION ALL SELECT v + 1 FROM n LIMIT 300000) SELECT count(*) FROM n"
    )
    code = (
        "import storage, sys; database = storage.Database(sys.argv[1]); print(flush=True); "
        f"[database.read(lambda connection: connection.execute({sql!r}).get) for _ in iter(int, 1)]"
    )
    command = [sys.executable, "-c", code, path]
    reading = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    try:
        for process in reading:
            process.stdout.readline()
        visitors = store(database)
        for number in range(3000):
            visitors.register(f"t{number}", {})
            assert os.stat(f"{path}-wal").st_size < 8000 * 4120
    finally:
        for process in reading:
            with process:
                process.kill()


def test_work_that_raises_changes_nothing_and_the_next_one_goes_well(database):
    def work(connection):
        connection.execute("UPDATE guest SET last = 99")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        database.write(work)
    assert store(database).register("a", {})["username"] == "guest-2"


def test_threads_may_share_a_database(database):
    visitors = store(database)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: visitors.register(f"t{number}", {}), range(80)))
        counts = list(pool.map(lambda _: database.read(count), range(80)))
    assert len({visitor["username"] for visitor in made}) == 80
    assert set(counts) == {80}


LOCKS = {
    "transaction": "import apsw; held = apsw.Connection(path); held.execute('BEGIN IMMEDIATE')",
    "queue": "import fcntl; held = open(path + '-lock'); fcntl.flock(held, fcntl.LOCK_EX)",
}


@contextmanager
def held(path, lock):
    """Let another process hold a lock; yield a function that makes it let go."""
    code = f"import sys; path = sys.argv[1]; {LOCKS[lock]}; print(flush=True); input()"
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield lambda: process.communicate(b"\n")
        process.kill()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_writer_waits_for_another_process_and_readers_do_not(database, path, lock):
    with held(path, lock) as let_go, ThreadPoolExecutor(1) as pool:
        registering = pool.submit(store(database).register, "a", {})
        wait_until(database._accesses.writer._free.locked, "the writer has begun")
        for _ in range(3000):  # by then it waits in SQLite, and this thread goes on all the same
            assert database.read(count) == 0
        assert not registering.done()
        let_go()
        assert registering.result(5)["username"] == "guest-2"


@pytest.mark.parametrize("lock", LOCKS)
def test_one_deadline_covers_all_waiting(database, path, lock, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    with held(path, lock) as let_go:
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(store(database).register, f"t{n}", {}) for n in range(4)]
        for one in waiting:
            with pytest.raises(storage.Unavailable, match="BusyError"):
                one.result()
        assert time.monotonic() - start < 2 * 0.3  # together, not one after the other
        let_go()
        assert store(database).register("t", {})["username"] == "guest-2"


def test_a_removed_lock_file_is_made_again(database, path):
    store(database).register("a", {})
    os.unlink(f"{path}-lock")
    store(database).register("b", {})
    assert os.path.exists(f"{path}-lock")


def test_16_processes_may_prepare_one_database_at_once(path, often):
    code = "import sys, storage; print(*storage.prepare(sys.argv[1], ('phone',)))"
    for _ in range(often(2, 50)):
        running = [
            subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE)
            for _ in range(16)
        ]
        said = sorted(process.communicate()[0].decode().strip() for process in running)
        assert said == ["False 0"] * 15 + ["True 0"]
        assert storage.prepare(path, ("phone",)) == (False, 0)
        for suffix in ("", "-lock"):
            os.unlink(path + suffix)


def test_nothing_is_shared_that_two_threads_may_not_use_at_once(database):
    inside = threading.Barrier(3, timeout=5)

    def work(connection):
        return inside.wait() + count(connection)

    with ThreadPoolExecutor(3) as pool:
        # A writer, a reader and one who reads for long are in SQLite at the same moment.
        writing = pool.submit(database.write, work)
        reading = pool.submit(database.read, work)
        scanning = pool.submit(database.read, work, scans=True)
        assert {writing.result(), reading.result(), scanning.result()} == {0, 1, 2}


def test_a_state_that_is_read_for_long_holds_up_one_write_and_not_all(database, path, monkeypatch):
    """As an export does it: writes try to get past it, and do not wait again and again."""
    monkeypatch.setattr(module, "WAIT_ERASE", 1)
    visitors = store(database)
    visitors.register("kept", {})
    visitors.register("gone", {})
    reading = storage.Database(path)

    def meanwhile(connection):
        count(connection)
        began = time.monotonic()
        visitors.erase("gone")
        assert time.monotonic() - began > 0.9  # in vain
        began = time.monotonic()
        for number in range(10):
            visitors.register(f"t{number}", {})
        visitors.erase("t0")
        assert time.monotonic() - began < 0.7  # and not 10 times 100 ms and 1 second

    reading.read(meanwhile)
    reading.close()
    visitors.register("last", {})  # erases at once
    assert os.stat(f"{path}-wal").st_size == 0
