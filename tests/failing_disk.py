"""A disk that fails while 64 clients write at once: a VFS that cannot write or sync the WAL.

`run` does it in a process of its own, `python -m tests.failing_disk PATH WHAT SIZE`: see `main`.
"""
# ruff: noqa: N802 # the names of a VFS are SQLite's

import json
import os
import subprocess
import sys
from functools import partial

import apsw

import storage
from tests.power import Groups
from tests.server import ROOT

CLIENTS = 64
LARGE = (
    15  # custom fields of 4,000 bytes: what 64 such visitors have, SQLite writes before a commit
)


class FailingDisk(apsw.VFS):
    """The operating system's files, but once told so the WAL fails one time.

    Every VFS and connection made later stands on it, as it makes itself the default one.
    """

    def __init__(self):
        super().__init__("failing disk", base="unix", makedefault=True)
        self.fails = None  # "write" or "sync"
        self.syncs = 0

    def xOpen(self, name, flags):
        if not flags[0] & apsw.SQLITE_OPEN_WAL:
            return apsw.VFSFile("unix", name, flags)
        return FailingFile(self, name, flags)

    def fail(self, what, error):
        if self.fails == what:
            self.fails = None
            raise error


class FailingFile(apsw.VFSFile):
    def __init__(self, disk, name, flags):
        super().__init__("unix", name, flags)
        self._disk = disk

    def xWrite(self, data, offset):
        self._disk.fail("write", apsw.FullError("no room"))
        super().xWrite(data, offset)

    def xSync(self, flags):
        self._disk.syncs += 1
        self._disk.fail("sync", apsw.IOError("not synced"))
        super().xSync(flags)


def run(path, what, size):
    """Return what `main` prints."""
    command = [sys.executable, "-m", "tests.failing_disk", path, what, size]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output)


def main(path, what, size):
    """Let 64 clients register at once, three times; the disk fails the second time.

    `what` fails: "write" or "sync" of the WAL; `size` of the visitors: "small" or "large".
    Print for each time the visitors that were answered and the reasons of the refusals, by token,
    the sizes of the groups, and how often the WAL was synced. End as by kill -9.
    """
    disk = FailingDisk()  # before any other VFS or connection is made
    storage.database.GROUP_TIME = 60  # so that no group is parted by a slow machine
    storage.prepare(path)
    groups = Groups()
    database = storage.Database(path, groups)
    store = storage.VisitorStore(database)
    fields = [
        {"key": f"k{number}", "value": "x" * 4000, "overwrite": True}
        for number in range(LARGE if size == "large" else 0)
    ]
    times = []
    for time in range(3):
        answered, refused = {}, {}

        def client(token, answered=answered, refused=refused):
            try:
                answered[token] = store.register(token, {"name": token}, fields)
            except storage.Unavailable as error:
                refused[token] = str(error)

        groups.sizes.clear()
        disk.fails = what if time == 1 else None
        disk.syncs = 0
        groups.run(database, [partial(client, f"{time}-{n}") for n in range(CLIENTS)])
        times.append((answered, refused, list(groups.sizes), disk.syncs))
    print(json.dumps(times), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
