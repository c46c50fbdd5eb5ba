"""What an operator does to the database, beside the running service: `python manage.py --help`."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO

from tqdm import tqdm

import replay
import storage
from settings import SettingError, Settings
from storage import maintenance, transfer

UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}  # seconds
LEAST_FREE = 100 * 2**20  # bytes on the disk, below which `check` says so; more for a large file
MUCH_WAL = 64 * 2**20  # bytes; the service keeps it below 32 MiB where nobody reads for long
FAULTS = (SettingError, storage.PrepareError, storage.Unavailable)

# A bar on stderr, where that is a terminal; gone in the end, as one line says what was done.
bar: Callable[..., Any] = partial(tqdm, unit=" visitors", disable=None, leave=False, delay=0.5)


class Failed(Exception):
    """What was asked for could not be done: one line."""


def export(args: argparse.Namespace, database: str) -> None:
    """Write every visitor to a file or to stdout."""
    args.output = None if args.output == "-" else args.output
    with maintenance.snapshot(database) as connection, output(args.output, database) as file:
        total = maintenance.count(connection, args.since)
        if args.format == "csv":
            text = io.TextIOWrapper(file, "utf-8", newline="")
            writer = csv.writer(text)
            try:
                for row in bar(transfer.rows(connection, args.since), total=total):
                    writer.writerow(row)
            except ValueError as error:
                raise Failed(f"{error}; export JSONL") from None
            text.flush()
            text.detach()
        else:
            file.writelines(bar(transfer.lines(connection, args.since), total=total))
    said = sys.stdout if args.output else sys.stderr  # which the visitors may be on
    print(f"exported {some(total)} to {args.output or 'stdout'}", file=said)


def import_(args: argparse.Namespace, database: str) -> None:
    """Read what `export` wrote as JSONL."""
    tally: Counter[str] = Counter()
    with open(0 if args.file == "-" else args.file, "rb", closefd=args.file != "-") as file:
        try:
            header = transfer.read_header(file)
        except storage.BadLine as error:
            raise Failed(f"{args.file}, {error}") from None
        if not os.path.lexists(database):
            storage.prepare(database)  # on a new machine; its start adds what its settings ask for
        with closing(maintenance.writable(database)) as target:
            progress = bar(total=header["visitors"])
            try:
                with closing(progress):
                    for batch in transfer.load(target, header, file):
                        tally.update(batch)
                        progress.update(len(batch))
            except storage.BadLine as error:
                raise Failed(f"{args.file}, {error}; before it: {words(tally)}") from None
    print(f"imported {words(tally)}")


def words(tally: Counter[str]) -> str:
    """Return in words what became of the visitors of an import."""
    known = f"{tally['unchanged']} unchanged, {tally['kept']} kept as changed later here"
    return f"{tally['new']} new, {tally['replaced']} replaced, {known}"


def backup(args: argparse.Namespace, database: str) -> None:
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
            for done, total in maintenance.backup(database, copy):
                progress.total = total
                progress.update(done - progress.n)
        size = os.stat(copy).st_size
    print(f"backed up to {args.file}: {megabytes(size)}, looked through and sound")


def purge(args: argparse.Namespace, database: str) -> None:
    """Delete the visitors that were not changed for so long."""
    until = int(1000 * (time.time() - args.older_than))
    with maintenance.snapshot(database) as connection:
        total = maintenance.count(connection, until=until)
    since = when(until)
    if args.dry_run:
        print(f"would purge {some(total)} last changed before {since}")
        return
    gone = 0
    with closing(maintenance.writable(database)) as target, closing(bar(total=total)) as progress:
        try:
            for went in maintenance.purge(target, until):
                gone += went
                progress.update(went)
        finally:
            forgotten = not gone or maintenance.forget(target)
    print(f"purged {some(gone)} last changed before {since}")
    told(forgotten)


def erase(args: argparse.Namespace, database: str) -> None:
    """Delete every visitor of a person, and say what went without saying whose it was."""
    with closing(maintenance.writable(database)) as target:
        gone = maintenance.erase_person(target, args.person)
        forgotten = not gone or maintenance.forget(target)
    if not gone:
        raise Failed("nobody has that token, phone or email")
    for visitor in gone:
        times = f"registered {visitor['ts']}, last changed {visitor['_updatedAt']}"
        print(f"{visitor['_id']}: {times}, {visitor['fields']} custom fields")
    print(f"erased {some(len(gone))} at {when(int(1000 * time.time()))}")
    told(forgotten)


def told(forgotten: bool) -> None:
    """Raise `Failed` where the deleted bytes are still in the WAL."""
    if not forgotten:
        raise Failed(
            "their bytes are still in the WAL, as another program reads an older state:"
            " the running service takes them away after that, or run this again"
        )


def check(_args: argparse.Namespace, database: str) -> None:
    """Look the database through."""
    if sys.stderr.isatty():
        print("looking through every page ...", end="\r", file=sys.stderr, flush=True)
    found = maintenance.examine(database)
    findings = []
    if found["problems"]:
        findings.append(
            f"damaged, first of all {found['problems'][0]}: stop the service and restore a backup"
        )
    if found["version"] < found["newest"]:
        versions = f"{found['version']}, of {found['newest']}"
        findings.append(f"schema version {versions}: restart the service, which brings it up")
    if found["sqlite"]:
        findings.append(found["sqlite"])
    least = max(LEAST_FREE, found["size"])
    if found["free"] < least:
        free = f"{megabytes(found['free'])} free on its disk"
        findings.append(f"{free}: make room until there are {megabytes(least)}")
    if found["wal"] > MUCH_WAL:
        findings.append(
            f"{megabytes(found['wal'])} in the WAL: end what reads an older state for so long,"
            " such as an export or a shell"
        )
    for finding in findings:
        print(finding)
    if findings:
        raise Failed(f"{len(findings)} finding{'s' * (len(findings) > 1)}")
    print(
        f"sound: {some(found['visitors'])}, schema version {found['version']},"
        f" {megabytes(found['size'])}, {megabytes(found['wal'])} in the WAL,"
        f" {megabytes(found['free'])} free"
    )


def replay_(args: argparse.Namespace, database: str) -> None:
    """Send every visitor to another server."""
    try:
        server = replay.Server(args.url)
    except ValueError as error:
        raise Failed(str(error)) from None
    file = args.state or f"replay-{re.sub('[^A-Za-z0-9.-]', '-', server.host)}.state"
    state = read_state(file, server.url, args.since)
    with maintenance.snapshot(database) as connection:
        guests = maintenance.last_guest(connection)
        left = maintenance.count(connection, args.since, after=state["number"])
    progress = bar(total=left)
    with closing(server), closing(storage.Database(database)) as source, closing(progress):
        while page := transfer.page(source, state["number"], args.since):
            for number, visitor in page:
                try:
                    send(server, visitor, guests, state)
                except replay.Stopped as error:
                    raise Failed(
                        f"stopped at {visitor['_id']}, number {number}, with {state['sent']} sent:"
                        f" {server.url}: {error}; the same command goes on from here"
                    ) from None
                state["number"] = number
                write_state(file, state)
                progress.update()
    with suppress(FileNotFoundError):
        os.unlink(file)
    said = f"{some(state['sent'])} to {server.url}, {state['refused']} refused"
    if state["met"]:
        said += f", {state['met']} met another one there"
    if state["refused"]:
        raise Failed(f"sent {said}; see above why")
    print(f"sent {said}; what changes from now on: --since {state['began']}")


def send(
    server: replay.Server, visitor: dict[str, Any], guests: int, state: dict[str, Any]
) -> None:
    """Send a visitor, count what became of it in `state`, and name it where that is to be known."""
    try:
        met = False
        for body in replay.bodies(visitor, guests):
            met |= server.register(body)["token"] != visitor["token"]
    except replay.Refused as error:
        state["refused"] += 1
        tqdm.write(f"{visitor['_id']}: refused: {error}", file=sys.stderr)
        return
    state["sent"] += 1
    if met:
        state["met"] += 1
        tqdm.write(
            f"{visitor['_id']}: met another one there, whose token stays, by its phone",
            file=sys.stderr,
        )


def read_state(file: str, url: str, since: int) -> dict[str, Any]:
    """Return where a replay to `url` stopped, or that of a new one."""
    new = {"url": url, "since": since, "number": 0, "sent": 0, "refused": 0, "met": 0}
    new["began"] = when(int(1000 * time.time()))
    try:
        with open(file, encoding="utf-8") as source:
            state = json.load(source)
        if {key: type(value) for key, value in state.items()} != {
            key: type(value) for key, value in new.items()
        }:
            raise ValueError
    except FileNotFoundError:
        return new
    except (ValueError, AttributeError):
        raise Failed(f"{file}: not the state of a replay; move it away") from None
    if (state["url"], state["since"]) != (url, since):
        raise Failed(
            f"{file}: of a replay to another URL or with another --since; go on with that one,"
            " or move it away"
        )
    return dict(state)


def write_state(file: str, state: dict[str, Any]) -> None:
    """Write down where a replay is, whole or not at all."""
    with open(f"{file}.new", "w", opener=private, encoding="utf-8") as target:
        json.dump(state, target)
    os.replace(f"{file}.new", file)


def private(path: str, flags: int) -> int:
    """Open a file, which if it is new is its owner's alone."""
    return os.open(path, flags, 0o600)


