"""Reads and writes beside the service, which hold up no registration for long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TypeVar

import apsw

from operate import Failed
from storage.database import Database, Unavailable, check_sizes, connect, describe, transaction
from storage.fields import MAX_INTEGER
from storage.migrations import (
    PrepareError,
    as_prepare_error,
    check_leftovers,
    newest_version,
    version_of,
)

SLICE = 0.02  # seconds that one of many write transactions takes
PAUSE = 0.005  # seconds between two of them, in which others who wait to write can begin
FORGETTING = 30  # seconds to wait for other programs, until deleted bytes are gone

T = TypeVar("T")
S = TypeVar("S")


@contextmanager
def snapshot(path: str, older: bool = False) -> Generator[apsw.Connection]:
    """Yield a connection that reads one state of the database, which nothing is done to.

    As long as this lasts no WAL can begin anew, so it grows with all that others write.
    Raise `PrepareError`, also for an `older` schema unless that will do, or `Unavailable`.
    """
    (schema_version if older else _check_newest)(path)
    try:
        with closing(connect(path)) as connection:
            check_sizes(connection, path)  # which cannot be inside a transaction
            with transaction(connection, "DEFERRED"):
                connection.pragma("user_version")  # the first read is what the state is of
                yield connection
    except apsw.Error as fault:
        raise Unavailable(describe(fault)) from fault


def writable(path: str) -> Database:
    """Return the database at `path`, which has to be of the newest schema, to be closed again.

    Raise `PrepareError`.
    """
    _check_newest(path)
    return Database(path)


def _check_newest(path: str) -> None:
    """Raise `PrepareError` where the database at `path` is not of the newest schema."""
    if schema_version(path) < newest_version():
        raise PrepareError(f"{path}: of an older version; a start of the service brings it up")


def in_slices(
    database: Database, items: Sequence[S], do: Callable[[apsw.Connection, S], T]
) -> Iterator[list[T]]:
    """Do something with each item, in transactions of `SLICE` with pauses for other writers.

    Where others write, they have half of the time.
    Yield after each transaction what was returned for its items.
    """
    before = None
    while items:

        def work(connection: apsw.Connection, items: Sequence[S] = items) -> tuple[list[T], int]:
            version = int(connection.pragma("data_version"))  # what others commit changes it
            end = time.monotonic() + SLICE
            done = []
            for item in items:
                done.append(do(connection, item))
                if time.monotonic() > end:
                    break
            return done, version

        began = time.monotonic()
        done, version = database.write(work)
        items = items[len(done) :]
        yield done
        took = time.monotonic() - began
        time.sleep(PAUSE if version == before else max(PAUSE, took))
        before = version


def count(
    connection: apsw.Connection, since: int = 0, until: int = MAX_INTEGER, after: int = 0
) -> int:
    """Return how many visitors were last changed in that time, in milliseconds, end excluded.

    Only those with a number `after` that one are counted.
    """
    sql = "SELECT count(*) FROM visitor"
    if (since, until, after) != (0, MAX_INTEGER, 0):  # or SQLite counts in the smallest index
        sql += " WHERE updated >= :since AND updated < :until AND number > :after"
    given = {"since": since, "until": until, "after": after}
    return int(connection.execute(sql, given).get)


def last_guest(connection: apsw.Connection) -> int:
    """Return the last number that was given to a guest."""
    return int(connection.execute("SELECT last FROM guest").get)


def forget(database: Database) -> None:
    """Let the bytes of all that was deleted be gone from the files.

    Raise `Failed` where another program still reads an older state after `FORGETTING`.
    """
    deadline = time.monotonic() + FORGETTING
    database.write(lambda _: None, erases=True)
    while not database.empty_wal_if_due():
        if time.monotonic() > deadline:
            raise Failed(
                "their bytes are still in the files, as another program reads an older state (an"
                " export, a shell, Litestream): end it and run this again, or the running service"
                " takes them away once it has ended"
            )
        time.sleep(0.5)


def problems(connection: apsw.Connection) -> list[str]:
    """Return what SQLite finds wrong in the whole file, each in one line."""
    try:
        found = connection.execute("PRAGMA integrity_check(10)").fetchall()
    except apsw.CorruptError as fault:
        return [str(fault)]
    return [str(text).splitlines()[0] for (text,) in found if text != "ok"]


def schema_version(path: str) -> int:
    """Return the version of the schema of the database at `path`, which is left as it is.

    Raise `PrepareError` where there is none, or one that is not ours, too new or out of reach.
    """
    with as_prepare_error(path):
        check_leftovers(path)
        if not os.path.exists(path):
            raise PrepareError(f"{path}: there is no database")
        with closing(connect(path)) as connection:
            version = version_of(connection, path)
    if not version:
        raise PrepareError(f"{path}: an empty file, and no database yet")
    return version
