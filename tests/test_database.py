"""One SQLite file: prepared once, private, durable, and shared by processes and threads."""

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import apsw
import pytest

import storage
from storage import database as module
from storage.migrations import newest_version
from tests.database import refused
from tests.locks import LOCKS, held
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
    names = {f"livechat.db{suffix}" for suffix in ("", "-wal", "-shm")}
    folder = os.path.dirname(path)
    assert set(os.listdir(folder)) == names
    modes = {stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) for name in names}
    database.close()
    assert modes == {0o600}


def test_every_connection_has_the_settings_that_make_an_answer_durable(database):
    def settings(connection):
        names = ("journal_mode", "synchronous", "secure_delete")
        return [connection.pragma(name) for name in names]

    assert database.write(settings) == ["wal", 2, 1]
    assert database.read(settings) == ["wal", 2, 1]
    assert database.scan(settings) == ["wal", 2, 1]


def test_the_file_says_whose_it_is_and_its_tables_are_strict(database):
    assert database.read(lambda connection: connection.pragma("user_version")) == newest_version()
    assert database.read(lambda connection: connection.pragma("application_id")) == 0x4C435631
    tables = database.read(
        lambda connection: connection.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND name != 'sqlite_schema'"
        ).fetchall()
    )
    assert {name for name, _ in tables} >= {"guest", "visitor"}
    assert {strict for _, strict in tables} == {1}


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
    database.write(lambda connection: connection.pragma("user_version", newest_version() + 1))
    database.close()
    assert refused(path) == f"{path}: written by a newer version of this service"


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "livechat.db"
    assert refused(str(path)) == f"{path}: its folder is a file, not a folder"


@pytest.fixture
def mounted(tmp_path):
    """Return a function that prepares a path where a file or folder is mounted on another one.

    It returns what that says on stderr.
    """
    unshare = ["unshare", "--mount", "--map-root-user"]
    tried = shutil.which("unshare") and subprocess.run([*unshare, "true"], capture_output=True)
    if not tried or tried.returncode:
        pytest.skip("nobody may mount anything here, as in most containers")
    code = (
        "import storage, sys\n"
        "try:\n    storage.prepare(sys.argv[1])\n"
        "except storage.PrepareError as error:\n    sys.exit(str(error))"
    )
    shell = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$5"'

    def mounted(source, target, path):
        arguments = [source, target, sys.executable, code, path]
        command = [*unshare, "sh", "-c", shell, "sh", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True).stderr

    return mounted


@pytest.mark.parametrize("name", ["livechat.db", "a name with blanks, \\ and é.db"])
def test_a_database_that_is_itself_a_mount_point_is_refused(mounted, tmp_path, name):
    """Its WAL would be left in the container, with what was answered last."""
    source, target, link = tmp_path / "outside.db", tmp_path / name, tmp_path / "link"
    storage.prepare(str(source))
    target.touch()
    link.symlink_to(target)
    before = content(source)
    for path in (target, link):
        assert mounted(source, target, path) == (
            f"{path}: mounted as a single file, so that its WAL would be left behind:"
            " mount its folder instead\n"
        )
    assert content(source) == before
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, target.name, link.name])


