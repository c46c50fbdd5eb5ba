"""The visitors in one SQLite file: the SQL of the service, and no word of HTTP."""

from storage.database import Database as Database
from storage.database import Identity as Identity
from storage.database import PendingWrite as PendingWrite
from storage.database import Unavailable as Unavailable
from storage.database import Waiting as Waiting
from storage.fields import FIELDS as FIELDS
from storage.fields import MAX_INTEGER as MAX_INTEGER
from storage.fields import WHITE_SPACE as WHITE_SPACE
from storage.fields import normalize_email as normalize_email
from storage.fields import to_json as to_json
from storage.migrations import PrepareError as PrepareError
from storage.migrations import identity as identity
from storage.migrations import prepare as prepare
from storage.visitors import SORTABLE as SORTABLE
from storage.visitors import OverLimit as OverLimit
from storage.visitors import UnknownField as UnknownField
from storage.visitors import VisitorNotFound as VisitorNotFound
from storage.visitors import VisitorStore as VisitorStore
from storage.visitors import milliseconds as milliseconds
