"""The visitors in one SQLite file: all the SQL there is, and no word of HTTP."""

from storage.database import Database, Unavailable
from storage.preparation import PrepareError, prepare
from storage.visitors import (
    MAX_FIELDS,
    MAX_INTEGER,
    SORTABLE,
    TooManyFields,
    UnknownField,
    VisitorNotFound,
    VisitorStore,
)

__all__ = [
    "MAX_FIELDS",
    "MAX_INTEGER",
    "SORTABLE",
    "Database",
    "PrepareError",
    "TooManyFields",
    "Unavailable",
    "UnknownField",
    "VisitorNotFound",
    "VisitorStore",
    "prepare",
]
