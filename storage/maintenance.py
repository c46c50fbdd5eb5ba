"""What is done to a database beside the service, without holding up its registrations for long."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import apsw

from storage.database import (
    APPLICATION_ID,
    Database,
    Unavailable,
    check_sizes,
    connect,
    describe,
    pages_in_wal,
    transaction,
)
from storage.migrations import (
    PrepareError,
    check_found,
    check_sqlite,
    newest,
    refusals,
    version_of,
)
from storage.visitors import iso_date

SLICE = 0.02  # seconds that one of many write transactions takes
PAUSE = 0.005  # seconds between two of them, in which others who wait to write can begin
PAGES = 4000  # of a backup from one report of progress to the next
FORGETTING = 30  # seconds that deleted bytes may take to be gone, as long as others read them

T = TypeVar("T")
S = TypeVar("S")


@contextmanager
def snapshot(path: str, older: bool = False) -> Generator[apsw.Connection]:
    """Yield a connection that reads one state of the database, which nothing is done to.

    As long as this lasts no WAL can begin anew, so it grows with all that others write.
    Raise `PrepareError`, also for an `older` schema unless that will do, or `Unavailable`.
    """
    (look if older else _check_newest)(path)
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
    if look(path) < newest():
        raise PrepareError(f"{path}: of an older version; a start of the service brings it up")


def in_turns(
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
    connection: apsw.Connection, since: int = 0, until: int = 2**63 - 1, after: int = 0
) -> int:
    """Return how many visitors were last changed in that time, in milliseconds, end excluded.

    Only those with a number `after` that one are counted.
    """
    sql = "SELECT count(*) FROM visitor"
    if (since, until, after) != (0, 2**63 - 1, 0):  # or SQLite counts in the smallest index
        sql += " WHERE updated >= :since AND updated < :until AND number > :after"
    given = {"since": since, "until": until, "after": after}
    return int(connection.execute(sql, given).get)


def last_guest(connection: apsw.Connection) -> int:
    """Return the last number that was given to a guest."""
    return int(connection.execute("SELECT last FROM guest").get)


def purge(database: Database, until: int) -> Iterator[int]:
    """Delete the visitors that were last changed before `until`, in milliseconds.

    Yield after each transaction how many went; `forget` has to follow.
    """
    sql = "SELECT number FROM visitor WHERE number > ? AND updated < ? ORDER BY number LIMIT 1000"

    def delete(connection: apsw.Connection, number: int) -> int:
        where = "number = ? AND updated < ?"  # as a registration may have come in between
        connection.execute(f"DELETE FROM visitor WHERE {where}", (number, until))
        return connection.changes()

    number = 0

    def find(connection: apsw.Connection) -> list[int]:
        return [found for (found,) in connection.execute(sql, (number, until))]

    while numbers := database.read(find):
        yield from map(sum, in_turns(database, numbers, delete))
        number = numbers[-1]


def erase_person(database: Database, who: str) -> list[dict[str, Any]]:
    """Delete every visitor with that token, phone or email; `forget` has to follow.

    Return of each the `_id`, both times and the number of custom fields.
    """
    where = "token = :who OR phone = :who OR email = :email"
    given = {"who": who, "email": who.strip().lower()}
    sql = f"SELECT number FROM visitor WHERE {where}"
    returned = "id, ts, updated, (SELECT count(*) FROM json_each(fields))"

    def find(connection: apsw.Connection) -> list[int]:
        return [number for (number,) in connection.execute(sql, given)]

    def delete(connection: apsw.Connection, number: int) -> tuple[Any, ...] | None:
        statement = f"DELETE FROM visitor WHERE number = :number AND ({where}) RETURNING {returned}"
        rows = connection.execute(statement, {**given, "number": number}).fetchall()
        return rows[0] if rows else None

    gone = []
    while numbers := database.read(find):  # until none was registered in between
        for batch in in_turns(database, numbers, delete):
            gone += [row for row in batch if row]
    return [
        {"_id": id_, "ts": iso_date(ts), "_updatedAt": iso_date(updated), "fields": fields}
        for id_, ts, updated, fields in gone
    ]


def forget(database: Database) -> bool:
    """Let all that was deleted be gone from the files; return whether it is.

    It is not where another program reads an older state all the time.
    """
    deadline = time.monotonic() + FORGETTING
    database.write(lambda _: None, erases=True)
    while not database.tidy():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def backup(path: str, copy: str) -> Iterator[tuple[int, int]]:
    """Copy one state of the database over the empty file `copy`, and look the copy through.

    Yield how many pages are copied, of how many. Raise `PrepareError` or `Unavailable`.
    """
    with snapshot(path, older=True) as source:
        # It writes as a checkpoint does, so that what was erased is in no gap of a page.
        with closing(connect(copy, checkpoints=True)) as target:
            target.pragma("synchronous", "OFF")  # who calls this syncs the file
            with target.backup("main", source, "main") as copying:
                while not copying.done:
                    copying.step(PAGES)
                    yield copying.page_count - copying.remaining, copying.page_count
            target.pragma("journal_mode", "DELETE")  # one file, and none beside it
        with closing(connect(copy)) as target:
            ours = target.pragma("application_id") == APPLICATION_ID
            same = [count(one) for one in (source, target)]
            if not ours or same[0] != same[1] or _problems(target):
                raise Unavailable("the copy is not sound; check the database")


def examine(path: str) -> dict[str, Any]:
    """Return what there is to say about the database; raise `PrepareError` or `Unavailable`.

    `problems` are those of the file, in SQLite's words; `sqlite` is "" where its version is sound;
    sizes are in bytes, that of the WAL of the part in use.
    """
    try:
        check_sqlite(apsw.sqlite_lib_version())
        sqlite = ""
    except PrepareError as error:
        sqlite = str(error)
    look(path)
    disk = os.statvfs(os.path.dirname(path))
    try:
        with closing(connect(path)) as connection:
            check_sizes(connection, path)
            problems = _problems(connection)
            return {
                "problems": problems,
                "version": connection.pragma("user_version"),
                "newest": newest(),
                "sqlite": sqlite,
                "free": disk.f_bavail * disk.f_frsize,
                "size": os.stat(path).st_size,
                "wal": max(0, pages_in_wal(connection)) * connection.pragma("page_size"),
                "visitors": 0 if problems else count(connection),
            }
    except apsw.Error as fault:
        raise Unavailable(describe(fault)) from fault


def _problems(connection: apsw.Connection) -> list[str]:
    """Return what SQLite finds wrong in the whole file, each in one line."""
    try:
        found = connection.execute("PRAGMA integrity_check(10)").fetchall()
    except apsw.CorruptError as fault:
        return [str(fault)]
    return [str(text).splitlines()[0] for (text,) in found if text != "ok"]


def look(path: str) -> int:
    """Return the version of the schema of the database at `path`, which is left as it is.

    Raise `PrepareError` where there is none, or one that is not ours, too new or out of reach.
    """
    with refusals(path):
        if not stat.S_ISREG(_mode(path)):
            raise PrepareError(f"{path}: not a regular file")
        check_found(path)
        with closing(connect(path)) as connection:
            version = version_of(connection, path)
    if not version:
        raise PrepareError(f"{path}: an empty file, and no database yet")
    return version


def _mode(path: str) -> int:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise PrepareError(f"{path}: there is no database") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return mode
