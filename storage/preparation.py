"""Make or migrate the database file, once, before any process serves it."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection
from contextlib import closing
from importlib.resources import files

import apsw

from storage.connection import APPLICATION_ID, FAULTS, TIMEOUT, configure, connect, transaction
from storage.database import turn

VERSION = 1  # of schema.sql


class PrepareError(Exception):
    """The file cannot be this service's database: one line that names it and the reason."""


def prepare(path: str, indexed: Collection[str] = ()) -> tuple[bool, int]:
    """Make or migrate the database at `path`, readable by its owner alone.

    Called once, before any worker opens it. Of phone and email, those `indexed` get an index.
    Return whether the database is new, and the number of visitors in it.
    Raise `PrepareError` where the file is not ours, is too new, or cannot be used.
    """
    _check_sqlite(apsw.sqlite_lib_version())
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _make_file(path)
        with closing(connect(path)) as connection:
            _is_new(connection, path)  # what is not ours is refused before anything is touched
        deadline = time.monotonic() + TIMEOUT
        with turn(path, deadline), closing(connect(path, checkpoints=True)) as connection:
            new = _is_new(connection, path)
            os.chmod(path, 0o600)  # SQLite gives the WAL the mode of the database
            configure(connection)
            with transaction(connection):
                _migrate(connection, new, indexed)
            return new, connection.execute("SELECT count(*) FROM visitor").get
    except apsw.NotADBError:
        raise PrepareError(f"{path}: not a SQLite database") from None
    except IsADirectoryError:
        raise PrepareError(f"{path}: a folder, not a file") from None
    except (FileExistsError, NotADirectoryError):
        raise PrepareError(f"{path}: its folder is a file, not a folder") from None
    except apsw.BusyError:
        raise PrepareError(f"{path}: locked by another process") from None
    except (*FAULTS, apsw.SQLError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise PrepareError(f"{path}: cannot be used: {reason}") from None


def _make_file(path: str) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise PrepareError(f"{path}: not a regular file")
    finally:
        os.close(file)


def _check_sqlite(version: str) -> None:
    # Several connections could corrupt a WAL database: sqlite.org/wal.html, "walresetbug".
    if tuple(map(int, version.split("."))) < (3, 51, 3) or version == "3.52.0":
        raise PrepareError(f"SQLite {version} can damage a database; install a newer apsw")


def _is_new(connection: apsw.Connection, path: str) -> bool:
    """Return whether the file is still empty; raise `PrepareError` where it is not ours."""
    with transaction(connection, "DEFERRED"):  # one state, as another process may be making it
        application = connection.pragma("application_id")
        version = connection.pragma("user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    if not application and not tables:
        return True
    if application != APPLICATION_ID:
        raise PrepareError(f"{path}: the database of another application")
    if version > VERSION:
        raise PrepareError(f"{path}: written by a newer version of this service")
    return False


def _migrate(connection: apsw.Connection, new: bool, indexed: Collection[str]) -> None:
    if new:
        connection.execute(files(__package__).joinpath("schema.sql").read_text("utf-8"))
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", VERSION)
    for column in ("phone", "email"):
        if column in indexed:
            sql = f"CREATE INDEX IF NOT EXISTS visitor_{column} ON visitor ({column})"
        else:
            sql = f"DROP INDEX IF EXISTS visitor_{column}"
        connection.execute(sql)