def test_a_folder_that_is_a_mount_point_is_taken(mounted, tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    assert mounted(outside, inside, inside / "livechat.db") == ""
    assert storage.prepare(str(outside / "livechat.db")) == (False, 0)
    assert os.listdir(inside) == []


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


@contextmanager
def away(path, *suffixes):
    """Rename files, and in the end rename them back."""
    for suffix in suffixes:
        os.rename(path + suffix, f"{path}{suffix}.away")
    yield
    for suffix in suffixes:
        os.rename(f"{path}{suffix}.away", path + suffix)


def content(*paths):
    """Return the bytes of files; not of a database that is open here, which would end its locks."""
    held = []
    for path in paths:
        with open(path, "rb") as file:
            held.append(file.read())
    return held


def uses(database):
    visitors = store(database)
    return (
        lambda: visitors.register("b", {}),
        lambda: visitors.erase("a"),
        lambda: visitors.find("a"),
        lambda: visitors.search("", {}, 0, 50),
        visitors.ping,
    )


@pytest.fixture
def other(tmp_path):
    """Another database of ours."""
    path = str(tmp_path / "other.db")
    storage.prepare(path)
    return path


@pytest.mark.parametrize("also", [(), ("-wal", "-shm")])
def test_a_database_that_was_replaced_is_a_fault_until_the_one_before_is_put_back(
    database, path, other, also
):
    """SQLite would mix the two, or go on with one that nobody can see."""
    store(database).register("a", {"name": "N"})
    with away(path, "", *also):
        os.rename(other, path)
        before = content(path)
        for use in uses(database):
            with pytest.raises(storage.Unavailable, match="was replaced: move the one before back"):
                use()
        assert content(path) == before
        os.rename(path, other)
    assert store(database).find("a")["name"] == "N"
    assert store(database).register("b", {})["username"] == "guest-3"


@pytest.mark.parametrize("also", [(), ("-wal", "-shm")])
def test_a_stop_moves_nothing_into_a_database_that_was_replaced(database, path, other, also):
    store(database).register("a", {})
    store(database).register("b", {})  # which is in the WAL alone
    with away(path, "", *also):
        os.rename(other, path)
        before = content(path)
        database.close()
        assert content(path) == before
        os.rename(path, other)
    assert storage.prepare(path) == (False, 2)


def test_a_database_that_is_replaced_before_its_first_use_is_not_the_one_that_was_prepared(
    path, other
):
    storage.prepare(path)
    database = storage.Database(path, identity=storage.identity(path))
    with away(path, ""):
        os.rename(other, path)
        for use in uses(database):
            with pytest.raises(storage.Unavailable, match="was replaced"):
                use()
        os.rename(path, other)
    assert store(database).register("a", {})["username"] == "guest-2"
    database.close()


@pytest.mark.parametrize("another", ["none", "an empty one", "of another database"])
def test_a_wal_that_was_removed_or_replaced_is_a_fault_until_it_is_put_back(
    database, path, other, another
):
    for token in "ab":
        store(database).register(token, {})  # "b" is in the WAL alone
    with closing(storage.Database(other)) as elsewhere:
        for token in "xyz":
            store(elsewhere).register(token, {})
        with away(path, "-wal"):
            if another != "none":
                with open(f"{path}-wal", "wb") as file:
                    file.write(*content(f"{other}-wal") if "of" in another else [b""])
            there = [f"{path}-wal"] if os.path.exists(f"{path}-wal") else []
            before = content(*there)
            for use in uses(database):
                with pytest.raises(storage.Unavailable, match="-wal was removed or replaced"):
                    use()
            assert os.path.exists(f"{path}-wal") == bool(there)
            assert content(*there) == before
    assert store(database).find("b")["username"] == "guest-3"
    assert store(database).register("c", {})["username"] == "guest-4"


def test_after_a_restart_the_service_goes_on_without_a_wal_that_was_removed(path):
    with another_process(path, "a", "b"):
        os.unlink(f"{path}-wal")
        assert refused(path) == (
            f"{path}: cannot be used: {path}-wal was removed or cut: stop all that use the database,"
            " then start the service"
        )
        waiting = storage.Database(path)
        for use in uses(waiting):
            with pytest.raises(storage.Unavailable, match="-wal was removed or cut"):
                use()
    assert store(waiting).register("c", {})["username"] == "guest-3"
    waiting.close()
    assert storage.prepare(path) == (False, 2)


def test_nobody_notices_that_the_index_of_the_wal_was_removed(database, path):
    """Two processes with an index each would write to the same place in the WAL."""
    made = []
    for number in range(3):
        made.append(store(database).register(f"here{number}", {}))
        os.unlink(f"{path}-shm")
        with another_process(path, f"there{number}"):
            made.append(store(database).register(f"also here{number}", {}))
        assert database.read(count) == database.scan(count) == 3 * (number + 1)
    assert [visitor["username"] for visitor in made] == [f"guest-{n}" for n in (2, 4, 5, 7, 8, 10)]
    assert [store(database).find(visitor["token"]) for visitor in made] == made
    store(database).ping()


def test_a_stop_leaves_a_wal_alone_that_another_process_has_made_since(database, path):
    for token in "ab":
        store(database).register(token, {})  # "b" is in the WAL alone
    for suffix in ("-wal", "-shm"):
        os.unlink(path + suffix)
    with another_process(path, "c"):
        pass
    wal = content(f"{path}-wal")
    database.close()
    assert content(f"{path}-wal") == wal
    assert storage.prepare(path) == (False, 2)
    with closing(storage.Database(path)) as after:
        assert store(after).find("c")["username"] == "guest-3"


@contextmanager
def another_process(path, *tokens):
    """Let a process register visitors and hold the database open; then kill it."""
    code = (
        "import storage, sys; storage.prepare(sys.argv[1]);"
        "database = storage.Database(sys.argv[1]);"
        "[storage.VisitorStore(database).register(token, {}) for token in sys.argv[2:]];"
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, path, *tokens]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        try:
            assert process.stdout.readline() == b"\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("left", ["nothing", "an empty file"])
def test_a_start_that_finds_a_wal_and_no_database_refuses_until_either_is_put_away(path, left):
    with another_process(path, "a", "b"):
        pass
    os.rename(path, f"{path}.away")
    if left == "an empty file":
        open(path, "w").close()
    wal = content(f"{path}-wal")
    assert len(wal[0]) > 0
    said = refused(path)
    assert said == (
        f"{path}: gone or empty, but {path}-wal is there; put the database back, or to begin anew"
        f" remove {path}-wal"
    )
    assert content(f"{path}-wal") == wal
    assert os.path.exists(path) == (left == "an empty file")
    os.rename(f"{path}.away", path)
    assert storage.prepare(path) == (False, 2)
    os.unlink(path)
    assert not os.path.exists(f"{path}-wal")
    assert storage.prepare(path) == (True, 0)


def test_nothing_is_written_to_a_wal_that_somebody_has_cut(database, path):
    for token in "ab":
        store(database).register(token, {})
    database.read(count)
    os.truncate(f"{path}-wal", 0)
    for _ in range(3):
        with pytest.raises(storage.Unavailable, match="-wal was removed or cut"):
            store(database).register("c", {})


def test_a_stop_while_the_wal_is_moved_away_leaves_it_whole_for_when_it_is_put_back(database, path):
    for token in "ab":
        store(database).register(token, {})
    os.rename(f"{path}-wal", f"{path}-wal.away")
    database.close()
    os.rename(f"{path}-wal.away", f"{path}-wal")
    assert storage.prepare(path) == (False, 2)


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


FROM_THE_NEXT_ON = 4000 * (24 + 4096)  # bytes of the WAL from which on it is to be emptied


def write_much(database, number):
    """Write some 60,000 bytes that are not the same as those of the number before."""
    fields = [
        {"key": f"k{n}", "value": f"{number:04}" * 1000, "overwrite": True} for n in range(15)
    ]
    store(database).register("much", {}, fields)


def test_the_wal_is_emptied_after_a_write_of_another_process_and_not_every_second(database, path):
    store(database).register("own", {})
    database.finish_erasures()
    store(database).register("own too", {})
    size = os.stat(f"{path}-wal").st_size
    assert size > 0
    for _ in range(3):
        database.finish_erasures()
        assert os.stat(f"{path}-wal").st_size == size
    other = "import apsw, sys; apsw.Connection(sys.argv[1]).execute('DELETE FROM visitor')"
    subprocess.run([sys.executable, "-c", other, path], check=True)
    database.finish_erasures()
    assert os.stat(f"{path}-wal").st_size == 0


def is_emptied(database, path):
    """Return whether the WAL is empty after one more write."""
    store(database).register("next", {})
    return os.stat(f"{path}-wal").st_size == 0


def test_searches_that_follow_one_another_never_keep_the_wal_from_being_emptied(database, path):
    store(database).register("first", {})
    sql = (
        "WITH RECURSIVE n(v) AS (SELECT number FROM visitor WHERE number = 1"
        " UNION ALL SELECT v + 1 FROM n LIMIT 100000) SELECT count(*) FROM n"
    )
    done = threading.Event()

    def search():
        while not done.is_set():
            database.scan(lambda connection: connection.execute(sql).get)

    with ThreadPoolExecutor(4) as pool:
        searching = [pool.submit(search) for _ in range(4)]
        try:
            for number in range(600):  # which is 36 MB
                write_much(database, number)
                if os.stat(f"{path}-wal").st_size > FROM_THE_NEXT_ON:
                    wait_until(lambda: is_emptied(database, path), "the WAL is emptied")
        finally:
            done.set()
        assert [one.result() for one in searching] == [None] * 4


def test_one_that_reads_in_another_process_keeps_the_wal_only_until_it_ends(database, path):
    store(database).register("first", {})
    with held(path, "older state") as let_go:
        for number in range(400):  # which is 24 MB
            write_much(database, number)
        assert os.stat(f"{path}-wal").st_size > FROM_THE_NEXT_ON
        assert not is_emptied(database, path)  # the reader needs it
        let_go()
        wait_until(lambda: is_emptied(database, path), "the WAL is emptied")


def test_a_database_that_vacuums_by_itself_stays_whole(path, run):
    """It has pages that look like a table's and hold numbers, which nobody may zero."""
    storage.prepare(path)
    with closing(apsw.Connection(path)) as shell:
        shell.execute("PRAGMA auto_vacuum = INCREMENTAL; VACUUM")
    many = (
        "WITH RECURSIVE n(v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n LIMIT 5000)"
        " INSERT INTO visitor (token, id, username, name, ts, updated, search, fields)"
        " SELECT v, v, v, replace(hex(zeroblob(450)), '0', 'N'), 0, 0, '', '{}' FROM n;"
        " DELETE FROM visitor WHERE number BETWEEN 3000 AND 4500"
    )
    with closing(storage.Database(path)) as database:
        database.write(lambda connection: connection.execute(many).get, erases=True)
    assert run("backup", "copy.db", "--db", path)[0] == 0
    for file in (path, "copy.db"):
        with closing(apsw.Connection(file)) as shell:
            assert shell.pragma("auto_vacuum") > 0
            assert shell.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


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


class Announced(storage.Waiting):
    """Says when a write begins to wait."""

    def __init__(self):
        super().__init__()
        self.begun = threading.Event()

    def commit(self, database, write):
        self.begun.set()
        super().commit(database, write)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_writer_waits_for_another_process_and_readers_do_not(path, lock):
    storage.prepare(path)
    waiting = Announced()
    with (
        closing(storage.Database(path, waiting)) as database,
        held(path, lock) as let_go,
        ThreadPoolExecutor(1) as pool,
    ):
        registering = pool.submit(store(database).register, "a", {})
        assert waiting.begun.wait(5)
        for _ in range(1000):
            assert database.read(count) == database.scan(count) == 0
        assert not registering.done()
        let_go()
        assert registering.result(5)["username"] == "guest-2"


@pytest.mark.parametrize("lock", LOCKS)
def test_one_deadline_covers_all_waiting(database, path, lock, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 1)
    with held(path, lock) as let_go:
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(store(database).register, f"t{n}", {}) for n in range(4)]
        for one in waiting:
            with pytest.raises(storage.Unavailable, match="BusyError"):
                one.result()
        assert time.monotonic() - start < 3  # together, not one after the other
        let_go()
        assert store(database).register("t", {})["username"] == "guest-2"


