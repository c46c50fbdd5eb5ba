"""`check`: look the whole database through, and say what to do."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing

import apsw

from operate import Failed, megabytes, some
from operate.database import count, problems, schema_version
from storage.database import Unavailable, check_sizes, connect, describe, pages_in_wal
from storage.migrations import newest_version

ABOUT = "check the whole database, and say what to do; exit status 1 with any finding"
EXAMPLE = "check"
LEAST_FREE = 100 * 2**20  # bytes on the disk, below which `check` says so; more for a large file
MUCH_WAL = 64 * 2**20  # bytes; the service keeps it below 32 MiB where nobody reads for long


def arguments(_parser: argparse.ArgumentParser) -> None:
    """Add the command's options, of which it has none."""


def run(_args: argparse.Namespace, database: str) -> None:
    """Print what there is to say about the database; raise `Failed` with any finding."""
    findings = []
    version = schema_version(database)
    if version < newest_version():
        versions = f"{version}, of {newest_version()}"
        findings.append(f"schema version {versions}: restart the service, which brings it up")
    if sys.stderr.isatty():
        print("checking every page ...", end="\r", file=sys.stderr, flush=True)
    try:
        with closing(connect(database)) as connection:
            check_sizes(connection, database)
            damage = problems(connection)
            visitors = 0 if damage else count(connection)
            wal = max(0, pages_in_wal(connection)) * connection.pragma("page_size")
    except apsw.Error as fault:
        raise Unavailable(describe(fault)) from fault
    if damage:
        first = f"damaged, first of all {damage[0]}"
        findings.append(f"{first}: stop the service and restore a backup")
    size = os.stat(database).st_size
    disk = os.statvfs(os.path.dirname(database))
    free = disk.f_bavail * disk.f_frsize
    least = max(LEAST_FREE, size)
    if free < least:
        room = f"make room until there are {megabytes(least)}"
        findings.append(f"{megabytes(free)} free on its disk: {room}")
    if wal > MUCH_WAL:
        findings.append(
            f"{megabytes(wal)} in the WAL: end what reads an older state for so long,"
            " such as an export or a shell"
        )
    if findings:
        print(*findings, sep="\n")
        raise Failed(f"{len(findings)} finding{'s' * (len(findings) > 1)}")
    print(
        f"sound: {some(visitors)}, schema version {version}, {megabytes(size)},"
        f" {megabytes(wal)} in the WAL, {megabytes(free)} free"
    )
