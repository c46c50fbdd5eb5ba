"""Visitors on their way out of a database and into one: JSONL whole, CSV for spreadsheets."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, BinaryIO

import apsw

from storage.database import Database
from storage.maintenance import count, in_turns, last_guest
from storage.migrations import newest
from storage.visitors import (
    COLUMNS,
    INSERT,
    MAX_FIELDS,
    SELECT,
    as_row,
    as_visitor,
    as_wire,
    iso_date,
)

FORM = 1  # of the JSONL; its first line says which one it is
MAX_LINE = 2**24  # bytes; the largest visitor takes 7 MB
MAX_NUMBER = 2**53  # of a visitor or a guest, so that the next ones have room
MAX_COLUMNS = 16_384  # of a spreadsheet
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet may run begins so
BATCH = 2**20  # bytes of lines that are read before they are written

# Made once; json.dumps would make one for each visitor.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00Z")
_MILLISECOND = timedelta(milliseconds=1)
_TEXTS = {"_id": True, "username": True, "token": True, "name": False, "department": False}
_KEYS = {*_TEXTS, "number", "ts", "_updatedAt", "phone", "visitorEmails", "livechatData", "status"}
_FIXED = ("number", "_id", "username", "token", "name", "phone", "email", "department")


class BadLine(Exception):
    """A line that `lines` did not write: its number and what is wrong; no visitor's data."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number}: {reason}")


def lines(connection: apsw.Connection, since: int = 0) -> Generator[bytes]:
    """Yield a header and then, in order of creation, each visitor as a line of JSON.

    It is as the contract answers it (2.4), with its number; of those that were last changed at
    `since`, in milliseconds, or later.
    """
    header = {"livechat-visitors": FORM, "schema": newest()}
    yield _line(header | {"guest": last_guest(connection), "visitors": count(connection, since)})
    for visitor in visitors(connection, since):
        yield _line({"number": visitor["number"], **as_wire(visitor)})


def rows(connection: apsw.Connection, since: int = 0) -> Generator[list[Any]]:
    """Yield the names of the columns and then a row a visitor, safe to open in a spreadsheet.

    There is a column for each custom field, from a pass of its own over the visitors.
    Raise `ValueError` where these are more than a spreadsheet has.
    """
    keys: dict[str, None] = {}
    for visitor in visitors(connection, since):
        keys |= dict.fromkeys(visitor["fields"])
        if len(keys) > MAX_COLUMNS - len(_FIXED) - 2:
            raise ValueError("there are more custom fields than a spreadsheet has columns")
    yield [*_FIXED, "ts", "_updatedAt", *(_cell(f"field:{key}") for key in keys)]
    for visitor in visitors(connection, since):
        texts = [_cell(visitor[column]) for column in ("id", *_FIXED[2:])]
        dates = [iso_date(visitor[column]) for column in ("ts", "updated")]
        fields = [_cell(visitor["fields"].get(key)) for key in keys]
        yield [visitor["number"], *texts, *dates, *fields]


def visitors(connection: apsw.Connection, since: int = 0) -> Generator[dict[str, Any]]:
    """Yield each visitor that was last changed at `since`, in milliseconds, or later."""
    sql = f"{SELECT} WHERE updated >= ? ORDER BY number"
    yield from map(as_visitor, connection.execute(sql, (since,)))


def page(
    database: Database, number: int, since: int = 0, size: int = 100
) -> list[tuple[int, dict[str, Any]]]:
    """Return number and visitor, as the contract answers it, of the next ones after `number`."""
    sql = f"{SELECT} WHERE number > ? AND updated >= ? ORDER BY number LIMIT ?"

    def work(connection: apsw.Connection) -> list[tuple[int, dict[str, Any]]]:
        found = map(as_visitor, connection.execute(sql, (number, since, size)))
        return [(visitor["number"], as_wire(visitor)) for visitor in found]

    return database.scan(work)


def read_header(file: BinaryIO) -> dict[str, int]:
    """Return the first line of what `lines` wrote; raise `BadLine`."""
    try:
        header = json.loads(file.readline(MAX_LINE))
        if header["livechat-visitors"] != FORM or header["schema"] > newest():
            raise BadLine(1, "written by a newer version of this service")
        return {key: _number(header[key], key, 0) for key in ("guest", "visitors")}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadLine(1, "not the beginning of an export as JSONL") from None


def load(database: Database, header: Mapping[str, int], file: BinaryIO) -> Iterator[list[str]]:
    """Write the visitors that follow the header; yield of each batch what happened to each.

    That is "new", "unchanged", "replaced" where the file's was changed later, or "kept" where it
    was not. Raise `BadLine` at the first bad one; those before it are in.
    """

    def set_guest(connection: apsw.Connection) -> None:
        connection.execute("UPDATE guest SET last = max(last, ?)", (header["guest"],))

    database.write(set_guest)
    batch = []
    size = 0
    try:
        for line, row in _numbered(file, header["visitors"]):
            batch.append(row)
            size += len(line)
            if size >= BATCH:
                yield from in_turns(database, batch, _put)
                batch, size = [], 0
    except BadLine:
        yield from in_turns(database, batch, _put)
        raise
    yield from in_turns(database, batch, _put)


