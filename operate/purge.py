"""`purge`: delete the visitors that were not updated for some time."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from contextlib import closing

import apsw

from operate import bar, some
from operate.database import count, forget, in_turns, snapshot, told, writable
from storage.database import Database
from storage.visitors import iso_date

ABOUT = "delete who was not changed for so long, without a trace in the database"
EXAMPLE = "purge --older-than 90d --dry-run"
UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}  # seconds


def age(text: str) -> int:
    """Return an age such as 90d in seconds."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([mhdw])", text)
    if not match:
        raise ValueError
    return int(match[1]) * UNITS[match[2]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--older-than", type=age, required=True, metavar="AGE", help="30m, 12h, 90d or 52w"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say how many these are")


def run(args: argparse.Namespace, database: str) -> None:
    """Delete the visitors that were not changed for so long."""
    until = int(1000 * (time.time() - args.older_than))
    with snapshot(database) as connection:
        total = count(connection, until=until)
    since = iso_date(until)
    if args.dry_run:
        print(f"would purge {some(total)} last changed before {since}")
        return
    gone = 0
    with closing(writable(database)) as target, closing(bar(total=total)) as progress:
        try:
            for went in delete_older(target, until):
                gone += went
                progress.update(went)
        finally:
            forgotten = not gone or forget(target)
    print(f"purged {some(gone)} last changed before {since}")
    told(forgotten)


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
        yield from map(sum, in_turns(database, numbers, delete))
        number = numbers[-1]
