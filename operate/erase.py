"""`erase`: delete every visitor of a person, and say what went without saying whose it was."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from typing import Any

import apsw

from operate import Failed, some
from operate.database import forget, in_turns, told, writable
from storage.database import Database
from storage.visitors import iso_date

ABOUT = "delete every visitor of a person, without a trace in the database"
EXAMPLE = "erase john.doe@email.com (what begins with a hyphen stands after --)"


def person(text: str) -> str:
    """Return what may be a token, a phone or an email."""
    text.encode()  # or the database would not take it
    if not text.strip():
        raise ValueError
    return text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("person", type=person, metavar="EMAIL|PHONE|TOKEN")


def run(args: argparse.Namespace, database: str) -> None:
    """Delete every visitor of a person, and say what went without saying whose it was."""
    with closing(writable(database)) as target:
        gone = erase_person(target, args.person)
        forgotten = not gone or forget(target)
    if not gone:
        raise Failed("nobody has that token, phone or email")
    for visitor in gone:
        times = f"registered {visitor['ts']}, last changed {visitor['_updatedAt']}"
        print(f"{visitor['_id']}: {times}, {visitor['fields']} custom fields")
    print(f"erased {some(len(gone))} at {iso_date(int(1000 * time.time()))}")
    told(forgotten)


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
