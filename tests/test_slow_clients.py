"""Slow and stubborn clients: nobody else waits for them, and they are told 408 (docs/deploying.md)."""

import json
import os
import re
import socket
import struct
import time
from contextlib import ExitStack, closing, suppress

import pytest

from tests.locks import held
from tests.server import PATH, wait_until
from tests.slow import ATTACKS, HEAD, WHOLE, Attack, fill, longest, wait_of_others

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
TIMEOUT = (
    b'{"success":false,"error":"The request did not come in time [error-request-timeout]",'
    b'"errorType":"error-request-timeout"}'
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
UNFINISHED = [
    name for name in ATTACKS if name.startswith(("half", "a head", "a body that is asked"))
]


def ask(client):
    """Return the answer to a small request on a connection."""
    client.sendall(LIVEZ)
    return client.recv(65_536)


@pytest.mark.parametrize("connections", [20, 200])
def test_others_register_while_slow_clients_are_there(server, connections):
    idle = wait_of_others(server, 0.5)
    with Attack(server.port, connections):
        waits = wait_of_others(server, 1.5)
    assert max(waits) < longest(idle)
    assert server.register("after")[0] == 200


@pytest.mark.parametrize("files", [None, 300])
def test_600_silent_connections_shut_nobody_out(make_server, files):
    # There is room for 500; and for less than the files that a process may have open.
    command = files and ["sh", "-c", f"ulimit -n {files} && exec gunicorn"]
    server = make_server(command=command).wait()
    idle = wait_of_others(server, 0.5)
    with ExitStack() as stack:
        quiet, busy = (stack.enter_context(server.connect()) for _ in range(2))
        assert ask(quiet).startswith(b"HTTP/1.1 200 ")
        for number in range(600):
            silent = stack.enter_context(server.connect())
            if number < 300 and number % 25 == 0:
                assert server.request("GET", "/livez")[0] == 200  # so by now all of them are there
                assert ask(busy).startswith(b"HTTP/1.1 200 ")
        # Now 300 have come in one go.
        assert max(wait_of_others(server, 1)) < longest(idle)
        assert ask(silent).startswith(b"HTTP/1.1 200 ")
        # Who has been without a whole request for longest has made room for them.
        assert quiet.recv(1) == b""
        assert files or ask(busy).startswith(b"HTTP/1.1 200 ")
    assert "[ERROR]" not in server.log()


SOME = 4  # files of the database, which the worker opens meanwhile


def files(server):
    """Return how many files and connections the worker has open."""
    return len(os.listdir(f"/proc/{server.worker()}/fd"))


def answers(attack, name):
    """Return what those of a name were answered, after the 100 that some ask for."""
    got = [answer.removeprefix(CONTINUE) for answer in attack.answers[name]]
    return [answer for answer in got if answer]


def test_a_request_that_does_not_come_in_time_is_a_408_and_nobody_keeps_a_connection(
    make_server, path
):
    # One without a request is kept for 75 seconds, unless it is told otherwise.
    fill(path, 1, {f"k{number}": "x" * 4096 for number in range(2500)})
    server = make_server(GUNICORN_CMD_ARGS="--keep-alive 5").wait()
    assert server.register("other")[0] == 200
    before = files(server)
    with (
        server.connect() as silent,
        closing(socket.socket()) as deaf,
        Attack(server.port, 5 * len(ATTACKS), again=False) as attack,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        # The answer has 10 MB, which is more than a kernel takes.
        deaf.sendall(f"GET {PATH}/t0 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(lambda: files(server) > before + 2 * len(ATTACKS), "connections are open")
        wait_until(lambda: files(server) <= before + SOME, "all connections are closed")
        wait_until(lambda: all(len(answers(attack, name)) == 5 for name in UNFINISHED), "the 408s")
        assert silent.recv(1) == b""  # who asks nothing is answered nothing
        with suppress(ConnectionResetError):
            answer = b"".join(iter(lambda: deaf.recv(65_536), b""))
            head, _, body = answer.partition(b"\r\n\r\n")
            assert len(body) < int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    for name in UNFINISHED:
        for answer in answers(attack, name):
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n"), name
            assert b"\r\ncontent-type: application/json\r\n" in head.lower() + b"\r\n"
            assert b"\r\nconnection: close\r\n" in head.lower() + b"\r\n"
            assert body == TIMEOUT
    assert server.query("SELECT token FROM visitor WHERE token = 'slow'") == [["slow"]]
    log = server.log()
    assert "[ERROR]" not in log
    assert "slow" not in log
    assert log.count("Booting worker") == 1


def read_answer(answers):
    """Return the next status line and body of a connection."""
    status, length = answers.readline(), 0
    while (line := answers.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return status, answers.read(length)


def test_requests_in_any_parts_are_answered_each_once_and_in_turn(server):
    body = b'{"visitor":{"token":"one"}}'
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    chunked += b"F\r\n" + body[:15] + b"\r\nC\r\n" + body[15:] + b"\r\n0\r\n\r\n"
    two = b"\r\n" + WHOLE.replace(b"slow", b"twoo")  # empty lines before a request are allowed
    large = HEAD + b"Content-Length: 50000\r\n\r\n" + b'{"visitor":{"token":"three"}}'.ljust(50_000)
    requests = {"one": chunked, "twoo": two, "three": large}
    assert len(chunked) < 300
    for cut in (*range(1, 300, 5), *range(300, len(large), 9999)):
        with server.connect() as client, client.makefile("rb") as answers:
            for token, request in requests.items():
                for part in (request[:cut], request[cut:]):
                    client.sendall(part)
                status, body = read_answer(answers)
                assert status == b"HTTP/1.1 200 OK\r\n"
                assert json.loads(body)["visitor"]["token"] == token
    assert server.query("SELECT count(*) FROM visitor") == [[3]]


@pytest.mark.parametrize("more", [WHOLE, LIVEZ[:5], b"nonsense"])
@pytest.mark.parametrize("late", [False, True])
def test_who_sends_more_before_the_answer_gets_that_answer_and_no_other(server, more, late):
    first = WHOLE.replace(b"slow", b"once")
    with held(server.database, "transaction") as let_go, server.connect() as client:
        if late:
            client.sendall(first)
            server.request("GET", "/livez")  # so by now the registration waits
            client.sendall(more)
            server.request("GET", "/livez")
        else:
            client.sendall(first + more)
        let_go()
        answer = b"".join(iter(lambda: client.recv(65_536), b""))
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert server.query("SELECT token FROM visitor") == [["once"]]


@pytest.mark.parametrize("broken", [b"ZZ\r\n\r\n", b"1\r\nxx\r\n", b"0\r\nX"])
def test_a_body_that_nobody_reads_and_that_is_none_is_an_incomplete_one(server, broken):
    server.register("t")
    head = f"DELETE {PATH}/t HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    _, body = server.raw(head + broken)
    assert json.loads(body)["errorType"] == "error-incomplete-body"
    assert server.query("SELECT token FROM visitor") == [["t"]]


def test_a_connection_may_have_any_number_of_requests(server):
    with server.connect() as client:
        for _ in range(200):
            answer = ask(client)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" not in answer.lower()


def test_a_stop_does_not_wait_for_who_asks_nothing(server):
    with Attack(server.port, 20, ("nothing", "a request, and is silent")):
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 5  # who is to send a request has 10


def reset(client):
    """End a connection in the way that the server learns of at once."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def erase_and_go(server):
    """Erase the visitor "gone", and reset the connection once that is committed."""
    client = server.connect()
    client.sendall(f"DELETE {PATH}/gone HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    wait_until(lambda: not server.query("SELECT 1 FROM visitor"), "it is committed")
    reset(client)
    assert server.request("GET", f"{PATH}/gone")[0] == 400


def test_an_erasure_is_finished_and_logged_also_where_its_client_has_gone(server):
    """The log has whom to erase again after a restore."""
    id_ = server.register("gone", name="Secret")[1]["visitor"]["_id"]
    with held(server.database, "older state") as let_go:  # so that the erasure waits
        erase_and_go(server)
        let_go()
    wait_until(lambda: f"Erased the visitor {id_}" in server.log(), "it is logged")
    wal = server.database.with_name("livechat.db-wal")
    wait_until(lambda: wal.stat().st_size == 0, "its bytes are gone")
    assert b"Secret" not in server.database.read_bytes()


def test_a_stop_waits_for_an_erasure_whose_client_has_gone(server):
    id_ = server.register("gone")[1]["visitor"]["_id"]
    with held(server.database, "older state"):  # so that the erasure waits
        erase_and_go(server)
        assert server.stop() == 0
    assert f"Erased the visitor {id_}" in server.log()


def test_requests_whose_clients_have_gone_take_no_room_from_others(make_server):
    server = make_server(GUNICORN_CMD_ARGS="--worker-connections 20").wait()
    with held(server.database, "transaction"):  # so that they go on waiting
        for number in range(30):
            client = server.connect()
            body = f'{{"visitor":{{"token":"t{number}"}}}}'
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert server.request("GET", "/livez")[0] == 200  # so it has been read by now
            reset(client)
        assert [server.request("GET", "/livez")[0] for _ in range(20)] == [200] * 20


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_large_last_answer_that_is_taken_slowly_arrives_whole(make_server, version):
    server = make_server(LIVECHAT_AGENT="agent:secret").wait()
    fields = [{"key": f"k{n}", "value": "v" * 4000, "overwrite": True} for n in range(15)]
    for n in range(65):  # of which a page has 4 MB
        assert server.register(f"large{n}", customFields=fields)[0] == 200
    lines = (
        f"GET /api/v1/livechat/visitors.search?term=&count=100 HTTP/{version}",
        *("Host: x", "X-User-Id: agent", "X-Auth-Token: secret", "Connection: close", "\r\n"),
    )
    with closing(socket.socket()) as client:
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall("\r\n".join(lines).encode())
        answer = b"".join(iter(lambda: client.recv(65_536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(json.loads(body)["visitors"]) > 60
    assert "Unforeseen" not in server.log()


def test_after_an_attack_all_connections_and_files_are_let_go(server):
    assert wait_of_others(server, 0.2)
    before = files(server)
    with Attack(server.port, 100):
        wait_until(lambda: files(server) > before + 50, "connections are open")
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
        client.sendall(data)
        answer = b"".join(iter(lambda: client.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.endswith(b'"errorType":"error-invalid-request"}')


def test_empty_lines_without_end_hold_up_nobody(server):
    with server.connect() as client, suppress(OSError):
        for _ in range(1000):
            client.sendall(b"\r\n" * 10_000)
    assert server.register("after")[0] == 200
    assert "Refused with 400: There are too many empty lines before the request" in server.log()


def test_a_head_that_is_too_large_is_refused_while_it_comes(server):
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n" + b"".join(b"X: %8000d\r\n" % n for n in range(12)))
        assert client.recv(65_536).startswith(b"HTTP/1.1 431 ")


def test_a_body_that_nobody_reads_is_a_part_of_its_request_all_the_same(server):
    with server.connect() as client, client.makefile("rb") as answers:
        for _ in range(20):
            client.sendall(b"DELETE /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
            server.request("GET", "/livez")  # so that the rest comes a moment later
            client.sendall(b"{}")
            assert read_answer(answers)[0] == b"HTTP/1.1 404 Not Found\r\n"
        client.sendall(WHOLE)
        assert read_answer(answers)[0] == b"HTTP/1.1 200 OK\r\n"


def test_an_empty_line_before_a_request_is_waited_for_as_a_part_of_it(server):
    with server.connect() as client:
        client.sendall(b"\r\n")
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 ")
