"""The real gunicorn: what only a socket, a signal or a process shows."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import threading

import pytest

from tests.server import PATH, ROOT, wait_until

TYPE = "Content-Type: application/json\r\n"
REGISTER = b'{"visitor":{"token":"t"}}'


def post(body, headers=TYPE, length=None):
    """Return the bytes of a registration; `length` is what it announces."""
    length = len(body) if length is None else length
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n"
    return head.encode() + body


def test_a_413_arrives_while_the_client_still_sends(server):
    with server.connect() as client:
        client.sendall(post(b"", length=10_000_000))
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_waits_for_100_continue_gets_it(server):
    with server.connect() as client:
        client.sendall(post(b"", TYPE + "Expect: 100-continue\r\n", length=len(REGISTER)))
        assert client.recv(65536).startswith(b"HTTP/1.1 100 ")
        client.sendall(REGISTER)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("arguments", [None, "--access-logfile -"])
def test_the_log_has_a_line_a_request_and_nothing_of_the_client(make_server, arguments):
    server = make_server(GUNICORN_CMD_ARGS=arguments).wait()
    server.register("secret", name="secret", email="secret@example.org")
    server.request("GET", "/secret?secret", headers={"User-Agent": "secret", "Referer": "secret"})
    server.request("POST", f"{PATH}?secret", b'{"secret": 1}')
    server.raw(b"SECRET /secret HTTP/1.1\r\nHost: x\r\n\r\n")
    server.raw(b"GET /secret HTTP/9\r\n\r\n")
    assert server.stop() == 0
    log = server.log()
    assert "secret" not in log.lower().replace(str(server.database).lower(), "")
    assert "127.0.0.1" not in log.replace(f"http://127.0.0.1:{server.port}", "")
    lines = re.findall(r"\[INFO\] ([A-Z]+ \S+ \d+) \d+ ms$", log, re.MULTILINE)
    lines = [line for line in lines if line != "GET - 404"]
    assert lines == [f"POST {PATH} 200", f"POST {PATH} 400", "TRACE - 404"]


def test_the_start_says_which_database_it_opened(make_server):
    server = make_server().wait()
    assert f"new database at {server.database}\n" in server.log()
    assert "LIVECHAT_AGENT is not set: visitors.info and visitors.search answer 401" in server.log()
    for token in "abc":
        server.register(token)
    assert server.stop() == 0
    server = make_server(LIVECHAT_AGENT="agent:secret").wait()
    assert f"opened {server.database} (3 visitors)\n" in server.log()
    assert "LIVECHAT_AGENT" not in server.log()
    assert "secret" not in server.log()


def test_after_an_orderly_stop_the_database_file_alone_holds_every_visitor(make_server):
    server = make_server().wait()
    server.register("a")
    assert server.stop() == 0
    assert not server.database.with_name("livechat.db-wal").exists()
    shutil.copy(server.database, server.database.with_name("copy.db"))
    server.database = server.database.with_name("copy.db")
    assert server.query("SELECT token FROM visitor") == [["a"]]


@pytest.mark.parametrize(("workers", "expected"), [(None, 2), ("1", 1), ("4", 4)])
def test_web_concurrency_is_the_number_of_workers(make_server, workers, expected):
    server = make_server(WEB_CONCURRENCY=workers).wait()
    wait_until(lambda: len(server.workers()) == expected, "all workers are there")


def test_term_finishes_the_running_request_and_exits_0(server):
    with server.connect() as client:
        # A request that is running: its worker asks for the body, and waits.
        client.sendall(post(b"", TYPE + "Expect: 100-continue\r\n", length=len(REGISTER)))
        assert client.recv(65536).startswith(b"HTTP/1.1 100 ")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Handling signal: term" in server.log(), "TERM has come")
        client.sendall(REGISTER)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert server.process.wait(20) == 0
    assert server.query("SELECT token FROM visitor") == [["t"]]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"LIVECHAT_DB": ":memory:"},
            "LIVECHAT_DB: ':memory:' is not a file; give the path of one",
        ),
        ({"LIVECHAT_DB": ""}, "LIVECHAT_DB: the name is empty"),
        ({"LIVECHAT_MATCH": "phone"}, "LIVECHAT_MATCH: 'phone' is none of"),
        ({"LIVECHAT_DEPARTMENTS": "a:"}, "LIVECHAT_DEPARTMENTS: 'a:' is not id:name"),
        ({"LIVECHAT_DB": "/"}, "/: a folder, not a file"),
        ({"LIVECHAT_DB": str(ROOT / "README.md")}, f"{ROOT / 'README.md'}: not a SQLite database"),
        ({"LIVECHAT_DB": "/proc/livechat.db"}, "/proc/livechat.db: cannot be used: No such file"),
        ({"PORT": "x"}, "'x' is not a valid port number."),
        ({"PORT": "70000"}, "PORT: '70000' is not a port, which ends at 65535"),
        ({"WEB_CONCURRENCY": "x"}, "'x'"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_meant_stops_the_start(make_server, environ, said):
    mode = os.stat(ROOT / "README.md").st_mode
    server = make_server(**environ)
    assert server.process.wait(20) != 0
    assert said in server.log()
    if "LIVECHAT" in str(environ):  # gunicorn judges the others, in its own words
        assert len([line for line in server.log().splitlines() if "[INFO]" not in line]) == 1
    assert os.stat(ROOT / "README.md").st_mode == mode
    assert not (ROOT / "README.md-lock").exists()


def test_hup_replaces_the_workers_and_no_request_notices(make_server):
    server = make_server().wait()
    over = threading.Event()
    answers = []

    def register(name):
        number = 0
        while not over.is_set():
            number += 1
            with server.connect() as client:
                # A request that comes a moment after its connection, which a worker has by then.
                over.wait(0.003)
                client.sendall(post(b'{"visitor":{"token":"%s-%d"}}' % (name, number)))
                answers.append(client.recv(65_536)[:13])

    def register_on_one_connection():
        """Begin another one only where the last answer has said that it is the last."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        number = 0
        while not over.is_set():
            number += 1
            connection.request("POST", PATH, b'{"visitor":{"token":"kept-%d"}}' % number)
            answer = connection.getresponse()
            answers.append(b"HTTP/1.1 %d " % answer.status)
            answer.read()
        connection.close()

    threads = [threading.Thread(target=register, args=(name,)) for name in (b"a", b"b")]
    threads.append(threading.Thread(target=register_on_one_connection))
    for thread in threads:
        thread.start()
    for _ in range(3):
        before = set(server.workers())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda before=before: len(set(server.workers()) - before) == 2, "new ones boot")
        wait_until(lambda before=before: not set(server.workers()) & before, "the old ones end")
    over.set()
    for thread in threads:
        thread.join()
    assert set(answers) == {b"HTTP/1.1 200 "}
    assert server.stop() == 0
    assert server.query("SELECT count(*) FROM visitor") == [[len(answers)]]
    assert all(line.startswith("[") for line in server.log().splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_a_stop_while_the_workers_boot_is_one(make_server, number):
    for _ in range(4):
        server = make_server()
        wait_until(lambda server=server: "Booting worker" in server.log(), "a worker boots")
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert "SIGKILL" not in server.log()


def test_a_port_that_is_taken_stops_the_start(make_server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = make_server(PORT=str(taken.getsockname()[1]))
        assert server.process.wait(20) != 0
    assert "already in use" in server.log()


def test_gunicorn_alone_in_the_checkout_and_make_run_listen_on_this_machine_alone(make_server):
    # On port 3000 where it is free; the port is not what this shows.
    for command, port in ((["gunicorn"], None), (["make", "-s", "run"], "0")):
        server = make_server(command=command, PORT=port, LIVECHAT_HOST=None)
        listening = wait_until(
            lambda server=server: re.search(r"Listening at: http://(\S+):\d+|in use", server.log()),
            "the server listens",
        )
        assert listening[1] in ("127.0.0.1", None)
        server.kill()
        server.output.unlink()


def test_no_worker_needs_more_than_50_mb(server):
    for number in range(20):
        server.register(f"t{number}")
    for worker in server.workers():
        resident = int(
            subprocess.run(
                ["ps", "-o", "rss=", "-p", str(worker)], capture_output=True, check=True
            ).stdout
        )
        assert resident < 50_000  # KiB


def test_no_control_socket_is_made(server):
    folder = server.database.parent
    assert not (folder / ".gunicorn").exists()


@pytest.mark.parametrize("arguments", ["-k gthread --threads 8", "-k sync", "-k gevent"])
def test_other_workers_of_gunicorn_serve_as_well(make_server, arguments):
    server = make_server(GUNICORN_CMD_ARGS=arguments).wait()
    statuses = []
    threads = [
        threading.Thread(target=lambda n=n: statuses.append(server.register(f"t{n}")[0]))
        for n in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 32
    head, _ = server.raw(b"GET /secret\x01 HTTP/1.1\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 ")
    assert "secret" not in server.log()
