"""The visitors in one SQLite file: all the SQL there is, and no word of HTTP."""

from storage.database import Database, PrepareError, Unavailable, prepare
from storage.visitors import MAX_FIELDS, TooManyFields, VisitorStore

__all__ = [
    "MAX_FIELDS",
    "Database",
    "PrepareError",
    "TooManyFields",
    "Unavailable",
    "VisitorStore",
    "prepare",
]
