"""Measure what one process holds: start, search, registrations and disk, by number of visitors.

Run from the project's root: `.venv/bin/python -m bench.growing [VISITORS ...]`, after `make bench`
or `make build/slowdisk.so`. 5,000,000 visitors need 6 GB of disk.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import servers
from bench.__main__ import fill, table, wrk
from bench.ratios import Run
from bench.servers import BUILD, SERVICE, Kind
from tests.server import ROOT

AGENT = {"X-User-Id": "agent", "X-Auth-Token": "bench"}
KIND = Kind(servers.DISK, environ={"LIVECHAT_AGENT": "agent:bench"})
SEARCH = "/api/v1/livechat/visitors.search?count=50&term="
TERMS = {
    "newest 50": "",
    "a part of a name that nobody has": "no-such-text",
    "one email": "nobody@example.com",
}
SLOW = 10  # milliseconds by which each sync of the slow disk takes longer
SECONDS = 5  # of a load


def measure(folder, visitors):
    """Yield what is measured, and how much it is."""
    path = folder / "livechat.db"
    fill(path, "random", visitors)
    yield "bytes of the file per visitor", f"{path.stat().st_size / visitors:.0f}"
    forget(path)
    server, took = servers.start(folder, KIND)
    servers.stop(server, KIND)
    yield "start to first registration, the file not in memory, s", f"{took:.1f}"
    server, took = servers.start(folder, KIND)
    try:
        yield "start to first registration, the file in memory, s", f"{took:.1f}"
        for name, term in TERMS.items():
            yield f"search: {name}, s (of CPU)", searched(server, term)
        yield "registrations a second, 1 at a time", loaded(server, 1)
        yield "registrations a second, 32 at a time", loaded(server, 32)
        yield "memory of all processes (PSS), MB", f"{servers.memory(server):.0f}"
    finally:
        servers.stop(server, KIND)
    server, _ = servers.start(folder, KIND, SLOW)
    try:
        for connections in (1, 32):
            name = f"registrations a second, {connections} at a time, syncs {SLOW} ms slower"
            yield name, loaded(server, connections, SLOW)
    finally:
        servers.stop(server, KIND)
    for command in ("check",), ("backup", str(folder / "backup.db")):
        yield f"manage.py {command[0]}, s", operated(path, command)


def forget(path):
    """Let the operating system keep nothing of the file in memory, as after a boot."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def searched(server, term):
    """Return the median of 5 answers' times, and of the server's CPU for them."""
    times, used = [], []
    for _ in range(5):
        before, start = servers.cpu(server), time.perf_counter()
        status, _, answer = server.request("GET", SEARCH + term, headers=AGENT)
        times.append(time.perf_counter() - start)
        used.append(servers.cpu(server) - before)
        if status != 200:
            return json.dumps(answer)
    return f"{statistics.median(times):.3f} ({statistics.median(used):.3f})"


def loaded(server, connections, delay=0):
    """Return the rate, and the server's CPU for a registration."""
    run = Run(SERVICE, connections, load="random", delay=delay)
    before = servers.cpu(server)
    found = wrk(server, run, SECONDS, f"{connections}-{delay}")
    used = 1e6 * (servers.cpu(server) - before) / found["answers"]
    return f"{found['rate']:,.0f} ({used:.0f} µs of CPU each)"


def operated(path, command):
    start = time.perf_counter()
    line = [sys.executable, str(ROOT / "manage.py"), command[0], "--db", str(path), *command[1:]]
    subprocess.run(line, check=True, capture_output=True)
    return f"{time.perf_counter() - start:.1f}"


def main(counts):
    BUILD.mkdir(exist_ok=True)
    columns = []
    for visitors in counts:
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            columns.append({})
            for name, value in measure(Path(folder), visitors):
                print(f"{visitors:,}: {name}: {value}", file=sys.stderr, flush=True)
                columns[-1][name] = value
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    print(table(["visitors", *(f"{visitors:,}" for visitors in counts)], rows))


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [100_000, 1_000_000, 5_000_000])
