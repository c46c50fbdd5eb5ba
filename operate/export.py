"""`export`: every visitor as JSONL, which loses nothing, or as CSV for spreadsheets."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Generator, Mapping
from typing import Any

import apsw

from operate import SINCE, Failed, bar, some
from operate.database import count, last_guest, snapshot
from operate.files import output
from storage.migrations import newest
from storage.visitors import FIELDS, SELECT, as_visitor, as_wire, iso_date, to_json

ABOUT = "write every visitor to a file"
EXAMPLE = "export -o visitors.jsonl"
FORM = 1  # of the JSONL; its first line says which one it is
MAX_COLUMNS = 16_384  # of a spreadsheet
# The columns of a CSV, before those of the custom fields; the dates stand behind the texts.
TEXTS = [field for field in FIELDS if field.kind == "text"]
DATES = [field for field in FIELDS if field.kind == "time"]
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet may run begins so


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--format",
        choices=("jsonl", "csv"),
        default="jsonl",
        help="jsonl loses nothing and is what import reads; csv is for spreadsheets, where cells"
        " that could be formulas begin with an apostrophe, as most phones do",
    )
    parser.add_argument("--since", **SINCE)
    parser.add_argument("-o", "--output", metavar="FILE", help="stdout, if not given or -")


def run(args: argparse.Namespace, database: str) -> None:
    """Write every visitor to a file or to stdout."""
    args.output = None if args.output == "-" else args.output
    with snapshot(database) as connection, output(args.output, database) as file:
        total = count(connection, args.since)
        if args.format == "csv":
            text = io.TextIOWrapper(file, "utf-8", newline="")
            writer = csv.writer(text)
            try:
                for row in bar(rows(connection, args.since), total=total):
                    writer.writerow(row)
            except ValueError as error:
                raise Failed(f"{error}; export JSONL") from None
            text.flush()
            text.detach()
        else:
            file.writelines(bar(lines(connection, args.since), total=total))
    said = sys.stdout if args.output else sys.stderr  # which the visitors may be on
    print(f"exported {some(total)} to {args.output or 'stdout'}", file=said)


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
        if len(keys) > MAX_COLUMNS - len(FIELDS):
            raise ValueError("there are more custom fields than a spreadsheet has columns")
    # A list of one object is a plain text here, and so called as its column.
    named = [field.column if field.list_of else field.key for field in TEXTS + DATES]
    yield ["number", *named, *(_cell(f"field:{key}") for key in keys)]
    for visitor in visitors(connection, since):
        texts = [_cell(visitor[field.column]) for field in TEXTS]
        dates = [iso_date(visitor[field.column]) for field in DATES]
        fields = [_cell(visitor["fields"].get(key)) for key in keys]
        yield [visitor["number"], *texts, *dates, *fields]


def visitors(connection: apsw.Connection, since: int = 0) -> Generator[dict[str, Any]]:
    """Yield each visitor that was last changed at `since`, in milliseconds, or later."""
    sql = f"{SELECT} WHERE updated >= ? ORDER BY number"
    yield from map(as_visitor, connection.execute(sql, (since,)))


def _line(record: Mapping[str, Any]) -> bytes:
    return f"{to_json(record)}\n".encode()


def _cell(text: str | None) -> str:
    return f"'{text}" if text and text.startswith(FORMULA) else text or ""
