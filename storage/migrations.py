"""Create the database file, upgrade it, or refuse it: once, before anybody serves it."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Collection, Generator
from contextlib import closing, contextmanager
from glob import escape, glob
from importlib.resources import files
from pathlib import Path
from typing import Any

import apsw

from storage.database import (
    APPLICATION_ID,
    BEGIN_RETRY,
    FAULTS,
    TIMEOUT,
    Identity,
    check_pages,
    check_sizes,
    configure,
    connect,
    describe,
    merge_on_close,
    stat_files,
    transaction,
)
from storage.fields import phone_digits, search_text

# What upgrades a file of version 1 to version 2, and so on: SQL that only adds, because in the
# minute of a deploy the old code works on the new file. schema.sql is the whole newest version.
# It may call `search_text` and `phone_digits` of fields.py.
STEPS: tuple[str, ...] = (
    # 2: texts are compared as Unicode has it, and phones by their digits
    """
    ALTER TABLE visitor ADD COLUMN digits TEXT;
    UPDATE visitor SET
        digits = phone_digits(phone),
        search = search_text(username, coalesce(name, ''), fields);
    """,
    # 3: the visitors of each day, for the statistics
    """
    CREATE TABLE day (
        number INTEGER PRIMARY KEY,
        registered INTEGER NOT NULL,
        changes INTEGER NOT NULL
    ) STRICT;

    CREATE TRIGGER visitor_created AFTER INSERT ON visitor BEGIN
        INSERT INTO day VALUES (NEW.ts / 86400000, 1, 1)
            ON CONFLICT DO UPDATE SET registered = registered + 1, changes = changes + 1;
    END;

    CREATE TRIGGER visitor_changed AFTER UPDATE ON visitor BEGIN
        UPDATE day SET changes = changes + 1 WHERE number = NEW.ts / 86400000;
    END;

    CREATE TRIGGER visitor_deleted AFTER DELETE ON visitor BEGIN
        UPDATE day SET registered = registered - 1, changes = changes + 1
            WHERE number = OLD.ts / 86400000;
    END;

    INSERT INTO day SELECT ts / 86400000, count(*), 0 FROM visitor GROUP BY 1;
    """,
)


class PrepareError(Exception):
    """The file cannot be this service's database: one line that names it and the reason."""


def prepare(path: str, indexed: Collection[str] = ()) -> tuple[bool, int]:
    """Create or upgrade the database at `path`, readable by its owner alone.

    Of phone and email, those `indexed` get an index.
    Return whether the database is new, and the number of visitors in it.
    Raise `PrepareError` where the file is not ours, is too new, or cannot be used.
    """
    path = os.path.abspath(path)
    check_sqlite(apsw.sqlite_lib_version())
    with refusals(path):
        check_found(path)
        _create_file(path)
        with closing(connect(path)) as connection:
            version_of(connection, path)  # what is not ours is refused before anything is touched
        os.chmod(path, 0o600)  # SQLite gives the WAL the mode of the database
        with closing(connect(path, checkpoints=True)) as connection:
            _configure(connection)
            check_sizes(connection, path)
            check_pages(connection)
            merge_on_close(connection)
            # Nothing is written where nothing is to be changed: another process may be writing.
            new = not version_of(connection, path) and _create(connection, path)
            _upgrade(connection, path)
            _index(connection, indexed)
            # A process that was killed may have left an erasure unfinished.
            connection.set_busy_timeout(100)
            connection.pragma("wal_checkpoint", "TRUNCATE")
            return new, connection.execute("SELECT count(*) FROM visitor").get


def identity(path: str) -> Identity:
    """Return which file is at `path`, for `Database`."""
    return stat_files(path)[0].database


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
    except FAULTS as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise PrepareError(f"{path}: cannot be used: {reason}") from None


def check_found(path: str) -> None:
    """Raise where going on would lose what is in the WAL, or what a restore moved away."""
    # Its last step (operate/restore.py) takes the file out of there.
    if not os.path.exists(path) and glob(f"{escape(path)}-before-*/restored"):
        raise PrepareError(f"{path}: a restore has not ended: run it again")
    # The WAL first, as another process may be making both.
    wal, database = (Path(f"{path}{suffix}") for suffix in ("-wal", ""))
    bytes_in_wal = wal.stat().st_size if wal.exists() else 0
    if bytes_in_wal and not (database.exists() and database.stat().st_size):
        raise PrepareError(
            f"{path}: gone or empty, but {wal} is there; put the database back, or to begin anew"
            f" remove {wal}"
        )
    mounts = Path("/proc/self/mountinfo")  # Linux alone has it: proc_pid_mountinfo(5)
    # The kernel writes a blank, for one, as \040.
    real = os.path.realpath(path).encode()
    mounted = {
        line.split()[4].decode("unicode_escape").encode("latin-1")
        for line in (mounts.read_bytes().splitlines() if mounts.exists() else ())
    }
    if real in mounted and database.is_file():
        raise PrepareError(
            f"{path}: mounted as a single file, so that its WAL would be left behind: mount its"
            " folder instead"
        )


def _create_file(path: str) -> None:
    """Create the file and its folders where they are missing, so that no power cut takes them."""
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
            f" PRAGMA user_version = {newest()};"
        )
    if application != APPLICATION_ID:
        raise PrepareError(f"{path}: the database of another application")
    if version > newest():
        raise PrepareError(f"{path}: written by a newer version of this service")
    if version < 1:
        raise PrepareError(f"{path}: damaged: it is of version {version}; restore a backup")
    return int(version)


def _configure(connection: apsw.Connection) -> None:
    """Configure it; wait for others who do so at this moment, as SQLite itself does not."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return configure(connection)
        except apsw.BusyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(BEGIN_RETRY)


def _create(connection: apsw.Connection, path: str) -> bool:
    """Create the schema, unless another process has; return whether it was here."""
    with transaction(connection):
        if version_of(connection, path):
            return False
        connection.execute(files(__package__).joinpath("schema.sql").read_text("utf-8"))
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", newest())
    return True


def _upgrade(connection: apsw.Connection, path: str) -> None:
    """Take the steps that the file has not taken, each in one transaction with its version."""

    def text_of(username: Any, name: Any, fields: Any) -> str:
        return search_text(username, name, *json.loads(fields).values())

    functions: dict[str, Any] = {"search_text": text_of, "phone_digits": phone_digits}
    for name, function in functions.items():
        connection.create_scalar_function(name, function)
    for number, step in enumerate(STEPS, 2):
        if version_of(connection, path) >= number:
            continue
        try:
            with transaction(connection):
                if version_of(connection, path) < number:  # else another process has done it
                    connection.execute(step)
                    connection.pragma("user_version", number)
        except Exception as fault:  # such as of a visitor that the step cannot read
            raise PrepareError(
                f"{path}: stays at version {number - 1}, the step to {number} failed:"
                f" {describe(fault)}"
            ) from None


def _index(connection: apsw.Connection, indexed: Collection[str]) -> None:
    sql = "SELECT name FROM sqlite_schema WHERE type = 'index'"
    there = {name for (name,) in connection.execute(sql)}
    for column in ("phone", "email"):
        name = f"visitor_{column}"
        if column in indexed and name not in there:
            connection.execute(f"CREATE INDEX IF NOT EXISTS {name} ON visitor ({column})")
        elif column not in indexed and name in there:
            connection.execute(f"DROP INDEX IF EXISTS {name}")
