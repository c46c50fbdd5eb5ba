"""`purge`: delete the visitors that were not updated within the given time."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import apsw

from operate import Failed, bar, some
from operate.database import count, forget, in_slices, snapshot, writable
from storage.database import Database
from storage.fields import iso_date

ABOUT = "delete visitors not updated within the given time, without a trace in the database"
EXAMPLE = "purge --older-than 90d --dry-run"
UNITS = {"h": 3600, "d": 86_400, "w": 604_800, "y": 365 * 86_400}  # seconds


def age(text: str) -> int:
    """Return an age such as 90d in seconds."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([hdwy])", text)
    if not match:  # above all 6m, which could be minutes or months
        raise argparse.ArgumentTypeError(
            f"{text!r}: give 12h, 90d, 52w or 2y; m could be minutes or months"
        )
    return int(match[1]) * UNITS[match[2]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    example = "12h, 90d, 52w or 2y, of 365 days each"
    parser.add_argument("--older-than", type=age, required=True, metavar="AGE", help=example)
    parser.add_argument("--dry-run", action="store_true", help="only say how many these are")
    parser.add_argument("--yes", action="store_true", help="do not ask, where this is a terminal")


def run(args: argparse.Namespace, database: str) -> None:
    """Delete the visitors that were not updated for so long."""
    until = max(0, int(1000 * (time.time() - args.older_than)))
    with snapshot(database) as connection:
        total = count(connection, until=until)
    which = f"last changed before {iso_date(until)}"
    if args.dry_run:
        print(f"would purge {some(total)} {which}")
        return
    if total and not args.yes and sys.stdin and sys.stdin.isatty():
        print(f"purge {some(total)} {which}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Failed("nothing was purged")
    gone = 0
    with closing(writable(database)) as target:
        try:
            with closing(bar(total=total)) as progress:
                for went in delete_older(target, until):
                    gone += went
                    progress.update(went)
            print(f"purged {some(gone)} {which}")
        finally:
            if gone:
                forget(target)


def delete_older(database: Database, until: int) -> Iterator[int]:
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
        yield from map(sum, in_slices(database, numbers, delete))
        number = numbers[-1]
