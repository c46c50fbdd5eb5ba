"""Every query, one method an operation; what comes out are plain dicts in the wire's names."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import apsw

from storage.database import Database

MAX_FIELDS = 256  # custom fields on one visitor (contract, 2.1)
ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTWXYZabcdefghijkmnopqrstuvwxyz"
ID_LENGTH = 17

_COLUMNS = (
    "number",
    "id",
    "token",
    "username",
    "name",
    "email",
    "phone",
    "department",
    "ts",
    "updated",
    "fields",
)
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM visitor"
_INSERT = f"INSERT INTO visitor ({', '.join(_COLUMNS)}) VALUES (:{', :'.join(_COLUMNS)})"
_UPDATE = """
    UPDATE visitor SET token = :token, name = :name, email = :email, phone = :phone,
        department = :department, updated = :updated, fields = :fields
    WHERE number = :number
"""


class TooManyFields(Exception):
    """The visitor would have more than `MAX_FIELDS` custom fields."""


def milliseconds() -> int:
    """Return the time, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def random_id() -> str:
    """Return a new `_id`, which nobody can guess (contract, 2.3)."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))


class VisitorStore:
    """The visitors in `database`; each method is one transaction, or raises `Unavailable`."""

    def __init__(
        self,
        database: Database,
        match: Iterable[str] = ("token",),
        clock: Callable[[], int] = milliseconds,
        make_id: Callable[[], str] = random_id,
    ) -> None:
        self._database = database
        self._match = tuple(match)
        self._clock = clock
        self._make_id = make_id

    def register(
        self,
        token: str,
        given: Mapping[str, str],
        custom_fields: Iterable[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """Create or update the visitor that `token`, or by configuration phone or email, meets.

        `given` holds what the client gave of username, name, email, phone and department, no
        empty strings; `custom_fields` are dicts of key, value and overwrite.
        Return the visitor; raise `TooManyFields` before anything is written.
        """

        def work(connection: apsw.Connection) -> dict[str, Any]:
            now = self._clock()
            visitor = self._meet(connection, token, given)
            statement = _UPDATE if visitor else _INSERT
            if visitor is None:
                visitor = dict.fromkeys(_COLUMNS) | {
                    "id": self._make_id(),
                    "token": token,
                    "username": given.get("username") or f"guest-{_next_guest(connection)}",
                    "ts": now,
                    "updated": now,
                    "fields": {},
                }
            visitor |= {column: given[column] for column in given if column != "username"}
            visitor["updated"] = max(now, visitor["updated"])
            _set_fields(visitor["fields"], custom_fields)
            connection.execute(statement, _row(visitor))
            return _wire(visitor)

        return self._database.write(work)

    def _meet(
        self, connection: apsw.Connection, token: str, given: Mapping[str, str]
    ) -> dict[str, Any] | None:
        """Return whom a registration meets (contract, 2.3), with the token to be kept."""
        for column in self._match:
            value = token if column == "token" else given.get(column)
            if value is None:
                continue
            sql = f"{_SELECT} WHERE {column} = ? ORDER BY number LIMIT 1"
            row = connection.execute(sql, (value,)).fetchone()
            if row is not None:
                visitor = _visitor(row)
                # Who is met by phone keeps the old token; who is met by email gets the new one.
                return visitor | {"token": token} if column == "email" else visitor
        return None


def _next_guest(connection: apsw.Connection) -> int:
    number: int = connection.execute("UPDATE guest SET last = last + 1 RETURNING last").get
    return number


def _set_fields(fields: dict[str, str], custom_fields: Iterable[Mapping[str, Any]]) -> None:
    """Apply a list of custom fields in order; raise `TooManyFields`."""
    for field in custom_fields:
        if field["overwrite"] or not fields.get(field["key"]):
            fields[field["key"]] = field["value"]
    if len(fields) > MAX_FIELDS:
        raise TooManyFields


def _visitor(row: Iterable[Any]) -> dict[str, Any]:
    visitor = dict(zip(_COLUMNS, row, strict=True))
    return visitor | {"fields": json.loads(visitor["fields"])}


def _row(visitor: Mapping[str, Any]) -> dict[str, Any]:
    fields = json.dumps(visitor["fields"], ensure_ascii=False, separators=(",", ":"))
    return {**visitor, "fields": fields}


def _wire(visitor: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the contract answers it (2.4): what is not set is absent."""
    shape = {
        "_id": visitor["id"],
        "username": visitor["username"],
        "status": "online",
        "ts": _date(visitor["ts"]),
        "_updatedAt": _date(visitor["updated"]),
        "token": visitor["token"],
        "name": visitor["name"],
        "phone": visitor["phone"] and [{"phoneNumber": visitor["phone"]}],
        "visitorEmails": visitor["email"] and [{"address": visitor["email"]}],
        "department": visitor["department"],
        "livechatData": visitor["fields"],
    }
    return {key: value for key, value in shape.items() if value}


def _date(ms: int) -> str:
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
