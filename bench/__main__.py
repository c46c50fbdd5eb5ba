"""Measure the service against what it is compared with, on the disk as it is and on a slow one.

Run from the project's root, on Linux: `make bench`, or `make bench ARGS=--quick`; with Node.js also
`make bench-peers`. All that one round measures comes in random order, and every ratio is the
median of the rounds' own ratios, so that a machine which is slow for a while slows both sides.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import apsw

import storage
from bench import servers
from bench.ratios import CONNECTIONS, MEMORY, START, possible
from bench.servers import BUILD, SERVERS, SERVICE, Void
from tests.server import PATH, ROOT

QUICK = (8, 32)  # connections
WARM_UP = 1  # seconds, in which the second of two workers boots too


def plan(ratios, counts):
    """Return the runs of a round, each once."""
    pairs = [pair for ratio in ratios for pair in ratio.pairs() if pair[0] in counts]
    return list(dict.fromkeys(run for _, *runs in pairs for run in runs))


def measure(run, seconds, full):
    """Return the numbers of a run, on a database of its own; raise `Void`."""
    kind = SERVERS[run.server]
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        before = 1
        if run.filled:
            path, visitors = full[run.load]
            shutil.copy(path, Path(folder) / "livechat.db")
            before += visitors
        server, started = servers.start(Path(folder), kind, run.delay)
        try:
            warm = wrk(server, run, WARM_UP, "warm")
            # 128 commits of a slow disk, one after the other, would be a part of what is measured.
            servers.settle(server)
            used = servers.cpu(server)
            found = wrk(server, run, seconds, "run")
            used = servers.cpu(server) - used
            memory = servers.memory(server)
            kept = servers.stop(server, kind)
        finally:
            server.kill()
        if kept:
            check(run, kept, before, [warm, found])
        if kind.promise == servers.DISK and found["p50"] < run.delay:
            raise Void("it answers before the visitor is on the disk")
    # Microseconds of all processes for one answer, seconds, and MB.
    return found | {"cpu": 1e6 * used / found["answers"], "start": started, "memory": memory}


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

    def ratios(self, ratio):
        """Return the median of the rounds' ratios, by the number of connections."""
        found = {}
        for count, *runs in ratio.pairs():
            rounds = zip(*(self.rounds.get(run, ()) for run in runs), strict=False)
            values = [
                ours[ratio.key] / theirs[ratio.key] for ours, theirs in rounds if ours and theirs
            ]
            if values:
                found[count] = statistics.median(values)
        return found


def row(results, ratio):
    """Return a line of a table: a name and ratios, in bold where one misses what it must be."""
    texts = dict.fromkeys(CONNECTIONS, "")
    for count, value in results.ratios(ratio).items():
        texts[count] = f"**{value:.2f}**" if ratio.misses(value, count) else f"{value:.2f}"
    return [ratio.name, *texts.values()]


def sizes(results, full):
    """Yield what else is measured, how much it is, the must and the goal."""
    for filled, name in ((False, "no visitors"), (True, "many visitors")):
        found = [
            numbers
            for run, rounds in results.rounds.items()
            if (run.server, run.delay, run.filled) == (SERVICE, 0, filled)
            for numbers in rounds
            if numbers
        ]
        if found:
            memory = max(numbers["memory"] for numbers in found)
            yield size(
                f"memory of all processes after the load (PSS), {name}", memory, "MB", MEMORY
            )
            start = statistics.median(numbers["start"] for numbers in found)
            yield size(f"start to first answer, {name}", start, "s", START)
    for load, (path, visitors) in full.items():
        tokens = "sequential" if load == "new" else "random"
        name = f"a visitor on the disk, {tokens} tokens, {visitors:,} of them"
        yield name, f"{path.stat().st_size / visitors:.0f} bytes", "", ""


def size(name, value, unit, targets):
    must, goal = (f"≤ {target} {unit}" for target in targets)
    text = f"{value:.{0 if unit == 'MB' else 2}f} {unit}"
    return name, f"**{text}**" if value > targets[0] else text, must, goal


def medians(results):
    """Yield a server, what is special, what its 200 means, and the medians by connections."""
    lines = {}
    for run in results.rounds:
        lines.setdefault(replace(run, connections=0), {})[run.connections] = run
    order, loads = list(SERVERS), ("new", "mix", "random")

    def place(line):
        return line.delay, line.filled, loads.index(line.load), order.index(line.server)

    for line in sorted(lines, key=place):
        texts = []
        for connections in CONNECTIONS:
            run = lines[line].get(connections)
            rate, p99, cpu = (results.median(run, key) for key in ("rate", "p99", "cpu"))
            texts.append(f"{rate:,.0f}; {p99:.1f}; {cpu:.0f}" if rate else "void" if run else "")
        yield line.server, line.special(), SERVERS[line.server].promise, *texts


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def report(results, full, targets, others):
    """Return the tables."""
    counts = [str(count) for count in CONNECTIONS]
    return "\n\n".join(
        [
            machine(),
            "What the service has to be, at so many connections (bold: it is not):",
            table(
                ["", *counts, "must", "goal"],
                (
                    [*row(results, ratio), ratio.target(ratio.must), ratio.target(ratio.goal)]
                    for ratio in targets
                ),
            ),
            table(["", "", "must", "goal"], sizes(results, full)),
            "Throughput, against each of these:",
            table(["", *counts], (row(results, ratio) for ratio in others)),
            "Registrations a second; 99 % of the answers within so many ms; CPU of all processes"
            " per registration in µs:",
            table(["", "", "200 means", *counts], medians(results)),
            *(f"Void: {line}" for line in results.void),
        ]
    )


def main():
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="two minutes, and less to rely on")
    parser.add_argument(
        "--peers", action="store_true", help="also Express, json-server and FastAPI"
    )
    parser.add_argument("--json", type=Path, default=BUILD / "bench.json", metavar="FILE")
    parser.add_argument("--rounds", type=int, metavar="N")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; on Debian and Ubuntu: apt-get install wrk")
    BUILD.mkdir(exist_ok=True)
    rounds, seconds, visitors = (1, 2, 200_000) if options.quick else (3, 4, 10**6)
    rounds = options.rounds or rounds
    say = partial(print, file=sys.stderr, flush=True)
    slow_disk = servers.SLOW_DISK.exists()
    if not slow_disk:
        say("The slow disk is left out: there is no compiler (cc) to build bench/slowdisk.c.")
    targets, others = possible(options.peers, slow_disk)
    runs = plan(targets + others, QUICK if options.quick else CONNECTIONS)
    results = Results()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        full = {}
        for load in ("new", "random"):
            say(f"{visitors:,} visitors, {load} tokens")
            full[load] = Path(folder) / f"{load}.db", visitors
            fill(full[load][0], load, visitors)
        order = [run for _ in range(rounds) for run in random.sample(runs, len(runs))]
        for number, run in enumerate(order, 1):
            special = run.special() and f", {run.special()}"
            name = f"{run.server}, {run.connections} connections{special}"
            numbers = None
            try:
                numbers = measure(run, seconds, full)
                found = "{rate:,.0f} a second, p99 {p99:.1f} ms, {cpu:.0f} µs".format_map(numbers)
            except Void as void:
                results.void.append(f"{name}: {void}")
                found = f"void: {void}"
            results.add(run, numbers)
            say(f"{time.monotonic() - begin:4.0f} s  {number}/{len(order)}  {name}: {found}")
        print(report(results, full, targets, others))
        options.json.write_text(
            json.dumps(
                {
                    "machine": machine(),
                    "ratios": {ratio.name: results.ratios(ratio) for ratio in targets + others},
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
