"""The store at fault under the running service: 503 meanwhile, nothing lost, and no hand needed.

Whatever a fault is, `/livez` answers, the service goes on by itself once the fault is gone, also
with a worker that boots meanwhile, and what was answered with 200 is still there.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from storage.migrations import newest_version
from tests.locks import held
from tests.server import PATH, ROOT, Server, wait_until
from tests.slow import WHOLE, longest, wait_of_others

TYPE = {"Content-Type": "application/json"}
BODY = '{"visitor":{"token":"t%d"}}'
UNAVAILABLE = "error-database-unavailable"
OTHER = "import storage, sys; storage.prepare(sys.argv[1])"
# Root may do everything, so that a file it cannot write is no fault; these are the rights it loses.
RIGHTS = "-dac_override,-dac_read_search"
WITHOUT_RIGHTS = ["setpriv", f"--bounding-set={RIGHTS}", f"--inh-caps={RIGHTS}", "gunicorn"]


def beside(server, suffix):
    return server.database.with_name(server.database.name + suffix)


@contextmanager
def away(server, *suffixes):
    """Rename files, and in the end rename them back."""
    for suffix in suffixes:
        beside(server, suffix).rename(beside(server, f"{suffix}.away"))
    try:
        yield
    finally:
        for suffix in suffixes:
            beside(server, f"{suffix}.away").rename(beside(server, suffix))


@contextmanager
def replaced(server, make):
    """Put what `make` makes at a path in the place of the database, whose WAL stays."""
    other = beside(server, ".other")
    make(other)
    with away(server, ""):
        other.rename(server.database)
        yield


@contextmanager
def written_over(server, change):
    """Change the bytes of the database where they are, and in the end write the old ones there."""
    server.query("PRAGMA wal_checkpoint(TRUNCATE)")  # or the WAL would have every page
    sound = server.database.read_bytes()
    with server.database.open("r+b") as file:
        change(file, len(sound))
    try:
        yield
    finally:
        with server.database.open("r+b") as file:
            file.write(sound)


@contextmanager
def cut_wal(server):
    """Cut the WAL in half, and in the end write it as it was."""
    wal = beside(server, "-wal")
    sound = wal.read_bytes()
    os.truncate(wal, len(sound) // 2)
    try:
        yield
    finally:
        with wal.open("r+b") as file:
            file.write(sound)


@contextmanager
def mode(path, bits):
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


@contextmanager
def no_file_may_grow(server):
    """Limit the files of the worker, and of the master, whose new workers have that too."""
    server.query("PRAGMA wal_checkpoint(TRUNCATE)")
    room = len(server.log()) + 100_000  # for the log is a file too
    fields = [{"key": f"k{n}", "value": "x" * 4096, "overwrite": True} for n in range(15)]
    while beside(server, "-wal").stat().st_size < room:
        assert server.register("large", customFields=fields)[0] == 200
    before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    for pid in (server.process.pid, *server.workers()):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        # The worker may have emptied the WAL meanwhile, as another process has written.
        wait_until(lambda: server.register("large", customFields=fields)[0] == 503, "it would grow")
        yield
    finally:
        for pid in (server.process.pid, *server.workers()):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def junk(path):
    path.write_bytes(b"junk" * 4096)


def another_applications(path):
    sql(path, "CREATE TABLE t (x)")


def sql(path, statement):
    """Let a process of its own do it."""
    code = "import apsw, sys; apsw.Connection(sys.argv[1]).execute(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, path, statement], check=True)


def empty_of_ours(path):
    subprocess.run([sys.executable, "-c", OTHER, path], check=True, cwd=ROOT)


def spoil(start, end):
    """Return a change that overwrites all from one offset to another."""

    def change(file, length):
        file.seek(start)
        file.write(b"\xa5" * ((end or length) - start))

    return change


# What each fault is, what a write, a read and /readyz may answer meanwhile, and what the log says.
FAULTS = {
    "the WAL is moved away": (
        lambda server: away(server, "-wal"),
        ({503}, {503}, {503}, "-wal was removed or replaced: move the one before back (a copy"),
    ),
    "the database is moved away": (
        lambda server: away(server, ""),
        ({503}, {503}, {503}, "put the file back"),
    ),
    "the database, its WAL and its index are moved away": (
        lambda server: away(server, "", "-wal", "-shm"),
        ({503}, {503}, {503}, "put the file back"),
    ),
    "the folder is moved away": (
        lambda server: moved_folder(server),
        ({503}, {503}, {503}, "put the file back"),
    ),
    "another database of ours stands in its place": (
        lambda server: replaced(server, empty_of_ours),
        ({503}, {503}, {503}, "was replaced"),
    ),
    "an empty file stands in its place": (
        lambda server: replaced(server, lambda path: path.touch()),
        ({503}, {503}, {503}, "was replaced"),
    ),
    "junk stands in its place": (
        lambda server: replaced(server, junk),
        ({503}, {503}, {503}, "was replaced"),
    ),
    "another application's database stands in its place": (
        lambda server: replaced(server, another_applications),
        ({503}, {503}, {503}, "was replaced"),
    ),
    "the database is cut to nothing": (
        lambda server: written_over(server, lambda file, length: file.truncate(0)),
        ({503}, {503}, {503}, "restore a backup"),
    ),
    "the database is cut in half": (
        lambda server: written_over(server, lambda file, length: file.truncate(length // 2)),
        ({503}, {503}, {503}, "restore a backup"),
    ),
    "the header is overwritten": (
        lambda server: written_over(server, spoil(0, 100)),
        ({200, 503}, {200, 503}, {503}, "restore a backup"),
    ),
    "all pages but the first are overwritten": (
        lambda server: written_over(server, spoil(4096, None)),
        ({200, 503}, {200, 503}, {503}, "restore a backup"),
    ),
    "the file is read-only": (
        lambda server: mode(server.database, 0o400),
        ({200, 503}, {200, 503}, {200, 503}, None),
    ),
    "the folder is read-only": (
        lambda server: mode(server.database.parent, 0o500),
        ({200, 503}, {200, 503}, {200, 503}, None),
    ),
    # After a stop of the worker the WAL is short, and may grow so far.
    "no file may grow": (no_file_may_grow, ({200, 503}, {200}, {200}, "disk I/O error")),
    "the index of the WAL is removed": (
        lambda server: removed(server, "-shm"),
        ({200}, {200}, {200}, None),
    ),
}
# The same, with the worker that was there alone: one that boots meanwhile makes a WAL of its own.
WAL_FAULTS = {
    "the WAL and its index are moved away": (
        lambda server: away(server, "-wal", "-shm"),
        ({503}, {503}, {503}, "-wal was removed or replaced: move the one before back (a copy"),
    ),
    "the WAL is cut in half": (
        cut_wal,
        ({503}, {503}, {503}, "-wal was removed or cut: stop all that use the database"),
    ),
}


@contextmanager
def removed(server, *suffixes):
    for suffix in suffixes:
        beside(server, suffix).unlink()
    yield


@contextmanager
def moved_folder(server):
    folder = server.database.parent
    folder.rename(folder.with_name("away"))
    try:
        yield
    finally:
        folder.with_name("away").rename(folder)


def boot_a_new_worker(server, signal_number):
    """End the worker, and wait for the one that follows it."""
    old = server.worker()
    os.kill(old, signal_number)
    wait_until(lambda: server.workers() and old not in server.workers(), "a new worker boots")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for all: what a fault has done to it, it has to get over."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "data").mkdir()
    options = {"command": WITHOUT_RIGHTS} if os.geteuid() == 0 else {}
    server = Server(folder, LIVECHAT_DB=str(folder / "data" / "livechat.db"), **options).wait()
    yield server
    server.kill()


class Visitors:
    """Registers visitors, and knows who was answered 200."""

    def __init__(self, server):
        self.server = server
        self.kept = {}
        self.asked = 0

    def register(self):
        """Return the status of one more registration."""
        self.asked += 1
        token = f"t{self.asked}"
        fields = [{"key": "k", "value": token, "overwrite": True}]
        status, answer = self.server.register(token, name="N", customFields=fields)
        if status == 200:
            self.kept[token] = answer["visitor"]
        else:
            assert (status, answer["errorType"]) == (503, UNAVAILABLE)
        return status

    def assert_kept(self):
        """Read everybody who was answered 200."""
        for token, visitor in self.kept.items():
            answer = self.server.request("GET", f"{PATH}/{token}")[2]
            assert answer.get("visitor") == visitor, answer


@pytest.fixture(scope="module")
def visitors(server):
    return Visitors(server)


def look(visitors, fault):
    """Ask for everything, twice, as the first answer may have changed something."""
    server, (writes, reads, readiness, _) = visitors.server, fault
    token = next(iter(visitors.kept))
    for _ in range(2):
        assert visitors.register() in writes
        assert server.request("GET", f"{PATH}/{token}")[0] in reads
        assert server.request("GET", "/readyz")[0] in readiness
        assert server.request("GET", "/livez")[0] == 200


def assert_it_goes_on(visitors, said, log_from):
    """Look whether it is as before the fault, of which the log has said something."""
    server = visitors.server
    wait_until(lambda: {visitors.register() for _ in range(4)} == {200}, "it goes on", 5)
    assert server.request("GET", "/readyz")[0] == 200
    visitors.assert_kept()
    assert server.process.poll() is None
    log = server.log()[log_from:]
    assert not said or said in log
    assert "Unforeseen" not in log
    assert server.query("PRAGMA integrity_check") == [["ok"]]


@pytest.mark.parametrize("name", FAULTS | WAL_FAULTS)
def test_nothing_is_lost_and_the_service_goes_on(server, visitors, name, often):
    begin, fault = (FAULTS | WAL_FAULTS)[name]
    log_from = len(server.log())
    assert visitors.register() == 200
    if name in WAL_FAULTS or often(False, True):  # the rest begins with the same looks
        with begin(server):
            look(visitors, fault)
        assert_it_goes_on(visitors, fault[3], log_from)
    if name in FAULTS:
        with begin(server):
            look(visitors, fault)
            for number in (signal.SIGKILL, signal.SIGTERM):  # one that has seen nothing
                boot_a_new_worker(server, number)
                look(visitors, fault)
        assert_it_goes_on(visitors, fault[3], log_from)


def test_after_all_faults_an_orderly_stop_leaves_everybody_in_one_file(server, visitors):
    assert server.stop() == 0
    assert not beside(server, "-wal").exists()
    rows = server.query("SELECT token, id FROM visitor")
    kept = {token: visitor["_id"] for token, visitor in visitors.kept.items()}
    assert kept.items() <= dict(rows).items()
    assert server.query("PRAGMA integrity_check") == [["ok"]]


@pytest.mark.parametrize("suffixes", [["-wal"], ["-wal", "-shm"]], ids=str)
def test_a_wal_that_is_removed_is_a_503_until_a_restart(make_server, suffixes):
    server = make_server().wait()
    visitors = Visitors(server)
    assert visitors.register() == 200
    server.query("PRAGMA wal_checkpoint(TRUNCATE)")  # what only the WAL holds may be lost
    kept = dict(visitors.kept)
    assert visitors.register() == 200
    with removed(server, *suffixes):
        look(visitors, ({503}, {503}, {503}, None))
    said = f"{server.database}-wal was removed or replaced: move the one before back (a copy"
    assert server.log().count(said) == 6
    assert server.stop() == 0
    visitors.server = server = make_server().wait()
    visitors.kept = kept
    assert_it_goes_on(visitors, None, 0)
    assert server.stop() == 0
    assert server.query("PRAGMA integrity_check") == [["ok"]]


def test_a_lock_of_more_than_5_seconds_is_a_503_for_each_of_8_clients_and_over_at_once(
    make_server, often
):
    server = make_server().wait()
    idle = wait_of_others(server, 0.5)
    start = time.monotonic()

    def register(number):
        status, headers, answer = server.request("POST", PATH, BODY % number, TYPE)
        return status, headers["Retry-After"], answer["errorType"], time.monotonic() - start

    with held(server.database, "transaction") as let_go, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(register, number) for number in range(8)]
        for one in waiting:
            status, retry_after, error_type, took = one.result()
            assert (status, retry_after, error_type) == (503, "5", UNAVAILABLE)
            assert took < 10
        for _ in range(often(0, 6)):  # one after the other: half a minute
            assert register(9)[:3] == (503, "5", UNAVAILABLE)
        let_go()
        released = time.monotonic()
        assert server.register("next")[0] == 200
        assert time.monotonic() - released < longest(idle)
    failed = 8 + often(0, 6)
    assert server.log().count("The visitor database is unavailable: BusyError: ") == failed
    assert "it goes on once whoever locks the database is done" in server.log()
    assert ["next"] in server.query("SELECT token FROM visitor")
    assert server.query("SELECT * FROM visitor WHERE token LIKE 't_'") == []


def test_a_full_disk_is_a_503_until_there_is_room(make_server, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    mount = f"mount -t tmpfs -o size=1m tmpfs {folder}"
    if subprocess.run([*command, "sh", "-c", mount], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this machine lets nobody mount a disk of 1 MiB")
    server = make_server(
        command=[*command, "sh", "-c", f"{mount} && exec gunicorn"],
        LIVECHAT_DB=str(folder / "livechat.db"),
    ).wait()
    seen_here = Path(f"/proc/{server.process.pid}/root{folder}")
    visitors = Visitors(server)
    for _ in range(4):
        assert visitors.register() == 200
    for _ in range(2):
        with suppress(OSError), (seen_here / "filling").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        wait_until(lambda: visitors.register() == 503, "the WAL's last page is full")
        assert visitors.register() == 503
        visitors.assert_kept()
        assert server.request("GET", "/livez")[0] == 200
        (seen_here / "filling").unlink()
        assert {visitors.register() for _ in range(4)} == {200}
    visitors.assert_kept()
    assert "FullError: database or disk is full; make room on its disk" in server.log()
    assert server.stop() == 0


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_a_worker_that_may_open_no_file_more_recovers(make_server, spare):
    server = make_server().wait()
    visitors = Visitors(server)
    assert visitors.register() == 200
    worker = server.worker()
    used = {int(number) for number in os.listdir(f"/proc/{worker}/fd")}
    free = min(set(range(len(used) + 1)) - used)  # what the next connection of a client gets
    before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (free + spare, before[1]))
    for _ in range(4):
        with suppress(OSError, HTTPException), server.connect() as client:
            client.settimeout(0.5)  # where not even the client gets in
            client.sendall(WHOLE)
            assert client.recv(100)[9:12] in (b"200", b"503", b"")
    resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
    wait_until(lambda: goes_on(visitors), "it goes on")
    assert server.workers() == [worker]
    visitors.assert_kept()
    assert 0 < server.log().count("accept() out of system resource") < 20  # asyncio says it often


def goes_on(visitors):
    with suppress(OSError, HTTPException):
        return visitors.register() == 200


NO_RIGHTS = "cannot be used: Permission denied"


def no_rights(path):
    path.touch(0o000)


def no_rights_in_the_folder(path):
    path.parent.chmod(0o500)


def folder(path):
    path.mkdir()


def newer(path):
    empty_of_ours(path)
    sql(path, f"PRAGMA user_version = {newest_version() + 1}")


def cut(path):
    empty_of_ours(path)
    os.truncate(path, path.stat().st_size - 4096)


def damaged(path):
    empty_of_ours(path)
    with path.open("r+b") as file:
        spoil(4096, 8192)(file, None)


def a_wal_alone(path):
    path.with_name(path.name + "-wal").write_bytes(b"w" * 5000)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_rights, NO_RIGHTS),
        (no_rights_in_the_folder, NO_RIGHTS),
        (folder, "a folder, not a file"),
        (junk, "not a SQLite database"),
        (another_applications, "the database of another application"),
        (newer, "written by a newer version of this service"),
        (cut, "damaged: "),
        (damaged, "damaged: the database is damaged; restore a backup"),
        (a_wal_alone, "livechat.db-wal is there; put the database back, or to begin anew remove "),
    ],
)
def test_what_cannot_be_the_database_stops_the_start_with_one_line(
    make_server, tmp_path, make, said
):
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "livechat.db"
    make(path)
    before = {one: one.stat().st_size for one in folder.iterdir()}
    options = {"command": WITHOUT_RIGHTS} if os.geteuid() == 0 else {}
    server = make_server(LIVECHAT_DB=str(path), **options)
    assert server.process.wait(20) != 0
    lines = [line for line in server.log().splitlines() if "[INFO]" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}: ")
    assert said in lines[0]
    folder.chmod(0o700)
    assert {one: one.stat().st_size for one in before} == before
