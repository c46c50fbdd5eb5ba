"""A continuous copy by a real Litestream, with deploy/litestream.yml: `make test-litestream`."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading

import apsw
import pytest

from tests.database import bytes_of, look, rows
from tests.operating import finish, spawn
from tests.server import PATH, ROOT, Server, wait_until

LITESTREAM = shutil.which("litestream")
pytestmark = pytest.mark.skipif(LITESTREAM is None, reason="there is no litestream in PATH")

CONFIG = ROOT / "deploy" / "litestream.yml"
BOUND = 60  # seconds that Litestream may take for anything, on a busy machine
# What docs/deploying.md shows for a host whose disk does not last.
LINE = re.search("^    web: (litestream .*)$", (ROOT / "docs/deploying.md").read_text(), re.M)
EXEC = LINE[1].split()


class Copy:
    """Litestream beside a server: copies its database into a folder."""

    def __init__(self, folder, database, config=CONFIG):
        self.folder, self.database, self.config = folder, database, config
        self.replica = folder / "replica"
        self.environ = os.environ | {
            "LIVECHAT_DB": str(database),
            "LITESTREAM_REPLICA": f"file://{self.replica}",
        }
        self.process = None

    def start(self):
        with (self.folder / "litestream.log").open("ab") as log:
            command = [LITESTREAM, "replicate", "-config", self.config]
            self.process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log)
        return self

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(BOUND)

    def restore(self, folder, *arguments):
        """Restore into `folder` as an operator does; return the database, None if there is none."""
        folder.mkdir()
        restored = folder / "livechat.db"
        command = [LITESTREAM, "restore", "-config", self.config, "-integrity-check", "full"]
        command += [*arguments, "-o", restored, self.database]
        ran = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        return restored if ran.returncode == 0 else None

    def has_begun(self):
        """Return whether there is a whole copy, from which a restore can begin."""
        return any(self.replica.glob("ltx/9/*.ltx"))

    def holds(self, expected):
        """Return whether what is restored now has exactly these rows."""
        trial = self.folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        restored = self.restore(trial)
        return restored and content(restored) == expected


def content(path):
    return rows(path), look(path, "SELECT last FROM guest")


@pytest.fixture
def copy(tmp_path):
    copy = Copy(tmp_path, tmp_path / "disk" / "livechat.db")
    copy.database.parent.mkdir()
    yield copy
    if copy.process:
        copy.process.kill()
        copy.process.wait()


@pytest.fixture
def serve(copy):
    """Return a function that starts the service on the database of the copy, by `command`."""
    servers = []

    def serve(database=copy.database, command=None):
        environ = copy.environ | {"LIVECHAT_DB": str(database)}
        named = {name: environ[name] for name in ("LIVECHAT_DB", "LITESTREAM_REPLICA")}
        servers.append(Server(copy.folder, command, **named))
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()


class Load:
    """Clients that register until the end, each new tokens; `answered` is who was."""

    def __init__(self, name, server, clients=4):
        self.answered = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._register, args=(server, f"{name}-{number}"))
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _register(self, server, name):
        number = 0
        while not self._ended.is_set():
            token = f"{name}-{number}"
            with contextlib.suppress(OSError):
                status, _ = server.register(token, name=f"Name of {token}")
                if status == 200:
                    self.answered.append(token)
            number += 1

    def reaches(self, count):
        before = len(self.answered)
        wait_until(lambda: len(self.answered) >= before + count, f"{count} more register", BOUND)

    def end(self):
        self._ended.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def load(name, server):
    load = Load(name, server)
    try:
        yield load
    finally:
        load.end()


def test_a_copy_has_every_row_after_kill_9_of_either_under_load(copy, serve, tmp_path):
    server = serve().wait()
    copy.start()
    with load("a", server) as first:
        first.reaches(100)
        copy.end(signal.SIGKILL)
        first.reaches(100)
        copy.start()
        first.reaches(100)
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    server = serve().wait()
    with load("b", server) as second:
        second.reaches(100)
    assert server.stop() == 0
    kept = content(copy.database)
    wait_until(lambda: copy.holds(kept), "the copy has every row", BOUND)
    copy.end()

    restored, anew = copy.restore(tmp_path / "empty"), tmp_path / "anew.db"
    assert finish(spawn("restore", "--db", anew, restored))[0] == 0
    assert content(restored) == content(anew) == kept
    tokens = {token for (token,) in look(restored, "SELECT token FROM visitor")}
    assert {*first.answered, *second.answered} <= tokens
    server = serve(anew).wait()
    assert server.register(first.answered[0], name="")[1]["visitor"]["name"].startswith(
        "Name of a-"
    )


def test_what_a_lost_machine_loses_are_the_newest_alone(copy, serve, tmp_path):
    server = serve().wait()
    copy.start()
    with load("a", server) as clients:
        clients.reaches(50)
        wait_until(lambda: copy.restore(tmp_path / os.urandom(4).hex()), "a first copy", BOUND)
        clients.reaches(200)
        os.killpg(server.process.pid, signal.SIGKILL)
        copy.end(signal.SIGKILL)
    shutil.move(copy.database.parent, tmp_path / "lost")
    restored = copy.restore(tmp_path / "empty")
    had = rows(tmp_path / "lost" / "livechat.db")
    has = rows(restored)
    assert has
    assert has == had[: len(has)]
    assert finish(spawn("check", "--db", restored))[0] == 0


def test_a_host_without_a_lasting_disk_keeps_its_visitors(copy, serve):
    usernames = {}
    for turn in range(3):  # each on an empty disk
        server = serve(command=EXEC).wait()
        for token, username in usernames.items():
            assert server.register(token)[1]["visitor"]["username"] == username
        usernames[f"t{turn}"] = server.register(f"t{turn}")[1]["visitor"]["username"]
        wait_until(copy.has_begun, "the first copy, some seconds after the first start")
        assert server.stop() == 0  # the last second is copied before it ends
        shutil.rmtree(copy.database.parent)
    assert list(usernames.values()) == ["guest-2", "guest-3", "guest-4"]
    assert "new database at" not in server.log()


def test_a_copy_that_is_damaged_starts_no_empty_database(copy, serve):
    server = serve(command=EXEC).wait()
    server.register("t")
    wait_until(copy.has_begun, "the first copy")
    assert server.stop() == 0
    shutil.rmtree(copy.database.parent)
    for file in copy.replica.rglob("*.ltx"):
        file.write_bytes(file.read_bytes()[:-50])
    again = serve(command=EXEC)
    assert again.process.wait(BOUND) != 0
    assert "Listening at" not in again.log()
    assert not copy.database.exists()


def test_the_commands_take_the_tables_of_litestream(copy, serve, tmp_path):
    server = serve().wait()
    server.register("t")
    copy.start()
    wait_until(lambda: copy.restore(tmp_path / os.urandom(4).hex()), "a first copy", BOUND)
    tables = {name for (name,) in server.query("SELECT name FROM sqlite_schema")}
    assert {"_litestream_seq", "_litestream_lock"} <= tables
    at = ("--db", copy.database)
    assert finish(spawn("check", *at))[0] == 0
    export = tmp_path / "export.jsonl"
    assert finish(spawn("export", *at, "-o", export))[0] == 0
    assert "litestream" not in export.read_text()
    assert finish(spawn("import", *at, export))[0] == 0
    assert finish(spawn("backup", *at, tmp_path / "backup.db"))[0] == 0
    assert server.stop() == 0
    assert "(1 visitors)" in serve().wait().log()
    assert finish(spawn("check", "--db", tmp_path / "backup.db"))[0] == 0


def test_no_restore_is_put_below_a_running_litestream(copy, serve, tmp_path):
    server = serve().wait()
    server.register("kept")
    backup = tmp_path / "backup.db"
    assert finish(spawn("backup", "--db", copy.database, backup))[0] == 0
    server.register("later")
    copy.start()
    wait_until(lambda: copy.restore(tmp_path / os.urandom(4).hex()), "a first copy", BOUND)
    assert server.stop() == 0
    before = content(copy.database)
    status, _, err = finish(spawn("restore", "--db", copy.database, backup))
    assert status == 1
    assert f"in use by process {copy.process.pid}:" in err
    assert content(copy.database) == before
    copy.end()
    assert finish(spawn("restore", "--db", copy.database, backup))[0] == 0
    copy.start()  # which goes on with what is there now
    assert content(copy.database) == content(backup)
    wait_until(lambda: copy.holds(content(backup)), "the copy is what was restored", BOUND)
    serve().wait().register("again")
    wait_until(lambda: copy.holds(content(copy.database)), "the copy goes on", BOUND)


def test_who_is_erased_is_gone_from_the_files_once_litestream_has_ended(copy, serve, tmp_path):
    server = serve().wait()
    copy.start()
    for token in ("first", "second", "third"):
        server.register(token, name=f"secret-{token}")
    wait_until(lambda: copy.restore(tmp_path / os.urandom(4).hex()), "a first copy", BOUND)
    assert server.request("DELETE", f"{PATH}/first")[0] == 200
    assert server.request("GET", f"{PATH}/first")[0] == 400
    status, out, err = finish(spawn("erase", "second", "--db", copy.database))
    assert status == 1
    assert "erased 1 visitor at" in out
    assert "Litestream" in err
    # What is documented: as long as Litestream reads, the bytes are there.
    held = bytes_of(copy.database)
    assert b"secret-first" in held
    assert b"secret-second" in held
    copy.end()
    wait_until(lambda: b"secret-second" not in bytes_of(copy.database), "they are gone", BOUND)
    held = bytes_of(copy.database)
    assert b"secret-first" not in held
    assert b"secret-third" in held


def test_who_is_erased_is_in_the_copy_until_it_expires(copy, serve, tmp_path):
    quick = CONFIG.read_text()
    for shown, here in {"interval: 24h": "interval: 1s", "retention: 24h": "retention: 2s"}.items():
        assert quick.count(f"  {shown}\n") == 1
        quick = quick.replace(shown, here)
    levels = "levels:\n  - interval: 1s\nl0-retention: 1s\nl0-retention-check-interval: 1s\n"
    copy.config = tmp_path / "quick.yml"
    copy.config.write_text(quick + levels)
    server = serve().wait()
    server.register("t", name="secret")
    copy.start()
    wait_until(lambda: copy.restore(tmp_path / os.urandom(4).hex()), "a first copy", BOUND)
    last = max(int(file.stem.rpartition("-")[2], 16) for file in copy.replica.rglob("*.ltx"))
    assert server.request("DELETE", f"{PATH}/t")[0] == 200

    def is_held():
        """Return whether some state that can be restored has who was erased."""
        for transaction in range(1, last + 1):
            shutil.rmtree(tmp_path / "state", ignore_errors=True)
            restored = copy.restore(tmp_path / "state", "-txid", f"{transaction:016x}")
            if restored and b"secret" in bytes_of(restored):
                return True
        return False

    assert is_held()

    def expired():
        server.register("other")  # without a write nothing expires
        return not is_held()

    wait_until(expired, "no state before the erasure is left", BOUND)


def test_a_copy_to_read_follows(copy, serve, tmp_path):
    server = serve().wait()
    server.register("a")
    copy.start()
    wait_until(lambda: copy.restore(tmp_path / os.urandom(4).hex()), "a first copy", BOUND)
    follower = tmp_path / "follower.db"
    command = [LITESTREAM, "restore", "-f", "-o", follower, f"file://{copy.replica}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            server.register("b")

            def both():
                return follower.exists() and len(read_only(follower)) == 2

            wait_until(both, "the follower has both", BOUND)
        finally:
            process.terminate()


def read_only(path):
    connection = apsw.Connection(str(path), apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(1000 * BOUND)  # it is locked for moments in which it follows
    try:
        return connection.execute("SELECT token FROM visitor").fetchall()
    finally:
        connection.close()
