"""What the API asks of the database, one method for each operation; visitors are plain dicts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter
from typing import Any

import apsw

from storage.database import Database, T, check_pages
from storage.fields import (
    COLUMNS,
    INSERT,
    MAX_CUSTOM_FIELDS,
    MAX_CUSTOM_FIELDS_BYTES,
    SELECT,
    UPDATE,
    as_row,
    as_visitor,
    as_wire,
    fold,
    iso_date,
    phone_digits,
    to_json,
)

MAX_PAGE_BYTES = 4_000_000  # of the visitors on one page of a search, which has at least one
ID_ALPHABET = b"23456789ABCDEFGHJKLMNPQRSTWXYZabcdefghijkmnopqrstuvwxyz"
ID_LENGTH = 17
# Each byte below the largest multiple of the alphabet's length stands for a character; the rest is
# dropped, as it would make some characters more likely than others.
_USED = 256 - 256 % len(ID_ALPHABET)
_CHARACTERS = (ID_ALPHABET * (_USED // len(ID_ALPHABET))).ljust(256)
_DROPPED = bytes(range(_USED, 256))

DAY = 86_400_000  # milliseconds
# The keys of a visitor in a search's answer; the last three are not in Rocket.Chat's (contract, 9).
SEARCH_KEYS = (
    *("_id", "username", "name", "phone", "livechatData", "visitorEmails"),
    *("department", "ts", "_updatedAt"),
)
# What a search may be sorted by, and the column it stands in.
SORTABLE = {"name": "name", "username": "username", "ts": "ts", "_updatedAt": "updated"}


class VisitorNotFound(Exception):
    """No visitor has that token or `_id`."""


class UnknownField(Exception):
    """A custom field is not configured, or the list of them is empty."""


class OverLimit(Exception):
    """The custom fields of a visitor would be too many or too large; the text is the limit."""


def milliseconds() -> int:
    """Return the time, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def random_id() -> str:
    """Return a new `_id`, which nobody can guess (contract, 2.3)."""
    id_ = b""
    while len(id_) < ID_LENGTH:
        id_ += os.urandom(2 * ID_LENGTH).translate(_CHARACTERS, _DROPPED)
    return id_[:ID_LENGTH].decode()


