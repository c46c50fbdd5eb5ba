"""`check`: look the whole database through, and say what to do."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from typing import Any

import apsw

from operate import Failed, megabytes, some
from operate.database import count, look, problems
from storage.database import Unavailable, check_sizes, connect, describe, pages_in_wal
from storage.migrations import PrepareError, check_sqlite, newest

ABOUT = "look the database through, and say what to do; exit status 1 with any finding"
EXAMPLE = "check"
LEAST_FREE = 100 * 2**20  # bytes on the disk, below which `check` says so; more for a large file
MUCH_WAL = 64 * 2**20  # bytes; the service keeps it below 32 MiB where nobody reads for long


def arguments(_parser: argparse.ArgumentParser) -> None:
    """Add the command's options, of which it has none."""


def run(_args: argparse.Namespace, database: str) -> None:
    """Look the database through."""
    if sys.stderr.isatty():
        print("looking through every page ...", end="\r", file=sys.stderr, flush=True)
    found = examine(database)
    findings = []
    if found["problems"]:
        findings.append(
            f"damaged, first of all {found['problems'][0]}: stop the service and restore a backup"
        )
    if found["version"] < found["newest"]:
        versions = f"{found['version']}, of {found['newest']}"
        findings.append(f"schema version {versions}: restart the service, which brings it up")
    if found["sqlite"]:
        findings.append(found["sqlite"])
    least = max(LEAST_FREE, found["size"])
    if found["free"] < least:
        free = f"{megabytes(found['free'])} free on its disk"
        findings.append(f"{free}: make room until there are {megabytes(least)}")
    if found["wal"] > MUCH_WAL:
        findings.append(
            f"{megabytes(found['wal'])} in the WAL: end what reads an older state for so long,"
            " such as an export or a shell"
        )
    for finding in findings:
        print(finding)
    if findings:
        raise Failed(f"{len(findings)} finding{'s' * (len(findings) > 1)}")
    print(
        f"sound: {some(found['visitors'])}, schema version {found['version']},"
        f" {megabytes(found['size'])}, {megabytes(found['wal'])} in the WAL,"
        f" {megabytes(found['free'])} free"
    )


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
            found = problems(connection)
            return {
                "problems": found,
                "version": connection.pragma("user_version"),
                "newest": newest(),
                "sqlite": sqlite,
                "free": disk.f_bavail * disk.f_frsize,
                "size": os.stat(path).st_size,
                "wal": max(0, pages_in_wal(connection)) * connection.pragma("page_size"),
                "visitors": 0 if found else count(connection),
            }
    except apsw.Error as fault:
        raise Unavailable(describe(fault)) from fault
