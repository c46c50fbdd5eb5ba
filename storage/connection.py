"""A connection to one SQLite file, with the settings that make an answer durable."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from json import JSONDecodeError
from typing import Any

import apsw

APPLICATION_ID = 0x4C435631  # "LCV1", in the header of every database of ours
SMALL = 2**22  # bytes of a database, some 20,000 visitors, that takes 10 ms to look through
TIMEOUT = 5.0  # seconds that one write or read may wait, in the queue and in SQLite together

# What SQLite raises when the file, the disk or another program is at fault, not our SQL; and what
# whoever operates the service can do about it, where that is not said already.
FAULTS: dict[type[Exception], str] = {
    apsw.BusyError: "it goes on once whoever locks the database is done",
    apsw.CantOpenError: "",
    apsw.CorruptError: "stop the service and restore a backup",
    apsw.FullError: "make room on its disk",
    apsw.IOError: "",
    apsw.LockedError: "",
    apsw.NoMemError: "",
    apsw.NotADBError: "stop the service and restore a backup",
    apsw.PermissionsError: "let the service write the file and its folder",
    apsw.ProtocolError: "",
    apsw.ReadOnlyError: "let the service write the file and its folder",
    apsw.SQLError: "stop the service and restore a backup",  # a schema that is not ours
    JSONDecodeError: "stop the service and restore a backup",
    UnicodeDecodeError: "stop the service and restore a backup",
    FileNotFoundError: "put the file back, or stop the service and restore a backup",
    OSError: "",
}


def describe(fault: Exception) -> str:
    """Return what went wrong in one line, and where it can be said what to do; no data of ours."""
    advice = next((FAULTS[kind] for kind in type(fault).__mro__ if FAULTS.get(kind)), "")
    return f"{type(fault).__name__}: {fault}" + (f"; {advice}" if advice else "")


def connect(path: str, checkpoints: bool = False) -> apsw.Connection:
    """Open the file, which has to be there; one that `checkpoints` leaves no erased data behind.

    None does so by itself, also not the last one when it closes: the file could be damaged.
    """
    vfs = _scrubber().name if checkpoints else None
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READWRITE, vfs)
    connection.set_busy_timeout(int(1000 * TIMEOUT))
    connection.wal_autocheckpoint(0)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    return connection


def merge_on_close(connection: apsw.Connection) -> None:
    """Let the WAL go into the database file when this connection closes, if it is the last one."""
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)


def configure(connection: apsw.Connection) -> None:
    """Make the connection durable; raise `apsw.CantOpenError` where SQLite does not do as told."""
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


def check_pages(connection: apsw.Connection) -> None:
    """Raise `apsw.CorruptError` where the database, unless it is large, is found damaged."""
    size = connection.pragma("page_count") * connection.pragma("page_size")
    if size <= SMALL and connection.execute("PRAGMA integrity_check(1)").get != "ok":
        raise apsw.CorruptError("the database is damaged")  # SQLite's words are of several lines


# How a function that waits for the disk or for another program is called with its arguments. Where
# all that a process does shares one thread, such a call is made in another one.
Run = Callable[..., Any]


def directly(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call it here, as where each thread has work of its own."""
    return call(*arguments)


@contextmanager
def transaction(
    connection: apsw.Connection, mode: str = "IMMEDIATE", run: Run = directly
) -> Generator[None]:
    """Commit what is done inside, or roll it back where it raises; `run` waits for the disk.

    IMMEDIATE is for writers: a deferred one that turns writer fails at once where another writes.
    apsw's own `with connection` holds the interpreter lock while it waits and while it commits,
    so that no other thread runs.
    """
    run(connection.execute, f"BEGIN {mode}")
    try:
        yield
        run(connection.execute, "COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextmanager
def savepoint(connection: apsw.Connection) -> Generator[None]:
    """Keep what is done inside, or undo that alone where it raises, within a transaction."""
    connection.execute("SAVEPOINT change")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # which some faults of a disk have ended
            connection.execute("ROLLBACK TO change")
        raise
    finally:
        if connection.in_transaction:
            connection.execute("RELEASE change")


def scrub(page: bytes) -> bytes:
    """Return a page of the database file with zeros where SQLite has left old cells.

    `secure_delete` zeroes what is deleted, but a page that SQLite builds anew, when it balances a
    tree, keeps copies of moved cells in the gap between its cell pointers and its cells (measured:
    in 1 of 1,000 erasures the erased data stood there). See sqlite.org/fileformat2.html, 1.6.
    """
    header = 100 if page.startswith(b"SQLite format 3\0") else 0
    kind = page[header]
    if kind not in (2, 5, 10, 13):  # not of a tree: an overflow or a free page has no gap
        return page
    cells = int.from_bytes(page[header + 3 : header + 5])
    start = header + (12 if kind in (2, 5) else 8) + 2 * cells
    end = int.from_bytes(page[header + 5 : header + 7]) or 65_536
    if not start <= end <= len(page):  # the number of an overflow page that looks like a kind
        return page
    return page[:start] + bytes(end - start) + page[end:]


class _Scrubber(apsw.VFS):
    """The files of the operating system, but for pages of the database, which are scrubbed.

    Only the connections that checkpoint use it, for those alone write to the database file.
    """

    name = "livechat-scrubber"

    def __init__(self) -> None:
        super().__init__(self.name, base="")

    def xOpen(  # noqa: N802 # SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> apsw.VFSFile:
        kind = _ScrubbedFile if flags[0] & apsw.SQLITE_OPEN_MAIN_DB else apsw.VFSFile
        return kind("", name, flags)


class _ScrubbedFile(apsw.VFSFile):
    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 # SQLite's name
        # SQLite writes whole pages, of 512 bytes at least; anything smaller is none. From 2**25
        # pages on, the number that begins an overflow page could be taken for a kind of tree page.
        if len(data) >= 512 and super().xFileSize() < 2**25 * len(data):
            data = scrub(data)
        super().xWrite(data, offset)


@cache
def _scrubber() -> _Scrubber:
    return _Scrubber()  # SQLite knows it as long as it is there, so it stays
