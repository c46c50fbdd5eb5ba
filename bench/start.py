"""Measure the time from `gunicorn` to the first answer, and the memory of a worker.

Run from the project's root: `.venv/bin/python -m bench.start [ROUNDS]`.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.server import Server, wait_until


def answers(server):
    try:
        return server.register("t")[0] == 200
    except OSError:
        return False


def main(rounds):
    seconds, kilobytes = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            server = Server(Path(folder), PORT="3999")
            server.port = 3999
            wait_until(lambda server=server: answers(server), "the first answer")
            seconds.append(time.perf_counter() - start)
            wait_until(lambda server=server: len(server.workers()) == 2, "both workers are there")
            for pid in server.workers():
                ps = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True)
                kilobytes.append(int(ps.stdout))
            server.stop()
    print(f"start to first answer: median {statistics.median(seconds):.2f} s of {rounds}")
    print(f"resident memory a worker: at most {max(kilobytes) / 1000:.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
