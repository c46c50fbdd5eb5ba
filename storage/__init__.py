"""The visitors in one SQLite file: all the SQL there is, and no word of HTTP."""

from storage import maintenance, transfer
from storage.database import Database, Identity, PendingWrite, Unavailable, Waiting
from storage.migrations import PrepareError, identity, prepare
from storage.transfer import BadLine
from storage.visitors import (
    MAX_FIELDS,
    MAX_FIELDS_BYTES,
    MAX_INTEGER,
    SORTABLE,
    FieldsTooLarge,
    TooManyFields,
    UnknownField,
    VisitorNotFound,
    VisitorStore,
    milliseconds,
)

__all__ = [
    "MAX_FIELDS",
    "MAX_FIELDS_BYTES",
    "MAX_INTEGER",
    "SORTABLE",
    "BadLine",
    "Database",
    "FieldsTooLarge",
    "Identity",
    "PendingWrite",
    "PrepareError",
    "TooManyFields",
    "Unavailable",
    "UnknownField",
    "VisitorNotFound",
    "VisitorStore",
    "Waiting",
    "identity",
    "maintenance",
    "milliseconds",
    "prepare",
    "transfer",
]
