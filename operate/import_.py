"""`import`: read what `export` wrote as JSONL, into a new database too."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime
from typing import Any, BinaryIO

import apsw

import storage
from operate import Failed, bar
from operate.database import in_slices, writable
from operate.export import FORM
from storage.fields import (
    COLUMNS,
    DERIVED,
    FIELDS,
    INSERT,
    MAX_CUSTOM_FIELDS,
    SELECT,
    Field,
    as_row,
    iso_date,
)
from storage.migrations import newest_version

ABOUT = "read what export wrote as JSONL; who is there and was changed later stays"
EXAMPLE = "import visitors.jsonl"
MAX_LINE = 2**24  # bytes; a visitor from before there was a limit takes up to 7 MB
# Of a visitor or a guest: whatever is counted on from here is still exact wherever JSON is read.
MAX_NUMBER = 2**52
BATCH = 2**20  # bytes of lines that are read before they are written

_KEYS = {"number", "status", *(field.key for field in FIELDS)}


class BadLine(Exception):
    """A line that `export` did not write: its number and what is wrong; no visitor's data."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", metavar="FILE", help="- is stdin")


def run(args: argparse.Namespace, database: str) -> None:
    """Read what `export` wrote as JSONL."""
    tally: Counter[str] = Counter()
    with open(0 if args.file == "-" else args.file, "rb", closefd=args.file != "-") as file:
        try:
            guest, visitors = read_header(file)
            if not os.path.lexists(database):
                storage.prepare(database)  # the service's start adds what its settings ask for
            raised = "UPDATE guest SET last = max(last, ?)"
            with closing(writable(database)) as target, closing(bar(total=visitors)) as progress:
                target.write(lambda connection: connection.execute(raised, (guest,)).get)
                for batch in batches(file, visitors):
                    for done in in_slices(target, batch, put):
                        tally.update(done)
                        progress.update(len(done))
        except BadLine as error:
            before = f"; before it: {words(tally)}" if tally else ""
            raise Failed(f"{args.file}, {error}{before}") from None
    print(f"imported {words(tally)}")


def words(tally: Counter[str]) -> str:
    """Return in words what became of the visitors of an import."""
    known = f"{tally['unchanged']} unchanged, {tally['kept']} kept as changed later here"
    return f"{tally['new']} new, {tally['replaced']} replaced, {known}"


def read_header(file: BinaryIO) -> tuple[int, int]:
    """Return the last guest's number, and how many visitors follow; raise `BadLine`."""
    try:
        header = json.loads(file.readline(MAX_LINE))
        if header["livechat-visitors"] != FORM or header["schema"] > newest_version():
            raise BadLine("line 1: written by a newer version of this service")
        numbers = header["guest"], header["visitors"]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadLine("line 1: not the beginning of an export as JSONL") from None
    if max(numbers) > MAX_NUMBER:
        raise BadLine(f"line 1: a number above {MAX_NUMBER}, after which there is no room")
    return numbers


def batches(file: BinaryIO, visitors: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of the lines that follow the header, up to a bad one; then raise `BadLine`."""
    batch: list[dict[str, Any]] = []
    number, size = 1, 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 2):
        try:
            if number > visitors + 1:  # with the header
                raise ValueError(f"the header says {visitors} visitors, and here is one more")
            if len(line) == MAX_LINE:
                raise ValueError(f"longer than {MAX_LINE} bytes")
            batch.append(_row(line.rstrip(b"\n")))
        except (ValueError, RecursionError) as error:
            yield batch
            raise BadLine(f"line {number}: {_reason(error)}") from None
        size += len(line)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch
    if number <= visitors:
        reason = f"the file breaks off here: the header says {visitors} visitors"
        raise BadLine(f"line {number}: {reason}")


def _reason(error: Exception) -> str:
    """Return what is wrong with a line, and nothing of what it holds."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeError):
        return "not UTF-8, or half of a surrogate pair"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at column {error.colno}"
    return str(error)


def _row(line: bytes) -> dict[str, Any]:
    """Return the row of a line; raise `ValueError`."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    for key in record:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key[:64]!r}")
    number = record.get("number")
    if type(number) is not int or not 1 <= number <= MAX_NUMBER:
        raise ValueError(f"number: not a whole number from 1 to {MAX_NUMBER}")
    visitor = dict.fromkeys(COLUMNS) | {"number": number, "fields": {}}
    for field in FIELDS:
        if field.required or field.key in record:
            visitor[field.column] = _value(field, record.get(field.key))
    return as_row(visitor)


def _value(field: Field, value: Any) -> Any:
    """Return what the database holds of what an export holds; raise `ValueError`."""
    if field.kind == "time":
        with suppress(TypeError, ValueError):
            ms = round(1000 * datetime.fromisoformat(value).timestamp())
            if ms >= 0 and iso_date(ms) == value:
                return ms
        raise ValueError(f"{field.key}: not a time such as 2022-06-29T06:05:01.392Z")
    if field.kind == "custom fields":
        if not isinstance(value, dict) or len(value) > MAX_CUSTOM_FIELDS:
            raise ValueError(f"{field.key}: not an object with {MAX_CUSTOM_FIELDS} keys at most")
        if "" in value or not all(isinstance(text, str) for text in value.values()):
            raise ValueError(f"{field.key}: an empty key, or a value that is no text")
        _check("".join([*value, *value.values()]), field.key)
        return value
    if field.list_of:
        one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
        if not one or value[0].keys() != {field.list_of}:
            raise ValueError(f'{field.key}: not [{{"{field.list_of}":"..."}}]')
        value = value[0][field.list_of]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field.key}: not a text, or empty")
    _check(value, field.key)
    try:
        return storage.normalize_email(value) if field.column == "email" else value
    except ValueError:
        raise ValueError(f"{field.key}: not an email") from None


def _check(text: str, key: str) -> None:
    """Raise `ValueError` for a text that the database does not take, or a search stumbles over."""
    if "\0" in text:
        raise ValueError(f"{key}: with a NUL character")
    text.encode()


def put(connection: apsw.Connection, row: dict[str, Any]) -> str:
    """Write a visitor of a file; return what happened, in a word.

    It is the one there with the same token, or with the same number and `_id`, as its token may
    have been replaced since. The one that was changed later stays, whole.
    """
    there = connection.execute(f"{SELECT} WHERE token = :token", row).fetchone()
    if there is None:
        at_number = connection.execute(f"{SELECT} WHERE number = :number", row).fetchone()
        if at_number is None or at_number[COLUMNS.index("id")] != row["id"]:
            # None becomes the next number.
            connection.execute(INSERT, row if at_number is None else {**row, "number": None})
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
