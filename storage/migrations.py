"""Create the database file, upgrade it, or refuse it: once, before the service opens it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Generator
from contextlib import closing, contextmanager, suppress
from glob import escape, glob
from importlib.resources import files
from pathlib import Path
from typing import Any

import apsw

from storage.database import (
    APPLICATION_ID,
    FAULTS,
    Identity,
    check_pages,
    check_sizes,
    checkpoint_on_close,
    configure,
    connect,
    describe,
    stat_file,
    stat_files,
    transaction,
)
from storage.fields import phone_digits, search_text

# The SQL of each version of the schema, the first one first.
_SCHEMA = files(__package__).joinpath("schema.sql").read_text("utf-8")
STEPS = tuple(re.split("(?m)^-- Version .*", _SCHEMA)[1:])


class PrepareError(Exception):
    """The file cannot be used as our database: one line with its path and the reason."""


def prepare(path: str, indexed: Collection[str] = ()) -> tuple[bool, int]:
    """Create or upgrade the database at `path`, readable by its owner alone.

    `indexed` names which of the columns phone and email get an index.
    Return whether the database is new, and the number of visitors in it.
    Raise `PrepareError` where the file is not ours, is too new, or cannot be used.
    """
    path = os.path.abspath(path)
    with as_prepare_error(path):
        check_leftovers(path)
        _create_file(path)
        with closing(connect(path)) as connection:
            version_of(connection, path)  # a foreign file is refused before anything is changed
        os.chmod(path, 0o600)  # SQLite gives the WAL the mode of the database
        with closing(connect(path, checkpoints=True)) as connection:
            with suppress(apsw.BusyError):  # another process is configuring it at this moment
                configure(connection)
            check_sizes(connection, path)
            check_pages(connection)
            checkpoint_on_close(connection)  # which removes what an unfinished erasure has left
            # Where nothing is to be changed, nothing here writes, as another process may.
            new = _upgrade(connection, path)
            for column in ("phone", "email"):
                if column in indexed:
                    sql = f"CREATE INDEX IF NOT EXISTS visitor_{column} ON visitor ({column})"
                else:
                    sql = f"DROP INDEX IF EXISTS visitor_{column}"
                connection.execute(sql)
            return new, connection.execute("SELECT count(*) FROM visitor").get


def identity(path: str) -> Identity:
    """Return the device and inode of the file at `path`, for `Database`."""
    return stat_files(path)[0].database


def newest_version() -> int:
    """Return the version of the schema that this code writes."""
    return len(STEPS)


@contextmanager
def as_prepare_error(path: str) -> Generator[None]:
    """Raise any fault of the file at `path` as a `PrepareError`."""
    try:
        yield
    except apsw.NotADBError:
        raise PrepareError(f"{path}: not a SQLite database; if it was, restore a backup") from None
    except (FileExistsError, NotADirectoryError):
        raise PrepareError(f"{path}: its folder is a file, not a folder") from None
    except apsw.BusyError:
        raise PrepareError(f"{path}: locked by another process") from None
    except apsw.CorruptError as fault:
        raise PrepareError(f"{path}: damaged: {fault}; restore a backup") from None
    except FAULTS as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise PrepareError(f"{path}: cannot be used: {reason}") from None


def check_leftovers(path: str) -> None:
    """Raise `PrepareError` where a start would lose visitors, or where no database can be.

    These are an unfinished restore, a WAL without its database, what is no regular file, and a file
    that is mounted alone.
    """
    # The last step of operate/restore.py renames that file.
    if not os.path.exists(path) and glob(f"{escape(path)}-before-*/restored"):
        raise PrepareError(f"{path}: a restore has not ended: run it again")
    # Look at the WAL first: another process may create both between the two looks.
    if stat_file(f"{path}-wal")[1] and not stat_file(path)[1]:
        raise PrepareError(
            f"{path}: gone or empty, but {path}-wal is there; put the database back, or to begin"
            f" anew remove {path}-wal"
        )
    if os.path.isdir(path):
        raise PrepareError(f"{path}: a folder, not a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise PrepareError(f"{path}: not a regular file")
    with suppress(FileNotFoundError), open("/proc/self/mountinfo", "rb") as mounts:  # of Linux
        # The kernel writes a blank, for one, as \040: proc_pid_mountinfo(5).
        points = [line.split()[4].decode("unicode_escape").encode("latin-1") for line in mounts]
        if os.fsencode(os.path.realpath(path)) in points:
            raise PrepareError(
                f"{path}: mounted as a single file, so that its WAL would be left behind: mount its"
                " folder instead"
            )


def _create_file(path: str) -> None:
    """Create the file and its folders where they are missing, and sync them."""
    missing = [entry for entry in (Path(path), *Path(path).parents) if not entry.exists()]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    for entry in missing:
        sync(str(entry.parent))


def sync(path: str) -> None:
    """Sync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def version_of(connection: apsw.Connection, path: str) -> int:
    """Return the version of the schema, 0 of an empty file.

    Raise `PrepareError` where the database is not ours, or of no version that this code knows.
    """
    # One statement reads one state, as another process may be creating the database.
    sql = (
        "SELECT application_id, user_version, (SELECT group_concat(name) FROM sqlite_schema)"
        " FROM pragma_application_id, pragma_user_version"
    )
    row: Any = connection.execute(sql).fetchone()
    application, version, names = row
    if not application and not names:
        return 0
    if not application and {"visitor", "guest"} <= set(names.split(",")):
        raise PrepareError(
            f"{path}: has our tables without our marks, as what was rebuilt from a .dump; if it is"
            f" ours, run in it: PRAGMA application_id = {APPLICATION_ID};"
            f" PRAGMA user_version = {newest_version()};"
        )
    if application != APPLICATION_ID:
        raise PrepareError(f"{path}: the database of another application")
    if version > newest_version():
        raise PrepareError(f"{path}: written by a newer version of this service")
    if version < 1:
        raise PrepareError(f"{path}: damaged: it is of version {version}; restore a backup")
    return int(version)


def _upgrade(connection: apsw.Connection, path: str) -> bool:
    """Run the steps that the file lacks, each in one transaction with its version.

    Return whether the first one was among them, so that the database is new.
    """

    def search_text_of_row(username: Any, name: Any, fields: Any) -> str:
        return search_text(username, name, *json.loads(fields).values())

    functions: dict[str, Any] = {"search_text": search_text_of_row, "phone_digits": phone_digits}
    for name, function in functions.items():
        connection.create_scalar_function(name, function)
    new = False
    while (version := version_of(connection, path)) < newest_version():
        try:
            with transaction(connection):
                if version_of(connection, path) == version:  # else another process has just run it
                    connection.execute(STEPS[version])
                    connection.pragma("application_id", APPLICATION_ID)
                    connection.pragma("user_version", version + 1)
                    new |= version == 0
        except PrepareError:  # another process has made it newer than we know
            raise
        except Exception as fault:  # such as of a row that the step cannot read
            raise PrepareError(
                f"{path}: stays at version {version}, the step to {version + 1} failed:"
                f" {describe(fault)}"
            ) from None
    return new
