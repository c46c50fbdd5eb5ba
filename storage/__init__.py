"""The visitors in one SQLite file: all the SQL there is, and no word of HTTP."""

from storage.database import Database, Identity, PendingWrite, Unavailable, Waiting
from storage.migrations import PrepareError, identity, prepare
from storage.visitors import (
    FIELDS,
    MAX_INTEGER,
    SORTABLE,
    OverLimit,
    UnknownField,
    VisitorNotFound,
    VisitorStore,
    milliseconds,
    to_json,
)

__all__ = [
    "FIELDS",
    "MAX_INTEGER",
    "SORTABLE",
    "Database",
    "Identity",
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
    "prepare",
    "to_json",
]
