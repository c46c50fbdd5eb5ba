"""`import`: read what `export` wrote as JSONL, into a new database too."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any, BinaryIO

import apsw

import storage
from operate import Failed, bar
from operate.database import in_turns, writable
from operate.export import FORM
from storage.database import Database
from storage.migrations import newest
from storage.visitors import (
    COLUMNS,
    DERIVED,
    FIELDS,
    INSERT,
    MAX_FIELDS,
    SELECT,
    Field,
    as_row,
    iso_date,
)

ABOUT = "read what export wrote as JSONL; who is there and was changed later stays"
EXAMPLE = "import visitors.jsonl"
MAX_LINE = 2**24  # bytes; the largest visitor takes 7 MB
MAX_NUMBER = 2**53  # of a visitor or a guest, so that the next ones have room
BATCH = 2**20  # bytes of lines that are read before they are written

_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00Z")
_MILLISECOND = timedelta(milliseconds=1)
_KEYS = {"number", "status", *(field.key for field in FIELDS)}


class BadLine(Exception):
    """A line that `export` did not write: its number and what is wrong; no visitor's data."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number}: {reason}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", metavar="FILE", help="- is stdin")


def run(args: argparse.Namespace, database: str) -> None:
    """Read what `export` wrote as JSONL."""
    tally: Counter[str] = Counter()
    with open(0 if args.file == "-" else args.file, "rb", closefd=args.file != "-") as file:
        try:
            header = read_header(file)
        except BadLine as error:
            raise Failed(f"{args.file}, {error}") from None
        if not os.path.lexists(database):
            storage.prepare(database)  # on a new machine; its start adds what its settings ask for
        with closing(writable(database)) as target:
            progress = bar(total=header["visitors"])
            try:
                with closing(progress):
                    for batch in load(target, header, file):
                        tally.update(batch)
                        progress.update(len(batch))
            except BadLine as error:
                raise Failed(f"{args.file}, {error}; before it: {words(tally)}") from None
    print(f"imported {words(tally)}")


def words(tally: Counter[str]) -> str:
    """Return in words what became of the visitors of an import."""
    known = f"{tally['unchanged']} unchanged, {tally['kept']} kept as changed later here"
    return f"{tally['new']} new, {tally['replaced']} replaced, {known}"


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
    visitor: dict[str, Any] = dict.fromkeys(COLUMNS)
    visitor["number"] = _number(record.get("number"), "number", 1)
    visitor["fields"] = {}
    for field in FIELDS:
        if field.required or field.key in record:
            visitor[field.column] = _value(field, record.get(field.key))
    return as_row(visitor)


def _value(field: Field, value: Any) -> Any:
    """Return what the database holds of what an export holds; raise `ValueError`."""
    if field.kind == "time":
        return _milliseconds(value, field.key)
    if field.kind == "custom fields":
        return _fields(value, field.key)
    if field.list_of:
        one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
        if not one or value[0].keys() != {field.list_of}:
            raise ValueError(f'{field.key}: not [{{"{field.list_of}":"..."}}]')
        value = value[0][field.list_of]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field.key}: not a text, or empty")
    return _whole(value, field.key)


def _whole(text: str, key: str) -> str:
    """Return a text that the database takes and that no search stumbles over."""
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


def _fields(value: Any, key: str) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_FIELDS:
        raise ValueError(f"{key}: not an object with {MAX_FIELDS} keys at most")
    for name, text in value.items():
        if not name or not isinstance(text, str):
            raise ValueError(f"{key}: an empty key, or a value that is no text")
        _whole(name, key)
        _whole(text, key)
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
    if all(new[column] == old[column] for column in COLUMNS if column not in DERIVED):
        return "unchanged"
    if new["updated"] <= old["updated"]:
        return "kept"
    connection.execute("DELETE FROM visitor WHERE number = :number", new)
    connection.execute(INSERT, new)
    return "replaced"
