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
TIMEOUT = 5.0  # seconds: of all waiting of a write; of a read, in each queue and in SQLite
GROUP_TIME = 0.02  # seconds of work after which a group of writes is committed
MAX_SCANS = 100  # long reads that run or wait; the next one is refused
BEGIN_RETRY = 0.002  # seconds between two tries to begin while another program is writing
CHECKPOINT_PAGES = 1000  # pages by which the WAL grows from one checkpoint to the next
MAX_WAL_PAGES = 4000  # pages in the WAL above which it is emptied even without an erasure
ERASE_TIME = 2.0  # seconds that an erasure waits for others who read an older state
ERASE_RETRY = 0.02  # seconds between two tries meanwhile
ERASE_BACKOFF = 40.0  # seconds in which no erasure waits, after one has waited without success
FRAME_HEADER = 24  # bytes before each page in the WAL: sqlite.org/fileformat2.html, 4.1
MAX_FULL_CHECK = 2**22  # bytes up to which a database is checked completely, which takes 10 ms

T = TypeVar("T")
# What is done with a connection. It returns no cursor; `.get` is apsw's first value of a result.
Work = Callable[[apsw.Connection], T]

_RESTORE = "stop the service and restore a backup"
# What is the fault of the file, the disk or another program, and not of our code.
FAULTS = (
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
    apsw.SQLError,  # such as "no such table": the schema is not ours
    JSONDecodeError,  # of the custom fields in a row
    OSError,
    UnicodeDecodeError,
)
# Those that may concern one row only: the group goes on, if SQLite has not undone all of it.
ROW_FAULTS = (apsw.CorruptError, apsw.SQLError, JSONDecodeError, UnicodeDecodeError)
# What the operator can do about a fault, where the message does not say that already.
ADVICE: dict[type[Exception], str] = {
    apsw.BusyError: "it goes on once whoever locks the database is done",
    apsw.FullError: "make room on its disk",
    apsw.NotADBError: _RESTORE,
    apsw.PermissionsError: "let the service write the file and its folder",
    apsw.ReadOnlyError: "let the service write the file and its folder",
    FileNotFoundError: f"put the file back, or {_RESTORE}",
    **dict.fromkeys(ROW_FAULTS, _RESTORE),
}


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
        """Do the work in a savepoint, and keep its error for `outcome`.

        Raise a fault that ends the whole transaction.
        """
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
            ends_transaction = isinstance(fault, FAULTS) and not isinstance(fault, ROW_FAULTS)
            if ends_transaction or not connection.in_transaction:
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
        """Return the result of the work, or raise its error; to be called after the commit."""
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
        finally:
            self._free.release()
        if not write.erases:
            with suppress(Unavailable):  # it can be done later
                database.empty_wal_if_due(0)

    def in_thread(
        self,
        call: Callable[[], T],
        cancellable: bool = False,  # noqa: ARG002 # the server's way to wait needs it
    ) -> T:
        """Return the result of a call that takes long, or waits.

        One that is `cancellable` may end with an exception when its client has gone.
        """
        return call()