def test_who_locks_out_everybody_is_a_fault_until_the_lock_ends(path, monkeypatch):
    """As a program does that repairs the database; it gets that lock while no service runs."""
    monkeypatch.setattr(module, "TIMEOUT", 1)
    with closing(storage.Database(path)) as database:
        with another_process(path, "a"):
            pass
        with held(path, "exclusive lock") as let_go:
            for use in uses(database):
                with pytest.raises(storage.Unavailable, match="BusyError"):
                    use()
            let_go()
            assert store(database).find("a")["username"] == "guest-2"
            assert store(database).register("b", {})["username"] == "guest-3"


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
        os.unlink(path)


def test_nothing_is_shared_that_two_threads_may_not_use_at_once(database):
    inside = threading.Barrier(3, timeout=5)

    def work(connection):
        return inside.wait() + count(connection)

    with ThreadPoolExecutor(3) as pool:
        # A writer, a reader and one who reads for long are in SQLite at the same moment.
        writing = pool.submit(database.write, work)
        reading = pool.submit(database.read, work)
        scanning = pool.submit(database.scan, work)
        assert {writing.result(), reading.result(), scanning.result()} == {0, 1, 2}


def test_an_erasure_that_is_committed_is_no_fault_where_its_bytes_have_to_wait(path):
    """Or nobody would log whom to erase again after a restore."""

    class Faulty(storage.Waiting):
        def in_thread(self, call, cancellable=False):
            raise storage.Unavailable("no room for a checkpoint")

    storage.prepare(path)
    with closing(storage.Database(path, Faulty())) as database:
        store(database).register("gone", {})
        store(database).erase("gone")
        assert database.read(count) == 0
        assert os.stat(f"{path}-wal").st_size > 0
    with closing(storage.Database(path)) as database:
        database.finish_erasures()
        assert os.stat(f"{path}-wal").st_size == 0


def test_threads_may_all_open_a_database_at_once(path):
    storage.prepare(path)
    for _ in range(20):
        with closing(storage.Database(path)) as database, ThreadPoolExecutor(8) as pool:
            uses = [database.read, database.scan, database.write] * 8
            assert set(pool.map(lambda use: use(count), uses)) == {0}


def test_an_erasure_waits_for_who_reads_for_long_and_the_next_ones_do_not(database, path):
    """As an export does it, for a minute: only the first erasure waits in vain."""
    visitors = store(database)
    for number in range(4):
        visitors.register(f"gone{number}", {})
    with held(path, "older state") as let_go:
        took = []
        for number in range(4):
            began = time.monotonic()
            visitors.erase(f"gone{number}")
            took.append(time.monotonic() - began)
        assert took[0] > module.ERASE_TIME
        assert sum(took[1:]) < took[0]
        assert os.stat(f"{path}-wal").st_size > 0
        let_go()
    assert is_emptied(database, path)