class VisitorStore:
    """The visitors in `database`. Each method returns when it is done, or raises `Unavailable`.

    `match` names the columns by which a registration finds the visitor that it updates.
    `field_keys` are the custom fields that are kept, all if empty.
    """

    def __init__(
        self,
        database: Database,
        match: Iterable[str] = ("token",),
        field_keys: Collection[str] = (),
        clock: Callable[[], int] = milliseconds,
        make_id: Callable[[], str] = random_id,
    ) -> None:
        self._database = database
        self._match = tuple(match)
        self._field_keys = field_keys
        self._clock = clock
        self._make_id = make_id
        self._started_at = clock()

    def register(
        self,
        token: str,
        given: Mapping[str, str],
        fields: Iterable[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """Create a visitor, or update the one that this registration matches (contract, 2.3).

        `given` holds what the client gave of username, name, email, phone and department, no
        empty strings; `fields` are dicts of key, value and overwrite, unknown keys are skipped.
        Return the visitor; raise `OverLimit`.
        """
        fields = [field for field in fields if self._keeps(field["key"])]

        def work(connection: apsw.Connection) -> dict[str, Any]:
            visitor = self._existing(connection, token, given)
            if visitor is None:
                guest = "UPDATE guest SET last = last + 1 RETURNING last"
                now = self._clock()
                visitor = dict.fromkeys(COLUMNS) | {
                    "id": self._make_id(),
                    "token": token,
                    "username": given.get("username") or f"guest-{connection.execute(guest).get}",
                    "ts": now,
                    "updated": now,
                    "fields": {},
                }
            visitor |= {column: given[column] for column in given if column != "username"}
            return self._save(connection, visitor, fields)

        return self._database.write(work)

    def set_fields(self, token: str, fields: Collection[Mapping[str, Any]]) -> None:
        """Set custom fields, dicts of key, value and overwrite, of the visitor with that token.

        Raise `VisitorNotFound`, `UnknownField` or `OverLimit`, in this order.
        """

        def work(connection: apsw.Connection) -> None:
            visitor = _oldest(connection, "token", token)
            if not fields or not all(self._keeps(field["key"]) for field in fields):
                raise UnknownField
            self._save(connection, visitor, fields)

        self._database.write(work)

    def find(self, value: str, by: str = "token") -> dict[str, Any]:
        """Return the visitor with that token, or `by` "id" with that `_id`.

        Raise `VisitorNotFound`.
        """
        return self._read(value, by, as_wire)

    def erase(self, value: str, by: str = "token") -> dict[str, Any]:
        """Delete the visitor that `find` returns, and its bytes from the files.

        These go before this returns, or once no other program reads an older state any more.
        Return the `_id` and the time of deletion; raise `VisitorNotFound`.
        """
        number, id_ = self._read(value, by, itemgetter("number", "id"))

        def work(connection: apsw.Connection) -> dict[str, Any]:
            # A new visitor may have got the number meanwhile.
            connection.execute("DELETE FROM visitor WHERE number = ? AND id = ?", (number, id_))
            if not connection.changes():
                raise VisitorNotFound
            return {"_id": id_, "ts": iso_date(self._clock())}

        return self._database.write(work, erases=True)

    def search(
        self, term: str, sort: Mapping[str, float], offset: int, count: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Return a page of the visitors that `term` finds, and the number of all of them.

        `term` is a whole email, a whole phone by its digits, or a part of name, username or a
        custom field's value, as `fold` compares them; "" is everybody. `sort` maps keys of
        `SORTABLE` to 1 or -1; the newest come first. The page ends early where it would be larger
        than `MAX_PAGE_BYTES`.
        """
        keys = [f"{SORTABLE[key]} {'ASC' if sort[key] > 0 else 'DESC'}" for key in sort]
        order = f"ORDER BY {', '.join([*keys, 'number DESC'])}"
        where = "email = :email OR phone = :phone OR digits = :digits OR instr(search, :part)"
        where = where if term else "true"
        # The inner query sorts the numbers alone, because SQLite copies what it sorts.
        numbers = f"SELECT number FROM visitor WHERE {where} {order} LIMIT :count OFFSET :offset"
        page = f"{SELECT} WHERE number IN ({numbers}) {order}"
        wanted = {
            "email": term.lower(),
            "phone": term,
            "digits": phone_digits(term),
            "part": fold(term),
            "count": count,
            "offset": offset,
        }

        def work(connection: apsw.Connection) -> tuple[list[dict[str, Any]], int]:
            if "\0" in term:  # which separates the texts in `search`, and is in none of them
                return [], 0
            sql = f"SELECT count(*) FROM visitor WHERE {where}"
            total = connection.execute(sql, wanted).get
            found: list[dict[str, Any]] = []
            size = 0
            for row in connection.execute(page, wanted):
                wire = as_wire(as_visitor(row))
                visitor = {key: wire[key] for key in SEARCH_KEYS if key in wire}
                size += len(to_json(visitor).encode())
                if found and size > MAX_PAGE_BYTES:
                    break
                found.append(visitor)
            return found, total

        return self._database.scan(work)

    def statistics(self, days: int) -> dict[str, Any]:
        """Return the total of visitors, and how many of them are of each of the last `days`.

        The days are those of UTC, today first. "changed" is an artificial time: it moves on when
        any program registers, changes or erases a visitor, and at a start.
        """
        today = self._clock() // DAY
        sql = "SELECT * FROM day"
        rows: Any = self._database.read(lambda connection: connection.execute(sql).fetchall())
        registered = {number: visitors for number, visitors, _ in rows}
        # One millisecond for each change there ever was. A restart moves it on too, as the service
        # has run for longer than its changes are.
        changed = self._started_at + sum(changes for *_, changes in rows)
        return {
            "total": sum(registered.values()),
            "changed": iso_date(changed),
            "days": [
                {"date": iso_date(day * DAY)[:10], "registered": registered.get(day, 0)}
                for day in range(today, today - days, -1)
            ],
        }

    def newest(self, count: int) -> list[dict[str, Any]]:
        """Return the newest visitors, so many at most, in the order of creation."""
        sql = f"SELECT * FROM ({SELECT} ORDER BY number DESC LIMIT ?) ORDER BY number"
        return self._database.scan(
            lambda connection: [
                as_wire(as_visitor(row)) for row in connection.execute(sql, (count,))
            ]
        )

    def reset(self) -> None:
        """Delete every visitor, as `erase` does; the next guest is guest-2 again."""
        sql = "DELETE FROM visitor; UPDATE guest SET last = 1"
        self._database.write(lambda connection: connection.execute(sql).get, erases=True)

    def ping(self) -> None:
        """Read the files, not SQLite's memory; raise `Unavailable` if they are missing or damaged.

        Of a large database only the newest visitor is read.
        """

        def work(connection: apsw.Connection) -> None:
            check_pages(connection)
            connection.execute(f"{SELECT} ORDER BY number DESC LIMIT 1").fetchall()

        self._database.scan(work, anew=True)

    def _keeps(self, key: str) -> bool:
        return not self._field_keys or key in self._field_keys

    def _read(self, value: str, by: str, convert: Callable[[dict[str, Any]], T]) -> T:
        # An `_id` has no index.
        read = self._database.read if by == "token" else self._database.scan
        return read(lambda connection: convert(_oldest(connection, by, value)))

    def _save(
        self,
        connection: apsw.Connection,
        visitor: dict[str, Any],
        fields: Iterable[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Merge custom fields into a visitor, new or not, and write it; return it as an answer.

        Raise `OverLimit`; for the bytes not where they are no more than before, as an older or an
        imported visitor may have more than the limit.
        """
        custom_fields = visitor["fields"]
        before = len(to_json(custom_fields).encode()) if custom_fields else 0
        for field in fields:
            if field["overwrite"] or not custom_fields.get(field["key"]):
                custom_fields[field["key"]] = field["value"]
        if len(custom_fields) > MAX_CUSTOM_FIELDS:
            raise OverLimit(f"{MAX_CUSTOM_FIELDS} items")
        visitor["updated"] = max(self._clock(), visitor["updated"])
        row = as_row(visitor)
        if len(row["fields"].encode()) > max(before, MAX_CUSTOM_FIELDS_BYTES):
            raise OverLimit(f"{MAX_CUSTOM_FIELDS_BYTES} bytes")
        connection.execute(UPDATE if visitor["number"] else INSERT, row)
        return as_wire(visitor)

    def _existing(
        self, connection: apsw.Connection, token: str, given: Mapping[str, str]
    ) -> dict[str, Any] | None:
        """Return the visitor that a registration matches, with the token to be kept; or None."""
        wanted = {**given, "token": token}
        for column in self._match:
            if column not in wanted:
                continue
            try:
                visitor = _oldest(connection, column, wanted[column])
            except VisitorNotFound:
                continue
            if column == "email":
                visitor["token"] = token  # but one that is matched by phone keeps its own
            return visitor
        return None


def _oldest(connection: apsw.Connection, column: str, value: str | int) -> dict[str, Any]:
    """Return the oldest visitor with that value in that column; raise `VisitorNotFound`."""
    sql = f"{SELECT} WHERE {column} = ? ORDER BY number LIMIT 1"
    row = connection.execute(sql, (value,)).fetchone()
    if row is None:
        raise VisitorNotFound
    return as_visitor(row)
