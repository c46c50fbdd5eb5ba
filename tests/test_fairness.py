"""Nobody holds up the others: not who writes, searches, waits, goes away or reads no answer.

How long others may wait is measured first, with the server idle.
"""

import itertools
import shutil
import socket
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.locks import held
from tests.server import PATH, ROOT, wait_until
from tests.slow import LARGE, Asking, fill, longest, wait_of_others

AGENT = "X-User-Id: agent\r\nX-Auth-Token: secret\r\n"
CUSTOM_FIELD = "/api/v1/livechat/custom.field"
SEARCH = "/api/v1/livechat/visitors.search?term=&count=100&"


def get(path, headers=""):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


def post(path, body):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


# All have to be sorted for it.
SLOW_SEARCH = get(SEARCH + "offset=19000&sort=" + quote('{"name":1,"ts":1}'), AGENT)
READY = get("/readyz")


@pytest.fixture
def make_full_server(make_server, path):
    """Return a function that fills a database and starts a server on it, which has an agent."""

    def make(number, fields=(), **options):
        fill(path, number, fields)
        return make_server(LIVECHAT_AGENT="agent:secret", **options).wait()

    return make


def ask_for(server, *paths):
    """Return a function that asks for one path after the other, and returns the status."""
    turns = itertools.cycle(paths)
    return lambda: server.request("GET", next(turns))[0]


def test_another_program_that_writes_for_4_seconds_holds_up_nobody_who_reads(server):
    server.register("known")
    ask = ask_for(server, "/livez", f"{PATH}/known", "/readyz")
    idle = wait_of_others(server, 0.8, ask)
    with held(server.database, "transaction") as let_go, ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(server.register, f"t{number}") for number in range(8)]
        waits = wait_of_others(server, 4, ask)
        assert not any(one.done() for one in writing)
        let_go()
        assert {one.result()[0] for one in writing} == {200}
    assert max(waits) < longest(idle)


def test_50_searches_hold_up_nobody(make_full_server):
    server = make_full_server(20_000)
    ask = ask_for(server, "/livez", f"{PATH}/t1")
    idle = wait_of_others(server, 0.5, ask), wait_of_others(server, 0.5)
    with Asking(server, 50, SLOW_SEARCH) as searches:
        wait_until(lambda: searches.statuses[200] > 1, "searches run")
        waits = wait_of_others(server, 1, ask), wait_of_others(server, 1)
        answered = searches.statuses[200]
        wait_until(lambda: searches.statuses[200] > answered, "they still run")
    assert max(waits[0]) < longest(idle[0])
    assert max(waits[1]) < longest(idle[1])


def test_commits_of_2_seconds_hold_up_nobody_who_reads(make_full_server, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler here, which makes the disk slow")
    library = tmp_path / "slowdisk.so"
    source = ROOT / "bench" / "slowdisk.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    server = make_full_server(1, LD_PRELOAD=str(library), SLOWDISK_MS="2000")
    ask = ask_for(server, "/livez", f"{PATH}/t0")
    idle = wait_of_others(server, 0.5, ask)
    waits = []
    with ThreadPoolExecutor(1) as pool:
        for token in ("first", "second"):
            writing = pool.submit(server.register, token)
            while not writing.done():
                waits += wait_of_others(server, 0.5, ask)
            assert writing.result()[0] == 200
    assert sorted(waits)[-2] < longest(idle)  # the first slow commit may be felt once


def test_small_changes_of_a_large_visitor_hold_up_nobody(make_full_server):
    server = make_full_server(1, {f"k{number}": "x" * 4096 for number in range(15)})
    request = post(CUSTOM_FIELD, b'{"token":"t0","key":"k","value":"v","overwrite":true}')
    idle = wait_of_others(server, 1)
    with Asking(server, 200, request, once=True) as changes:
        waits = wait_of_others(server, 0.5)
        wait_until(lambda: changes.statuses.total() == 200, "all changes are answered")
    assert set(changes.statuses) == {200}
    assert max(waits) < longest(idle)


def test_who_reads_no_answer_holds_up_nobody(make_full_server):
    server = make_full_server(100, {f"k{number}": "x" * 4096 for number in range(15)})
    large, page = get(f"{PATH}/t0"), get(SEARCH, AGENT)
    idle = wait_of_others(server, 0.5)
    with ExitStack() as stack:
        for number in range(100):
            client = stack.enter_context(closing(socket.socket()))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(page if number % 2 else large)
        waits = wait_of_others(server, 2)
    assert max(waits) < longest(idle)


@pytest.mark.parametrize("request_", [SLOW_SEARCH, READY], ids=["a search", "/readyz"])
def test_1000_who_ask_for_what_takes_long_and_go_away_hold_up_nobody(make_full_server, request_):
    server = make_full_server(20_000)

    def wait_beside(request):
        """Return the longest wait of others while 1,000 ask for it and go away."""
        ask = ask_for(server, "/livez", f"{PATH}/t1")
        waits = wait_of_others(server, 0)

        def ask_and_go():
            for _ in range(1000):
                with server.connect() as client:
                    client.sendall(request)

        with ThreadPoolExecutor(1) as pool:
            attack = pool.submit(ask_and_go)
            while not attack.done():
                waits += wait_of_others(server, 0, ask) + wait_of_others(server, 0)
            attack.result()
        return max(waits + wait_of_others(server, 0.5))

    # A thousand at once take their time anyway.
    usual = wait_beside(get("/livez"))
    assert wait_beside(request_) < 5 * usual + longest(wait_of_others(server, 0.5))
    assert "Unforeseen" not in server.log()


def test_no_more_than_100_searches_wait_and_none_for_whom_nobody_waits(make_full_server):
    server = make_full_server(20_000)
    headers = dict(line.split(": ") for line in AGENT.split("\r\n") if line)
    path = SLOW_SEARCH.split()[1].decode()

    def search():
        return server.request("GET", path, headers=headers)[0]

    idle = wait_of_others(server, 0.5, search)
    with Asking(server, 300, SLOW_SEARCH, once=True) as searches:
        wait_until(lambda: searches.statuses[503] > 150, "the others are refused")
    # All are reset now, and some 100 of them would have been answered, one after the other.
    assert set(searches.statuses) <= {200, 503}
    (wait,) = wait_of_others(server, 0, search)
    assert wait < 20 * statistics.median(idle)


@pytest.mark.parametrize("number", [64, 25_000], ids=["64 requests", "requests without end"])
def test_who_sends_requests_in_one_go_holds_up_nobody_and_takes_no_memory(server, number):
    idle = wait_of_others(server, 0.5)
    before = memory(server)
    with Asking(server, 100, number * LARGE) as asking:
        waits = wait_of_others(server, 2)
        assert asking.statuses[200] > 0
    assert max(waits) < longest(idle)
    assert memory(server) - before < 50


def memory(server):
    """Return the MB that the worker has had at most."""
    status = Path(f"/proc/{server.worker()}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1.024e-3 * int(line.split()[1])
