"""Measure the time from `gunicorn` to the first answer, and the memory then.

Run from the project's root: `.venv/bin/python -m bench.start [ROUNDS]`.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from bench.servers import memory, start


def main(rounds):
    seconds, sizes = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            server, took = start(Path(folder))
            seconds.append(took)
            sizes.append(memory(server))
            server.stop()
    print(f"start to first answer: median {statistics.median(seconds):.2f} s of {rounds}")
    print(f"memory of all processes (PSS): at most {max(sizes):.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