Identity = tuple[int, int]  # device and inode of a file: a renamed file keeps them
NO_FILE: Identity = (0, 0)


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
    """Return which file is at `path`, and its bytes; `NO_FILE` and 0 where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return NO_FILE, 0
    return (status.st_dev, status.st_ino), status.st_size


class Handle:
    """A connection that is opened when it is needed, and the lock of whoever uses it."""

    def __init__(self, busy_timeout: float = 0, is_checkpointer: bool = False) -> None:
        self.lock = threading.Lock()
        self.busy_timeout = busy_timeout  # seconds for which SQLite waits inside a call
        self.is_checkpointer = is_checkpointer
        self.connection: apsw.Connection | None = None

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Database:
    """The prepared file at `path`, for any number of threads; opened by `open` or the first use.

    One connection writes, one reads what is quick, one reads what takes long, and one checkpoints.
    The checkpointing one stays open, so that no other program is ever the last one to close the
    database, which would remove the WAL.

    `identity` is the file that the start has prepared; any other file is refused. Without it the
    first file that is found is accepted.
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
        self._database_bytes = 0  # of the database file at its last use
        self._frame_bytes = 0  # of a page in the WAL
        self._wal_pages = 0  # after the last commit
        self._writer, self._reader = Handle(), Handle()
        self._scanner, self._checkpointer = Handle(TIMEOUT), Handle(is_checkpointer=True)
        # In the order in which `close` closes them.
        self._handles = (self._writer, self._reader, self._scanner, self._checkpointer)
        self._opening = threading.Lock()
        self._scans = 0  # that run or wait
        self._erasures = 1  # that are committed; the first is what an earlier process may have left
        self._erased = 0  # of these, whose bytes are gone
        self._emptying = False  # whether the WAL is being emptied, so that no write may begin
        self._data_version = 0  # of the writer: it changes when another connection writes
        self._no_wait_until = 0.0  # seconds of `time.monotonic`, until which no erasure waits

    def open(self) -> None:
        """Open the file, and hold it open; raise `Unavailable`."""
        with self._exclusive(self._checkpointer):
            pass

    def write(self, work: Work[T], erases: bool = False) -> T:
        """Run `work` in a transaction; return its result once that is on the disk.

        When `work` raises, nothing has changed. The bytes of what `work` deletes or replaces are
        gone from the database file at the next checkpoint. If it `erases`, this waits until they
        are gone from the file and the WAL, but for another program that reads an older state only
        `ERASE_TIME`: then they go later, by themselves.
        They also go later where a fault keeps them from it now.
        Raise `Unavailable` where nothing is written, or where that is not known.
        """
        write = PendingWrite(work, erases)
        self._waiting.commit(self, write)
        result = write.outcome()
        if erases:
            with suppress(Unavailable):  # it is written, so its `_id` has to be logged
                self.empty_wal_if_due()
        return result

    def read(self, work: Work[T]) -> T:
        """Return the result of `work`, which is one quick SELECT; raise `Unavailable`."""
        try:
            with self._exclusive(self._reader) as connection:
                return work(connection)
        except Unavailable as fault:
            if not isinstance(fault.__cause__, apsw.BusyError):
                raise
        return self.scan(work)  # which may wait for the lock, in a thread

    def scan(self, work: Work[T], anew: bool = False) -> T:
        """Return the result of `work`, a long read of one state; raise `Unavailable`.

        `anew` opens the connection anew, so that nothing comes from SQLite's memory.
        """
        deadline = time.monotonic() + TIMEOUT

        def run() -> T:
            if time.monotonic() > deadline:
                raise Unavailable("BusyError: the searches before this one took too long")
            with (
                self._exclusive(self._scanner, anew) as connection,
                transaction(connection, "DEFERRED"),
            ):
                return work(connection)

        if self._scans >= MAX_SCANS:
            raise Unavailable("BusyError: too many searches wait")
        self._scans += 1
        try:
            return self._waiting.in_thread(run, cancellable=True)
        finally:
            self._scans -= 1

    def empty_wal_if_due(self, seconds: float = ERASE_TIME) -> bool:
        """Empty the WAL where it holds erased bytes, or too much; return whether that is done.

        Wait for our own scans, and for so many seconds for other programs; but not for these within
        `ERASE_BACKOFF` after that was in vain, as an export may take a minute. Raise `Unavailable`.
        """
        if not self._emptying_is_due():
            return True
        return self._waiting.in_thread(partial(self._empty_wal, seconds))

    def finish_erasures(self) -> None:
        """Empty the WAL if that is due, also after a write of another process, perhaps an erasure.

        Raise `Unavailable`. To be called about once a second.
        """
        with suppress(Unavailable):  # during a commit: it is seen a second later
            version = self._read_data_version()
            self._erasures += version != self._data_version
            self._data_version = version
        if self._emptying_is_due():
            self.empty_wal_if_due(0)
            # To empty the WAL counts as a write of another connection. An erasure that another
            # process makes at this very moment is missed here, but that process empties it too.
            self._data_version = self._read_data_version()

    def close(self) -> None:
        """Close all connections; the last one moves the WAL into the database file.

        It does not where another program has the database open, or a file was moved or replaced.
        """
        if self._scanner.connection is not None:
            self._scanner.connection.interrupt()  # which is a search that nobody waits for
        with ExitStack() as held:
            for handle in self._handles:
                if handle.lock.acquire(timeout=TIMEOUT):  # else whoever holds it is stuck
                    held.callback(handle.lock.release)
            with suppress(FileNotFoundError):
                now, _, _ = stat_files(self.path)
                opened = self._files
                if opened and (now.database, now.wal) == (opened.database, opened.wal):
                    checkpoint_on_close(self._checkpointer.connection)
            for handle in self._handles:
                handle.close()
            self._files, self._wal_pages = None, 0

    # What a way to wait calls: `Waiting.commit`, and the server's own.

    def run_group(self, writes: Sequence[PendingWrite[Any]]) -> Sequence[PendingWrite[Any]]:
        """Begin a transaction, and run as many of the writes in it as `GROUP_TIME` allows.

        Return those that ran, or those whose deadline has passed, for `commit_group`: until that is
        called, in any thread, nobody else can write. Return an empty list while another program is
        writing, or the WAL is being emptied: then try again. It never waits for these.
        """
        self._writer.lock.acquire()
        now = time.monotonic()
        if late := [write for write in writes if write.deadline < now]:
            for write in late:
                write.fail(LOCKED)
            return late
        if self._emptying:
            self._writer.lock.release()
            return []
        try:
            connection = self._checked_connection(self._writer)
            connection.execute("BEGIN IMMEDIATE")
        except apsw.BusyError:
            self._writer.lock.release()
            return []
        except Exception as fault:
            self._roll_back(writes, fault)
            return writes
        group: list[PendingWrite[Any]] = []
        try:
            for write in writes:
                group.append(write)
                write.run(connection)
                if time.monotonic() > now + GROUP_TIME:
                    break
        except Exception as fault:
            self._roll_back(group, fault)
        return group

    def commit_group(self, group: Sequence[PendingWrite[Any]]) -> None:
        """Commit what `run_group` has begun, if anything; after that each write has its outcome.

        It waits for the disk.
        """
        writer = self._writer
        try:
            if writer.connection is not None and writer.connection.in_transaction:
                writer.connection.execute("COMMIT")
                self._erasures += any(write.erases and write.error is None for write in group)
                if any(isinstance(write.error, Unavailable) for write in group):
                    writer.close()  # with its memory of pages, one of which may be damaged
        except Exception as fault:
            self._roll_back(group, fault)
        finally:
            writer.lock.release()

    def checkpoint(self) -> None:
        """Copy the WAL into the database file, where that is due; it waits for the disk."""
        if self.checkpoint_due:
            self.checkpoint_due = False
            with suppress(Unavailable), self._exclusive(self._checkpointer) as connection:
                connection.pragma("wal_checkpoint", "PASSIVE")  # a later one does what is left

    def _roll_back(self, group: Sequence[PendingWrite[Any]], fault: Exception) -> None:
        """Undo the transaction, and give everyone this fault, also those who have an error."""
        self._writer.close()
        for write in group:
            write.fail(fault)

    # How the WAL is emptied.

    def _emptying_is_due(self) -> bool:
        return self._erased < self._erasures or self._wal_pages > MAX_WAL_PAGES

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
            while self._emptying_is_due() and not self._try_to_empty_wal():
                if time.monotonic() > start + seconds:
                    if seconds:
                        self._no_wait_until = time.monotonic() + ERASE_BACKOFF
                    return False
                time.sleep(ERASE_RETRY)
            return True
        finally:
            self._scanner.lock.release()

    def _try_to_empty_wal(self) -> bool:
        """Empty the WAL once; return False where another program keeps it from that."""
        erasures, pages = self._erasures, self._wal_pages  # of which a commit may make more
        self._emptying = True
        try:
            # Let the write that is running end first, as SQLite does not wait for it.
            if self._writer.lock.acquire(timeout=TIMEOUT):
                self._writer.lock.release()
            with self._exclusive(self._checkpointer) as connection:
                busy, _, _ = connection.pragma("wal_checkpoint", "TRUNCATE")
        finally:
            self._emptying = False
        if busy:
            return False
        self._erased = erasures
        if self._wal_pages == pages:
            self._wal_pages = 0
        return True

    def _read_data_version(self) -> int:
        """Return the writer's `data_version`; raise `Unavailable` while it is in use."""
        with self._exclusive(self._writer, seconds=0) as writer:
            version: int = writer.pragma("data_version")
            return version

    # How connections are opened and held.

    @contextmanager
    def _exclusive(
        self, handle: Handle, anew: bool = False, seconds: float = TIMEOUT
    ) -> Generator[apsw.Connection]:
        """Hold a connection exclusively. Raise `Unavailable` for any fault of the file or disk."""
        if not handle.lock.acquire(timeout=seconds):
            raise Unavailable("BusyError: the queue in this process")
        try:
            if anew:
                handle.close()
            yield self._checked_connection(handle)
        except FAULTS as fault:
            if not isinstance(fault, apsw.BusyError) and not handle.is_checkpointer:
                handle.close()  # whatever has happened, the next use begins afresh
            raise Unavailable(describe(fault)) from fault
        finally:
            handle.lock.release()

    def _checked_connection(self, handle: Handle) -> apsw.Connection:
        """Return an open connection; raise where the files are not those that were opened.

        Where only the -shm file is another one, all connections are opened anew.
        """
        with self._opening:
            # Not before: another thread may be opening them.
            files, database_bytes, bytes_in_wal = stat_files(self.path)
            if files != self._files:
                self._refuse_replaced(files)
                self._reopen(handle)
            if handle.connection is None:
                handle.connection = self._connect(handle)
        connection = handle.connection
        # Another program may have emptied the WAL, or vacuumed; else somebody has cut a file.
        shrunk = database_bytes < self._database_bytes
        if shrunk or bytes_in_wal < self._wal_pages * self._frame_bytes:
            check_sizes(connection, self.path, shrunk)
        self._database_bytes = database_bytes
        return connection

    def _refuse_replaced(self, now: Files) -> None:
        """Raise where the database or its WAL was replaced or removed."""
        if now.database != (self._identity or now.database):
            raise apsw.CantOpenError(
                f"{self.path} was replaced: move the one before back (a copy is another one), or to"
                f" use this one stop the service, move {self.path}-wal and {self.path}-shm away,"
                " and start it"
            )
        if self._files is None:
            # A start leaves no -shm file. One without a -wal file means that a worker was killed
            # and that somebody moved its WAL away.
            lacks_wal = self._prepared and now.shm != NO_FILE and now.wal == NO_FILE
        else:
            lacks_wal = now.wal != self._files.wal
        if lacks_wal:
            raise apsw.CantOpenError(
                f"{self.path}-wal was removed or replaced: move the one before back (a copy is"
                " another one), or restart the service"
            )

    def _reopen(self, handle: Handle) -> None:
        """Close all connections, as they share a -shm file, and open the first one.

        `handle` is the one that the caller holds. Raise `apsw.BusyError` while others are in use.
        """
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
        """Return a new connection; raise where the file is not the prepared one, or was cut."""
        connection = connect(self.path, handle.is_checkpointer)
        connection.set_busy_timeout(0)  # as this may be the event loop
        try:
            # SQLite would make a WAL that nobody can write to, also later.
            if connection.readonly("main"):
                raise apsw.ReadOnlyError(f"{self.path} is read-only")
            if connection.pragma("application_id") != APPLICATION_ID:
                raise apsw.NotADBError(f"{self.path} is not the database that the start prepared")
            configure(connection)
            check_sizes(connection, self.path)
            self._frame_bytes = FRAME_HEADER + connection.pragma("page_size")
            connection.set_busy_timeout(int(1000 * handle.busy_timeout))
            if handle is self._writer:
                connection.set_wal_hook(self._on_commit)
                self._data_version = 0  # as it is another count for each connection
        except BaseException:
            connection.close()
            raise
        return connection

    def _on_commit(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        """Remember how many pages the WAL has; SQLite calls this after each commit."""
        self.checkpoint_due |= pages // CHECKPOINT_PAGES > self._wal_pages // CHECKPOINT_PAGES
        self._wal_pages = pages
        return apsw.SQLITE_OK


def describe(fault: Exception) -> str:
    """Return in one line what went wrong and, if known, what to do; no data of a visitor."""
    advice = next((ADVICE[kind] for kind in type(fault).__mro__ if kind in ADVICE), "")
    return f"{type(fault).__name__}: {fault}" + (f"; {advice}" if advice else "")


def connect(path: str, checkpoints: bool = False) -> apsw.Connection:
    """Open the file, which has to be there. One that `checkpoints` leaves no erased bytes behind.

    None of them checkpoints by itself, not even the last one when it closes, as it might write into
    a damaged file. SQLite waits `TIMEOUT` seconds for other programs inside a call.
    """
    vfs = scrubber().name if checkpoints else None
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE, vfs)
    connection.set_busy_timeout(int(1000 * TIMEOUT))
    connection.wal_autocheckpoint(0)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    return connection