@contextmanager
def output(path: str | None, database: str) -> Generator[BinaryIO]:
    """Yield a file to write to: stdout, a pipe or device, or a file that is whole or not there."""
    if path is None:
        with open(1, "wb", closefd=False) as file:
            yield file
        return
    guard(path, database)
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    with aside(path) as copy, open(copy, "wb") as file:
        yield file


@contextmanager
def aside(path: str, replaces: bool = True) -> Generator[str]:
    """Yield the path of an empty file, private, that takes the place of `path` in the end.

    Where anything fails, `path` stays as it was; also where it is there and nothing `replaces` it.
    """
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    try:
        descriptor, copy = tempfile.mkstemp(".part", ".livechat-", folder)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    os.close(descriptor)
    try:
        yield copy
        sync(copy)
        if replaces:
            os.replace(copy, path)
        else:
            os.link(copy, path)  # which fails where it is there
        sync(folder)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror or error}; nothing was written") from None
    finally:
        for made in (copy, f"{copy}-journal"):
            with suppress(FileNotFoundError):
                os.unlink(made)


def sync(path: str) -> None:
    """Let the file or folder be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def guard(path: str, database: str) -> None:
    """Raise `Failed` where `path` is a file of the database itself."""
    own = {f"{database}{suffix}" for suffix in ("", "-wal", "-shm")}
    same = os.path.exists(path) and os.path.exists(database) and os.path.samefile(path, database)
    if same or os.path.realpath(path) in own:
        raise Failed(f"{path}: belongs to the database itself")


def some(visitors: int) -> str:
    """Return a number of visitors in words."""
    return f"{visitors} visitor{'s' * (visitors != 1)}"


def megabytes(size: int) -> str:
    """Return a size in words."""
    return f"{size / 2**20:,.1f} MiB"


def when(ms: int) -> str:
    """Return a time as the service writes it."""
    text = datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def date(text: str) -> int:
    """Return an ISO date or time, in milliseconds since 1970; without a zone it is UTC."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, int(1000 * moment.timestamp()))


