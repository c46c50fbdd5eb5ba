"""The visitors in one SQLite file: all the SQL there is, and no word of HTTP."""

from storage.database import Database, Identity, PendingWrite, Unavailable, Waiting
from storage.migrations import PrepareError, identity, prepare
from storage.visitors import (
    FIELDS,
    MAX_INTEGER,
    SORTABLE,
    WHITE_SPACE,
    InvalidEmail,
    OverLimit,
    UnknownField,
    VisitorNotFound,
    VisitorStore,
    milliseconds,
    normalize_email,
    to_json,
)

__all__ = [
    "FIELDS",
    "MAX_INTEGER",
    "SORTABLE",
    "WHITE_SPACE",
    "Database",
    "Identity",
    "InvalidEmail",
    "OverLimit",
    "PendingWrite",
    "PrepareError",
    "Unavailable",
    "UnknownField",
    "VisitorNotFound",
    "VisitorStore",
    "Waiting",
    "identity",
    "milliseconds",
    "normalize_email",
    "prepare",
    "to_json",
]
