"""Measure the service against its ceiling, its peers and a slow disk, all in turn.

Run from the project's root: `make bench`, or `make bench ARGS=--quick`; with Node.js also
`make bench-peers`. The numbers of one round are measured in random order, and every ratio is the
median of the rounds' own ratios, so that a machine which is slow for a while slows both sides.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import apsw

import storage
from bench import servers
from bench.servers import (
    ALONE,
    BUILD,
    CEILINGS,
    GTHREAD,
    MATCHING,
    ONE_WORKER,
    RAW,
    SERVERS,
    SERVICE,
    Void,
)
from tests.server import PATH, ROOT

CONNECTIONS = (1, 8, 32, 128)


@dataclass(frozen=True)
class Run:
    """One measurement: what is loaded, with what, and how."""

    server: str
    connections: int
    load: str = "new"  # or "mix", or "random", as load.lua has them
    delay: int = 0  # milliseconds by which each sync of the disk takes longer
    filled: bool = False  # whether there are very many visitors, with tokens like the load's

    def special(self):
        """Return how the run differs from new tokens on an empty table and the disk as it is."""
        load = {"mix": ["half known tokens"], "random": ["random tokens"]}.get(self.load, [])
        filled = ["many visitors"] if self.filled else []
        delay = [f"syncs {self.delay} ms slower"] if self.delay else []
        return ", ".join(load + filled + delay)


def plan(quick, peers, slow_disk):
    """Return the runs of a round."""
    counts = (8, 32) if quick else CONNECTIONS
    others = ["Flask", *(("Express, FULL", "Express, NORMAL", "FastAPI") if peers else ())]
    runs = [Run(server, count) for server in (SERVICE, *CEILINGS) for count in counts]
    runs += [Run(RAW, 1)]
    runs += [Run(server, count) for server in others for count in ((32,) if quick else counts)]
    runs += [Run(SERVICE, 32, load, filled=True) for load in ("new", "random")]
    runs += [Run(SERVICE, 32, "random")]
    runs += [Run(ALONE, 32)]
    if peers:
        runs += [Run("json-server", 32)]
    if not quick:
        runs += [Run(MATCHING, count) for count in counts]
        runs += [Run(ALONE, 1), Run(ONE_WORKER, 32), Run(GTHREAD, 32)]
        runs += [Run(server, 32, "mix") for server in (SERVICE, MATCHING, *others)]
    if slow_disk:
        delayed = [(5, 32)] if quick else [(5, 1), (5, 32), (20, 32)]
        for server in (SERVICE, ALONE, *others):
            runs += [Run(server, count, delay=delay) for delay, count in delayed]
    return runs


def measure(run, seconds, warm_up, full):
    """Return the numbers of a run, on a database of its own; raise `Void`."""
    kind = SERVERS[run.server]
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        database = Path(folder) / "livechat.db"
        if run.server == RAW:
            command = shlex.split(kind.command.format(database=database, seconds=seconds))
            return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        before = 1
        if run.filled:
            shutil.copy(full[run.load][0], database)
            before += full[run.load][1]
        server, started = servers.start(Path(folder), kind, run.delay)
        try:
            warm = wrk(server, run, warm_up, "warm") if warm_up else None
            found = wrk(server, run, seconds, "run")
            worker, total = servers.memory(server)
            kept = servers.stop(server, kind)
        finally:
            server.kill()
        if kept:
            check(run, kept, before, [one for one in (warm, found) if one])
        if kind.promise == servers.DISK and found["p50"] < run.delay:
            raise Void("it answers before the visitor is on the disk")
    return found | {"start": started, "worker": worker, "total": total}


def wrk(server, run, seconds, name):
    url = f"http://127.0.0.1:{server.port}{PATH}"
    command = ["wrk", "-t", "1", "-c", str(run.connections), "-d", f"{seconds}s"]
    command += ["--timeout", "20s", "-s", "bench/load.lua", url, "--", name, run.load]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise Void(f"wrk: {ran.stderr.strip()}")
    found = json.loads(ran.stdout.splitlines()[-1])
    if found["errors"] or not found["answers"]:
        raise Void(f"{found['errors']} errors, {found['answers']} answers")
    return found


def check(run, kept, before, loads):
    """Raise `Void` unless the database has a row for each token, and no other.

    A load ends with requests that nobody waits for any more, one a connection, each of which may
    be done or not; and wrk makes one at first to look at, which it never sends.
    """
    rows, tokens = kept
    sent = before + sum(load["fresh"] for load in loads)
    least = sent - len(loads) * (run.connections + 1)
    if run.load != "mix":
        least = max(least, before + sum(load["answers"] for load in loads))
    if rows != tokens or not least <= rows <= sent:
        raise Void(f"{rows} rows of {tokens} tokens, where {least} to {sent} were registered")


def fill(path, load, visitors):
    """Make a database of so many visitors, each a copy of one that the store has registered."""
    storage.prepare(str(path))
    database = storage.Database(str(path))
    model, house = "model", {"key": "address", "value": "1 Main Street", "overwrite": True}
    given = {"name": f"Visitor {model}", "email": f"{model}@example.com", "phone": f"+{model}"}
    storage.VisitorStore(database).register(model, given, [house])
    database.close()
    connection = apsw.Connection(str(path))
    connection.pragma("synchronous", "OFF")
    connection.pragma("cache_size", -500_000)
    _, *row = connection.execute("SELECT * FROM visitor").fetchone()
    source = random.Random(1)

    def copies():
        for number in range(visitors - 1):
            token = f"{source.getrandbits(128):032x}" if load == "random" else f"full-{number}"
            yield [
                None,
                *(
                    value.replace(model, token) if isinstance(value, str) else value
                    for value in row
                ),
            ]

    places = ", ".join("?" * (1 + len(row)))
    with connection:
        connection.executemany(f"INSERT INTO visitor VALUES ({places})", copies())
    connection.pragma("wal_checkpoint", "TRUNCATE")
    connection.close()


class Results:
    """What the rounds have given: a list of the numbers of each run, None where it was void."""

    def __init__(self):
        self.rounds = {}
        self.void = []

    def add(self, run, numbers):
        self.rounds.setdefault(run, []).append(numbers)

    def median(self, run, key="rate"):
        values = [numbers[key] for numbers in self.rounds.get(run, ()) if numbers]
        return statistics.median(values) if values else None

    def ratio(self, run, other, key="rate"):
        """Return the median of the rounds' ratios."""
        both = zip(self.rounds.get(run, ()), self.rounds.get(other, ()), strict=False)
        values = [ours[key] / theirs[key] for ours, theirs in both if ours and theirs]
        return statistics.median(values) if values else None

    def ceiling(self, connections):
        """Return the run of the better of the two ceilings."""
        runs = [Run(server, connections) for server in CEILINGS]
        return max(runs, key=lambda run: self.median(run) or 0)


