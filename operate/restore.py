"""`restore`: put a backup in the place of the database, which is moved aside with its WAL."""

from __future__ import annotations

import argparse
import fcntl
import os
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from glob import escape, glob

from operate import Failed, some
from operate.backup import STAMP, copy_database
from operate.database import count
from operate.files import aside, guard
from storage.database import connect
from storage.fields import iso_date
from storage.migrations import sync

ABOUT = "put a backup in the place of the database, which is moved aside; first stop the service"
EXAMPLE = "restore backup.db"
# SQLite's own locks: whoever has read the file in WAL mode keeps a shared lock on some of the
# first bytes, and on the last one whoever has the WAL's index open (SQLite's os_unix.c).
LOCKS = (("", 0x40000000, 512), ("-shm", 128, 1))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", metavar="FILE")


def run(args: argparse.Namespace, database: str) -> None:
    """Put a backup in the place of the database.

    After a crash at any point there is the old database with its WAL, the restored one, or none:
    then nothing starts until this has run again (`storage.migrations.check_leftovers`).
    """
    if args.file == "-":
        raise Failed("give the name of a file; stdin will not do")
    guard(args.file, database)
    parent, name = os.path.split(database)
    with not_in_use(database):
        # Continue an interrupted restore in its folder, unless the database is both here and there:
        # then that folder is of an earlier, finished one.
        before = [os.path.dirname(one) for one in glob(f"{escape(database)}-before-*/restored")]
        there = os.path.lexists(database)
        before = [one for one in before if not (there and os.path.lexists(f"{one}/{name}"))]
        folder = (*before, f"{database}-before-{datetime.now(UTC):{STAMP}}")[0]
        if not before:
            os.mkdir(folder, 0o700)
        if os.path.realpath(f"{folder}/restored") != f"{folder}/restored":
            raise Failed(f"{folder}: leads elsewhere by a symbolic link")
        try:
            owner = os.stat(database if there else parent)
            with aside(f"{folder}/restored") as copy:
                copy_database(args.file, copy)
                with closing(connect(copy)) as restored:
                    visitors = count(restored)
                    last = restored.execute("SELECT max(updated) FROM visitor").get or 0
                for made in (copy, folder):
                    os.chown(made, owner.st_uid, owner.st_gid, follow_symlinks=False)
            sync(parent)
            # The database goes first, as one without its WAL would be taken for whole.
            beside = (f"{name}-wal", f"{name}-shm", f"{name}-journal", f".{name}-litestream")
            for source, target, names in (
                (parent, folder, {name: name}),
                (parent, folder, {one: one for one in beside}),
                (folder, parent, {"restored": name}),
            ):
                for old, new in names.items():
                    with suppress(FileNotFoundError):
                        os.rename(f"{source}/{old}", f"{target}/{new}")
                sync(target)  # first, so that no file can be lost under both of its names
                sync(source)
        finally:
            with suppress(OSError):
                os.rmdir(folder)  # if nothing was moved there
    moved = f"; what was there is in {folder}/" if os.path.isdir(folder) else ""
    print(f"restored {some(visitors)} from {args.file}{moved}")
    print(
        f"who was erased after {iso_date(last)} is there again: repeat that as docs/operating.md"
        " says under restore"
    )


@contextmanager
def not_in_use(database: str) -> Generator[None]:
    """Keep all others away from the database; raise `Failed` where another program has it open."""
    with ExitStack() as opened:
        files, locked = [], True
        for suffix, start, length in LOCKS:
            with suppress(FileNotFoundError):
                file = os.open(f"{database}{suffix}", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                opened.callback(os.close, file)
                files.append(os.fstat(file))
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
                except (BlockingIOError, PermissionError):
                    locked = False
        # Who has not read it so far has no lock, but would mix the old file with the new WAL. Linux
        # tells of all these to root, and of their own to others.
        processes = set()
        for link in glob("/proc/[0-9]*/fd/*"):
            with suppress(OSError):
                status = os.stat(link)
                if any(os.path.samestat(status, file) for file in files):
                    processes.add(int(link.split("/")[2]))
        processes.discard(os.getpid())
        if processes or not locked:
            by = f" by process {', '.join(map(str, sorted(processes)))}" if processes else ""
            raise Failed(f"{database}: in use{by}: stop the service, and what else has it open")
        yield
