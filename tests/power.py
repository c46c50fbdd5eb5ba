"""What a power cut can leave of the database: a VFS that records, and a model of the disk.

SQLite tests itself so (sqlite.org/testing.html, "Crash Testing"; its test6.c). `record` runs
changes in a process of its own, in which everything that SQLite does to its files is written
down; `history` replays that on a `Disk`, which after each operation can say what a cut would leave.

    python -m tests.power FOLDER SEED CHANGES [SYNCHRONOUS]     the process of its own
"""
# ruff: noqa: N802 # the names of a VFS are SQLite's

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import apsw
from greenlet import getcurrent, greenlet

import storage
from operate.database import snapshot
from tests.server import ROOT

NAME = "livechat.db"
SECTOR = 512
NOW = 1_656_482_701_392

# The kinds of files that are recorded; the rest, the -shm and temporary files, are never synced.
RECORDED = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL

# What a cut leaves of that which was not synced: nothing, all of it, some of the operations, or
# some of the sectors of some of the operations, with rubbish in others.
KINDS = ("nothing", "everything", "some", "torn")


class Recorder(apsw.VFS):
    """The operating system's files; what changes them is appended to `journal`.

    Every VFS and connection made later stands on it, as it makes itself the default one.
    """

    def __init__(self, random):
        super().__init__("recorder", base="unix", makedefault=True)
        self.journal = []
        self.known = set()
        self._random = random

    def xOpen(self, name, flags):
        if not flags[0] & RECORDED:
            return apsw.VFSFile("unix", name, flags)
        return RecordedFile(self, name, flags)

    def xDelete(self, name, sync_folder):
        super().xDelete(name, sync_folder)
        self.known.discard(os.path.basename(name))
        self.journal.append(("delete", os.path.basename(name), sync_folder))

    def xRandomness(self, size):
        return self._random.randbytes(size)  # so that a seed always gives the same journal


class RecordedFile(apsw.VFSFile):
    def __init__(self, recorder, name, flags):
        super().__init__("unix", name, flags)
        self._name = os.path.basename(name if isinstance(name, str) else name.filename())
        self._recorder = recorder
        # SQLite syncs the folder with the first sync of a log that it has opened to create it
        # (os_unix.c, UNIXFILE_DIRSYNC); of the database itself it never does.
        is_log = not flags[0] & apsw.SQLITE_OPEN_MAIN_DB
        self._sync_folder = is_log and bool(flags[0] & apsw.SQLITE_OPEN_CREATE)
        if self._name not in recorder.known:  # the database itself was made by our own code
            recorder.known.add(self._name)
            recorder.journal.append(("create", self._name))

    def xWrite(self, data, offset):
        super().xWrite(data, offset)
        self._recorder.journal.append(("write", self._name, offset, bytes(data)))

    def xTruncate(self, size):
        super().xTruncate(size)
        self._recorder.journal.append(("truncate", self._name, size))

    def xSync(self, flags):
        # Not done in truth: this process is never cut, and it would take most of the time.
        self._recorder.journal.append(("sync", self._name, self._sync_folder))
        self._sync_folder = False


class File:
    """The content that is certain, and the operations after it that a cut may undo."""

    def __init__(self):
        self.synced = bytearray()
        self.waiting = []  # (offset, data), or (size, None) for a truncation

    def sync(self):
        self.synced = self.left("everything", None, 1)
        self.waiting = []

    def left(self, kind, random, chance):
        """Return the content after a cut that keeps each operation with that chance."""
        content = bytearray(self.synced)
        for offset, data in self.waiting:
            if kind == "torn" and data and random.random() < 0.5:
                for start, part in sectors(offset, data):
                    if random.random() < chance:
                        # The sector may hold what was never written, but no byte outside of the
                        # write is touched: sqlite.org/psow.html.
                        rubbish = random.random() < 0.1
                        put(content, start, random.randbytes(len(part)) if rubbish else part)
            elif kind == "everything" or random.random() < chance:
                put(content, offset, data)
        return content


class Disk:
    """The folder as SQLite sees it, and what a power cut now could leave of it.

    Writes reach the disk in any order or not at all, until a sync of their file
    (sqlite.org/atomiccommit.html, 2 and 9.2). So do names, until a sync of the folder: a file
    made since may be missing, and a deleted one may be there still.
    """

    def __init__(self):
        self._files = {}  # by name
        self._names = {}  # as `_files`, but certain
        self._waiting = []  # a name and its file, or None for a deletion

    def apply(self, what, name=None, *more):
        """Do one recorded operation."""
        if what == "create":
            self._name(name, File())
        elif what == "write":
            self._files[name].waiting.append(more)
        elif what == "truncate":
            self._files[name].waiting.append((*more, None))
        elif what == "sync":
            self._files[name].sync()
        elif what == "delete":
            self._name(name, None)
        if what in ("sync", "delete") and more[0]:
            self._names = dict(self._files)
            self._waiting = []

    def left(self, kind, random):
        """Return by name the contents of the files that a cut leaves; `kind` is one of KINDS."""
        chance = 0 if kind == "nothing" else random.random()
        names = dict(self._names)
        for name, file in self._waiting:
            if kind == "everything" or random.random() < chance:
                names[name] = file
        left = {name: file.left(kind, random, chance) for name, file in names.items() if file}
        if kind == "torn":  # nobody ever syncs this one
            left[f"{NAME}-shm"] = random.randbytes(32_768)
        return left

    def _name(self, name, file):
        self._files[name] = file
        self._waiting.append((name, file))


def put(content, offset, data):
    """Write `data` there, or truncate where it is None; a gap before it reads as zeros."""
    content.extend(bytes(max(0, offset - len(content))))
    if data is None:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data


