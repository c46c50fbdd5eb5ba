"""One prepared SQLite file, written and read by several processes and threads."""

from __future__ import annotations

import threading
import time
from typing import Any, TypeVar

import apsw

from storage.access import Accesses, Unavailable, Work
from storage.change import Change
from storage.connection import TIMEOUT, Run, directly, transaction
from storage.files import wal_is_whole
from storage.lock import Lock, Note, WalRemoved, turn

CHECKPOINT = 1000  # pages that the WAL grows by from one checkpoint to the next
CROWDED = 4000  # pages in the WAL for which a checkpoint waits until the readers let it restart
# Seconds that a checkpoint waits for readers: so long that our own searches end meanwhile,
# and so short for what has failed before that another program's reader does not hold up writers.
WAIT_ERASE, WAIT_RESTART, WAIT_AGAIN = 2, 0.5, 0.1

T = TypeVar("T")


class Database:
    """The prepared file at `path`, for any number of threads; opened at its first use.

    A commit waits for the disk, so writes that wait at one moment share one: one thread leads,
    and does the others' work with its own. What waits is called by `run`.
    """

    def __init__(self, path: str, run: Run = directly) -> None:
        self._path, self._run = path, run
        self._accesses = Accesses(path, run)
        self._mutex = threading.Lock()  # of the next two
        self._waiting: list[Change[Any]] = []
        self._led = False  # whether a thread leads
        self._checkpointed = 0  # pages in the WAL at the last checkpoint

    def write(self, work: Work[T], erases: bool = False) -> T:
        """Run `work` alone and wholly, or not at all; return what it returns, which is no cursor.

        When this returns, the change is on the disk; when `work` raises, nothing has changed.
        What `work` deletes or replaces is gone from the files at the next checkpoint. If it
        `erases`, that comes before this returns, or with the first write after another program
        has read an older state to its end.
        Raise `Unavailable` where the database cannot be written within `TIMEOUT`, or could not
        tell: the disk may have the change, and not the checkpoint.
        """
        deadline = time.monotonic() + TIMEOUT
        change = Change(work, erases)
        with self._mutex:
            self._waiting.append(change)
            change.leads, self._led = not self._led, True
        if change.leads or self._is_next(change, deadline):
            self._lead(change, deadline)
        return change.outcome()

    def read(self, work: Work[T], anew: bool = False, scans: bool = False) -> T:
        """Run `work`, which only reads, on one state; return what it returns, which is no cursor.

        What is read `anew` comes from the files; what `scans` many rows keeps only such waiting.
        Raise `Unavailable` where the database cannot be read within `TIMEOUT`.
        """
        deadline, accesses = time.monotonic() + TIMEOUT, self._accesses
        reader = accesses.scanner if scans else accesses.reader
        try:
            with reader.held(deadline):
                if not accesses.have_moved():
                    return accesses.read(reader, work, anew)
        except Unavailable as fault:
            if not isinstance(fault.__cause__, WalRemoved):
                raise
        with accesses.writer.held(deadline), turn(self._path, deadline, self._run) as lock:
            accesses.follow(lock, deadline)
        with reader.held(deadline):
            return accesses.read(reader, work, anew)

    def close(self) -> None:
        """Close the file, if it is open, whose WAL goes into it; the next use opens it again."""
        self._accesses.close(time.monotonic() + TIMEOUT)

    def _is_next(self, change: Change[Any], deadline: float) -> bool:
        """Wait until the change is done, or return True where its thread is to lead."""
        if not change.wait(deadline - time.monotonic()):
            with self._mutex:
                if change in self._waiting and not change.leads:
                    self._waiting.remove(change)
                    raise Unavailable("BusyError: the queue in this process")
            change.wait()  # somebody has taken it up at this moment
        return change.leads

    def _lead(self, change: Change[Any], deadline: float) -> None:
        """Do all changes that wait, this one among them, in one transaction."""
        changes = [change]
        fault: str | None = "the write was given up"
        try:
            writer = self._accesses.writer
            with writer.held(deadline), turn(self._path, deadline, self._run) as lock:
                self._accesses.follow(lock, deadline)
                connection = writer.connection()
                if not wal_is_whole(connection, self._path):
                    raise apsw.IOError(f"{self._path}-wal was cut")
                connection.set_busy_timeout(max(1, int(1000 * (deadline - time.monotonic()))))
                with transaction(connection, run=self._run):
                    with self._mutex:  # only now, when no other could have been done before
                        changes, self._waiting = self._waiting, []
                    for one in changes:
                        one.do(connection)
                    # Before the commit, so that no crash forgets what is to be erased.
                    erasing = any(one.erases for one in changes) or lock.note.erasing
                    lock.leave(Note(erasing, writer.files))
                for one in changes:
                    if not one.erases:
                        one.settle()
                self._tidy(lock, any(one.erases for one in changes))
                fault = None
        except Unavailable as unavailable:
            fault = str(unavailable)
        finally:
            for one in changes:
                one.settle(fault)
            with self._mutex:
                if change in self._waiting:  # it was not even begun
                    self._waiting.remove(change)
                if self._waiting:
                    self._waiting[0].lead()
                else:
                    self._led = False

    def _tidy(self, lock: Lock, erased: bool) -> None:
        """Checkpoint where something is to be erased, or the WAL has grown by so much.

        What another program's reader prevents is tried again by whoever writes next.
        """
        if lock.note.erasing:
            if self._accesses.checkpoint("TRUNCATE", WAIT_ERASE if erased else WAIT_AGAIN):
                lock.leave(lock.note._replace(erasing=False))
            return
        pages = self._accesses.writer.wal_pages
        if pages < self._checkpointed:
            self._checkpointed = 0  # the WAL has begun anew
        if pages - self._checkpointed >= CHECKPOINT:
            self._checkpointed = pages
            # One that does not wait never ends where one reader follows the other.
            self._accesses.checkpoint("PASSIVE" if pages < CROWDED else "RESTART", WAIT_RESTART)
