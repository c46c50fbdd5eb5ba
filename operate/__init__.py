"""The operator's commands, one module each; `manage.py` is their door.

The service imports none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from tqdm import tqdm

# A bar on stderr, where that is a terminal; gone in the end, as one line says what was done.
bar: Callable[..., Any] = partial(tqdm, unit=" visitors", disable=None, leave=False, delay=0.5)


class Failed(Exception):
    """What was asked for could not be done: one line."""


def some(visitors: int) -> str:
    """Return a number of visitors in words."""
    return f"{visitors} visitor{'s' * (visitors != 1)}"


def megabytes(size: int) -> str:
    """Return a size in words."""
    return f"{size / 2**20:,.1f} MiB"


def date(text: str) -> int:
    """Return an ISO date or time, in milliseconds since 1970; without a zone it is UTC."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, int(1000 * moment.timestamp()))


SINCE: dict[str, Any] = {
    "type": date,
    "default": 0,
    "metavar": "DATE",
    "help": "only who was last changed then or later: 2026-11-23, or 2026-11-23T17:42, UTC",
}
