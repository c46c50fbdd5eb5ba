"""kill -9 and TERM under load: who was answered 200 is there, and the next start needs no hand."""

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from random import Random, randrange
from threading import Event

import pytest

from tests.server import is_running, wait_until

CLIENTS = 16


class Load:
    """Clients that register visitors, and update each once; `answered` has them by token."""

    def __init__(self):
        self.answered = {}
        self._clients = 0

    @contextmanager
    def on(self, server):
        """Let the clients run meanwhile; what they are not answered, they do not ask again."""
        enough = Event()

        def client(name):
            turn = 0
            while not enough.is_set():
                turn += 1
                for value in ("first", "second"):
                    self._register(server, f"{name}-{turn}", value)

        names = range(self._clients, self._clients + CLIENTS)
        self._clients += CLIENTS
        with ThreadPoolExecutor(CLIENTS) as pool:
            running = [pool.submit(client, name) for name in names]
            try:
                yield
            finally:
                enough.set()
        for one in running:
            one.result()

    def _register(self, server, token, value):
        fields = [{"key": "k", "value": value, "overwrite": True}]
        try:
            status, answer = server.register(token, name=f"{token}-{value}", customFields=fields)
        except (OSError, HTTPException, json.JSONDecodeError):
            return  # killed meanwhile
        assert status == 200
        self.answered[token] = answer["visitor"]

    def wait_for(self, number):
        """Wait until so many more visitors are answered."""
        wanted = len(self.answered) + number
        wait_until(lambda: len(self.answered) >= wanted, "visitors are answered")

    def assert_kept(self, server):
        """Look for everybody, with all fields: as answered last, or as asked for after that."""
        rows = server.query("SELECT token, id, username, name, fields FROM visitor")
        kept = {row[0]: row[1:] for row in rows}
        for token, visitor in self.answered.items():
            id_, username, name, fields = kept[token]
            assert (id_, username) == (visitor["_id"], visitor["username"])
            value = name.removeprefix(f"{token}-")
            assert json.loads(fields) == {"k": value}
            assert value in (visitor["livechatData"]["k"], "second")
        usernames = [username for _, username, _, _ in kept.values()]
        assert len(set(usernames)) == len(usernames)
        assert server.query("PRAGMA integrity_check") == [["ok"]]


def a_worker(server, random):
    """Kill the worker; another one comes."""
    with suppress(ProcessLookupError):  # it has ended by itself since it was looked for
        os.kill(server.worker(), signal.SIGKILL)


def the_master(server, random):
    """Kill the master alone, with which its worker ends."""
    workers = server.workers()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not any(map(is_running, workers)), "the worker ends", 5)


def the_whole_group(server, random):
    """Kill all at one moment."""
    server.kill()


@pytest.mark.parametrize("kill", [a_worker, the_master, the_whole_group])
def test_kill_9_under_load_loses_no_answered_visitor(make_server, often, capsys, kill):
    seed = often(1, randrange(10**6))
    random = Random(seed)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])  # always the same one, as for a real service
    load = Load()
    kills = often(2, 34)
    server = None
    for _ in range(kills):
        if server is None or server.process.poll() is not None:
            server = make_server(PORT=port).wait()  # which needs no hand
        with load.on(server):
            load.wait_for(random.randrange(1, 200))
            kill(server, random)
            if kill is a_worker:
                load.wait_for(50)
        if kill is not a_worker:
            server = make_server(PORT=port).wait()
        load.assert_kept(server)
        assert server.register("next")[0] == 200
    if often(False, True):
        with capsys.disabled():
            print(f"\n{kills} times kill -9 of {kill.__name__}, seed {seed}:", end=" ")
            print(f"{len(load.answered)} answered visitors, none lost")


def test_the_worker_ends_with_its_master_also_where_nobody_asks_it(server):
    the_master(server, None)


def test_term_under_load_finishes_what_runs_and_loses_no_answered_visitor(make_server, often):
    load = Load()
    for _ in range(often(2, 20)):
        server = make_server().wait()
        with load.on(server):
            load.wait_for(100)
            assert server.stop() == 0
        assert "Unforeseen" not in server.log()
        load.assert_kept(server)
