"""A real gunicorn on a free port, as the Procfile starts it."""

import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = "/api/v1/livechat/visitor"
BOUND = 20  # seconds that any wait of a test may take


def wait_until(condition, what, bound=BOUND):
    """Return what `condition()` returns once it is true; fail after `bound` seconds."""
    deadline = time.monotonic() + bound
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {bound} s in vain: {what}"
        time.sleep(0.01)
    return result


def is_running(pid):
    """Return whether a process is there and has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Server:
    """The service in processes of its own; `folder` holds its database and its log."""

    def __init__(self, folder, command=None, **environ):
        self.database = Path(environ.get("LIVECHAT_DB", folder / "livechat.db"))
        self.output = folder / "server.log"
        self.port = None  # or the path of its socket
        command = command or shlex.split((ROOT / "Procfile").read_text().removeprefix("web:"))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environ = {"PORT": "0", "LIVECHAT_HOST": "127.0.0.1", "PATH": path, **environ}
        environ = {"LIVECHAT_DB": str(self.database), "HOME": str(folder), **environ}
        with self.output.open("ab") as output:
            self.start = output.tell()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={name: value for name, value in environ.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def log(self):
        """Return what this server, and none before it, has printed."""
        return self.output.read_bytes()[self.start :].decode()

    def wait(self):
        """Wait until it answers; return self."""

        def listening():
            assert self.process.poll() is None, self.log()
            return re.findall(r"(?:Listening at: |Serving on )(\S+)", self.log())

        address = wait_until(listening, "the server listens")[-1]
        if address.startswith("unix:"):
            self.port = address.removeprefix("unix:")
        else:
            self.port = int(address.rpartition(":")[2])
        wait_until(lambda: self.request("GET", "/nothing")[0] == 404, "the server answers")
        return self

    def connect(self):
        """Return a connected socket."""
        if isinstance(self.port, int):
            client = socket.create_connection(("127.0.0.1", self.port), timeout=BOUND)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(BOUND)
            client.connect(self.port)
        return client

    def http(self):
        """Return a connection for any number of requests."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.connect()
        return connection

    def request(self, method, path, body=None, headers=None):
        """Return status, headers and body, parsed as JSON, of one request."""
        with contextlib.closing(self.http()) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, json.loads(answer.read() or "null")

    def register(self, token, **fields):
        """Return the status and the body of a registration."""
        body = json.dumps({"visitor": {"token": token, **fields}})
        status, _, answer = self.request("POST", PATH, body, {"Content-Type": "application/json"})
        return status, answer

    def raw(self, data):
        """Send bytes, end the sending side, and return status line and body of the answer."""
        with self.connect() as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return head.decode(), body.decode()

    def query(self, sql):
        """Return the rows that `sql` gives, seen by a process of its own."""
        code = (
            "import apsw, json, sys\n"
            "connection = apsw.Connection(sys.argv[1], apsw.SQLITE_OPEN_READWRITE)\n"
            "print(json.dumps(connection.execute(sys.argv[2]).fetchall()))"
        )
        command = [sys.executable, "-c", code, str(self.database), sql]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    def workers(self):
        """Return the process ids of the workers."""
        pids = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(pid) for pid in pids.stdout.split()]

    def worker(self):
        """Return the process id of the one worker, once there is one alone."""
        return wait_until(lambda: len(self.workers()) == 1 and self.workers(), "one worker")[0]

    def stop(self):
        """Send TERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(BOUND)

    def kill(self):
        """End the whole process group at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(BOUND)
