"""What an operator does to the database, beside the running service: `python manage.py --help`."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

try:
    import storage
    from operate import Failed, backup, check, erase, export, import_, purge, replay, restore
    from settings import SettingError, Settings
except ImportError as error:  # by another Python, which lacks what is installed in the environment
    sys.exit(f"{error}: run .venv/bin/python manage.py, which `make .venv/run` sets up")

COMMANDS: dict[str, Any] = {
    "export": export,
    "import": import_,
    "backup": backup,
    "restore": restore,
    "purge": purge,
    "erase": erase,
    "check": check,
    "replay": replay,
}
FAULTS = (SettingError, storage.PrepareError, storage.Unavailable)


def parser() -> argparse.ArgumentParser:
    """Return the commands and their options."""
    db = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    db.add_argument("--db", metavar="FILE", help="the database; LIVECHAT_DB, if not given")
    main = argparse.ArgumentParser(description=__doc__, parents=[db])
    commands = main.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, command in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=command.ABOUT,
            description=command.ABOUT,
            epilog=f"example: python manage.py {command.EXAMPLE}",
            parents=[db],
        )
        command.arguments(made)
        made.set_defaults(run=command.run)
    return main


def main(arguments: Iterable[str] | None = None) -> int:
    """Run a command; return the exit status: 0, or 1 where it could not."""
    args = parser().parse_args(None if arguments is None else list(arguments))
    environ = os.environ | ({"LIVECHAT_DB": args.db} if "db" in args else {})
    try:
        args.run(args, Settings.from_environ(environ).database)
        print(end="", flush=True)  # so that what cannot be written is a failure too
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
    while (number := os.open(os.devnull, os.O_RDONLY)) < 3:
        pass  # of a closed stdin, stdout or stderr, which no other file may get
    os.close(number)
    sys.stderr = sys.stderr or io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)  # so that it clears up behind itself
    status = main()
    os._exit(status)  # as Python would try again to write what could not be written
