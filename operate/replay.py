"""`replay`: send every visitor to another server with this API, such as Rocket.Chat."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

import storage
from operate import SINCE, Failed, bar, some
from operate.database import count, last_guest, snapshot
from operate.export import visitors
from operate.files import aside, guard, private
from operate.rocketchat import Refused, Server, Stopped, bodies
from storage.fields import iso_date

ABOUT = "send every visitor to another server with this API; go on where it stopped"
EXAMPLE = "replay https://chat.example.org"
PAGE = 20  # visitors that are read at once, and after which it is noted how far it is


@dataclass
class State:
    """How far a replay is, and with which command; nothing of a visitor."""

    url: str
    since: int
    began: str  # a date
    number: int = 0  # of the last visitor who is done
    sent: int = 0
    refused: int = 0
    met: int = 0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--since", **SINCE)
    parser.add_argument(
        "--state", metavar="FILE", help="where it notes how far it is: replay-HOST.state"
    )


def run(args: argparse.Namespace, database: str) -> None:
    """Send every visitor to another server."""
    progress = bar(total=0)

    def wait(seconds: float, reason: str) -> None:
        progress.set_postfix_str(f"waits {seconds:.0f} s: {reason}")
        time.sleep(seconds)
        progress.set_postfix_str("")

    with closing(progress), closing(storage.Database(database)) as source:
        server = Server(args.url, wait)
        file = args.state or f"replay-{re.sub('[^A-Za-z0-9.-]', '-', server.host)}.state"
        guard(file, database)
        state = read_state(file, server.url, args.since)
        with snapshot(database) as connection:
            guests = last_guest(connection)
            progress.total = count(connection, args.since, after=state.number)

        with closing(server):
            while page := source.scan(lambda c: [*visitors(c, args.since, state.number, PAGE)]):
                try:
                    for visitor in page:
                        send(server, visitor, guests, state)
                        progress.update()
                except Stopped as error:
                    raise Failed(
                        f"stopped at {visitor['id']}, number {visitor['number']}, with {state.sent}"
                        f" sent: {server.url}: {error}; the same command goes on from here"
                    ) from None
                finally:
                    if state.number:
                        write_state(file, state)
    with suppress(FileNotFoundError):
        os.unlink(file)
    said = f"{some(state.sent)} to {server.url}, {state.refused} refused"
    if state.met:
        said += f", {state.met} met another one there"
    if state.refused:
        raise Failed(f"sent {said}; see above why")
    print(f"sent {said}; what changes from now on: --since {state.began}")


def send(server: Server, visitor: dict[str, Any], guests: int, state: State) -> None:
    """Send a visitor, note what became of it in `state`, and name it where that is to be known."""
    token = visitor["token"]
    said = ""
    try:
        for body in bodies(visitor, guests):
            # From the first answer on its token, which is another one where it met somebody there.
            token = server.register({"token": token, **body})
        state.sent += 1
        if token != visitor["token"]:
            state.met += 1
            said = "met another one there, whose token stays, by its phone"
    except Refused as error:
        state.refused += 1
        said = f"refused: {error}"
    state.number = visitor["number"]
    if said:
        tqdm.write(f"{visitor['id']}: {said}", file=sys.stderr)


def read_state(file: str, url: str, since: int) -> State:
    """Return where a replay to `url` stopped, or the state of a new one."""
    new = State(url, since, iso_date(int(1000 * time.time())))
    try:
        with open(file, encoding="utf-8", opener=private) as source:
            state = State(**json.load(source))
        if [*map(type, asdict(state).values())] != [*map(type, asdict(new).values())]:
            raise ValueError
    except FileNotFoundError:
        return new
    except (ValueError, TypeError):
        raise Failed(f"{file}: not the state of a replay; move it away") from None
    if (state.url, state.since) != (url, since):
        raise Failed(
            f"{file}: of a replay to another URL or with another --since; go on with that one,"
            " or move it away"
        )
    return state


def write_state(file: str, state: State) -> None:
    """Write down how far a replay is, whole or not at all."""
    with aside(file) as copy, open(copy, "w", opener=private, encoding="utf-8") as target:
        json.dump(asdict(state), target)
