"""Which files stand at the path of the database, and whether they belong together."""

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple

import apsw

Identity = tuple[int, int]  # device and number of a file: a renamed file keeps it
NONE: Identity = (0, 0)  # of a file that is not there


class Files(NamedTuple):
    """The database file, its WAL and the WAL's index, as they stand at a path."""

    database: Identity
    wal: Identity
    shm: Identity
    length: int  # bytes of the database file

    @classmethod
    def at(cls, path: str) -> Files:
        """Return what stands at `path`; raise FileNotFoundError where there is no database."""
        status = os.stat(path)
        database = status.st_dev, status.st_ino
        return cls(database, _identity(f"{path}-wal"), _identity(f"{path}-shm"), status.st_size)

    def are_still(self, before: Files) -> bool:
        """Return whether nothing of what stood there before was removed, replaced or cut."""
        return self[:3] == before[:3] and self.length >= before.length  # none of ours shrinks


NOTHING = Files(NONE, NONE, NONE, 0)


def _identity(path: str) -> Identity:
    """Return which file stands at `path`, or `NONE`."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return NONE
    return status.st_dev, status.st_ino


def size(path: str) -> int:
    """Return the bytes of the file at `path`, 0 where there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def is_open(path: str) -> bool:
    """Return whether a process has the database open; not for one that has, it would lose it."""
    with open(path, "r+b") as file:
        try:  # what SQLite holds a part of while a database is open: os.h, SHARED_FIRST
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
        except OSError:
            return True
    return False


def wal_is_whole(connection: apsw.Connection, path: str) -> bool:
    """Return whether the WAL at `path` is as long as its index says.

    It is not where somebody has cut it, or removed it: those who had it open go on with that one.
    """
    page_size: int = connection.pragma("page_size")
    for _ in range(3):  # as another process may cut it and write it anew between the two looks
        pages = pages_in_wal(connection)
        # sqlite.org/fileformat2.html, 4.1: a header, and before each page one of its own.
        if size(f"{path}-wal") >= pages * (24 + page_size):
            return True
    return False


def pages_in_wal(connection: apsw.Connection) -> int:
    """Return the pages in the WAL, by its index; -1 where there is none."""
    for _ in range(100):
        pages: int = connection.pragma("wal_checkpoint", "NOOP")[1]
        if pages >= 0:  # it is not for a moment, while another process is writing the index
            break
    return pages


def check(connection: apsw.Connection, path: str, known: int = 0) -> None:
    """Raise `apsw.IOError` or `apsw.CorruptError` where a part of the files is missing.

    `known` is a length, in bytes, that the database file has had since the start.
    """
    if not wal_is_whole(connection, path):
        raise apsw.IOError(f"{path}-wal was removed or cut")
    page_size = connection.pragma("page_size")
    whole = connection.pragma("page_count") * page_size
    # Pages may be missing that were never in the file, and so are in the WAL.
    least = max(known, whole - pages_in_wal(connection) * page_size)
    if size(path) < min(least, whole):
        raise apsw.CorruptError(f"{path} was cut")
