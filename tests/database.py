"""Looks at database files that are not in use."""

import os

import apsw
import pytest

import storage


def look(path, sql):
    """Return the rows; the file is not in use."""
    connection = apsw.Connection(str(path))
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def version(path):
    return look(path, "PRAGMA user_version")[0][0]


def rows(path):
    return look(path, "SELECT * FROM visitor ORDER BY number")


def bytes_of(path):
    """Return what the database and its WAL hold; nobody has them open here."""
    held = b""
    for name in (path, f"{path}-wal"):
        if os.path.exists(name):
            with open(name, "rb") as file:
                held += file.read()
    return held


def files_of_a_database(folder):
    return [name for name in sorted(os.listdir(folder)) if name.startswith("livechat.db")]


def damage(path):
    with open(path, "r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\xa5" * 4096)


def refused(path):
    with pytest.raises(storage.PrepareError) as raised:
        storage.prepare(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)
