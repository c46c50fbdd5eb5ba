"""One SQLite file: prepare it once, then read and write it from several processes and threads."""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from importlib.resources import files
from typing import TypeVar

import apsw

APPLICATION_ID = 0x4C435631  # "LCV1", in the header of every database of ours
VERSION = 1  # of schema.sql
TIMEOUT = 5.0  # seconds that one write or read may wait, in the queue and in SQLite together

# What SQLite raises when the file, the disk or another program is at fault, not our SQL.
_FAULTS = (
    apsw.BusyError,
    apsw.CantOpenError,
    apsw.CorruptError,
    apsw.FullError,
    apsw.IOError,
    apsw.LockedError,
    apsw.NoMemError,
    apsw.NotADBError,
    apsw.PermissionsError,
    apsw.ProtocolError,
    apsw.ReadOnlyError,
    OSError,
)

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]


class Unavailable(Exception):
    """The database cannot be written or read just now; what was asked for did not happen."""


class PrepareError(Exception):
    """The file cannot be this service's database: one line that names it and the reason."""


def prepare(path: str, indexed: Collection[str] = ()) -> tuple[bool, int]:
    """Make or migrate the database at `path`, readable by its owner alone.

    Called once, before any worker opens it. Of phone and email, those `indexed` get an index.
    Return whether the database is new, and the number of visitors in it.
    Raise `PrepareError` where the file is not ours, is too new, or cannot be used.
    """
    _check_sqlite(apsw.sqlite_lib_version())
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE)
        try:
            connection.set_busy_timeout(int(1000 * TIMEOUT))
            _is_new(connection, path)  # what is not ours is refused before anything is touched
            with _turn(path, time.monotonic() + TIMEOUT):
                new = _is_new(connection, path)
                os.chmod(path, 0o600)  # SQLite gives the WAL the mode of the database
                _configure(connection)
                with _transaction(connection):
                    _migrate(connection, new, indexed)
                return new, connection.execute("SELECT count(*) FROM visitor").get
        finally:
            connection.close()
    except apsw.NotADBError:
        raise PrepareError(f"{path}: not a SQLite database") from None
    except IsADirectoryError:
        raise PrepareError(f"{path}: a folder, not a file") from None
    except (FileExistsError, NotADirectoryError):
        raise PrepareError(f"{path}: its folder is a file, not a folder") from None
    except apsw.BusyError:
        raise PrepareError(f"{path}: locked by another process") from None
    except (*_FAULTS, apsw.SQLError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise PrepareError(f"{path}: cannot be used: {reason}") from None


def _check_sqlite(version: str) -> None:
    # Several connections could corrupt a WAL database: sqlite.org/wal.html, "walresetbug".
    if tuple(map(int, version.split("."))) < (3, 51, 3) or version == "3.52.0":
        raise PrepareError(f"SQLite {version} can damage a database; install a newer apsw")


def _is_new(connection: apsw.Connection, path: str) -> bool:
    """Return whether the file is still empty; raise `PrepareError` where it is not ours."""
    application = connection.pragma("application_id")
    if not application and not connection.execute("SELECT count(*) FROM sqlite_schema").get:
        return True
    if application != APPLICATION_ID:
        raise PrepareError(f"{path}: the database of another application")
    if connection.pragma("user_version") > VERSION:
        raise PrepareError(f"{path}: written by a newer version of this service")
    return False


def _migrate(connection: apsw.Connection, new: bool, indexed: Collection[str]) -> None:
    if new:
        connection.execute(files(__package__).joinpath("schema.sql").read_text("utf-8"))
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", VERSION)
    for column in ("phone", "email"):
        if column in indexed:
            sql = f"CREATE INDEX IF NOT EXISTS visitor_{column} ON visitor ({column})"
        else:
            sql = f"DROP INDEX IF EXISTS visitor_{column}"
        connection.execute(sql)


def _open(path: str) -> apsw.Connection:
    """Open the prepared database; a file that is missing or not ours is a fault, never made."""
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE)
    connection.set_busy_timeout(int(1000 * TIMEOUT))
    if connection.pragma("application_id") != APPLICATION_ID:
        connection.close()
        raise apsw.NotADBError(f"{path} is not the database that the start prepared")
    _configure(connection)
    return connection


def _configure(connection: apsw.Connection) -> None:
    # Each on its own: of a string of several, those after one that returns a row never run.
    connection.pragma("journal_mode", "WAL")
    connection.pragma("synchronous", "FULL")
    connection.pragma("secure_delete", "ON")
    connection.pragma("foreign_keys", "ON")
    if sys.platform == "darwin":
        connection.pragma("fullfsync", "ON")
    held = [connection.pragma(name) for name in ("journal_mode", "synchronous", "secure_delete")]
    if held != ["wal", 2, 1]:
        raise apsw.CantOpenError(f"SQLite did not take the settings it was given: {held}")


@contextmanager
def _transaction(connection: apsw.Connection) -> Generator[None]:
    """Commit what is done inside, or roll it back where it raises.

    apsw's own `with connection` holds the interpreter lock while it waits and while it commits,
    so that no other thread runs. IMMEDIATE, because a deferred transaction that turns writer
    fails at once where another one writes.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextmanager
def _turn(path: str, deadline: float) -> Generator[None]:
    """Hold the lock file, where writers queue; raise `apsw.BusyError` at the deadline.

    SQLite's own waiting polls with growing pauses, so that two busy writers starve each other.
    """
    lock = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        pause = 0.0001
        while True:  # a flock(2) that blocks knows no deadline
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise apsw.BusyError("the writers' queue") from None
            time.sleep(pause)
            pause = min(2 * pause, 0.004)
        yield
    finally:
        os.close(lock)


class Database:
    """The prepared file at `path`, opened at its first use and again after a fault.

    One connection writes and another one reads, each for one thread at a time.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._writer = _Access(path)
        self._reader = _Access(path)

    def write(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run `work` in a transaction of its own and return what it returns, which is no cursor.

        When this returns, the change is on the disk; when it raises, nothing has changed.
        Raise `Unavailable` where the database cannot be written within `TIMEOUT`.
        """
        deadline = time.monotonic() + TIMEOUT
        with self._writer.held(deadline) as connection, _turn(self._path, deadline):
            connection.set_busy_timeout(max(1, int(1000 * (deadline - time.monotonic()))))
            with _transaction(connection):
                return work(connection)

    def read(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run `work`, which only reads, and return what it returns, which is no cursor.

        Raise `Unavailable` where the database cannot be read within `TIMEOUT`.
        """
        with self._reader.held(time.monotonic() + TIMEOUT) as connection:
            return work(connection)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._writer.close()
        self._reader.close()


class _Access:
    """One connection to the file at `path`, for one thread at a time: apsw raises otherwise."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._free = threading.Lock()
        self._connection: apsw.Connection | None = None

    @contextmanager
    def held(self, deadline: float) -> Generator[apsw.Connection]:
        """Yield the connection; turn every fault into `Unavailable`."""
        if not self._free.acquire(timeout=max(0, deadline - time.monotonic())):
            raise Unavailable("BusyError: the threads' queue")
        try:
            if self._connection is None:
                self._connection = _open(self._path)
            yield self._connection
        except _FAULTS as fault:
            if not isinstance(fault, apsw.BusyError):
                self.close()  # whatever happened to the file, the next use starts afresh
            raise Unavailable(f"{type(fault).__name__}: {fault}") from fault
        finally:
            self._free.release()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
