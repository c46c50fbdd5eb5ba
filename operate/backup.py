"""`backup`: copy the database with SQLite's online backup, and look the copy through."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import closing

from operate import Failed, bar, megabytes
from operate.database import count, problems, snapshot
from operate.files import aside, guard
from storage.database import APPLICATION_ID, Unavailable, connect

ABOUT = "copy the database, and look it through"
EXAMPLE = "backup backup.db"
PAGES = 4000  # from one report of progress to the next


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def run(args: argparse.Namespace, database: str) -> None:
    """Copy the database with SQLite's online backup, and look the copy through."""
    guard(args.file, database)
    if os.path.lexists(f"{args.file}-wal"):
        raise Failed(f"{args.file}-wal is there: {args.file} is a database in use")
    if os.path.isdir(args.file):
        raise Failed(f"{args.file}: a folder, not a file")
    if os.path.lexists(args.file):
        if not args.force:
            raise Failed(f"{args.file}: is there; --force writes over it")
        if not os.path.isfile(args.file):
            raise Failed(f"{args.file}: not a regular file")
    with aside(args.file, replaces=args.force) as copy:
        progress = bar(unit=" pages")
        with closing(progress):
            for done, total in copy_database(database, copy):
                progress.total = total
                progress.update(done - progress.n)
        size = os.stat(copy).st_size
    print(f"backed up to {args.file}: {megabytes(size)}, looked through and sound")


def copy_database(path: str, copy: str) -> Iterator[tuple[int, int]]:
    """Copy one state of the database over the empty file `copy`, and look the copy through.

    Yield how many pages are copied, of how many. Raise `PrepareError` or `Unavailable`.
    """
    with snapshot(path, older=True) as source:
        # It writes as a checkpoint does, so that what was erased is in no gap of a page.
        with closing(connect(copy, checkpoints=True)) as target:
            target.pragma("synchronous", "OFF")  # who calls this syncs the file
            with target.backup("main", source, "main") as copying:
                while not copying.done:
                    copying.step(PAGES)
                    yield copying.page_count - copying.remaining, copying.page_count
            target.pragma("journal_mode", "DELETE")  # one file, and none beside it
        with closing(connect(copy)) as target:
            ours = target.pragma("application_id") == APPLICATION_ID
            same = [count(one) for one in (source, target)]
            if not ours or same[0] != same[1] or problems(target):
                raise Unavailable("the copy is not sound; check the database")
