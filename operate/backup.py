"""`backup`: copy the database with SQLite's online backup, and check the copy."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import tempfile
from contextlib import closing
from datetime import UTC, datetime

from operate import Failed, bar, megabytes
from operate.database import count, problems, snapshot
from operate.files import aside, guard
from storage.database import APPLICATION_ID, Unavailable, connect

ABOUT = "copy the database to a file, a folder (under a dated name) or stdout, and check the copy"
EXAMPLE = "backup backup.db"
PAGES = 4000  # from one report of progress to the next
STAMP = "%Y%m%dT%H%M%SZ"  # UTC


def number(text: str) -> int:
    """Return a number from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", metavar="FILE|FOLDER/|-")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    keep = "how many backups of this database stay in FOLDER (7)"
    parser.add_argument("--keep", type=number, default=7, metavar="N", help=keep)


def run(args: argparse.Namespace, database: str) -> None:
    """Copy the database, and check the copy."""
    if args.file == "-":
        with tempfile.NamedTemporaryFile() as file, open(1, "wb", closefd=False) as stdout:
            copy_database(database, file.name)
            shutil.copyfileobj(file, stdout)
        return
    target, folder = args.file, ""
    if target.endswith("/") or os.path.isdir(target):
        folder, stem = target, os.path.splitext(os.path.basename(database))[0]
        target = os.path.join(folder, f"{stem}-{datetime.now(UTC):{STAMP}}.db")
    guard(target, database)
    if os.path.lexists(f"{target}-wal"):
        raise Failed(f"{target}-wal is there: {target} is a database in use")
    if os.path.lexists(target):
        if not args.force:
            raise Failed(f"{target}: is there; --force writes over it")
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise Failed(f"{target}: not a regular file")
    with aside(target, replaces=args.force) as copy:
        copy_database(database, copy)
        size = os.stat(copy).st_size
    if folder:
        made = re.compile(rf"{re.escape(stem)}-\d{{8}}T\d{{6}}Z\.db")
        for old in sorted(filter(made.fullmatch, os.listdir(folder)))[: -args.keep]:
            os.unlink(os.path.join(folder, old))
    print(f"backed up to {target}: {megabytes(size)}, checked")


def copy_database(path: str, copy: str) -> None:
    """Copy one state of the database over the empty file `copy`, and check the copy.

    Raise `PrepareError` or `Unavailable`.
    """
    progress = bar(unit=" pages")
    with closing(progress), snapshot(path, older=True) as source:
        # It writes as a checkpoint does, so that what was erased is in no gap of a page; but not
        # where the copy has maps of pages, which the scrubber knows only once it has the header.
        with closing(connect(copy, checkpoints=not source.pragma("auto_vacuum"))) as target:
            target.pragma("synchronous", "OFF")  # who calls this syncs the file
            with target.backup("main", source, "main") as copying:
                while not copying.done:
                    copying.step(PAGES)
                    progress.total = copying.page_count
                    progress.update(copying.page_count - copying.remaining - progress.n)
            target.pragma("journal_mode", "DELETE")  # one file, and none beside it
        with closing(connect(copy)) as target:
            ours = target.pragma("application_id") == APPLICATION_ID
            if not ours or count(target) != count(source) or problems(target):
                raise Unavailable(f"{path}: its copy is not sound; see what check says of it")
