"""The real gunicorn: what only a socket, a signal or a process shows."""

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.locks import held
from tests.server import PATH, ROOT, is_running, wait_until

TYPE = "Content-Type: application/json\r\n"
REGISTER = b'{"visitor":{"token":"t"}}'
LARGE = 65_536  # bytes that a body may have


def post(body, headers=TYPE, length=None):
    """Return the bytes of a registration; `length` is what it announces."""
    length = len(body) if length is None else length
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n"
    return head.encode() + body


def chunked(body):
    """Return the bytes of a registration in one chunk, without its end."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{TYPE}Transfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"%x\r\n%s\r\n" % (len(body), body)


@pytest.mark.parametrize(
    "sent",
    [
        post(b"", length=LARGE + 1),
        post(b"", length=10_000_000),
        post(b" " * 1000, length=LARGE + 1),
        chunked(b" " * (LARGE + 1)),
    ],
)
def test_a_413_arrives_while_the_client_still_sends(server, sent):
    with server.connect() as client:
        client.sendall(sent)
        assert client.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_64_kib_is_not_too_large(server):
    for sent in (post(REGISTER.ljust(LARGE)), chunked(REGISTER.ljust(LARGE)) + b"0\r\n\r\n"):
        assert server.raw(sent)[0].startswith("HTTP/1.1 200 ")


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
    server.request("POST", f"{PATH}?secret", b'{"secret": 1}', {"Content-Type": "application/json"})
    server.request("DELETE", f"{PATH}/secret")
    server.raw(b"SECRET /secret HTTP/1.1\r\nHost: x\r\n\r\n")
    server.raw(b"GET /secret HTTP/9\r\n\r\n")
    assert server.stop() == 0
    log = server.log()
    assert "secret" not in log.lower().replace(str(server.database).lower(), "")
    own = rf"http://127\.0\.0\.1:{server.port}|LIVECHAT_HOST=127\.0\.0\.1"
    assert "127.0.0.1" not in re.sub(own, "", log)
    lines = re.findall(r"\[INFO\] ([A-Z]+ \S+ \d+) \d+ ms$", log, re.MULTILINE)
    lines = [line for line in lines if line != "GET - 404"]
    assert lines == [f"POST {PATH} 200", f"POST {PATH} 400", f"DELETE {PATH}/{{token}} 200"]
    assert len(re.findall(r"\[WARNING\] Refused with 400: The request is not valid HTTP", log)) == 2


def test_after_an_orderly_stop_the_database_file_alone_holds_every_visitor(make_server):
    server = make_server().wait()
    server.register("a")
    assert server.stop() == 0
    assert not server.database.with_name("livechat.db-wal").exists()
    shutil.copy(server.database, server.database.with_name("copy.db"))
    server.database = server.database.with_name("copy.db")
    assert server.query("SELECT token FROM visitor") == [["a"]]


def test_the_access_log_is_in_the_configured_format_a_line_a_request(make_server):
    server = make_server(GUNICORN_CMD_ARGS="--access-logfile -").wait()
    for _ in range(3):
        server.request("GET", "/livez")
    server.register("t")
    assert server.stop() == 0
    lines = re.findall(r"^\[[^]]+ [+-]\d{4}\] (\d+) (\d+) bytes \d+ ms$", server.log(), re.M)
    lines = [line for line in lines if line[0] != "404"]  # those of the start
    assert lines[:3] == [("200", "15")] * 3
    assert [status for status, _ in lines] == ["200"] * 4
    arguments = "--access-logfile - --access-logformat '%(m)s gave %(s)s'"
    server = make_server(GUNICORN_CMD_ARGS=arguments).wait()
    server.request("GET", "/livez")
    assert server.stop() == 0
    assert server.log().count("\nGET gave 200\n") == 1


@pytest.mark.parametrize(
    "options", [{"WEB_CONCURRENCY": "4"}, {"GUNICORN_CMD_ARGS": "--workers 4"}], ids=str
)
def test_there_is_one_worker_whatever_is_asked_for(make_server, options):
    server = make_server(**options).wait()
    said = "there is always one worker: SQLite has one writer"
    assert server.log().count(said) == len(options.keys() - {"WEB_CONCURRENCY"})
    before = server.log().count(said)
    server.process.send_signal(signal.SIGTTIN)
    wait_until(lambda: server.log().count(said) == before + 1, "the log says so")
    old = server.worker()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.workers() and old not in server.workers(), "the old one ends")
    assert server.register("t")[0] == 200
    assert server.stop() == 0
    assert server.log().count("Booting worker") == 2


def test_term_finishes_a_request_that_is_still_coming_and_exits_0(server):
    with server.connect() as client:
        # The server has taken it up: it asks for the body, and waits.
        client.sendall(post(b"", TYPE + "Expect: 100-continue\r\n", length=len(REGISTER)))
        assert client.recv(65536).startswith(b"HTTP/1.1 100 ")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Handling signal: term" in server.log(), "TERM has come")
        client.sendall(REGISTER)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert server.process.wait(20) == 0
    assert server.query("SELECT token FROM visitor") == [["t"]]


def test_term_finishes_a_registration_that_waits_for_another_program_for_4_seconds(server):
    with held(server.database, "transaction") as let_go, server.connect() as client:
        asked = time.monotonic()
        client.sendall(post(REGISTER))
        server.request("GET", "/livez")  # so by now the registration waits
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Handling signal: term" in server.log(), "TERM has come")
        with contextlib.suppress(subprocess.TimeoutExpired):  # 5 seconds are all it waits
            server.process.wait(asked + 4 - time.monotonic())
        let_go()
        answer = client.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert server.process.wait(20) == 0
    assert server.query("SELECT token FROM visitor") == [["t"]]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"LIVECHAT_DB": "/usr"}, "/usr: a folder, not a file"),
        ({"LIVECHAT_DB": str(ROOT / "README.md")}, f"{ROOT / 'README.md'}: not a SQLite database"),
        ({"LIVECHAT_DB": "/proc/livechat.db"}, "/proc/livechat.db: cannot be used: No such file"),
        ({"WEB_CONCURRENCY": "x"}, "'x'"),
        ({"GUNICORN_CMD_ARGS": "--reload"}, "--reload would not load the code again"),
        (
            {"GUNICORN_CMD_ARGS": f"--certfile {ROOT}/README.md --keyfile {ROOT}/README.md"},
            "TLS is for a proxy in front",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_used_stops_the_start(make_server, environ, said):
    mode = os.stat(ROOT / "README.md").st_mode
    server = make_server(**environ)
    assert server.process.wait(20) != 0
    assert said in server.log()
    if "WEB_CONCURRENCY" not in environ:  # which gunicorn judges, in its own words
        assert len(said_at_the_start(server)) == 1
    assert not server.database.is_relative_to(server.output.parent) or not server.database.exists()
    assert os.stat(ROOT / "README.md").st_mode == mode


def said_at_the_start(server):
    return [line for line in server.log().splitlines() if "[INFO]" not in line]


class Clients:
    """12 clients that register, half of them on connections that they keep.

    A context, in which they run. A client ends once it is refused a connection.
    """

    def __init__(self, server):
        self.server = server
        self.statuses = {}  # by token; None where no answer came
        self.lost = []  # tokens that a connection was not answered, which had an answer before
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(12)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self.join()

    def join(self):
        """Wait until all of them have ended."""
        for thread in self._threads:
            thread.join()

    def _run(self, number):
        asked = 0
        while not self._over.is_set():
            try:
                connection = self.server.http()
            except ConnectionError:
                return
            with contextlib.closing(connection):
                if number % 4 == 2:
                    self._over.wait(0.003)  # by then the worker has the connection, and no request
                goes_on, first = True, True
                while goes_on and not self._over.is_set():
                    asked += 1
                    token = f"{number}-{asked}"
                    self._register(connection, token)
                    if self.statuses[token] is None and not first:
                        self.lost.append(token)
                    # Half of them go on until an answer says that it is the last one.
                    goes_on = number % 2 and self.statuses[token] and connection.sock
                    first = False

    def _register(self, connection, token):
        self.statuses[token] = None
        body = json.dumps({"visitor": {"token": token}})
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            self.statuses[token] = answer.status

    def wait_for(self, number):
        """Wait until so many more are answered."""
        wanted = len(self.statuses) + number
        wait_until(lambda: len(self.statuses) >= wanted, "visitors are answered")

    def assert_none_lost(self, unless_refused=False):
        """Look whether everybody was answered, or at a stop was not taken up."""
        assert set(self.statuses.values()) <= {200, None if unless_refused else 200}
        assert self.lost == []
        answered = {token for token, status in self.statuses.items() if status}
        rows = {token for (token,) in self.server.query("SELECT token FROM visitor")}
        assert rows == answered
        log = self.server.log()
        assert all(line.startswith("[") for line in log.splitlines())
        assert not re.search(r"ERROR|CRITICAL|SIGKILL", log)


def test_hup_loses_no_request(make_server):
    server = make_server().wait()
    with Clients(server) as clients:
        for _ in range(3):
            clients.wait_for(50)
            old = server.worker()
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda old=old: server.workers() not in ([], [old]), "a new one boots")
            wait_until(lambda old=old: old not in server.workers(), "the old one ends")
        clients.wait_for(50)
    assert server.stop() == 0
    clients.assert_none_lost()


def test_usr2_loses_no_request(make_server):
    server = make_server().wait()
    listening = r"Listening at: \S+ \((\d+)\)"
    with Clients(server) as clients:
        clients.wait_for(50)
        server.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: server.log().count("Booting worker") == 2, "the new master has one too")
        clients.wait_for(50)
        assert server.stop() == 0  # the old one
        clients.wait_for(50)
    new = int(re.findall(listening, server.log())[-1])
    assert new != server.process.pid
    os.kill(new, signal.SIGTERM)
    wait_until(lambda: not is_running(new), "the new one ends")
    clients.assert_none_lost()


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["the master", "all of them"])
def test_term_loses_no_request(make_server, kill):
    server = make_server().wait()
    with Clients(server) as clients:
        clients.wait_for(100)
        kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(20) == 0
        clients.join()
    clients.assert_none_lost(unless_refused=True)


def test_a_worker_that_ends_after_so_many_requests_loses_none(make_server):
    server = make_server(GUNICORN_CMD_ARGS="--max-requests 50").wait()
    with Clients(server) as clients:
        wait_until(lambda: server.log().count("Booting worker") >= 4, "others follow the first")
    assert server.stop() == 0
    clients.assert_none_lost()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_a_stop_while_the_worker_boots_is_one(make_server, number):
    for _ in range(2):
        server = make_server()
        wait_until(lambda server=server: "Booting worker" in server.log(), "a worker boots")
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert "SIGKILL" not in server.log()


def test_a_port_that_is_taken_stops_the_start_in_one_line_and_leaves_no_database(
    make_server, tmp_path
):
    start = time.monotonic()
    make_server(LIVECHAT_DB=str(tmp_path / "other.db")).wait()
    usual = time.monotonic() - start
    with socket.create_server(("127.0.0.1", 0)) as taken:
        start = time.monotonic()
        port = taken.getsockname()[1]
        server = make_server(PORT=str(port))
        assert server.process.wait(20) != 0
        took = time.monotonic() - start
    assert took < 3 * usual  # gunicorn alone tries for five seconds
    (line,) = said_at_the_start(server)
    assert line == (
        f"127.0.0.1:{port}: cannot listen there: Address already in use;"
        " PORT and LIVECHAT_HOST name another address"
    )
    assert not server.database.exists()


@pytest.mark.parametrize("host", ["a..b", 64 * "a"])
def test_what_no_host_can_be_called_stops_the_start_in_one_line(make_server, host):
    server = make_server(LIVECHAT_HOST=host)
    assert server.process.wait(20) != 0
    (line,) = said_at_the_start(server)
    assert line == (
        f"{host}:0: cannot listen there: not a host's name; PORT and LIVECHAT_HOST name another"
        " address"
    )


def test_it_listens_on_a_unix_socket(make_server, tmp_path):
    socket_path = str(tmp_path / "s")
    for _ in range(2):  # also where the last one has left its socket
        server = make_server(
            GUNICORN_CMD_ARGS=f"--bind unix:{socket_path}",
            LIVECHAT_RATE_LIMIT="2",
            LIVECHAT_TRUSTED_PROXIES="1",
        ).wait()
        assert server.port == socket_path
        for number in range(3):  # each client counts by itself
            headers = {"X-Forwarded-For": f"192.0.2.{number}", "Content-Type": "application/json"}
            assert server.request("POST", PATH, REGISTER, headers)[0] == 200
        statuses = [server.request("GET", f"{PATH}/t")[0] for _ in range(3)]
        assert sorted(statuses) in ([200, 200, 429], [200, 200, 200])  # where a minute ends
        server.kill()


def test_gunicorn_alone_in_the_checkout_and_make_run_listen_on_this_machine_alone(make_server):
    # On port 3000 where it is free; the port is not what this shows.
    for command, port in ((["gunicorn"], None), (["make", "-s", "run"], "0")):
        server = make_server(command=command, PORT=port, LIVECHAT_HOST=None)
        listening = wait_until(
            lambda server=server: re.search(
                r"Listening at: http://(\S+):\d+|(\S+):3000: cannot listen", server.log()
            ),
            "the server listens",
        )
        assert (listening[1] or listening[2]) == "127.0.0.1"
        server.kill()
        server.output.unlink()


def test_all_processes_together_need_less_than_60_mb(server):
    for number in range(20):
        server.register(f"t{number}")
    kib = 0
    for pid in (server.process.pid, server.worker()):  # each page once: proc_pid_smaps(5)
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kib += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    assert 1.024e-3 * kib < 60


def test_no_control_socket_is_made(server):
    folder = server.database.parent
    assert not (folder / ".gunicorn").exists()


def test_a_connection_is_kept_for_longer_than_5_seconds(server):
    # At which clients and proxies ask again, and would lose the race with the close.
    with server.connect() as client:
        for last in (False, True):
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = client.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" not in answer.lower()
            assert last or select.select([client], [], [], 6) == ([], [], [])


def test_how_long_a_connection_is_kept_can_be_set(make_server):
    server = make_server(GUNICORN_CMD_ARGS="--keep-alive 1").wait()
    with server.connect() as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 200 ")
        assert client.recv(65_536) == b""


OTHERS = {
    "gthread": "gunicorn -k gthread --threads 8",
    "sync": "gunicorn -k sync",
    "gthread without our settings": "gunicorn -k gthread --threads 8 -c {folder}/empty.py"
    " -b 127.0.0.1:0 app:get_app()",
    "waitress": "waitress-serve --listen=127.0.0.1:0 --call app:get_app",
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_servers_serve_as_well_on_a_fresh_folder(make_server, tmp_path, other):
    (tmp_path / "empty.py").touch()
    database = tmp_path / "new" / "livechat.db"
    command = OTHERS[other].format(folder=tmp_path).split()
    server = make_server(command=command, LIVECHAT_DB=str(database)).wait()
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
    assert server.request("GET", f"{PATH}/t7")[2]["visitor"]["token"] == "t7"
    assert server.request("DELETE", f"{PATH}/t7")[0] == 200
    assert server.request("GET", "/readyz")[0] == 200
    if other in ("gthread", "sync"):  # without our settings they say so in their own way
        head, _ = server.raw(b"GET /secret\x01 HTTP/1.1\r\n\r\n")
        assert head.startswith("HTTP/1.1 400 ")
    assert "secret" not in server.log()
    server.process.send_signal(signal.SIGINT if other == "waitress" else signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert not database.with_name("livechat.db-wal").exists()
    assert server.query("SELECT count(*) FROM visitor") == [[31]]
