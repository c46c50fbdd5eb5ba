"""`replay`: send every visitor to another server with this API, such as Rocket.Chat."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from contextlib import closing, suppress
from typing import Any

import apsw
from tqdm import tqdm

import storage
from operate import SINCE, Failed, bar, rocketchat, some
from operate.database import count, last_guest, snapshot
from operate.files import private
from storage.database import Database
from storage.visitors import SELECT, as_visitor, as_wire, iso_date

ABOUT = "send every visitor to another server with this API; go on where it stopped"
EXAMPLE = "replay https://chat.example.org"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--since", **SINCE)
    parser.add_argument(
        "--state", metavar="FILE", help="where it notes how far it is: replay-HOST.state"
    )


def run(args: argparse.Namespace, database: str) -> None:
    """Send every visitor to another server."""
    try:
        server = rocketchat.Server(args.url)
    except ValueError as error:
        raise Failed(str(error)) from None
    file = args.state or f"replay-{re.sub('[^A-Za-z0-9.-]', '-', server.host)}.state"
    state = read_state(file, server.url, args.since)
    with snapshot(database) as connection:
        guests = last_guest(connection)
        left = count(connection, args.since, after=state["number"])
    progress = bar(total=left)
    with closing(server), closing(storage.Database(database)) as source, closing(progress):
        while following := next_page(source, state["number"], args.since):
            for number, visitor in following:
                try:
                    send(server, visitor, guests, state)
                except rocketchat.Stopped as error:
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
    server: rocketchat.Server, visitor: dict[str, Any], guests: int, state: dict[str, Any]
) -> None:
    """Send a visitor, count what became of it in `state`, and name it where that is to be known."""
    try:
        met = False
        for body in rocketchat.bodies(visitor, guests):
            met |= server.register(body)["token"] != visitor["token"]
    except rocketchat.Refused as error:
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
    new["began"] = iso_date(int(1000 * time.time()))
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


def next_page(
    database: Database, number: int, since: int = 0, size: int = 100
) -> list[tuple[int, dict[str, Any]]]:
    """Return number and visitor, as the contract answers it, of the next ones after `number`."""
    sql = f"{SELECT} WHERE number > ? AND updated >= ? ORDER BY number LIMIT ?"

    def work(connection: apsw.Connection) -> list[tuple[int, dict[str, Any]]]:
        found = map(as_visitor, connection.execute(sql, (number, since, size)))
        return [(visitor["number"], as_wire(visitor)) for visitor in found]

    return database.scan(work)
