"""One SQLite file: open it, read it, write to it in groups, and recover from its faults."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from json import JSONDecodeError
from typing import Any, Generic, NamedTuple, TypeVar

import apsw

from storage.scrubber import scrubber

APPLICATION_ID = 0x4C435631  # "LCV1", in the header of every database of ours
TIMEOUT = 5.0  # seconds that a write may wait altogether, a read in each queue and in SQLite
GROUP_TIME = 0.02  # seconds of work after which a group of writes is committed
MAX_SCANS = 100  # that run or wait at once; more is a fault
BEGIN_RETRY = 0.002  # seconds between two tries to begin while another program is writing
CHECKPOINT = 1000  # pages by which the WAL grows from one checkpoint to the next
CROWDED = 4000  # pages in the WAL from which on it is to be emptied, as for an erasure
ERASE_TIME = 2.0  # seconds that an erasure waits for those who read an older state
ERASE_RETRY = 0.02  # seconds between two tries meanwhile
IN_VAIN = 40.0  # seconds after a wait in vain in which no erasure waits again
FRAME = 24  # bytes before each page in the WAL: sqlite.org/fileformat2.html, 4.1
SMALL = 2**22  # bytes of a database, 10,000 to 20,000 visitors, that takes 10 ms to look through

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]  # what is done with a connection; it returns no cursor

_RESTORE = "stop the service and restore a backup"
# What SQLite raises when the file, the disk or another program is at fault, not our SQL.
FAULTS = (
    *(apsw.BusyError, apsw.CantOpenError, apsw.CorruptError, apsw.FullError, apsw.IOError),
    *(apsw.LockedError, apsw.NoMemError, apsw.NotADBError, apsw.PermissionsError),
    *(apsw.ProtocolError, apsw.ReadOnlyError, OSError, JSONDecodeError, UnicodeDecodeError),
    apsw.SQLError,  # of a schema that is not ours
)
# What the operator can do about it, where the message does not say that already.
ADVICE: dict[type[Exception], str] = {
    apsw.BusyError: "it goes on once whoever locks the database is done",
    apsw.FullError: "make room on its disk",
    apsw.PermissionsError: "let the service write the file and its folder",
    apsw.ReadOnlyError: "let the service write the file and its folder",
    FileNotFoundError: f"put the file back, or {_RESTORE}",
} | dict.fromkeys(
    (apsw.CorruptError, apsw.NotADBError, apsw.SQLError, JSONDecodeError, UnicodeDecodeError),
    _RESTORE,
)
# Those that may be of one visitor's row alone: the transaction goes on, if SQLite lets it.
OF_ONE_ROW = (apsw.CorruptError, apsw.SQLError, JSONDecodeError, UnicodeDecodeError)


class Unavailable(Exception):
    """The database cannot be written or read just now; says why, and where it can what to do."""


LOCKED = apsw.BusyError("another write takes too long")


class PendingWrite(Generic[T]):
    """A write that waits for its commit."""

    def __init__(self, work: Work[T], erases: bool = False) -> None:
        self.erases = erases
        self.deadline = time.monotonic() + TIMEOUT
        self.error: Exception | None = None
        self._work = work
        self._result: Any = None

    def run(self, connection: apsw.Connection) -> None:
        """Do the work, or nothing of it. Raise only what ends the whole transaction."""
        fault: Exception | None = None
        try:
            with connection:  # inside a transaction this is a savepoint
                try:
                    self._result = self._work(connection)
                except Exception as error:
                    # The first error is the reason. Where SQLite has rolled back everything, the
                    # end of the savepoint raises a second one.
                    fault = error
                    raise
        except Exception as error:
            fault = fault or error
            ends = isinstance(fault, FAULTS) and not isinstance(fault, OF_ONE_ROW)
            if ends or not connection.in_transaction:
                raise fault from None
            self.fail(fault)

    def fail(self, error: Exception) -> None:
        """Let `outcome` raise this; a fault as `Unavailable`."""
        if isinstance(error, FAULTS):
            self.error = Unavailable(describe(error))
            self.error.__cause__ = error
        else:
            self.error = error

    def outcome(self) -> T:
        """Return what the work returned, once it is on the disk, or raise why it is not."""
        if self.error is not None:
            raise self.error
        result: T = self._result
        return result


class Waiting:
    """How a caller waits: here by blocking its thread, with a transaction for each write."""

    def __init__(self) -> None:
        self._free = threading.Lock()

    def commit(self, database: Database, write: PendingWrite[Any]) -> None:
        """Return when `write` is on the disk, or has an error."""
        if not self._free.acquire(timeout=TIMEOUT):
            write.fail(LOCKED)
            return
        try:
            while not (group := database.run_group([write])):
                time.sleep(BEGIN_RETRY)
            database.commit_group(group)
            database.checkpoint()
            if not write.erases:
                with suppress(Unavailable):  # of what may be done later
                    database.tidy(0)
        finally:
            self._free.release()

    def in_thread(
        self,
        call: Callable[[], T],
        scans: bool = False,  # noqa: ARG002 # `server.Turns` needs it
    ) -> T:
        """Return the result of a call that takes long, or waits.

        One that `scans` may be given up where nobody waits for it any more.
        """
        return call()


Identity = tuple[int, int]  # device and inode of a file: a renamed file keeps them
NONE: Identity = (0, 0)  # of a file that is not there


class Files(NamedTuple):
    """Which files are at the path of a database."""

    database: Identity
    wal: Identity
    shm: Identity  # the index of the WAL


def stat_files(path: str) -> tuple[Files, int, int]:
    """Return the files at `path`, the bytes of the database and those of the WAL.

    Raise `FileNotFoundError` where there is no database.
    """
    database = os.stat(path)
    wal, bytes_in_wal = stat_file(f"{path}-wal")
    shm, _ = stat_file(f"{path}-shm")
    files = Files((database.st_dev, database.st_ino), wal, shm)
    return files, database.st_size, bytes_in_wal


def stat_file(path: str) -> tuple[Identity, int]:
    """Return which file is there, and its size."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return NONE, 0
    return (status.st_dev, status.st_ino), status.st_size


