"""The visitors in one SQLite file: all the SQL there is, and no word of HTTP."""

from storage import maintenance, transfer
from storage.access import Unavailable
from storage.database import Database
from storage.preparation import PrepareError, prepare
from storage.transfer import BadLine
from storage.visitors import (
    MAX_FIELDS,
    MAX_INTEGER,
    SORTABLE,
    TooManyFields,
    UnknownField,
    VisitorNotFound,
    VisitorStore,
    milliseconds,
)

__all__ = [
    "MAX_FIELDS",
    "MAX_INTEGER",
    "SORTABLE",
    "BadLine",
    "Database",
    "PrepareError",
    "TooManyFields",
    "Unavailable",
    "UnknownField",
    "VisitorNotFound",
    "VisitorStore",
    "maintenance",
    "milliseconds",
    "prepare",
    "transfer",
]