def comparisons(results):
    """Yield a name, ours and theirs by their connections, the targets, and what is compared."""
    peers = {
        "Flask": {32: "≥ 5"},
        "Express, FULL": {1: "≥ 0.95", 8: "≥ 2.0", 32: "≥ 2.4", 128: "≥ 2.6"},
        "Express, NORMAL": {32: "≥ 1.0"},
        "FastAPI": {},
        "json-server": {},
    }
    service, matching = partial(Run, SERVICE), partial(Run, MATCHING)
    targets = {8: "≥ 0.40", 32: "≥ 0.55", 128: "≥ 0.65"}
    yield "the ceiling", service, results.ceiling, targets, "rate"
    yield "the ceiling; p99, times as long", service, results.ceiling, {8: "≤ 4", 32: "≤ 3"}, "p99"
    yield "raw apsw", service, lambda _: Run(RAW, 1), {}, "rate"
    yield "one commit a request", service, partial(Run, ALONE), {}, "rate"
    for peer, targets in peers.items():
        yield peer, service, partial(Run, peer), targets, "rate"
        yield f"{peer}; matching all", matching, partial(Run, peer), {}, "rate"
        half = {"load": "mix"}
        theirs = partial(Run, peer, **half)
        yield f"{peer}; half known tokens", partial(Run, SERVICE, **half), theirs, {}, "rate"
    for delay, targets in ((5, {32: "≥ 14"}), (20, {})):
        for server in (ALONE, *peers):
            name = "one commit a request" if server == ALONE else server
            runs = (partial(Run, one, delay=delay) for one in (SERVICE, server))
            yield f"{name}; syncs {delay} ms slower", *runs, targets, "rate"
            targets = {}
    for load, name, targets in (("new", "sequential", {}), ("random", "random", {32: "≥ 0.85"})):
        runs = (partial(Run, SERVICE, load=load, filled=filled) for filled in (True, False))
        yield f"no visitors; with many, {name} tokens", *runs, targets, "rate"


def ratios(results):
    """Yield the name of what the service is compared with, and the ratios by connections."""
    for name, ours, theirs, targets, key in comparisons(results):
        found = {
            count: (results.ratio(ours(count), theirs(count), key), targets.get(count, ""))
            for count in CONNECTIONS
        }
        found = {count: cell for count, cell in found.items() if cell[0] is not None}
        if found:
            yield name, found


