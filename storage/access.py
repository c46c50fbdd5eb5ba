"""The connections to one SQLite file, opened at their first use and again after a fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

import apsw

from storage.connection import (
    APPLICATION_ID,
    FAULTS,
    TIMEOUT,
    Run,
    configure,
    connect,
    describe,
    merge_on_close,
    transaction,
)
from storage.files import NONE, NOTHING, Files, check, is_open, pages_in_wal, size
from storage.lock import Lock, check_wal, turn

IMPATIENT = 20  # times as long as a checkpoint waited in vain, none waits so long again

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]  # what is done with a connection


class Unavailable(Exception):
    """The database cannot be written or read just now; says why, and where it can what to do."""


class Access:
    """A connection to the prepared file at `path`; apsw raises where two threads use one."""

    wal_pages = 0  # in the WAL after the last commit of this connection

    def __init__(self, path: str, run: Run, checkpoints: bool = False) -> None:
        self._path = path
        self._run = run
        self._checkpoints = checkpoints
        self._free = threading.Lock()
        self._connection: apsw.Connection | None = None
        self.files = NOTHING  # what it is open on

    @contextmanager
    def held(self, deadline: float) -> Generator[None]:
        """Let no other thread use it meanwhile; turn every fault into `Unavailable`."""
        if not self._free.acquire(timeout=max(0, deadline - time.monotonic())):
            raise Unavailable("BusyError: the queue in this process")
        try:
            yield
        except tuple(FAULTS) as fault:
            if not isinstance(fault, apsw.BusyError):
                self.close()  # whatever happened to the file, the next use starts afresh
            raise Unavailable(describe(fault)) from fault
        finally:
            self._free.release()

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    def connection(self) -> apsw.Connection:
        """Return the connection, to whoever holds it."""
        if self._connection is None:
            self._connection = self._run(self._open)
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self.files = NOTHING

    def _open(self) -> apsw.Connection:
        known = check_wal(self._path).files.length
        connection = connect(self._path, self._checkpoints)
        try:
            # A file that is not the one that the start prepared is a fault, never made ours.
            if connection.pragma("application_id") != APPLICATION_ID:
                raise apsw.NotADBError(f"{self._path} is not the database that the start prepared")
            configure(connection)
            check(connection, self._path, known)
            self.files = Files.at(self._path)
        except BaseException:
            connection.close()
            raise
        connection.set_wal_hook(self._count)
        return connection

    def _count(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self.wal_pages = pages
        return apsw.SQLITE_OK


class Accesses:
    """The connections to the file at `path`: one writes, two read and one checkpoints.

    They let go of files that somebody has removed, replaced or cut under them.
    """

    def __init__(self, path: str, run: Run) -> None:
        self._path = path
        self._run = run
        self.writer = Access(path, run)
        self.reader = Access(path, run)
        self.scanner = Access(path, run)  # reads for long, so that no other read waits for it
        self.checkpointer = Access(path, run, checkpoints=True)
        self._all = (self.writer, self.reader, self.scanner, self.checkpointer)
        self._in_vain = (0.0, 0.0)  # how long a checkpoint waited so, and until when that counts

    def have_moved(self) -> bool:
        """Return whether one is open on what no longer stands at the path."""
        were_open = [access for access in self._all if access.is_open]  # of whom `now` tells
        now = Files.at(self._path)
        for access in were_open:
            if access.files != now:
                if not now.are_still(access.files):
                    return True
                access.files = now  # it has grown
        return False

    def read(self, reader: Access, work: Work[T], anew: bool) -> T:
        """Return what `work` reads on one state; for whoever holds the reader, or the scanner."""
        if anew:
            reader.close()
        result: T = self._run(_read, reader.connection(), work)
        return result

    def checkpoint(self, mode: str, wait: float) -> bool:
        """Move the WAL into the database, waiting for readers so many seconds; return if all went.

        It looks often, where SQLite's own waiting looks ever more seldom. And what has waited in
        vain only tries for some time: an export of a large database reads one state for a minute.
        """
        longest, until = self._in_vain
        if wait <= longest and time.monotonic() < until:
            wait = 0
        deadline = time.monotonic() + wait
        with self.checkpointer.held(deadline + TIMEOUT):
            connection = self.checkpointer.connection()
            connection.set_busy_timeout(20 if wait else 0)
            while True:
                busy, pages, moved = self._run(connection.pragma, "wal_checkpoint", mode)
                if not busy and pages == moved:
                    return True
                if mode == "PASSIVE" or time.monotonic() > deadline:
                    break
        if wait and mode != "PASSIVE":
            self._in_vain = wait, time.monotonic() + IMPATIENT * wait
        return False

    def follow(self, lock: Lock, deadline: float) -> None:
        """Let go of files that are no longer there; for whoever holds the writer and the lock."""
        if not self.have_moved() and not self._lacks_wal(lock):
            return
        with self._rest_held(deadline):
            if self.have_moved():
                for access in reversed(self._all):  # best the one that leaves no erased data
                    if access.is_open:
                        self._save_wal(access, lock)
                for access in self._all:
                    access.close()
            nobody_has_it = not any(access.is_open for access in self._all)
            if self._lacks_wal(lock) and nobody_has_it and not is_open(self._path):
                lock.leave(lock.note.without_wal())  # which is lost: there is nothing to wait for

    @contextmanager
    def _rest_held(self, deadline: float) -> Generator[None]:
        """Hold all but the writer."""
        with ExitStack() as held:
            for access in self._all:
                if access is not self.writer:
                    held.enter_context(access.held(deadline))
            yield

    def _lacks_wal(self, lock: Lock) -> bool:
        """Return whether the WAL that was last written to is no longer there."""
        if self.writer.is_open:
            return False
        now, written = Files.at(self._path), lock.note.files
        return written.database == now.database and written.wal not in (NONE, now.wal)

    def _save_wal(self, access: Access, lock: Lock) -> None:
        """Move what a removed WAL holds, which lives on where it is open, into the database.

        Not where another one has taken its place: what is in that was written without it.
        """
        now, connection = Files.at(self._path), access.connection()
        removed = access.files.wal != now.wal and not size(f"{self._path}-wal")
        if not removed or access.files.database != now.database:
            return
        busy = (
            pages_in_wal(connection)
            and self._run(connection.pragma, "wal_checkpoint", "TRUNCATE")[0]
        )
        if busy:
            raise apsw.BusyError(f"{self._path}-wal was removed and is still being read")
        lock.leave(lock.note.without_wal())

    def close(self, deadline: float) -> None:
        """Close them, so that the WAL goes into the database where nobody else has it open."""
        if not any(access.is_open for access in self._all):
            return
        with (
            suppress(Unavailable),
            self.writer.held(deadline),
            turn(self._path, deadline, self._run) as lock,
        ):
            self.follow(lock, deadline)
            with self._rest_held(deadline):
                merge_on_close(self.checkpointer.connection())
                lock.leave(lock.note.without_wal())
                for access in self._all:  # the checkpointer last
                    access.close()
        for access in self._all:
            access.close()


def _read(connection: apsw.Connection, work: Work[T]) -> T:
    with transaction(connection, "DEFERRED"):
        return work(connection)
