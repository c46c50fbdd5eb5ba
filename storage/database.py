"""One prepared SQLite file, written and read by several processes and threads."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import TypeVar

import apsw

from storage.connection import APPLICATION_ID, FAULTS, TIMEOUT, configure, connect, transaction

CHECKPOINT = 1000  # pages that the WAL grows by from one checkpoint to the next
CROWDED = 4000  # pages in the WAL for which a checkpoint waits until the readers let it restart
# Milliseconds that a checkpoint waits for readers: so long that our own searches end meanwhile,
# and so short for what has failed before that another program's reader does not hold up writers.
WAIT_ERASE, WAIT_RESTART, WAIT_AGAIN = 2000, 500, 100

T = TypeVar("T")


class Unavailable(Exception):
    """The database cannot be written or read just now."""


@contextmanager
def turn(path: str, deadline: float) -> Generator[int]:
    """Hold the lock file, where writers queue, and yield its descriptor.

    SQLite's own waiting polls with growing pauses, so that two busy writers starve each other.
    Raise `apsw.BusyError` at the deadline, in seconds of `time.monotonic`.
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
        yield lock
    finally:
        os.close(lock)


class Database:
    """The prepared file at `path`, opened at its first use and again after a fault.

    One connection writes, one reads and one checkpoints, each for one thread at a time.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._writer = _Access(path)
        self._reader = _Access(path)
        self._checkpointer = _Access(path, checkpoints=True)
        self._checkpointed = 0  # pages in the WAL at the last checkpoint

    def write(self, work: Callable[[apsw.Connection], T], erases: bool = False) -> T:
        """Run `work` in a transaction of its own and return what it returns, which is no cursor.

        When this returns, the change is on the disk; when it raises, nothing has changed.
        What `work` deletes or replaces is gone from the files at the next checkpoint, which comes
        before this returns if it `erases`.
        Raise `Unavailable` where the database cannot be written within `TIMEOUT`.
        """
        deadline = time.monotonic() + TIMEOUT
        with self._writer.held(deadline) as connection, turn(self._path, deadline) as lock:
            connection.set_busy_timeout(max(1, int(1000 * (deadline - time.monotonic()))))
            with transaction(connection):
                result = work(connection)
                if erases:
                    os.ftruncate(lock, 1)  # before the commit, so that no crash forgets it
            try:
                if os.fstat(lock).st_size:
                    self._erase(lock, WAIT_ERASE if erases else WAIT_AGAIN)
                else:
                    self._keep_short()
            except Unavailable:
                if erases:  # the change is on the disk, and the next write tries this again
                    raise
            return result

    def read(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run `work`, which only reads, on one state; return what it returns, which is no cursor.

        Raise `Unavailable` where the database cannot be read within `TIMEOUT`.
        """
        deadline = time.monotonic() + TIMEOUT
        with self._reader.held(deadline) as connection, transaction(connection, "DEFERRED"):
            return work(connection)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        # Whoever closes last moves the WAL into the database file, if it is one that checkpoints.
        with suppress(Unavailable), self._checkpointer.held(time.monotonic() + TIMEOUT):
            self._writer.close()
            self._reader.close()
        for access in (self._writer, self._reader, self._checkpointer):
            access.close()

    def _erase(self, lock: int, wait: int) -> None:
        """Cut the WAL to nothing: what was erased is gone then.

        Where another program reads an older state this cannot be; then the lock file keeps its
        one byte, by which whoever writes next knows that it is still to be done.
        """
        if self._checkpoint("TRUNCATE", wait):
            os.ftruncate(lock, 0)

    def _keep_short(self) -> None:
        """Checkpoint each time that the WAL has grown by so much."""
        pages = self._writer.wal_pages
        if pages < self._checkpointed:
            self._checkpointed = 0  # the WAL has begun anew
        if pages - self._checkpointed >= CHECKPOINT:
            self._checkpointed = pages
            # One that does not wait never ends where one reader follows the other.
            self._checkpoint("PASSIVE" if pages < CROWDED else "RESTART", WAIT_RESTART)

    def _checkpoint(self, mode: str, wait: int) -> bool:
        """Move the WAL into the database file; return whether all of it went."""
        with self._checkpointer.held(time.monotonic() + TIMEOUT) as connection:
            connection.set_busy_timeout(wait)
            busy, pages, moved = connection.pragma("wal_checkpoint", mode)
            return not busy and pages == moved


class _Access:
    """One connection to the file at `path`, for one thread at a time: apsw raises otherwise."""

    wal_pages = 0  # in the WAL after the last commit of this connection

    def __init__(self, path: str, checkpoints: bool = False) -> None:
        self._path = path
        self._checkpoints = checkpoints
        self._free = threading.Lock()
        self._connection: apsw.Connection | None = None
        self._file: tuple[int, int] | None = None

    @contextmanager
    def held(self, deadline: float) -> Generator[apsw.Connection]:
        """Yield the connection; turn every fault into `Unavailable`."""
        if not self._free.acquire(timeout=max(0, deadline - time.monotonic())):
            raise Unavailable("BusyError: the threads' queue")
        try:
            if self._connection is not None and self._file != _identity(self._path):
                self.close()  # the file was moved or replaced: what is written there is lost
            if self._connection is None:
                self._file = _identity(self._path)
                self._connection = self._open()
            yield self._connection
        except FAULTS as fault:
            if not isinstance(fault, apsw.BusyError):
                self.close()  # whatever happened to the file, the next use starts afresh
            raise Unavailable(f"{type(fault).__name__}: {fault}") from fault
        finally:
            self._free.release()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> apsw.Connection:
        connection = connect(self._path, self._checkpoints)
        try:
            # A file that is not the one that the start prepared is a fault, never made ours.
            if connection.pragma("application_id") != APPLICATION_ID:
                raise apsw.NotADBError(f"{self._path} is not the database that the start prepared")
            configure(connection)
        except BaseException:
            connection.close()
            raise
        connection.set_wal_hook(self._count)
        return connection

    def _count(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self.wal_pages = pages
        return apsw.SQLITE_OK


def _identity(path: str) -> tuple[int, int]:
    """Return which file stands at `path`; raise OSError where none does."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
