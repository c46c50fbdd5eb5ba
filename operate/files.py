"""Files that a command writes: private, and whole or not there.

The user of the service may write the folder of the database, in which root runs commands: no link
or pipe of another user is followed or opened, nor one that comes in between.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from operate import Failed
from storage.migrations import sync

PARTS = ("-journal", "-wal", "-shm")  # what SQLite appends to the name of a database


@contextmanager
def output(path: str, database: str) -> Generator[BinaryIO]:
    """Yield a file to write to: stdout for -, a pipe or device, or one that is whole or not there.

    Raise `Failed` where nothing may be written there.
    """
    if path != "-":
        guard(path, database)
    if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
        with open(1 if path == "-" else path, "wb", closefd=path != "-") as file:
            yield file
    else:
        with aside(path) as copy, open(copy, "wb", opener=private) as file:
            yield file


@contextmanager
def aside(path: str, replaces: bool = True) -> Generator[str]:
    """Yield the path of an empty file, private, that takes the place of `path` in the end.

    Where anything fails, `path` stays as it was; also where it is there and nothing `replaces` it.
    """
    path = resolve(path)
    folder = os.path.dirname(path)
    try:
        descriptor, copy = tempfile.mkstemp(".part", ".livechat-", folder)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    os.close(descriptor)
    try:
        yield copy
        sync(copy)
        if replaces:
            os.replace(copy, path)
        else:
            os.link(copy, path, follow_symlinks=False)  # which fails where it is there
        sync(folder)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror or error}; nothing was written") from None
    finally:
        for made in (copy, f"{copy}-journal"):
            with suppress(FileNotFoundError):
                os.unlink(made)


def guard(path: str, database: str) -> None:
    """Raise `Failed` where no command may write: SQLite's files, and what `resolve` refuses."""
    real = resolve(path)
    if path == "-":
        raise Failed("-: not the name of a file; ./- is one")
    if real.endswith(PARTS):
        raise Failed(f"{path}: a name that SQLite gives to a part of a database")
    with suppress(FileNotFoundError):
        if os.path.samefile(path, database):
            raise Failed(f"{path}: belongs to the database itself")


def resolve(path: str) -> str:
    """Return the absolute path, after links; raise `Failed` at another user's link or pipe."""
    mode = 0
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        mode = status.st_mode
        of_others = status.st_uid not in (0, os.geteuid())
        if of_others and (stat.S_ISLNK(mode) or stat.S_ISFIFO(mode)):
            raise Failed(f"{path}: a link or pipe of another user, who could lead it anywhere")
    return os.path.realpath(path) if stat.S_ISLNK(mode) else os.path.abspath(path)


def private(path: str, flags: int) -> int:
    """Open a file, but no link, and no pipe to wait for; a new one is its owner's alone."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