def sectors(offset, data):
    """Yield the parts of a write that lie in one sector each, with their offsets."""
    end = offset + len(data)
    borders = range(offset - offset % SECTOR + SECTOR, end, SECTOR)
    for start, stop in pairwise((offset, *borders, end)):
        yield start, data[start - offset : stop - offset]


@dataclass
class Moment:
    """What a cut now has to leave: all visitors, by token, are `before` or `after`."""

    before: dict = field(default_factory=dict)  # what was answered
    after: dict = field(default_factory=dict)  # with the group of changes that is in progress
    usernames: set = field(default_factory=set)  # all that were ever answered


def history(journal):
    """Yield the disk and the moment after each operation of the journal; both go on changing."""
    disk, moment = Disk(), Moment()
    for operation in journal:
        what, *more = operation
        if what == "begin":
            token, visitor = more
            moment.after = {**moment.after, token: visitor}
            if visitor is None:
                del moment.after[token]
        elif what == "answer":
            moment.before = moment.after
            moment.usernames |= {visitor["username"] for visitor in moment.after.values()}
        else:
            disk.apply(*operation)
        yield disk, moment


def record(folder, seed, changes, synchronous="FULL"):
    """Return the journal of a run in the empty `folder`: tuples of an operation and its values.

    Between SQLite's stand ("begin", token, the visitor that it has to leave or None), ("answer",).
    """
    arguments = [str(folder), str(seed), str(changes), synchronous]
    command = [sys.executable, "-m", "tests.power", *arguments]
    return pickle.loads(
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    )


class Groups(storage.Waiting):
    """Lets callers wait in greenlets for writes that share transactions, as the server does."""

    def __init__(self):
        super().__init__()
        self.sizes = []  # of all groups so far
        self._writes = []

    def commit(self, database, write):
        self._writes.append(write)
        getcurrent().parent.switch()

    def run(self, database, calls):
        """Make all `calls` at once, each of which writes once."""
        callers = [greenlet(call) for call in calls]
        for caller in callers:
            caller.switch()
        while self._writes:
            group = database.run_group(self._writes)
            database.commit_group(group)
            database.checkpoint()
            self._writes = self._writes[len(group) :]
            self.sizes.append(len(group))
        for caller in callers:
            caller.switch()
        assert all(caller.dead for caller in callers)


class Run:
    """Changes by chance, in parts, each with a start and an orderly stop of the service."""

    def __init__(self, path, journal, random):
        self.path = path
        self.journal = journal
        self.visitors = {}
        self.number = 0  # of the last change
        self._random = random

    def part(self, changes, stop=True):
        """Start, do so many changes, a quarter of them while one reader keeps its state; stop."""
        storage.prepare(self.path, self._random.choice([(), ("phone",), ("phone", "email")]))
        groups = Groups()
        database = storage.Database(self.path, groups)
        store = storage.VisitorStore(
            database, clock=lambda: NOW, make_id=lambda: self._random.randbytes(9).hex()
        )

        def change(count, erasing):
            end = self.number + count
            while self.number < end:
                together = self._random.choice((1, 1, 2, 5))
                tokens = self._random.sample(range(20), min(together, end - self.number))
                group = [self.change(store, f"token-{token}", erasing) for token in tokens]
                groups.run(database, group)
                database.empty_wal_if_due(0)

        change(changes // 2, erasing=0.3)
        with snapshot(self.path):
            change(changes // 4, erasing=0)  # which would wait for this reader
        change(changes // 4, erasing=0.3)
        if stop:
            database.close()

    def change(self, store, token, erasing):
        """Return a function that registers, updates or erases a visitor.

        It writes down what that has to leave.
        """
        self.number += 1
        # A value that no other change writes, some so long that they need pages of their own.
        secret = f"secret-{self.number:05}" * self._random.choice((1, 1, 1, 30, 700))
        number = self.number
        known = self.visitors.get(token)
        mark = len(self.journal)
        self.journal.append(None)  # until it is known
        erases = bool(known) and self._random.random() < erasing
        updates = bool(known) and self._random.random() < 0.4

        def change():
            if erases:
                store.erase(token)
                visitor = None
            elif updates:
                store.set_fields(token, [{"key": "k", "value": secret, "overwrite": True}])
                visitor = {**known, "livechatData": {"k": secret}}
            else:
                visitor = store.register(token, {"name": secret, "phone": str(number)})
            self.visitors[token] = visitor
            self.journal[mark] = ("begin", token, visitor)
            self.journal.append(("answer",))

        return change


def main(folder, seed, changes, synchronous="FULL"):
    """Record a run and print its journal."""
    random = Random(int(seed))
    recorder = Recorder(random)  # before any other VFS or connection is made
    # So few pages that a short run checkpoints in every way, and begins the WAL anew.
    storage.database.CHECKPOINT_PAGES, storage.database.MAX_WAL_PAGES = 10, 25
    storage.database.GROUP_TIME = 60  # so that no group is parted by a slow machine
    for module in (storage.database, storage.migrations):
        module.configure = weakened(module.configure, synchronous)
    run = Run(os.path.join(folder, NAME), recorder.journal, random)
    for _ in range(3):
        run.part(int(changes) // 4)
    run.part(int(changes) // 4, stop=False)  # so that a WAL is left to be compared
    sys.stdout.buffer.write(pickle.dumps(recorder.journal))
    sys.stdout.flush()
    os._exit(0)


def weakened(configure, synchronous):
    """Return `configure`, whose connections then sync only so much."""

    def wrapper(connection):
        configure(connection)
        connection.pragma("synchronous", synchronous)

    return wrapper


if __name__ == "__main__":
    main(*sys.argv[1:])
