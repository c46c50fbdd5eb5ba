"""manage.py as an operator runs it, and whom its tests register."""

import os
import stat
import subprocess
import sys

from tests.server import ROOT

JOHN = {"name": "John Doe", "email": "john.doe@email.com", "phone": "+37265783468"}
FIELD = {"key": "address", "value": "Rocket.Chat street", "overwrite": True}
LATER = 1_700_000_000_000
VISITORS = (
    ("867ad6a09fc4af29f6f1f2a9cf1deaba", {}),
    ("john", JOHN | {"department": "Support", "username": "kim.jane"}, FIELD),
    ('quoted "\n\u2028 王小明', {"name": "Zoë"}, {"key": "é\r", "value": "", "overwrite": True}),
)


def spawn(*arguments, command=(), **options):
    """Start manage.py as an operator does."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    line = [*command, sys.executable, ROOT / "manage.py", *map(str, arguments)]
    return subprocess.Popen(line, text=True, **(pipes | options))


def finish(process):
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def files(folder):
    return sorted(os.listdir(folder))
