"""Measure the time from `gunicorn` to the first answer, and the memory of a worker.

Run from the project's root: `.venv/bin/python -m bench.start [ROUNDS]`.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from bench.servers import memory, start
from tests.server import wait_until


def main(rounds):
    seconds, workers = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            server, took = start(Path(folder))
            seconds.append(took)
            wait_until(lambda server=server: len(server.workers()) == 2, "both workers are there")
            workers.append(memory(server)[0])
            server.stop()
    print(f"start to first answer: median {statistics.median(seconds):.2f} s of {rounds}")
    print(f"resident memory a worker: at most {max(workers):.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