def _line(record: Mapping[str, Any]) -> bytes:
    return f"{_encode(record)}\n".encode()


def _cell(text: str | None) -> str:
    return f"'{text}" if text and text.startswith(FORMULA) else text or ""


def _numbered(file: BinaryIO, visitors: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line and its row; raise `BadLine`, also where the file breaks off."""
    last = visitors + 1  # with the header
    number = 1
    while line := file.readline(MAX_LINE):
        number += 1
        if number > last:
            raise BadLine(number, f"the header says {visitors} visitors, and here is one more")
        if len(line) == MAX_LINE:
            raise BadLine(number, f"longer than {MAX_LINE} bytes")
        try:
            row = _row(line.rstrip(b"\n"))
        except RecursionError:
            raise BadLine(number, "nested too deeply") from None
        except UnicodeError:
            raise BadLine(number, "not UTF-8, or half of a surrogate pair") from None
        except json.JSONDecodeError as error:
            raise BadLine(number, f"not JSON at column {error.colno}") from None
        except ValueError as error:
            raise BadLine(number, str(error)) from None
        yield line, row
    if number < last:
        raise BadLine(number, f"the file breaks off here: the header says {visitors} visitors")


def _row(line: bytes) -> dict[str, Any]:
    """Return the row of a line; raise `ValueError`."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    for key in record:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key[:64]!r}")
    for key, required in _TEXTS.items():
        if required or key in record:
            _text(record.get(key), key)
    visitor = {
        **dict.fromkeys(COLUMNS),
        **{key: record.get(key) for key in _TEXTS},
        "id": record["_id"],
        "number": _number(record.get("number"), "number", 1),
        "ts": _milliseconds(record.get("ts"), "ts"),
        "updated": _milliseconds(record.get("_updatedAt"), "_updatedAt"),
        "phone": _only(record, "phone", "phoneNumber"),
        "email": _only(record, "visitorEmails", "address"),
        "fields": _fields(record.get("livechatData", {})),
    }
    return as_row(visitor)


def _text(value: Any, key: str) -> str:
    """Return a text that the database takes and that no search stumbles over."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: not a text, or empty")
    return _whole(value, key)


def _whole(text: str, key: str) -> str:
    if "\0" in text:
        raise ValueError(f"{key}: with a NUL character")
    text.encode()
    return text


def _number(value: Any, key: str, least: int) -> int:
    if type(value) is not int or not least <= value <= MAX_NUMBER:
        raise ValueError(f"{key}: not a whole number from {least} to {MAX_NUMBER}")
    return value


def _milliseconds(value: Any, key: str) -> int:
    try:
        ms = (datetime.fromisoformat(value) - _EPOCH) // _MILLISECOND
    except (TypeError, ValueError):
        ms = -1
    if ms < 0 or iso_date(ms) != value:
        raise ValueError(f"{key}: not a time such as 2022-06-29T06:05:01.392Z")
    return ms


def _only(record: Mapping[str, Any], key: str, name: str) -> str | None:
    """Return the one phone or email, which stands in a list with one object."""
    if key not in record:
        return None
    value = record[key]
    one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    if not one or value[0].keys() != {name}:
        raise ValueError(f'{key}: not [{{"{name}":"..."}}]')
    return _text(value[0][name], key)


def _fields(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_FIELDS:
        raise ValueError(f"livechatData: not an object with {MAX_FIELDS} keys at most")
    for key, text in value.items():
        if not key or not isinstance(text, str):
            raise ValueError("livechatData: an empty key, or a value that is no text")
        _whole(key, "livechatData")
        _whole(text, "livechatData")
    return value


def _put(connection: apsw.Connection, row: dict[str, Any]) -> str:
    """Write a visitor of a file; return what happened, in a word.

    It is the one there with the same token, or with the same number and `_id`, as its token may
    have been replaced since. The one that was changed later stays, whole.
    """
    there = connection.execute(f"{SELECT} WHERE token = :token", row).fetchone()
    if there is None:
        at_number = connection.execute(f"{SELECT} WHERE number = :number", row).fetchone()
        if at_number is None or at_number[COLUMNS.index("id")] != row["id"]:
            # None becomes the next number.
            number = row["number"] if at_number is None else None
            connection.execute(INSERT, {**row, "number": number})
            return "new"
        there = at_number
    old = dict(zip(COLUMNS, there, strict=True))
    new = {**row, "number": old["number"]}
    if new == old:
        return "unchanged"
    if new["updated"] <= old["updated"]:
        return "kept"
    connection.execute("DELETE FROM visitor WHERE number = :number", new)
    connection.execute(INSERT, new)
    return "replaced"
