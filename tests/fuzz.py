"""Fuzz for some minutes: `make fuzz MINUTES=60`; half of them hypothesis, half schemathesis.

Every round prints its seed and its number of cases; the exit status is 1 where one found something.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.server import ROOT, Server

BIN = Path(sys.executable).parent
ROUND = 1_500  # examples of each property; a round of hypothesis takes two minutes or three
AGENT = {"X-User-Id": "agent", "X-Auth-Token": "secret"}


def hypothesis(seed):
    """Run the properties of tests/test_fuzz.py; return the process that has ended and its cases."""
    ran = subprocess.run(
        [
            str(BIN / "pytest"),
            "tests/test_fuzz.py",
            "-s",
            "--hypothesis-show-statistics",
            f"--hypothesis-seed={seed}",
        ],
        cwd=ROOT,
        env={**os.environ, "FUZZ_EXAMPLES": str(ROUND)},
        capture_output=True,
        text=True,
    )
    return ran, sum(map(int, re.findall(r"(\d+) passing", ran.stdout)))


def schemathesis(seed):
    """Run schemathesis on a real server; return the process that has ended and its cases."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), LIVECHAT_AGENT=":".join(AGENT.values())).wait()
        try:
            ran = subprocess.run(
                [
                    str(BIN / "schemathesis"),
                    f"--config-file={ROOT / 'tests' / 'schemathesis.toml'}",
                    "run",
                    f"http://127.0.0.1:{server.port}/api/openapi.json",
                    "--checks=all",
                    "--max-examples=200",
                    f"--seed={seed}",
                    "--no-color",
                    *[f"--header={name}: {value}" for name, value in AGENT.items()],
                ],
                cwd=folder,
                capture_output=True,
                text=True,
            )
            # What the client does not see: a worker that died, or an error in the log.
            faults = re.findall(r".*(?:CRITICAL|ERROR|Traceback).*", server.log())
        finally:
            server.kill()
    if faults:
        ran.returncode, ran.stdout = 1, "\n".join([ran.stdout, *faults])
    return ran, sum(map(int, re.findall(r"(\d+) generated", ran.stdout)))


def fuzz(part, seconds):
    """Run rounds of a part until the time is over; return whether nothing was found."""
    end = time.monotonic() + seconds
    seed = random.randrange(2**31)
    rounds = cases = found = 0
    while rounds == 0 or time.monotonic() < end:
        ran, number = part(seed + rounds)
        print(f"{part.__name__}: seed {seed + rounds}, {number} cases, exit {ran.returncode}")
        if ran.returncode:
            found += 1
            print(ran.stdout, ran.stderr)
        sys.stdout.flush()
        rounds, cases = rounds + 1, cases + number
    print(f"{part.__name__}: {rounds} rounds, {cases} cases, {found} rounds found something")
    return not found


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    seconds = 60 * parser.parse_args().minutes / 2
    return 0 if all([fuzz(hypothesis, seconds), fuzz(schemathesis, seconds)]) else 1


if __name__ == "__main__":
    sys.exit(main())
