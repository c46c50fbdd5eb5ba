"""`export`: every visitor as JSONL, which loses nothing, or as CSV for spreadsheets."""

from __future__ import annotations

import argparse
import codecs
import csv
import re
import sys
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import apsw

from operate import SINCE, Failed, bar, some
from operate.database import count, last_guest, snapshot
from operate.files import output
from storage.fields import FIELDS, SELECT, as_visitor, as_wire, iso_date, to_json
from storage.migrations import newest_version

ABOUT = "write every visitor to a file"
EXAMPLE = "export -o visitors.jsonl"
FORM = 1  # of the JSONL; its first line says which one it is
MAX_COLUMNS = 16_384  # of a spreadsheet
# The columns of a CSV, before those of the custom fields; the dates stand behind the texts.
TEXTS = [field for field in FIELDS if field.kind == "text"]
DATES = [field for field in FIELDS if field.kind == "time"]
# Where a spreadsheet would begin a formula, also after a separator of another locale and by East
# Asian signs; and what it would take for a number, and round or shorten.
UNSAFE = re.compile(
    r"(?:^|(?<=[;\t\r\n]))(?=[^\S\t\r\n]*[=+\-@\uff1d\uff0b\uff0d\uff20])"
    r"|^(?=[\t\r\n]|\s*(?:0[0-9]|[0-9]{12}|[0-9]+[eE][0-9]+\s*$))"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--format",
        choices=("jsonl", "csv"),
        default="jsonl",
        help="jsonl loses nothing and is what import reads; csv is for spreadsheets: an apostrophe"
        " stands before what could be a formula, as most phones, and before leading zeros and long"
        " numbers",
    )
    parser.add_argument("--since", **SINCE)
    parser.add_argument("-o", "--output", metavar="FILE", default="-", help="- is stdout")


def run(args: argparse.Namespace, database: str) -> None:
    """Write every visitor to a file or to stdout."""
    written = csv_lines if args.format == "csv" else json_lines
    with snapshot(database) as connection, output(args.output, database) as file:
        total = count(connection, args.since)
        file.writelines(bar(written(connection, args.since), total=total))
    to_stdout = args.output == "-"
    said = f"exported {some(total)} to {'stdout' if to_stdout else args.output}"
    print(said, file=sys.stderr if to_stdout else sys.stdout)


def json_lines(connection: apsw.Connection, since: int) -> Generator[bytes]:
    """Yield a header and then, in order of creation, each visitor as a line of JSON.

    It is as the contract answers it (2.4), with its number.
    """
    header = {
        "livechat-visitors": FORM,
        "schema": newest_version(),
        "guest": last_guest(connection),
    }
    yield f"{to_json(header | {'visitors': count(connection, since)})}\n".encode()
    for visitor in visitors(connection, since):
        yield f"{to_json({'number': visitor['number'], **as_wire(visitor)})}\n".encode()


def csv_lines(connection: apsw.Connection, since: int) -> Generator[bytes]:
    """Yield the names of the columns and then a line a visitor, safe to open in a spreadsheet.

    There is a column for each custom field, from a pass of its own over the visitors.
    """
    keys: dict[str, None] = {}
    for visitor in visitors(connection, since):
        keys |= dict.fromkeys(visitor["fields"])
        if len(keys) > MAX_COLUMNS - len(FIELDS):
            reason = "there are more custom fields than a spreadsheet has columns"
            raise Failed(f"{reason}; export JSONL")
    encoder: Any = SimpleNamespace(write=str.encode)  # `writerow` returns what it does
    line = csv.writer(encoder, quoting=csv.QUOTE_ALL).writerow
    # A list of one object is a plain text here, and so called as its column.
    named = [field.column if field.list_of else field.key for field in TEXTS + DATES]
    header: Any = line(["number", *named, *(_cell(f"field:{key}") for key in keys)])
    yield codecs.BOM_UTF8 + header  # or Excel takes it for the Windows code page
    for visitor in visitors(connection, since):
        texts = [_cell(visitor[field.column]) for field in TEXTS]
        dates = [iso_date(visitor[field.column]) for field in DATES]
        fields = [_cell(visitor["fields"].get(key)) for key in keys]
        yield line([visitor["number"], *texts, *dates, *fields])


def visitors(
    connection: apsw.Connection, since: int = 0, after: int = 0, most: int = -1
) -> Generator[dict[str, Any]]:
    """Yield visitors in order of creation: those with a number `after` that one, at `most` so many.

    They were last changed at `since`, in milliseconds, or later.
    """
    sql = f"{SELECT} WHERE updated >= ? AND number > ? ORDER BY number LIMIT ?"
    yield from map(as_visitor, connection.execute(sql, (since, after, most)))


def _cell(text: str | None) -> str:
    """Return a text with an apostrophe where a spreadsheet would run or round it."""
    return UNSAFE.sub("'", text or "")