def checkpoint_on_close(connection: apsw.Connection | None) -> None:
    """Let this connection move the WAL into the file when it closes, if it is the last one."""
    if connection is not None:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)


def configure(connection: apsw.Connection) -> None:
    """Make commits durable and deletions erase; raise `apsw.CantOpenError` where that fails."""
    # Each on its own: in a string of several, those after one that returns a row are not run.
    connection.pragma("synchronous", "FULL")
    connection.pragma("secure_delete", "ON")
    if sys.platform == "darwin":
        connection.pragma("fullfsync", "ON")
    connection.pragma("journal_mode", "WAL")  # the last one, as it may raise BusyError
    held = [connection.pragma(name) for name in ("journal_mode", "synchronous", "secure_delete")]
    if held != ["wal", 2, 1]:
        raise apsw.CantOpenError(f"SQLite did not take the settings it was given: {held}")


@contextmanager
def transaction(connection: apsw.Connection, mode: str = "IMMEDIATE") -> Generator[None]:
    """Commit what is done inside, or roll it back where it raises.

    IMMEDIATE is for writers: a DEFERRED one that begins to write fails at once if another writes.
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

    Pages that are only in the WAL may be missing in the file, but not if it has `shrunk`.
    """
    page_bytes = connection.pragma("page_size")
    frame_bytes = FRAME_HEADER + page_bytes
    # Three tries, as another process may empty the WAL or write to it between the two looks of one.
    sizes = ((stat_file(f"{path}-wal")[1], pages_in_wal(connection)) for _ in range(3))
    if all(bytes_in_wal < pages * frame_bytes for bytes_in_wal, pages in sizes):
        raise apsw.IOError(
            f"{path}-wal was removed or cut: stop all that use the database, then start the service"
        )
    pages = connection.pragma("page_count") - (0 if shrunk else max(0, pages_in_wal(connection)))
    if stat_file(path)[1] < pages * page_bytes:
        raise apsw.CorruptError(f"{path} was cut")


def pages_in_wal(connection: apsw.Connection) -> int:
    """Return the pages in the WAL, by its index; -1 where that cannot be told."""
    for _ in range(100):
        pages: int = connection.pragma("wal_checkpoint", "NOOP")[1]  # which only reports
        if pages >= 0:  # it is -1 for a moment, while another process is writing the index
            break
    return pages


def check_pages(connection: apsw.Connection) -> None:
    """Raise `apsw.CorruptError` where a database that is not large is damaged."""
    size = connection.pragma("page_count") * connection.pragma("page_size")
    if size <= MAX_FULL_CHECK and connection.execute("PRAGMA integrity_check(1)").get != "ok":
        raise apsw.CorruptError("the database is damaged")  # SQLite's own text has several lines
