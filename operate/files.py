"""Files that a command writes: private, and whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from operate import Failed


@contextmanager
def output(path: str | None, database: str) -> Generator[BinaryIO]:
    """Yield a file to write to: stdout, a pipe or device, or a file that is whole or not there."""
    if path is None:
        with open(1, "wb", closefd=False) as file:
            yield file
        return
    guard(path, database)
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    with aside(path) as copy, open(copy, "wb") as file:
        yield file


@contextmanager
def aside(path: str, replaces: bool = True) -> Generator[str]:
    """Yield the path of an empty file, private, that takes the place of `path` in the end.

    Where anything fails, `path` stays as it was; also where it is there and nothing `replaces` it.
    """
    path = os.path.realpath(path)
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
            os.link(copy, path)  # which fails where it is there
        sync(folder)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror or error}; nothing was written") from None
    finally:
        for made in (copy, f"{copy}-journal"):
            with suppress(FileNotFoundError):
                os.unlink(made)


def sync(path: str) -> None:
    """Let the file or folder be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def guard(path: str, database: str) -> None:
    """Raise `Failed` where `path` is a file of the database itself."""
    own = {f"{database}{suffix}" for suffix in ("", "-wal", "-shm")}
    same = os.path.exists(path) and os.path.exists(database) and os.path.samefile(path, database)
    if same or os.path.realpath(path) in own:
        raise Failed(f"{path}: belongs to the database itself")


def private(path: str, flags: int) -> int:
    """Open a file, which if it is new is its owner's alone."""
    return os.open(path, flags, 0o600)
