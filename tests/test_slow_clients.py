"""Slow and stubborn clients: nobody else waits for them, and they are told 408 (docs/deploying.md)."""

import json
import os
import time
from contextlib import suppress

import pytest

from tests.server import PATH, wait_until
from tests.slow import ATTACKS, HEAD, WHOLE, Attack, wait_of_others

TIMEOUT = (
    b'{"success":false,"error":"The request did not come in time [error-request-timeout]",'
    b'"errorType":"error-request-timeout"}'
)
UNFINISHED = [
    name for name in ATTACKS if name.startswith(("half", "a head", "a body that is asked"))
]


@pytest.mark.parametrize("connections", [20, 200])
def test_others_register_while_slow_clients_are_there(server, connections):
    with Attack(server.port, connections):
        waits = wait_of_others(server, 1.5)
    assert sorted(waits)[len(waits) // 2] < 0.5
    assert max(waits) < 3
    assert server.register("after")[0] == 200


def test_a_request_that_does_not_come_in_time_is_a_408_and_holds_nothing(server):
    names = tuple(UNFINISHED)
    with server.connect() as silent, Attack(server.port, 3 * len(names), names, False) as attack:
        wait_until(lambda: all(len(one) >= 3 for one in attack.answers.values()), "the 408s come")
        assert silent.recv(1) == b""  # who asks nothing is answered nothing
    for name, answers in attack.answers.items():
        for answer in answers:
            answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
            if answer:
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n"), name
                assert b"\r\ncontent-type: application/json\r\n" in head.lower() + b"\r\n"
                assert b"\r\nconnection: close\r\n" in head.lower() + b"\r\n"
                assert body == TIMEOUT
    assert server.query("SELECT count(*) FROM visitor") == [[0]]
    log = server.log()
    assert "[ERROR]" not in log
    assert "slow" not in log
    assert len(server.workers()) == 2
    assert log.count("Booting worker") == 2


def read_answer(answers):
    """Return the next status line and body of a connection."""
    status, length = answers.readline(), 0
    while (line := answers.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return status, answers.read(length)


def test_requests_in_any_parts_are_answered_each_once_and_in_turn(server):
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    chunked += b'F\r\n{"visitor":{"to\r\nC\r\nken":"one"}}\r\n0\r\n\r\n'
    two, three = (WHOLE.replace(b"slow", name) for name in (b"twoo", b"tree"))
    large = HEAD + b"Content-Length: 5000\r\n\r\n" + b'{"visitor":{"token":"four"}}'.ljust(5000)
    stream = b"\r\n" + chunked + two + b"\r\n" + three + 2 * large + two
    for cut in (*range(0, 600, 7), *range(600, len(stream), 999)):
        with server.connect() as client, client.makefile("rb") as answers:
            for part in (stream[:cut], stream[cut:]):
                client.sendall(part)
            for token in ("one", "twoo", "tree", "four", "four", "twoo"):
                status, body = read_answer(answers)
                assert status == b"HTTP/1.1 200 OK\r\n"
                assert json.loads(body)["visitor"]["token"] == token
    assert server.query("SELECT count(*) FROM visitor") == [[4]]


@pytest.mark.parametrize("broken", [b"ZZ\r\n\r\n", b"1\r\nxx\r\n", b"0\r\nHost: y\r\n\r\n"])
def test_a_body_that_nobody_reads_and_that_is_none_gets_no_second_answer(server, broken):
    head = f"DELETE {PATH}/t HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    _, body = server.raw(head + broken)
    assert json.loads(body)["errorType"] == "invalid-token"


def test_a_connection_is_closed_after_64_requests_which_its_client_is_told(server):
    with server.connect() as client, client.makefile("rb") as answers:
        for number in range(1, 65):
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            head = b"".join(iter(answers.readline, b"\r\n")).lower()
            assert (b"connection: close" in head) == (number == 64)
            assert answers.read(15) == b'{"status":"ok"}'
        assert answers.read() == b""


def test_a_stop_does_not_wait_for_who_asks_nothing(server):
    with Attack(server.port, 20, ("nothing",)):
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 5


SOME = 10  # files of the database, which a worker that was not asked before opens meanwhile


def files(server):
    """Return how many files and connections the workers have open."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in server.workers())


def test_after_an_attack_all_connections_and_files_are_let_go(server):
    assert wait_of_others(server, 0.5)
    before = files(server)
    with Attack(server.port, 100):
        wait_of_others(server, 1)
        assert files(server) > before + 50
    wait_until(lambda: files(server) <= before + SOME, "connections are closed")


def test_who_never_ends_a_connection_loses_it_all_the_same(server):
    assert wait_of_others(server, 0.5)
    before = files(server)
    with Attack(server.port, 5 * len(ATTACKS), again=False):
        wait_until(lambda: files(server) > before + 2 * len(ATTACKS), "connections are open")
        wait_until(lambda: files(server) <= before + SOME, "connections are closed")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n", 400),
        (b"GET /livez HTTP/1.1\nHost: x\n\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # somebody says https
        (b"GET /" + b"x" * 9_000, 414),
        (b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\n", 414),
    ],
)
def test_what_does_not_begin_as_http_is_refused_though_more_may_come(server, data, status):
    with server.connect() as client:
        start = time.monotonic()
        client.sendall(data)
        answer = b"".join(iter(lambda: client.recv(65_536), b""))
        assert time.monotonic() - start < 8  # and not when its 10 seconds are over
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.endswith(b'"errorType":"error-invalid-request"}')


def test_empty_lines_without_end_hold_up_nobody(server):
    with server.connect() as client, suppress(OSError):
        for _ in range(1000):
            client.sendall(b"\r\n" * 10_000)
    assert server.register("after")[0] == 200
    assert "Invalid request: InvalidRequestLine" in server.log()


def test_a_head_that_is_too_large_is_refused_while_it_comes(server):
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n" + b"".join(b"X: %8000d\r\n" % n for n in range(12)))
        assert client.recv(65_536).startswith(b"HTTP/1.1 431 ")


def test_the_rest_of_a_body_that_nobody_reads_may_come_a_moment_later(server):
    with server.connect() as client, client.makefile("rb") as answers:
        for _ in range(20):
            client.sendall(b"DELETE /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
            assert read_answer(answers)[0] == b"HTTP/1.1 404 Not Found\r\n"
            client.sendall(b"{}")
        client.sendall(WHOLE)
        assert read_answer(answers)[0] == b"HTTP/1.1 200 OK\r\n"


def test_an_empty_line_before_a_request_is_waited_for_as_a_part_of_it(server):
    with server.connect() as client:
        client.sendall(b"\r\n")
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 ")
