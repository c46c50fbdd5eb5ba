"""A change that waits to be done, by the thread that asks for it or by another one."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import apsw

from storage.access import Unavailable, Work
from storage.connection import FAULTS, savepoint

T = TypeVar("T")


class Change(Generic[T]):
    """A call of `Database.write`; its thread waits until it is settled, or is to lead."""

    def __init__(self, work: Work[T], erases: bool) -> None:
        self._work = work
        self.erases = erases  # until it is known that it has failed
        self.leads = False  # whether its thread is to do what waits
        self._result: Any = None  # what `work` returns
        self._error: Exception | None = None
        self._settled = False
        self._woken = threading.Lock()
        self._woken.acquire()

    def do(self, connection: apsw.Connection) -> None:
        """Do the work, or nothing of it; raise only what no other change would survive either."""
        try:
            with savepoint(connection):
                self._result = self._work(connection)
        except tuple(FAULTS):
            raise
        except Exception as error:
            self._error = error
            self.erases = False

    def settle(self, fault: str | None = None) -> None:
        """Wake the thread that waits for this: it is on the disk, or `fault` says why not."""
        if not self._settled:
            self._settled = True
            if fault is not None:
                self._error = Unavailable(fault)
            self._woken.release()

    def lead(self) -> None:
        """Wake the thread that waits for this, so that it does what waits."""
        self.leads = True
        self._woken.release()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the change is settled or its thread is to lead; return whether it is so."""
        return self._woken.acquire(timeout=-1 if seconds is None else max(0, seconds))

    def outcome(self) -> T:
        """Return what the work returned, or raise what it raised or why it was not done."""
        if self._error is not None:
            raise self._error
        result: T = self._result
        return result
