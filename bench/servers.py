"""What is measured: how each server is started, and what its database holds afterwards."""

import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from tests.server import ROOT, Server, wait_until

BUILD = ROOT / "build"  # on the same disk as the databases of who tries the service here
SLOW_DISK = BUILD / "slowdisk.so"
NODE = ROOT / "bench" / "peers" / "node_modules"
COUNT = "SELECT count(*), count(DISTINCT token) FROM visitor"


@dataclass(frozen=True)
class Kind:
    """A server as it is started, and what its 200 means."""

    promise: str
    command: str = (ROOT / "Procfile").read_text().removeprefix("web:")
    environ: dict = field(default_factory=dict)
    keeps: str = "rows"  # or "json", or nothing: ""


CEILING = "gunicorn -c bench/gunicorn.conf.py -b 127.0.0.1:{port} bench.ceiling:app"
FLASK = "gunicorn -c bench/gunicorn.conf.py -b 127.0.0.1:{port} --preload bench.peers.flask_app:app"
FASTAPI = "uvicorn bench.peers.fast_app:app --port {port} --workers 2 --no-access-log"
EXPRESS = "node bench/peers/express.js"
JSON = (
    "node bench/peers/node_modules/.bin/json-server --quiet --host 127.0.0.1 --port {port}"
    " --routes bench/peers/routes.json {database}"
)
DISK = "on the disk"

SERVICE, MATCHING, ONE_WORKER = "the service", "the service, matching all", "the service, 1 worker"
ALONE, GTHREAD = "the service, a commit a request", "the service on gthread"
CEILINGS = ("ceiling, sync", "ceiling, gthread")
RAW = "raw apsw"

SERVERS = {
    SERVICE: Kind(DISK),
    MATCHING: Kind(DISK, environ={"LIVECHAT_MATCH": "token,phone,email"}),
    ONE_WORKER: Kind(DISK, environ={"WEB_CONCURRENCY": "1"}),
    GTHREAD: Kind(DISK, environ={"GUNICORN_CMD_ARGS": "-k gthread --threads 16"}),
    # A sync worker has one request at a time, so that no two can share a commit.
    ALONE: Kind(DISK, environ={"GUNICORN_CMD_ARGS": "-k sync"}),
    CEILINGS[0]: Kind("nothing", f"{CEILING} -k sync", keeps=""),
    CEILINGS[1]: Kind("nothing", f"{CEILING} -k gthread --threads 16", keeps=""),
    RAW: Kind(DISK, f"{sys.executable} -m bench.ceiling {{database}} {{seconds}}"),
    "Flask": Kind(DISK, FLASK),
    "Express, FULL": Kind(DISK, EXPRESS, {"SYNCHRONOUS": "FULL"}),
    "Express, NORMAL": Kind("a while before the disk", EXPRESS),
    "FastAPI": Kind(DISK, FASTAPI),
    "json-server": Kind("a while before the disk", JSON, keeps="json"),
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


def memory(server):
    """Return MB of the largest worker of a server, and of all its processes, each page once."""
    largest = total = 0
    ps = ["ps", "-o", "pid=", "-s", str(server.process.pid)]
    pids = [int(pid) for pid in subprocess.run(ps, capture_output=True).stdout.split()]
    for pid in pids:
        with contextlib.suppress(OSError):  # one that has just ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
            if pid != server.process.pid or len(pids) == 1:
                largest = max(largest, 1.024e-3 * sizes["Rss"])
            total += 1.024e-3 * sizes["Pss"]
    return largest, total


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
