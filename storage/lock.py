"""The lock file: where writers queue, and where they leave word for each other."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from time import monotonic, sleep  # before gevent has its own, which has no tenths of a millisecond
from typing import NamedTuple

import apsw

from storage.connection import Run, directly
from storage.files import NONE, NOTHING, Files, size

LENGTH = 300  # bytes; always the same, so that a short note leaves nothing of a long one


class Note(NamedTuple):
    """What the lock file says; what a new one says is safe to believe."""

    erasing: bool = True  # whether erased data may still be in the WAL
    files: Files = NOTHING  # what the last writer wrote to; no WAL where that may be gone

    def without_wal(self) -> Note:
        """Return the note of who has moved the WAL into the database, and lets it be removed."""
        return self._replace(files=self.files._replace(wal=NONE))


class Lock:
    """The lock file, held."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.note = _note(os.pread(descriptor, LENGTH, 0))

    def leave(self, note: Note, sync: bool = False) -> None:
        """Leave word for whoever holds the lock file after us; only a `sync` outlives a cut."""
        if note != self.note:
            os.pwrite(self._descriptor, json.dumps(note).encode().ljust(LENGTH), 0)
            self.note = note
        if sync:
            os.fsync(self._descriptor)


@contextmanager
def turn(path: str, deadline: float, run: Run = directly) -> Generator[Lock]:
    """Hold the lock file of the database at `path`, where writers queue; `run` waits for it.

    SQLite's own waiting polls with growing pauses, so that two busy writers starve each other.
    Raise `apsw.BusyError` at the deadline, in seconds of `time.monotonic`.
    """
    descriptor = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _take(descriptor):
            run(_wait, descriptor, deadline)
        yield Lock(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(descriptor: int, deadline: float) -> None:
    """Look again and again, for a flock(2) that blocks knows no deadline."""
    while not _take(descriptor):
        if monotonic() > deadline:
            raise apsw.BusyError("the writers' queue")
        sleep(0.0001)  # who sleeps for longer starves among busy ones


def check_wal(path: str) -> Note:
    """Return the note; raise `apsw.CantOpenError` or `WalRemoved` where it parts the files.

    To be asked before SQLite opens them: it takes any WAL for that of the file beside it, removes
    that of an empty one, and makes a new one where it is missing.
    """
    note = read_note(path)
    now, written = Files.at(path), note.files
    if size(f"{path}-wal"):
        if not now.length:
            raise apsw.CantOpenError(
                f"{path} is gone or empty, but {path}-wal is there: put the database back, or stop"
                " the service, move both away and restore a backup"
            )
        if now.wal == written.wal and now.database != written.database:
            raise apsw.CantOpenError(
                f"{path} was replaced, and {path}-wal belongs to the one before: put that one"
                f" back, or stop the service and move {path}-wal and {path}-shm away; where both"
                f" were restored together, remove {path}-lock"
            )
    if written.wal not in (NONE, now.wal) and now.database == written.database:
        raise WalRemoved(
            f"{path}-wal was removed: the process that still has it open saves it with its next"
            " request; where there is none, restart the service"
        )
    return note


class WalRemoved(apsw.CantOpenError):
    """Nobody may make a new WAL while another process still has the removed one open."""


def read_note(path: str) -> Note:
    """Return the note in the lock file of the database at `path`."""
    try:
        with open(f"{path}-lock", "rb") as file:
            return _note(file.read(LENGTH))
    except FileNotFoundError:
        return Note()


@lru_cache(maxsize=1)  # it is the same from one write to the next
def _note(data: bytes) -> Note:
    try:
        erasing, (database, wal, shm, length) = json.loads(data)
        return Note(bool(erasing), Files(tuple(database), tuple(wal), tuple(shm), int(length)))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return Note()
