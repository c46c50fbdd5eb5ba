"""What a visitor is: its fields, and how they are stored and answered."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import apsw

MAX_CUSTOM_FIELDS = 256  # custom fields on one visitor (contract, 2.1)
MAX_CUSTOM_FIELDS_BYTES = 65_536  # of all of them, as JSON in UTF-8
MAX_INTEGER = 2**63 - 1  # of SQLite
# JavaScript's white space, which is not Python's (ECMA-262, WhiteSpace and LineTerminator).
WHITE_SPACE = (
    "\t\n\v\f\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
# `unicodedata.normalize` sorts combining marks in a time that grows with the square of their
# number. All of them are among these characters; a joiner after so many ends the run.
MARKS = re.compile(r"(?:[^\w\x00-\x7f]|[\uff9e\uff9f]){30}")
GRAPHEME_JOINER = "\u034f"


class Field(NamedTuple):
    """One property of a visitor, and where it stands in the database and in an answer."""

    column: str
    key: str  # in an answer (contract, 2.4), and in an export
    kind: Literal["text", "time", "custom fields"] = "text"
    list_of: str = ""  # the key in the one object of a list, where the answer has such a list
    given: bool = True  # a registration may set it; its key there is the column's name
    required: bool = False  # in every visitor
    searched: bool = False  # for a part of its text


# Statements, answers by token, export, import and replay follow from this table, in this order,
# which is that of an answer. What does not follow: schema.sql, visitor.json and `SEARCH_KEYS`.
FIELDS = (
    Field("id", "_id", given=False, required=True),
    Field("username", "username", required=True, searched=True),
    Field("ts", "ts", kind="time", given=False, required=True),
    Field("updated", "_updatedAt", kind="time", given=False, required=True),
    Field("token", "token", given=False, required=True),
    Field("name", "name", searched=True),
    Field("phone", "phone", list_of="phoneNumber"),
    Field("email", "visitorEmails", list_of="address"),
    Field("department", "department"),
    Field("fields", "livechatData", kind="custom fields", given=False),
)

DERIVED = ("search", "digits")  # columns that follow from the others
COLUMNS = ("number", *(field.column for field in FIELDS), *DERIVED)
SELECT = f"SELECT {', '.join(COLUMNS)} FROM visitor"
INSERT = f"INSERT INTO visitor ({', '.join(COLUMNS)}) VALUES (:{', :'.join(COLUMNS)})"
UPDATE = (
    f"UPDATE visitor SET {', '.join(f'{column} = :{column}' for column in COLUMNS[1:])}"
    " WHERE number = :number"
)

# Returns compact JSON. Made once; json.dumps would make an encoder for each value.
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def normalize_email(text: str) -> str:
    """Return an email trimmed and in lower case; raise `ValueError` with that if it is no email."""
    email = text.strip(WHITE_SPACE).lower()
    if not re.fullmatch("[^@]+@[^@]+", email):
        raise ValueError(email)
    return email


def as_row(visitor: Mapping[str, Any]) -> dict[str, Any]:
    """Return a visitor as its columns hold it."""
    held = visitor["fields"]
    texts = [visitor[field.column] or "" for field in FIELDS if field.searched]
    return {
        **visitor,
        "search": search_text(*texts, *held.values()),
        "digits": phone_digits(visitor["phone"]),
        "fields": to_json(held),
    }


def search_text(*texts: str) -> str:
    """Return texts as one that a search looks into, with NUL in between."""
    return fold("\0".join(texts))


def fold(text: str) -> str:
    """Return a text in a form in which texts that look alike are equal, letter case aside."""
    if text.isascii():
        return text.lower()
    # A run longer than any real text has is divided, as in Unicode's Stream-Safe Text Format.
    text = MARKS.sub(lambda run: run[0] + GRAPHEME_JOINER * _is_mark(run[0][-1]), text)
    # Unicode's NFKC and full case folding. The latter makes of İ an i with a dot, which is removed.
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", folded).replace("i\u0307", "i")


def _is_mark(char: str) -> bool:
    """Return whether normalization may move this character forward: it is a combining mark."""
    return unicodedata.combining(unicodedata.normalize("NFKD", char)[0]) > 0


def phone_digits(text: str | None) -> str | None:
    """Return the digits of a phone however it is written; None for what is no phone."""
    if not text:
        return None
    text = unicodedata.normalize("NFKC", text)
    if not re.fullmatch(r"[\d\s+()./-]+", text):
        return None
    return re.sub(r"\D", "", text) or None


def as_visitor(row: Iterable[Any]) -> dict[str, Any]:
    """Return a row of `SELECT` as a dict by column, with the custom fields as a dict."""
    visitor = dict(zip(COLUMNS, row, strict=True))
    return visitor | {"fields": json.loads(visitor["fields"])}


def as_wire(visitor: Mapping[str, Any]) -> dict[str, Any]:
    """Return a visitor as the contract answers it (2.4): what is not set is absent."""
    wire = {"_id": visitor["id"], "username": visitor["username"], "status": "online"}
    for field in FIELDS:
        value = visitor[field.column]
        if field.kind == "time":
            value = iso_date(value)
        if value:
            wire[field.key] = [{field.list_of: value}] if field.list_of else value
    return wire


@lru_cache(maxsize=256)  # simultaneous registrations have the same dates
def iso_date(ms: int) -> str:
    """Return a time, in milliseconds since 1970, as the contract writes it."""
    try:
        moment = datetime.fromtimestamp(ms / 1000, UTC)
    except (ValueError, OverflowError):  # after the year 9999
        raise apsw.CorruptError("a date of a visitor is damaged") from None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