class Handle:
    """One connection, for one thread at a time; its next use opens it again."""

    def __init__(self, seconds: float = 0, checkpoints: bool = False) -> None:
        self.lock = threading.Lock()
        self.seconds = seconds  # for which SQLite waits inside a call
        self.checkpoints = checkpoints
        self.connection: apsw.Connection | None = None

    def close(self) -> None:
        """Close it, which undoes a transaction."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Database:
    """The prepared file at `path`, for any number of threads; opened at its first use.

    One connection writes, one reads what is quick, one reads what takes long, and one checkpoints.
    The checkpointing one stays open, so that no other program is ever the last one to close the
    database, which would remove the WAL.

    `identity` is which file the start has prepared. Without it the first use says so.
    """

    def __init__(
        self, path: str, waiting: Waiting | None = None, identity: Identity | None = None
    ) -> None:
        self.path = path
        self.checkpoint_due = False  # whether `checkpoint` has something to do
        self._waiting = waiting or Waiting()
        self._identity = identity
        self._prepared = identity is not None
        self._files: Files | None = None  # those that are open
        self._length = 0  # bytes of the database file at its last use
        self._frame = 0  # bytes of a page in the WAL
        self._pages = 0  # in the WAL after the last commit
        self._writer, self._reader = Handle(), Handle()
        self._scanner, self._checkpointer = Handle(TIMEOUT), Handle(checkpoints=True)
        self._handles = (self._writer, self._reader, self._scanner, self._checkpointer)
        self._opening = threading.Lock()
        self._scans = 0
        self._erasure_due = True  # as a process that ended may have left one
        self._version = 0  # which changes when another process writes
        self._no_wait_until = 0.0  # seconds of `time.monotonic`, until which no erasure waits

    def open(self) -> None:
        """Open the file, and hold it open; raise `Unavailable`."""
        with self._held(self._checkpointer):
            pass

    def write(self, work: Work[T], erases: bool = False) -> T:
        """Run `work` in a transaction; return its result once that is on the disk.

        When `work` raises, nothing has changed. What `work` deletes or replaces is gone from the
        database file at the next checkpoint. If it `erases`, this returns when the old bytes are
        gone from the file and the WAL; where another program reads an older state for longer than
        `ERASE_TIME`, they go later, by themselves.
        Raise `Unavailable` where the database cannot be written, or where that is not known: the
        commit is then done or not, or it is done and the old bytes are not gone.
        """
        write = PendingWrite(work, erases)
        self._waiting.commit(self, write)
        result = write.outcome()
        if erases:
            self.tidy()
        return result

    def read(self, work: Work[T]) -> T:
        """Return the result of `work`, which is one quick SELECT; raise `Unavailable`."""
        try:
            with self._held(self._reader) as connection:
                return work(connection)
        except Unavailable as fault:
            if not isinstance(fault.__cause__, apsw.BusyError):
                raise
        return self.scan(work)  # which can wait for whoever locks out readers

    def scan(self, work: Work[T], anew: bool = False) -> T:
        """Return the result of `work`, which reads for long, on one state; raise `Unavailable`.

        `anew` reads the files and not what is in memory of them.
        """
        deadline = time.monotonic() + TIMEOUT

        def scan() -> T:
            if time.monotonic() > deadline:
                raise Unavailable("BusyError: the queue of searches")
            with self._held(self._scanner, anew) as connection, transaction(connection, "DEFERRED"):
                return work(connection)

        if self._scans >= MAX_SCANS:
            raise Unavailable("BusyError: too many searches wait")
        self._scans += 1
        try:
            return self._waiting.in_thread(scan, scans=True)
        finally:
            self._scans -= 1

    def tidy(self, seconds: float = ERASE_TIME) -> bool:
        """Empty the WAL where it holds erased data, or far too much; return whether it is tidy.

        Wait for scans of our own that read an older state, and for so many seconds for other
        programs; but not for a while once that was in vain, as an export of a large database takes
        a minute. Raise `Unavailable`.
        """
        if not self._untidy():
            return True
        return self._waiting.in_thread(partial(self._empty_wal, seconds))

    def look_after(self) -> None:
        """Tidy the WAL, also after a write of another process, which may have been an erasure.

        Raise `Unavailable`. To be called about once a second.
        """
        version = self._data_version()
        self._erasure_due |= version != self._version
        self._version = version
        if self._untidy():
            self.tidy(0)
            # To empty the WAL counts as a write of another connection. An erasure that another
            # process makes at this very moment is missed here, but that process empties it too.
            self._version = self._data_version()

    def close(self) -> None:
        """Close the file. The WAL goes into it, unless another program has it open."""
        with ExitStack() as held:
            for handle in self._handles:
                if handle.lock.acquire(timeout=TIMEOUT):  # else whoever holds it is stuck
                    held.callback(handle.lock.release)
            with suppress(FileNotFoundError):
                now, _, _ = stat_files(self.path)
                # Not where one was moved away, and may be put back.
                if self._files and now[:2] == self._files[:2]:
                    merge_on_close(self._checkpointer.connection)
            for handle in self._handles:  # the one that checkpoints last
                handle.close()
            self._files, self._pages = None, 0

    # What `Waiting.commit` and the server's `Turns` call.

    def run_group(self, writes: Sequence[PendingWrite[Any]]) -> Sequence[PendingWrite[Any]]:
        """Begin a transaction, and run as many of the writes in it as `GROUP_TIME` allows.

        Return those that ran, for `commit_group`, or those whose deadline has passed. Return none
        while another program is writing: then try again. It never waits.
        """
        self._writer.lock.acquire()
        now = time.monotonic()
        if late := [write for write in writes if write.deadline < now]:
            for write in late:
                write.fail(LOCKED)
            return late
        ran = 0
        try:
            try:
                connection = self._usable(self._writer)
                connection.execute("BEGIN IMMEDIATE")
            except apsw.BusyError:
                self._writer.lock.release()
                return []
            for write in writes:
                ran += 1
                write.run(connection)
                if time.monotonic() > now + GROUP_TIME:
                    break
            return writes[:ran]
        except Exception as fault:
            group = writes[: ran or None]  # all of them, where nothing could be begun
            self._fail(group, fault)
            return group

    def commit_group(self, group: Sequence[PendingWrite[Any]]) -> None:
        """Commit what `run_group` has begun, if anything; after that each write has its outcome.

        It waits for the disk.
        """
        writer = self._writer
        try:
            if writer.connection is not None and writer.connection.in_transaction:
                writer.connection.execute("COMMIT")
                self._erasure_due |= any(write.erases and write.error is None for write in group)
                if any(isinstance(write.error, Unavailable) for write in group):
                    writer.close()  # so that a bad page does not stay in its memory
        except Exception as fault:
            self._fail(group, fault)
        finally:
            writer.lock.release()

    def checkpoint(self) -> None:
        """Copy the WAL into the database file, where that is due; it waits for the disk."""
        if self.checkpoint_due:
            self.checkpoint_due = False
            with suppress(Unavailable), self._held(self._checkpointer) as connection:
                connection.pragma("wal_checkpoint", "PASSIVE")  # a later one does what is left

    def _fail(self, group: Sequence[PendingWrite[Any]], fault: Exception) -> None:
        """Undo the transaction, and give everyone whose work was in it this fault."""
        self._writer.close()
        for write in group:
            write.fail(fault)

    def _untidy(self) -> bool:
        return self._erasure_due or self._pages > CROWDED

    def _empty_wal(self, seconds: float) -> bool:
        """Move the WAL into the database file and cut it to nothing; return whether that is done.

        Try for so many seconds, where another program reads an older state.
        """
        start = time.monotonic()
        if start < self._no_wait_until:
            seconds = 0
        if not self._scanner.lock.acquire(timeout=TIMEOUT):  # as a scan reads an older state too
            return False
        try:
            while self._untidy() and not self._truncate_wal():
                if time.monotonic() > start + seconds:
                    if seconds:
                        self._no_wait_until = time.monotonic() + IN_VAIN
                    return False
                time.sleep(ERASE_RETRY)
            return True
        finally:
            self._scanner.lock.release()

    def _truncate_wal(self) -> bool:
        """Do it, unless another program keeps it from that; return whether it is done."""
        done = False
        due, pages = self._erasure_due, self._pages
        self._erasure_due = False  # a commit that comes meanwhile sets it again
        try:
            with self._held(self._checkpointer) as connection:
                done = not connection.pragma("wal_checkpoint", "TRUNCATE")[0]
        finally:
            self._erasure_due |= due and not done
        if done and self._pages == pages:
            self._pages = 0
        return done

    def _data_version(self) -> int:
        """Return a number that changes when others write; raise `Unavailable` during a commit."""
        with self._held(self._writer, seconds=0) as writer:
            version: int = writer.pragma("data_version")
            return version

    @contextmanager
    def _held(
        self, handle: Handle, anew: bool = False, seconds: float = TIMEOUT
    ) -> Generator[apsw.Connection]:
        """Hold a connection exclusively. Raise `Unavailable` for any fault of the file or disk."""
        if not handle.lock.acquire(timeout=seconds):
            raise Unavailable("BusyError: the queue in this process")
        try:
            if anew:
                handle.close()
            yield self._usable(handle)
        except FAULTS as fault:
            if not isinstance(fault, apsw.BusyError) and not handle.checkpoints:
                handle.close()  # whatever has happened, the next use begins afresh
            raise Unavailable(describe(fault)) from fault
        finally:
            handle.lock.release()

    def _usable(self, handle: Handle) -> apsw.Connection:
        """Return an open connection; raise where the files are not those that were opened."""
        files, length, bytes_in_wal = stat_files(self.path)
        with self._opening:
            if files != self._files:
                self._check_changed(files, handle)
            if handle.connection is None:
                handle.connection = self._connect(handle)
        connection = handle.connection
        # Another program may have emptied the WAL, or vacuumed; else somebody has cut a file.
        shrunk = length < self._length
        if shrunk or bytes_in_wal < self._pages * self._frame:
            check_sizes(connection, self.path, shrunk)
        self._length = length
        return connection

    def _check_changed(self, now: Files, handle: Handle) -> None:
        """Raise where the database or its WAL was replaced or removed; else open what is there."""
        before = self._files
        if now.database != (self._identity or now.database):
            raise apsw.CantOpenError(
                f"{self.path} was replaced: put the one before back, or to use this one stop the"
                f" service, move {self.path}-wal and {self.path}-shm away, and start it"
            )
        # After a start there is no -shm file. One without a -wal file means that a worker was
        # killed and that somebody moved its WAL away.
        lacks_wal = before is None and self._prepared and now.shm != NONE == now.wal
        if lacks_wal or (before and before.wal != now.wal):
            raise apsw.CantOpenError(
                f"{self.path}-wal was removed or replaced: put the one before back, or restart the"
                " service"
            )
        # The -shm file is another one. All connections of a process share one, so all are closed.
        for other in self._handles:
            if other is handle:
                other.close()
            elif other.lock.acquire(blocking=False):
                other.close()
                other.lock.release()
            elif other.connection is not None:
                raise apsw.BusyError(f"{self.path} is being opened again")
        self._checkpointer.connection = self._connect(self._checkpointer)
        self._files, _, _ = stat_files(self.path)
        self._identity = self._files.database

    def _connect(self, handle: Handle) -> apsw.Connection:
        """Return a new connection; raise where it is not one to the prepared database."""
        connection = connect(self.path, handle.checkpoints)
        connection.set_busy_timeout(0)  # as this may be the event loop
        try:
            # SQLite would make a WAL that nobody can write to, also later.
            if connection.readonly("main"):
                raise apsw.ReadOnlyError(f"{self.path} is read-only")
            # A file that is not the one that the start prepared is a fault, never made ours.
            if connection.pragma("application_id") != APPLICATION_ID:
                raise apsw.NotADBError(f"{self.path} is not the database that the start prepared")
            configure(connection)
            check_sizes(connection, self.path)
            self._frame = FRAME + connection.pragma("page_size")
            connection.set_busy_timeout(int(1000 * handle.seconds))
            if handle is self._writer:
                connection.set_wal_hook(self._count)
        except BaseException:
            connection.close()
            raise
        return connection

    def _count(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self.checkpoint_due |= pages // CHECKPOINT > self._pages // CHECKPOINT
        self._pages = pages
        return apsw.SQLITE_OK


def describe(fault: Exception) -> str:
    """Return what went wrong in one line, and where it can be said what to do; no data of ours."""
    advice = next((ADVICE[kind] for kind in type(fault).__mro__ if kind in ADVICE), "")
    return f"{type(fault).__name__}: {fault}" + (f"; {advice}" if advice else "")


def connect(path: str, checkpoints: bool = False) -> apsw.Connection:
    """Open the file, which has to be there; one that `checkpoints` leaves no erased data behind.

    None of them checkpoints by itself, also not the last one when it closes: the file could be
    damaged. SQLite waits `TIMEOUT` seconds for other programs inside a call.
    """
    vfs = scrubber().name if checkpoints else None
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE, vfs)
    connection.set_busy_timeout(int(1000 * TIMEOUT))
    connection.wal_autocheckpoint(0)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    return connection


def merge_on_close(connection: apsw.Connection | None) -> None:
    """Let the WAL go into the database file when this connection closes, if it is the last one."""
    if connection is not None:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)


def configure(connection: apsw.Connection) -> None:
    """Make the connection durable; raise `apsw.CantOpenError` where SQLite does not do as told."""
    # Each on its own: of a string of several, those after one that returns a row never run.
    connection.pragma("synchronous", "FULL")
    connection.pragma("secure_delete", "ON")
    connection.pragma("foreign_keys", "ON")
    if sys.platform == "darwin":
        connection.pragma("fullfsync", "ON")
    connection.pragma("journal_mode", "WAL")  # the last one, as it may raise BusyError at once
    held = [connection.pragma(name) for name in ("journal_mode", "synchronous", "secure_delete")]
    if held != ["wal", 2, 1]:
        raise apsw.CantOpenError(f"SQLite did not take the settings it was given: {held}")


@contextmanager
def transaction(connection: apsw.Connection, mode: str = "IMMEDIATE") -> Generator[None]:
    """Commit what is done inside, or roll it back where it raises.

    IMMEDIATE is for writers: a deferred one that turns writer fails at once where another writes.
    apsw's own `with connection` holds the interpreter's lock while it waits and while it commits,
    so that no other thread runs.
    """
    connection.execute(f"BEGIN {mode}")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def check_sizes(connection: apsw.Connection, path: str, shrunk: bool = False) -> None:
    """Raise `apsw.IOError` or `apsw.CorruptError` where a part of the files is missing.

    The file may be shorter than the database by the pages in the WAL, unless it has `shrunk`.
    """
    if not wal_is_whole(connection, path):
        raise apsw.IOError(
            f"{path}-wal was removed or cut: stop all that use the database, then start the service"
        )
    pages = connection.pragma("page_count") - (0 if shrunk else max(0, pages_in_wal(connection)))
    if stat_file(path)[1] < pages * connection.pragma("page_size"):
        raise apsw.CorruptError(f"{path} was cut")


def wal_is_whole(connection: apsw.Connection, path: str) -> bool:
    """Return whether the WAL at `path` is as long as its index says: nobody has cut it."""
    frame = FRAME + connection.pragma("page_size")
    # Three looks, as another process may empty it and write to it between the two halves of one.
    return any(stat_file(f"{path}-wal")[1] >= pages_in_wal(connection) * frame for _ in range(3))


def pages_in_wal(connection: apsw.Connection) -> int:
    """Return the pages in the WAL, by its index; -1 where there is none."""
    for _ in range(100):
        pages: int = connection.pragma("wal_checkpoint", "NOOP")[1]
        if pages >= 0:  # it is not for a moment, while another process is writing the index
            break
    return pages


def check_pages(connection: apsw.Connection) -> None:
    """Raise `apsw.CorruptError` where the database, unless it is large, is found damaged."""
    size = connection.pragma("page_count") * connection.pragma("page_size")
    if size <= SMALL and connection.execute("PRAGMA integrity_check(1)").get != "ok":
        raise apsw.CorruptError("the database is damaged")  # SQLite's words are of several lines
