"""`erase`: delete every visitor of a person, and say what went without saying whose it was."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import apsw

from operate import Failed, some
from operate.database import forget, in_slices, writable
from storage.database import Database
from storage.fields import iso_date, phone_digits

ABOUT = "delete every visitor of a person, without a trace in the database"
EXAMPLE = "erase john.doe@email.com (what begins with a hyphen stands after --)"
LEAST_DIGITS = 7  # of a phone that is compared by its digits; one of fewer is compared as it is
SELECT = "SELECT number, id, token, phone, email FROM visitor"
TIMES = "ts, updated, (SELECT count(*) FROM json_each(fields))"

Key = tuple[str, str]  # how a text is compared, and the text


def person(text: str) -> str:
    """Return what may be an email, a phone, a token or an `_id`."""
    text.encode()  # or the database would not take it
    if not text.strip():
        raise ValueError
    return text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    several = "one or more; - reads lines of stdin, and whom these name may be gone already"
    kinds = "EMAIL|PHONE|TOKEN|_ID"
    parser.add_argument("person", type=person, nargs="+", metavar=kinds, help=several)


def run(args: argparse.Namespace, database: str) -> None:
    """Delete every visitor of these people, and say what went without saying whose it was."""
    typed = [text for text in args.person if text != "-"]
    repeats = len(typed) < len(args.person)
    lines = sys.stdin.buffer if repeats and sys.stdin else ()
    people = typed + [text for line in lines if (text := line.decode(errors="replace").strip())]
    wanted = {key for text in people for key in keys_of_person(text)}
    in_files = {text for text in typed if is_in_files(database, text)}
    found: set[Key] = set()
    erased = 0
    with closing(writable(database)) as target:
        for receipt, keys in erase_people(target, wanted):
            print(f"Erased the visitor {receipt}", flush=True)
            found |= keys
            erased += 1
        missing = [text for text in people if not keys_of_person(text) & found]
        absent = f"; nobody was there for {len(missing)} of {len(people)}" if missing else ""
        print(f"erased {some(erased)} at {iso_date(int(1000 * time.time()))}{absent}")
        if erased or in_files or repeats:
            forget(target)
    # Who was in the files until now, but not there, was erased by a run that had to give up.
    unknown = [text for text in missing if text in typed]
    if any(text not in in_files or is_in_files(database, text) for text in unknown):
        raise Failed(
            "nobody has that _id or token (exactly), email (letter case aside) or phone (by its"
            f" digits; exactly, if they are fewer than {LEAST_DIGITS})"
        )


def erase_people(database: Database, wanted: set[Key]) -> Iterator[tuple[str, set[Key]]]:
    """Delete every visitor with one of the `wanted` keys; `forget` has to follow.

    Yield for each, once it is committed, a receipt and all keys of the visitor.
    """

    def find(connection: apsw.Connection) -> list[int]:
        rows = connection.execute(SELECT)
        return [number for number, *known in rows if keys_of_visitor(*known) & wanted]

    def delete(connection: apsw.Connection, number: int) -> tuple[str, set[Key]] | None:
        row = connection.execute(f"{SELECT} WHERE number = ?", (number,)).fetchone()
        keys = keys_of_visitor(*row[1:]) if row else set()
        if not keys & wanted:  # no longer
            return None
        sql = f"DELETE FROM visitor WHERE number = ? RETURNING id, {TIMES}"
        id_, ts, updated, fields = connection.execute(sql, (number,)).fetchall()[0]
        times = f"registered {iso_date(ts)}, last changed {iso_date(updated)}"
        return f"{id_}: {times}, {fields} custom fields", keys

    while numbers := database.read(find):  # until none was registered in between
        for batch in in_slices(database, numbers, delete):
            yield from filter(None, batch)


def keys_of_person(text: str) -> set[Key]:
    """Return what a visitor may have of a person who is known by this text."""
    return {("exactly", text), ("email", text.strip().lower()), *keys_of_phone(text)}


def keys_of_visitor(id_: str, token: str, phone: str | None, email: str | None) -> set[Key]:
    """Return what a visitor is known by."""
    exact = {("exactly", text) for text in (id_, token, phone) if text}
    return exact | {("email", email.lower()) for email in (email,) if email} | keys_of_phone(phone)


def keys_of_phone(phone: str | None) -> set[Key]:
    """Return the digits of a phone, if they are enough."""
    digits = phone_digits(phone) or ""
    return {("digits", digits)} if len(digits) >= LEAST_DIGITS else set()


def is_in_files(database: str, text: str) -> bool:
    """Return whether the files still hold what a person is known by.

    No connection of this process may be open, as this would drop its locks.
    """
    keys = dict(keys_of_person(text))
    pattern = r"\D{0,3}".join(keys.get("digits", "")) or re.escape(keys["email"])
    sought = re.compile(pattern.encode(), re.IGNORECASE)
    for name in (database, f"{database}-wal"):
        if os.path.isfile(name):
            with open(name, "rb") as file:
                before = b""
                while part := file.read(2**24):
                    if sought.search(before + part):
                        return True
                    before = part[-1000:]
    return False