def age(text: str) -> int:
    """Return an age such as 90d in seconds."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([mhdw])", text)
    if not match:
        raise ValueError
    return int(match[1]) * UNITS[match[2]]


def person(text: str) -> str:
    """Return what may be a token, a phone or an email."""
    text.encode()  # or the database would not take it
    if not text.strip():
        raise ValueError
    return text


def parser() -> argparse.ArgumentParser:
    """Return the commands and their options."""
    db = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    db.add_argument("--db", metavar="FILE", help="the database; LIVECHAT_DB, if not given")
    main = argparse.ArgumentParser(description=__doc__, parents=[db])
    commands = main.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(
        name: str, run: Callable[[argparse.Namespace, str], None], about: str, example: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: python manage.py {example}",
            parents=[db],
        )
        made.set_defaults(run=run)
        return made

    since: dict[str, Any] = {"type": date, "default": 0, "metavar": "DATE"}
    since["help"] = "only who was last changed then or later: 2026-11-23, or 2026-11-23T17:42, UTC"

    made = command("export", export, "write every visitor to a file", "export -o visitors.jsonl")
    made.add_argument(
        "--format",
        choices=("jsonl", "csv"),
        default="jsonl",
        help="jsonl loses nothing and is what import reads; csv is for spreadsheets, where cells"
        " that could be formulas begin with an apostrophe, as most phones do",
    )
    made.add_argument("--since", **since)
    made.add_argument("-o", "--output", metavar="FILE", help="stdout, if not given or -")

    made = command(
        "import",
        import_,
        "read what export wrote as JSONL; who is there and was changed later stays",
        "import visitors.jsonl",
    )
    made.add_argument("file", metavar="FILE", help="- is stdin")

    made = command("backup", backup, "copy the database, and look it through", "backup backup.db")
    made.add_argument("file", metavar="FILE")
    made.add_argument("--force", action="store_true", help="write over a file that is there")

    made = command(
        "purge",
        purge,
        "delete who was not changed for so long, without a trace in the database",
        "purge --older-than 90d --dry-run",
    )
    made.add_argument(
        "--older-than", type=age, required=True, metavar="AGE", help="30m, 12h, 90d or 52w"
    )
    made.add_argument("--dry-run", action="store_true", help="only say how many these are")

    made = command(
        "erase",
        erase,
        "delete every visitor of a person, without a trace in the database",
        "erase john.doe@email.com (what begins with a hyphen stands after --)",
    )
    made.add_argument("person", type=person, metavar="EMAIL|PHONE|TOKEN")

    command(
        "check",
        check,
        "look the database through, and say what to do; exit status 1 with any finding",
        "check",
    )

    made = command(
        "replay",
        replay_,
        "send every visitor to another server with this API; go on where it stopped",
        "replay https://chat.example.org",
    )
    made.add_argument("url", metavar="URL")
    made.add_argument("--since", **since)
    made.add_argument(
        "--state", metavar="FILE", help="where it notes how far it is: replay-HOST.state"
    )
    return main


def main(arguments: Iterable[str] | None = None) -> int:
    """Run a command; return the exit status: 0, or 1 where it could not."""
    args = parser().parse_args(None if arguments is None else list(arguments))
    environ = os.environ | ({"LIVECHAT_DB": args.db} if "db" in args else {})
    try:
        args.run(args, Settings.from_environ(environ).database)
    except (Failed, *FAULTS) as error:
        return failed(args.command, str(error))
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        return failed(args.command, f"{named}{error.strerror or error}")
    except KeyboardInterrupt:
        failed(args.command, "interrupted")
        return 130
    return 0


def failed(command: str, reason: str) -> int:
    """Say in one line why a command could not do it; return the exit status."""
    print(f"{command}: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)  # so that it clears up behind itself
    sys.exit(main())
