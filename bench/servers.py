"""What is measured: how each server is started, what it uses, and what it has kept."""

import contextlib
import json
import shlex
import socket
import subprocess
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from tests.server import BOUND, ROOT, Server, wait_until

BUILD = ROOT / "build"  # on the same disk as the databases of who tries the service here
SLOW_DISK = BUILD / "slowdisk.so"
COUNT = "SELECT count(*), count(DISTINCT token) FROM visitor"


@dataclass(frozen=True)
class Kind:
    """A server as it is started, and what its 200 means."""

    promise: str
    command: str = (ROOT / "Procfile").read_text().removeprefix("web:")
    environ: dict = field(default_factory=dict)
    keeps: str = "rows"  # or "json", or nothing: ""


DISK = "on the disk"
GUNICORN = "gunicorn -c bench/gunicorn.conf.py -b 127.0.0.1:{port}"
NODE_SERVER = "node bench/peers/express.js"

SERVICE, MATCHING = "the service", "the service, matching all"
ALONE = "the service, a commit per request"
CEILING = "bare Falcon, gunicorn sync x2, no storage"
FLASK, FASTAPI, JSON_SERVER = "Flask", "FastAPI", "json-server"
EXPRESS, NORMAL = "Express, FULL", "Express, NORMAL"
PEERS = (EXPRESS, NORMAL, FASTAPI, JSON_SERVER)  # those that are left out without --peers

SERVERS = {
    SERVICE: Kind(DISK),
    MATCHING: Kind(DISK, environ={"LIVECHAT_MATCH": "token,phone,email"}),
    # Without the event loop each write is a transaction of its own.
    ALONE: Kind(DISK, environ={"GUNICORN_CMD_ARGS": "-k gthread --threads 1"}),
    CEILING: Kind("nothing", f"{GUNICORN} bench.ceiling:app", keeps=""),
    FLASK: Kind(DISK, f"{GUNICORN} --preload bench.peers.flask_app:app"),
    EXPRESS: Kind(DISK, NODE_SERVER, {"SYNCHRONOUS": "FULL"}),
    NORMAL: Kind("a while before the disk", NODE_SERVER),
    FASTAPI: Kind(
        DISK, "uvicorn bench.peers.fast_app:app --port {port} --workers 2 --no-access-log"
    ),
    JSON_SERVER: Kind(
        "a while before the disk",
        "node bench/peers/node_modules/.bin/json-server --quiet --host 127.0.0.1 --port {port}"
        " --routes bench/peers/routes.json {database}",
        keeps="json",
    ),
}


class Void(Exception):
    """A run that counts for nothing, and why."""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(folder, kind=SERVERS[SERVICE], delay=0):
    """Start a server in `folder`; return it, and the seconds until it has registered "first"."""
    port = free_port()
    database = folder / "livechat.db"
    if kind.keeps == "json":
        database = folder / "visitors.json"
        database.write_text('{"visitors": []}')
    environ = {"PORT": str(port), "LIVECHAT_DB": str(database), "DATABASE": str(database)}
    if delay:
        environ |= {"LD_PRELOAD": str(SLOW_DISK), "SLOWDISK_MS": str(delay)}
    command = shlex.split(kind.command.format(port=port, database=database))
    begin = time.perf_counter()
    server = Server(folder, command, **environ | kind.environ)
    server.port = port
    try:
        wait_until(lambda: answers(server), "the first answer")
    except AssertionError:
        server.kill()
        last = server.log().strip().rpartition("\n")[2]
        raise Void(f"it does not answer, and says last: {last}") from None
    return server, time.perf_counter() - begin


def answers(server):
    try:
        status, answer = server.register("first")
    except (OSError, HTTPException, ValueError):  # not yet, or no JSON
        return False
    return status < 300 and "visitor" in answer


def settle(server):
    """Wait until a server has done what a load has left behind; raise `Void`."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=BOUND)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/nothing")
            connection.getresponse().read()
        except (OSError, HTTPException) as error:
            raise Void(f"after the warm-up: {error!r}") from None


def processes(server):
    """Return the folders in /proc of all processes of a server."""
    ps = ["ps", "-o", "pid=", "-s", str(server.process.pid)]
    pids = subprocess.run(ps, capture_output=True, text=True).stdout.split()
    return [Path("/proc", pid) for pid in pids]


def memory(server):
    """Return the MB of all processes of a server; a page that several have counts once (PSS)."""
    total = 0
    for process in processes(server):
        with contextlib.suppress(OSError):  # one that has just ended
            lines = (process / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1.024e-3


def cpu(server):
    """Return the seconds of CPU that the threads of a server have used, of all its processes."""
    total = 0
    for process in processes(server):
        for thread in process.glob("task/*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(thread.read_text().split()[0])
    return total / 1e9


def stop(server, kind):
    """End a server; return how many visitors it has kept, and how many tokens."""
    if kind.keeps == "json":
        time.sleep(2)  # it writes after its answer, and what it has not written it loses
    try:
        server.stop()
    except subprocess.TimeoutExpired:
        raise Void("it does not end") from None
    if kind.keeps == "json":
        kept = json.loads(server.database.read_text())["visitors"]
        return len(kept), len({one["visitor"]["token"] for one in kept})
    return tuple(server.query(COUNT)[0]) if kind.keeps else None
