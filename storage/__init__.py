"""The visitors in one SQLite file: the SQL of the service, and no word of HTTP."""

from storage.database import Database, Identity, PendingWrite, Unavailable, Waiting
from storage.fields import (
    FIELDS,
    MAX_INTEGER,
    WHITE_SPACE,
    InvalidEmail,
    normalize_email,
    to_json,
)
from storage.migrations import PrepareError, identity, prepare
from storage.visitors import (
    SORTABLE,
    OverLimit,
    UnknownField,
    VisitorNotFound,
    VisitorStore,
    milliseconds,
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
