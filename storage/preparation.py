"""Make or migrate the database file, once, before any process serves it."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Collection, Generator
from contextlib import closing, contextmanager
from importlib.resources import files

import apsw

from storage.connection import (
    APPLICATION_ID,
    FAULTS,
    TIMEOUT,
    check_pages,
    configure,
    connect,
    describe,
    merge_on_close,
    transaction,
)
from storage.files import Files, check, is_open, size
from storage.lock import WalRemoved, check_wal, read_note, turn

# What makes a file of version 1 one of version 2, and so on: SQL that only adds, as in the minute
# of a deploy the old code works on the new file. schema.sql is the whole of the newest version.
STEPS: tuple[str, ...] = ()
REFUSED = tuple(FAULTS)


class PrepareError(Exception):
    """The file cannot be this service's database: one line that names it and the reason."""


def prepare(path: str, indexed: Collection[str] = ()) -> tuple[bool, int]:
    """Make or migrate the database at `path`, readable by its owner alone.

    Called once, before any worker opens it. Of phone and email, those `indexed` get an index.
    Return whether the database is new, and the number of visitors in it.
    Raise `PrepareError` where the file is not ours, is too new, or cannot be used.
    """
    path = os.path.abspath(path)
    check_sqlite(apsw.sqlite_lib_version())
    with refusals(path):
        _check_found(path)
        _make_file(path)
        with closing(connect(path)) as connection:
            version_of(connection, path)  # what is not ours is refused before anything is touched
        deadline = time.monotonic() + TIMEOUT
        with turn(path, deadline) as lock, closing(connect(path, checkpoints=True)) as connection:
            version = version_of(connection, path)
            os.chmod(path, 0o600)  # SQLite gives the WAL the mode of the database
            configure(connection)
            check(connection, path)
            check_pages(connection)
            # What a note of before a power cut says need not be true any more.
            lock.leave(lock.note._replace(files=Files.at(path)).without_wal(), sync=True)
            merge_on_close(connection)
            if not version:
                _make(connection)
            _migrate(connection, path)
            with transaction(connection):
                _index(connection, indexed)
            return not version, connection.execute("SELECT count(*) FROM visitor").get


def look(path: str) -> int:
    """Return the version of the schema of the database at `path`, which is left as it is.

    Raise `PrepareError` where there is none, or one that is not ours, too new or out of reach.
    """
    with refusals(path):
        if not stat.S_ISREG(_mode(path)):
            raise PrepareError(f"{path}: not a regular file")
        check_wal(path)
        with closing(connect(path)) as connection:
            version = version_of(connection, path)
    if not version:
        raise PrepareError(f"{path}: an empty file, and no database yet")
    return version


def newest() -> int:
    """Return the version of the schema that this code writes."""
    return 1 + len(STEPS)


@contextmanager
def refusals(path: str) -> Generator[None]:
    """Turn whatever keeps the file at `path` from being our database into a `PrepareError`."""
    try:
        yield
    except apsw.NotADBError:
        raise PrepareError(f"{path}: not a SQLite database; if it was, restore a backup") from None
    except IsADirectoryError as fault:
        raise PrepareError(f"{fault.filename}: a folder, not a file") from None
    except (FileExistsError, NotADirectoryError):
        raise PrepareError(f"{path}: its folder is a file, not a folder") from None
    except apsw.BusyError:
        raise PrepareError(f"{path}: locked by another process") from None
    except apsw.CorruptError as fault:
        raise PrepareError(f"{path}: damaged: {fault}; restore a backup") from None
    except REFUSED as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise PrepareError(f"{path}: cannot be used: {reason}") from None


def _check_found(path: str) -> None:
    """Raise where the files are not those that were left, so that nothing is lost by going on."""
    # The WAL and the note first, as another process may be making all of them.
    wal, note = size(f"{path}-wal"), read_note(path)
    if not size(path) and (wal or note.files.length):
        raise PrepareError(
            f"{path}: gone or empty, and was not; put it back, or to begin anew"
            f" remove {path}-wal and {path}-lock"
        )
    if os.path.exists(path):
        try:
            check_wal(path)
        except WalRemoved:
            if is_open(path):  # else what it held is lost, and there is nothing to wait for
                raise


def _mode(path: str) -> int:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise PrepareError(f"{path}: there is no database") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return mode


def _make_file(path: str) -> None:
    """Make the file and its folders where they are missing, so that no power cut takes them."""
    made = [] if os.path.exists(path) else [path]
    while made and not os.path.exists(os.path.dirname(made[-1])):
        made.append(os.path.dirname(made[-1]))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise PrepareError(f"{path}: not a regular file")
    finally:
        os.close(file)
    for entry in made:
        folder = os.open(os.path.dirname(entry), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_sqlite(version: str) -> None:
    """Raise `PrepareError` where that version of SQLite is known to damage databases."""
    # Several connections could corrupt a WAL database: sqlite.org/wal.html, "walresetbug".
    if tuple(map(int, version.split("."))) < (3, 51, 3) or version == "3.52.0":
        raise PrepareError(f"SQLite {version} can damage a database; install a newer apsw")


def version_of(connection: apsw.Connection, path: str) -> int:
    """Return the version of the schema, 0 of an empty file; raise `PrepareError`: not ours."""
    with transaction(connection, "DEFERRED"):  # one state, as another process may be making it
        application = connection.pragma("application_id")
        version: int = connection.pragma("user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    if not application and not tables:
        return 0
    if application != APPLICATION_ID:
        raise PrepareError(f"{path}: the database of another application")
    if version > newest():
        raise PrepareError(f"{path}: written by a newer version of this service")
    if version < 1:
        raise PrepareError(f"{path}: damaged: it is of version {version}; restore a backup")
    return version


def _make(connection: apsw.Connection) -> None:
    with transaction(connection):
        connection.execute(files(__package__).joinpath("schema.sql").read_text("utf-8"))
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", newest())


def _migrate(connection: apsw.Connection, path: str) -> None:
    """Take the steps that the file has not taken, each in one transaction with its version."""
    version = connection.pragma("user_version")
    for number, step in enumerate(STEPS[version - 1 :], version + 1):
        try:
            with transaction(connection):
                connection.execute(step)
                connection.pragma("user_version", number)
        except apsw.Error as fault:
            raise PrepareError(
                f"{path}: stays at version {number - 1}, the step to {number} failed:"
                f" {describe(fault)}"
            ) from None


def _index(connection: apsw.Connection, indexed: Collection[str]) -> None:
    for column in ("phone", "email"):
        if column in indexed:
            sql = f"CREATE INDEX IF NOT EXISTS visitor_{column} ON visitor ({column})"
        else:
            sql = f"DROP INDEX IF EXISTS visitor_{column}"
        connection.execute(sql)
