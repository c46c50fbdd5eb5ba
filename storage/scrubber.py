"""A VFS that zeroes what SQLite leaves behind in the pages of the database file.

`secure_delete` zeroes what is deleted, but a page that SQLite rebuilds while it balances a tree
keeps copies of moved cells in the gap between its cell pointers and its cells. Measured: after 1 of
1,000 erasures the erased data was still there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache

import apsw

# The name of the VFS. Only connections that checkpoint need it, as nothing else writes to the file.
SCRUBBER = "livechat-scrubber"


@cache
def register_scrubber() -> object:
    """Register the VFS. It stays registered while the returned object lives; the cache keeps it."""
    return _Scrubber()


def scrub(page: bytes) -> bytes:
    """Return a page of a database file with zeros in the gap: sqlite.org/fileformat2.html, 1.6."""
    header = 100 if page.startswith(b"SQLite format 3\0") else 0
    kind = page[header]
    if kind not in (2, 5, 10, 13):  # no page of a tree: an overflow or a free page has no gap
        return page
    cells = int.from_bytes(page[header + 3 : header + 5])
    start = header + (12 if kind in (2, 5) else 8) + 2 * cells
    end = int.from_bytes(page[header + 5 : header + 7]) or 65_536
    if not start <= end <= len(page):  # an overflow page whose first byte looks like a kind
        return page
    return page[:start] + bytes(end - start) + page[end:]


class _Scrubber(apsw.VFS):
    """The operating system's files, but the pages of a database file are scrubbed."""

    def __init__(self) -> None:
        super().__init__(SCRUBBER, base="")

    def xOpen(  # noqa: N802 # SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> apsw.VFSFile:
        return (_ScrubbedFile if flags[0] & apsw.SQLITE_OPEN_MAIN_DB else _File)("", name, flags)


class _File(apsw.VFSFile):
    """A file whose syncs let other threads run, as apsw's own do not.

    They need the descriptor that SQLite has opened: closing another one of the same file would take
    away SQLite's locks.
    """

    def __init__(self, vfs: str, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        before = _descriptors(path)
        super().__init__(vfs, name, flags)
        new = _descriptors(path) - before
        # Several are new where another thread has opened the file too; another VFS syncs by itself.
        sure = len(new) == 1 and apsw.vfs_names()[0] == "unix"
        self._descriptor = new.pop() if sure else None

    def xSync(self, flags: int) -> None:  # noqa: N802 # SQLite's name
        if self._descriptor is None:
            super().xSync(flags)
            return
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise apsw.IOError(f"cannot sync: {error.strerror}") from None


class _ScrubbedFile(_File):
    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 # SQLite's name
        # SQLite writes whole pages, of 512 bytes at least. From 2**25 pages on, the number with
        # which an overflow page begins could be taken for the kind of a tree page.
        if len(data) >= 512 and super().xFileSize() < 2**25 * len(data):
            data = scrub(data)
        super().xWrite(data, offset)


def _descriptors(path: str | None) -> set[int]:
    """Return the descriptors of this process that are open on a file, as far as Linux tells."""
    found = set()
    with suppress(OSError, TypeError):
        file = os.stat(path)  # type: ignore[arg-type] # a temporary file has no name
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # the one that lists them is closed by now
                if os.path.samestat(os.fstat(number), file):
                    found.add(number)
    return found
