"""Another program that holds the database."""

import subprocess
import sys
from contextlib import contextmanager

LOCKS = {
    "transaction": "import apsw; held = apsw.Connection(path); held.execute('BEGIN IMMEDIATE')",
}
OTHERS = {
    "only opened": "import apsw; held = apsw.Connection(path)",
    "has read": "import apsw; held = apsw.Connection(path); "
    "held.execute('SELECT * FROM visitor').fetchall()",
    "exclusive lock": "import apsw; held = apsw.Connection(path); "
    "held.pragma('locking_mode', 'exclusive'); held.execute('UPDATE guest SET last = last')",
    "older state": "import apsw; held = apsw.Connection(path); held.execute('BEGIN'); "
    "held.execute('SELECT * FROM visitor').fetchall()",
}


@contextmanager
def held(path, lock):
    """Let another process hold a lock or read; yield a function that makes it let go."""
    code = f"import sys; path = sys.argv[1]; {(LOCKS | OTHERS)[lock]}; print(flush=True); input()"
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"\n"
            yield lambda: process.communicate(b"\n")
        finally:
            process.kill()