def sizes(results, full):
    """Yield what is measured, how much it is, and the target."""
    for filled, name in ((False, "no visitors"), (True, "many visitors")):
        found = [
            numbers
            for run, rounds in results.rounds.items()
            if (run.server, run.delay, run.filled) == (SERVICE, 0, filled)
            for numbers in rounds
            if numbers
        ]
        if found:
            start = statistics.median(numbers["start"] for numbers in found)
            yield f"start to first answer, {name}", f"{start:.2f} s", "≤ 0.3 s"
            worker, total = (max(numbers[key] for numbers in found) for key in ("worker", "total"))
            yield f"memory of a worker after the load, {name}", f"{worker:.0f} MB", "≤ 45 MB"
            yield f"memory of all processes, each page once, {name}", f"{total:.0f} MB", ""
    for load, (path, visitors) in full.items():
        name = "sequential" if load == "new" else "random"
        size = f"{path.stat().st_size / visitors:.0f} bytes"
        yield f"a visitor on the disk, {name} tokens, {visitors:,} of them", size, ""


def medians(results):
    """Yield a server, what is special, what its 200 means, and the medians by connections."""
    lines = {}
    for run in results.rounds:
        lines.setdefault(replace(run, connections=0), {})[run.connections] = run
    order, loads = list(SERVERS), ("new", "mix", "random")

    def place(line):
        return line.delay, line.filled, loads.index(line.load), order.index(line.server)

    for line in sorted(lines, key=place):
        cells = []
        for connections in CONNECTIONS:
            run = lines[line].get(connections)
            rate = results.median(run) if run else None
            p99 = results.median(run, "p99") if run else None
            cells.append(f"{rate:,.0f} ({p99:.1f})" if rate else "void" if run else "")
        yield line.server, line.special(), SERVERS[line.server].promise, *cells


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(ratio, target):
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + (f" ({target})" if target else "")


def machine():
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores"
        f" {names[0] if names else platform.machine()}, {platform.system()} {platform.release()},"
        f" Python {platform.python_version()}, SQLite {apsw.sqlite_lib_version()}"
    )


def report(results, full):
    """Return the tables."""
    return "\n\n".join(
        [
            machine(),
            "Times as fast as each of these, at so many connections (and the target):",
            table(
                ["", *map(str, CONNECTIONS)],
                (
                    (name, *(cell(*found.get(count, (None, ""))) for count in CONNECTIONS))
                    for name, found in ratios(results)
                ),
            ),
            table(["", "", "target"], sizes(results, full)),
            "Registrations a second (and the 99th percentile in ms), at so many connections:",
            table(["", "", "200 means", *map(str, CONNECTIONS)], medians(results)),
            *(f"Void: {line}" for line in results.void),
        ]
    )


def main():
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="two minutes, and less to rely on")
    parser.add_argument("--peers", action="store_true", help="also the peers that need Node.js")
    parser.add_argument("--json", type=Path, default=BUILD / "bench.json", metavar="FILE")
    parser.add_argument("--rounds", type=int, metavar="N")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; on Debian and Ubuntu: apt-get install wrk")
    BUILD.mkdir(exist_ok=True)
    rounds, seconds, warm_up, visitors = (1, 2, 0, 200_000) if options.quick else (3, 4, 1, 10**6)
    rounds = options.rounds or rounds
    say = partial(print, file=sys.stderr, flush=True)
    slow_disk = servers.SLOW_DISK.exists()
    if not slow_disk:
        say("The slow disk is left out: there is no compiler (cc) to build bench/slowdisk.c.")
    results = Results()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        full = {}
        for load in ("new", "random"):
            say(f"{visitors:,} visitors, {load} tokens")
            full[load] = Path(folder) / f"{load}.db", visitors
            fill(full[load][0], load, visitors)
        runs = plan(options.quick, options.peers, slow_disk)
        order = [run for _ in range(rounds) for run in random.sample(runs, len(runs))]
        for number, run in enumerate(order, 1):
            special = run.special() and f", {run.special()}"
            name = f"{run.server}, {run.connections} connections{special}"
            # A slow disk is as slow each time, so that less of it will do.
            numbers = None
            try:
                numbers = measure(run, 2 if run.delay else seconds, warm_up, full)
                found = f"{numbers['rate']:,.0f} a second, p99 {numbers['p99']:.1f} ms"
            except Void as void:
                results.void.append(f"{name}: {void}")
                found = f"void: {void}"
            results.add(run, numbers)
            say(f"{time.monotonic() - begin:4.0f} s  {number}/{len(order)}  {name}: {found}")
        print(report(results, full))
        options.json.write_text(
            json.dumps(
                {
                    "machine": machine(),
                    "ratios": dict(ratios(results)),
                    "sizes": list(sizes(results, full)),
                    "runs": [
                        asdict(run) | {"rounds": numbers} for run, numbers in results.rounds.items()
                    ],
                    "void": results.void,
                },
                indent=1,
            )
        )
    say(f"{time.monotonic() - begin:.0f} s; written to {options.json}")
    sys.exit(bool(results.void))


if __name__ == "__main__":
    main()
