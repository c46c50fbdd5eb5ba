"""Measure how long others wait while slow and stubborn clients are there.

Run from the project's root: `.venv/bin/python -m bench.slow [SECONDS]`.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from tests.server import Server
from tests.slow import ATTACKS, Attack, wait_of_others

SERVERS = {
    "the service": None,
    "gthread, 16 threads": "-k gthread --threads 16",
}


def main(seconds):
    print("| sent by the others | at once |", " | ".join(SERVERS), "|")
    print("|---" * (2 + len(SERVERS)) + "|")
    for name in [*ATTACKS, "all of these"]:
        for connections in (20, 200, 600):  # 500 is the most that are open at a time
            cells = [
                measure(arguments, name, connections, seconds) for arguments in SERVERS.values()
            ]
            print("|", name, "|", connections, "|", " | ".join(cells), "|", flush=True)


def measure(arguments, name, connections, seconds):
    """Return the median and the longest wait, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), GUNICORN_CMD_ARGS=arguments)
        try:
            server.wait()
            names = tuple(ATTACKS) if name == "all of these" else (name,)
            with Attack(server.port, connections, names):
                waits = wait_of_others(server, seconds)
        finally:
            server.kill()
    return f"{statistics.median(waits):.3f}, {max(waits):.1f}"


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 15)
