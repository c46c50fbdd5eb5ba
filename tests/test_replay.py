"""`manage.py replay`: to a second instance of this service, and to servers that fail in every way."""

import json
import os
import signal
import socket
import ssl
import subprocess
import termios
import threading
import time
from contextlib import closing, contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import manage
import storage
from operate import replay, rocketchat
from storage.database import ERASE_TIME
from tests.database import files_of_a_database
from tests.operating import FIELD, JOHN, spawn
from tests.server import PATH, Server


@pytest.fixture
def waits(monkeypatch):
    """Let no replay wait; return the seconds it would have."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@contextmanager
def answering(answer, tls=None):
    """Serve: `answer(number, visitor)` of each request is status, headers and body, or None, which
    drops the connection; yield the URL and the visitors that were sent.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65_536  # or each answer waits 40 ms for the client's acknowledgement

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert len(body) <= 65_536
            asked.append((self.path, json.loads(body)["visitor"]))
            answered = answer(len(asked), asked[-1][1])
            if answered is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            status, headers, body = answered
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response_only(status)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = "Content-Length" in headers

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def taken(visitor):
    return 200, {}, {"visitor": {"_id": "x", **visitor}, "success": True}


def refusal(error, status=400):
    return status, {}, {"success": False, "error": error}


@pytest.fixture
def other(tmp_path):
    """A second instance of this service."""
    folder = tmp_path / "other"
    folder.mkdir()
    server = Server(folder).wait()
    yield server
    server.kill()


def test_everybody_moves_to_a_second_instance(run, fill, other, tmp_path):
    # 64 at a time, of which the last ones have too many bytes for one request
    fields = [
        {"key": f"k{n}", "value": "x" * (1 if n < 64 else 1000), "overwrite": True}
        for n in range(128)
    ]
    answers = fill(
        ("867ad6a09fc4af29f6f1f2a9cf1deaba", {}),
        ("john", JOHN | {"department": "Support", "username": "kim.jane"}, FIELD),
        ("a token/with ? 王", {"name": "Zoë"}),
        ("guest", {"username": "guest-99"}),
    )
    for part in (fields[:64], fields[64:]):
        many = fill(("many", {}, *part))
    assert len(json.dumps(fields[64:], separators=(",", ":"))) > 65_536
    url = f"http://127.0.0.1:{other.port}/"
    status, out, err = run("replay", url)
    assert (status, err) == (0, "")
    assert out.startswith(f"sent 5 visitors to {url[:-1]}, 0 refused; what changes from now on: --")
    assert sorted(os.listdir(tmp_path)) == [*files_of_a_database(tmp_path), "other"]
    for answer in (*answers, *many):
        token = answer["token"].replace(" ", "%20").replace("?", "%3F").replace("王", "%E7%8E%8B")
        there = other.request("GET", f"{PATH}/{token}")[2]["visitor"]
        for key in ("token", "username", "name", "phone", "visitorEmails", "department"):
            assert there.get(key) == answer.get(key)
        assert there.get("livechatData") == answer.get("livechatData")
    assert len(many[0]["livechatData"]) == 128
    assert run("replay", url)[0] == 0  # and again: the same
    assert other.query("SELECT count(*), max(number) FROM visitor") == [[5, 5]]


def test_who_meets_another_one_there_by_phone_brings_all_fields(run, fill, tmp_path, make_server):
    """In several requests, of which only the first one says whom it met."""
    fields = [{"key": f"k{n}", "value": "v", "overwrite": True} for n in range(100)]
    fill(("a", JOHN), ("b", {"phone": JOHN["phone"]}, *fields[:50]))
    fill(("b", {}, *fields[50:]))
    there = make_server(
        LIVECHAT_MATCH="token,phone,email", LIVECHAT_DB=str(tmp_path / "there.db")
    ).wait()
    status, out, _ = run("replay", f"http://127.0.0.1:{there.port}")
    assert (status, ", 1 met another one there;" in out) == (0, True)
    assert there.query("SELECT token FROM visitor") == [["a"]]
    met = there.request("GET", f"{PATH}/a")[2]["visitor"]
    assert met["livechatData"] == {field["key"]: "v" for field in fields}


def test_a_date_takes_only_who_was_changed_since(run, fill, other):
    fill(("old", {}), ("changed", {}))
    fill(("changed", {"name": "N"}), at=1_700_000_000_000)
    url = f"http://127.0.0.1:{other.port}"
    assert run("replay", url, "--since", "2023-01-01")[1].startswith("sent 1 visitor to")
    assert other.query("SELECT token, name FROM visitor") == [["changed", "N"]]


def test_what_changes_meanwhile_is_what_the_last_line_says(run, fill, other):
    now = int(1000 * time.time())
    fill(("a", {}), at=now - 60_000)
    url = f"http://127.0.0.1:{other.port}"
    since = run("replay", url)[1].rpartition("--since ")[2].strip()
    fill(("b", {}), at=now + 60_000)
    assert run("replay", url, "--since", since)[1].startswith("sent 1 visitor to")


def test_a_username_made_here_is_not_sent_and_one_that_was_given_is(run, fill):
    fill(("a", {}), ("b", {"username": "kim.jane"}), ("c", {"username": "guest-99"}))
    with answering(lambda number, visitor: taken(visitor)) as (url, asked):
        assert run("replay", f"{url}/prefix")[0] == 0
    assert asked == [
        ("/prefix" + PATH, {"token": "a"}),
        ("/prefix" + PATH, {"token": "b", "username": "kim.jane"}),
        ("/prefix" + PATH, {"token": "c", "username": "guest-99"}),
    ]


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": "7", "X-RateLimit-Reset": "1"}, 7, 7),
        ({"Retry-After": "0"}, 1, 1),
        ({"Retry-After": "86400"}, 600, 600),
        ({"X-RateLimit-Reset": lambda: int(1000 * time.time()) + 9_500}, 8, 9.5),
        # by the clock of a server that is an hour late
        (
            {
                "X-RateLimit-Reset": lambda: int(1000 * (int(time.time()) - 3600)) + 9_000,
                "Date": lambda: formatdate(int(time.time()) - 3600, usegmt=True),
            },
            8,
            9,
        ),
        ({"X-RateLimit-Reset": "1656482701392"}, 1, 1),
        ({"X-RateLimit-Reset": "soon"}, 1, 1),
        ({}, 1, 1),
    ],
)
def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(
    run, fill, waits, headers, least, most
):
    fill(("a", {}), ("b", {}))

    def answer(number, visitor):
        if number == 2:
            values = {
                name: value() if callable(value) else value for name, value in headers.items()
            }
            return 429, values, {"success": False, "error": "Too many [error-too-many-requests]"}
        return taken(visitor)

    with answering(answer) as (url, asked):
        status, out, err = run("replay", url)
    assert (status, err) == (0, "")
    assert out.startswith("sent 2 visitors")
    assert [visitor["token"] for _, visitor in asked] == ["a", "b", "b"]
    assert len(waits) == 1
    assert least <= waits[0] <= most


def test_a_rate_limit_may_come_as_often_as_it_likes(run, fill, waits):
    fill(("a", {}))

    def answer(number, visitor):
        return (429, {"Retry-After": "1"}, {}) if number < 30 else taken(visitor)

    with answering(answer) as (url, _):
        assert run("replay", url)[0] == 0
    assert waits == [1] * 29


FAILURES = {
    "500": lambda number, visitor: (500, {}, {"success": False, "error": "Internal [error]"}),
    "502 of a proxy": lambda number, visitor: (502, {"Content-Type": "text/html"}, b"<html>"),
    "503": lambda number, visitor: (503, {"Retry-After": "5"}, {"error": "unavailable"}),
    "408": lambda number, visitor: (408, {}, b""),
    "dropped": lambda number, visitor: None,
    "half an answer": lambda number, visitor: (200, {"Content-Length": 999}, b"{"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_fails_now_and_then_gets_everybody_all_the_same(run, fill, waits, failure):
    fill(*((f"t{n}", {}) for n in range(12)))

    def answer(number, visitor):
        return FAILURES[failure](number, visitor) if number % 3 == 0 else taken(visitor)

    with answering(answer) as (url, asked):
        status, out, err = run("replay", url)
    assert (status, err) == (0, "")
    assert out.startswith("sent 12 visitors")
    assert {visitor["token"] for _, visitor in asked} == {f"t{n}" for n in range(12)}
    assert set(waits) == ({5} if failure == "503" else {1})


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_goes_on_failing_is_a_stop_and_the_next_run_goes_on(
    run, fill, waits, tmp_path, failure
):
    answers = fill(*((f"t{n}", {}) for n in range(6)))
    failing = [True]

    def answer(number, visitor):
        if failing[0] and visitor["token"] == "t3":
            return FAILURES[failure](number, visitor)
        return taken(visitor)

    with answering(answer) as (url, asked):
        status, out, err = run("replay", url, "--state", "state")
        assert (status, out) == (1, "")
        assert err.startswith(
            f"replay: stopped at {answers[3]['_id']}, number 4, with 3 sent: {url}: tried 7 times: "
        )
        assert err.endswith("; the same command goes on from here\n")
        assert len(waits) == 6
        assert waits == sorted(waits)
        assert oct((tmp_path / "state").stat().st_mode)[-3:] == "600"
        failing[0] = False
        asked.clear()
        assert run("replay", url, "--state", "state")[1].startswith("sent 6 visitors")
        assert [visitor["token"] for _, visitor in asked] == ["t3", "t4", "t5"]
    assert not (tmp_path / "state").exists()


def test_who_is_refused_is_named_with_the_servers_reason_and_the_rest_goes_on(run, fill):
    answers = fill(("a", {}), ("b", {"department": "Secret"}), ("c", {}))

    def answer(number, visitor):
        if "department" in visitor:
            return refusal(
                "The provided department is invalid\n\x1b[31m [error-invalid-department]"
            )
        return taken(visitor)

    with answering(answer) as (url, asked):
        status, out, err = run("replay", url)
    assert (status, out) == (1, "")
    assert err == (
        f"{answers[1]['_id']}: refused: 400 The provided department is invalid??[31m"
        f" [error-invalid-department]\nreplay: sent 2 visitors to {url}, 1 refused; see above why\n"
    )
    assert len(asked) == 3


def test_a_refusal_of_the_first_run_is_still_told_by_the_last(run, fill, waits):
    fill(("a", {}), ("b", {}))
    failing = [True]

    def answer(number, visitor):
        if visitor["token"] == "a":
            return refusal("no")
        return (500, {}, b"") if failing[0] else taken(visitor)

    with answering(answer) as (url, _):
        assert run("replay", url)[0] == 1
        failing[0] = False
        status, _, err = run("replay", url)
    assert (status, err) == (1, f"replay: sent 1 visitor to {url}, 1 refused; see above why\n")


def test_who_meets_another_visitor_there_is_named(run, fill, other, tmp_path):
    """As with Rocket.Chat's own matching: by its phone, and the token of the other one stays."""
    answers = fill(("a", JOHN), ("b", {"phone": JOHN["phone"]}))

    def answer(number, visitor):
        return taken(visitor | {"token": "a"})

    with answering(answer) as (url, _):
        status, out, err = run("replay", url)
    assert status == 0
    assert ", 0 refused, 1 met another one there; " in out
    assert err == f"{answers[1]['_id']}: met another one there, whose token stays, by its phone\n"


ELSEWHERE = {
    "a redirect": ((301, {"Location": "https://x/\x07"}, b""), "it sends on to https://x/?"),
    "no such page": (refusal("Not found", 404), "it does not speak this API: 404 Not found"),
    "another method": ((405, {}, b""), "it does not speak this API: 405 Method Not Allowed"),
    "a login": ((401, {}, b"{}"), "it does not speak this API: 401 Unauthorized"),
    "a page": ((200, {}, b"<html>"), "it does not speak this API: its answer holds no visitor"),
    "a proxy's page": ((400, {}, b"<html>"), "it does not speak this API: 400 Bad Request"),
    "a list": ((200, {}, [1]), "it does not speak this API: its answer holds no visitor"),
    "nothing": ((204, {}, b""), "it does not speak this API: its answer holds no visitor"),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_what_does_not_speak_this_api_is_a_stop_at_once(run, fill, waits, tmp_path, kind):
    fill(("a", {}), ("b", {}))
    answered, reason = ELSEWHERE[kind]
    with answering(lambda number, visitor: answered) as (url, asked):
        status, out, err = run("replay", url)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f": {url}: {reason}" in err
    assert len(asked) == 1
    assert waits == []
    assert sorted(os.listdir(tmp_path)) == files_of_a_database(tmp_path)


def test_nobody_listening_is_a_stop_after_the_tries(run, fill, waits):
    fill(("a", {}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    status, out, err = run("replay", f"http://127.0.0.1:{port}")
    assert (status, out) == (1, "")
    assert "tried 7 times: ConnectionRefusedError: [Errno 111] Connection refused" in err
    assert waits == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    "url",
    [
        "chat.example.org",
        "localhost:3000",
        "ftp://x",
        "http://",
        "http://x:port",
        "http://a:b@x/",
        "http://x/?q",
        "http://[::1",
        "http://x:70000",
        "http://x y/",
        "http://x/é",
    ],
)
def test_what_is_no_url_is_one_line(run, fill, url):
    fill(("a", {}))
    status, out, err = run("replay", url)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err == ("replay: not a URL such as https://chat.example.org, with port and path alone\n")


@contextmanager
def raw(answer):
    """Serve: `answer(client)` of each connection does what it likes; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with suppress(OSError):
                while True:
                    with listening.accept()[0] as client, suppress(OSError):
                        answer(client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def answer_nonsense(client):
    client.recv(65_536)
    client.sendall(b"SSH-2.0-\x1b[31m\r\n")


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("http", "another try would not help: BadStatusLine: SSH-2.0-?[31m"),
        ("https", "another try would not help: SSLError: [SSL: "),
    ],
)
def test_a_server_of_another_protocol_is_a_stop_at_once(run, fill, waits, scheme, reason):
    fill(("a", {}))
    with raw(answer_nonsense) as port:
        url = f"{scheme}://127.0.0.1:{port}"
        status, out, err = run("replay", url)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f": {url}: {reason}" in err
    assert waits == []


def test_tls_to_this_service_itself_is_a_stop_at_once(run, fill, other, waits):
    fill(("a", {}))
    status, _, err = run("replay", f"https://127.0.0.1:{other.port}")
    assert (status, err.count("\n")) == (1, 1)
    assert "another try would not help: SSLError: " in err
    assert waits == []


@pytest.mark.parametrize("url", ["http://x..y/", f"http://{'x' * 64}.example.org"])
def test_a_name_that_no_host_can_have_is_a_stop_at_once(run, fill, waits, url):
    fill(("a", {}))
    status, _, err = run("replay", url)
    assert (status, err.count("\n")) == (1, 1)
    assert "another try would not help: Unicode" in err
    assert waits == []


@pytest.mark.parametrize(
    ("number", "tries"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 7)], ids=["none", "later"]
)
def test_a_host_that_is_not_there_is_a_stop_at_once(run, fill, waits, monkeypatch, number, tries):
    fill(("a", {}))

    def resolve(*_, **__):
        raise socket.gaierror(number, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    status, _, err = run("replay", "http://chat.example.org")
    assert (status, err.count("\n")) == (1, 1)
    assert "no such name" in err
    assert len(waits) == tries - 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The file of a certificate that has signed itself, and the server's side of it."""
    folder = tmp_path_factory.mktemp("certificate")
    key, file = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", file]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file, key)
    return file, context


def test_a_certificate_that_is_not_trusted_is_a_stop_at_once(
    run, fill, waits, certificate, monkeypatch
):
    fill(("a", {}))
    file, context = certificate
    with answering(lambda number, visitor: taken(visitor), context) as (url, asked):
        status, _, err = run("replay", url)
        assert (status, err.count("\n")) == (1, 1)
        assert f": {url}: its certificate is not trusted: self-signed certificate; SSL_CERT" in err
        assert (asked, waits) == ([], [])
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert run("replay", url)[0] == 0
        assert len(asked) == 1


def test_plain_http_to_a_port_for_tls_is_a_stop(run, fill, waits, certificate):
    fill(("a", {}))
    with answering(None, certificate[1]) as (url, _):
        status, _, err = run("replay", url.replace("https", "http"))
    assert (status, err.count("\n")) == (1, 1)


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"])
def test_a_server_that_sends_byte_by_byte_has_a_limit_of_time(run, fill, waits, monkeypatch, start):
    fill(("a", {}))
    monkeypatch.setattr(rocketchat, "TIMEOUT", 0.2)
    ended = threading.Event()

    def answer(client):
        client.sendall(start)
        while not ended.wait(0.02):
            client.sendall(b"H")

    with raw(answer) as port:
        status, _, err = run("replay", f"http://127.0.0.1:{port}")
        ended.set()
    assert (status, err.count("\n")) == (1, 1)
    assert "tried 7 times: TimeoutError: no whole answer within 0.2 seconds" in err
    assert waits == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ((429, {"Retry-After": "2"}, {"error": "Slow down"}), "waits 2 s: it answers 429 Slow dow"),
        ((500, {}, {"error": "Out of order"}), "waits 1 s: it answers 500 Out of order"),
        (None, "waits 1 s: RemoteDisconnected: Remote end closed"),
    ],
    ids=["rate limit", "failure", "dropped"],
)
def test_the_bar_says_when_and_why_it_waits(path, fill, tmp_path, refused, reason):
    fill(("a", {}))
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 132))
    with answering(lambda number, visitor: refused if number == 1 else taken(visitor)) as (url, _):
        process = spawn("replay", url, "--db", path, cwd=tmp_path, stderr=terminal)
        assert process.communicate(timeout=20)[0].startswith("sent 1 visitor to")
    shown = os.read(master, 65_536).decode()
    assert f"0/1 [00:00<?, ? visitors/s, {reason}" in shown
    os.close(master)
    os.close(terminal)


def test_a_state_of_another_replay_is_left_alone(run, fill, waits, tmp_path):
    fill(("a", {}), ("b", {}))
    with answering(lambda number, visitor: taken(visitor) if number == 1 else (500, {}, b"")) as (
        url,
        _,
    ):
        run("replay", url, "--state", "state")
    before = (tmp_path / "state").read_text()
    for arguments in (["http://127.0.0.1:9"], [url, "--since", "2023-01-01"]):
        status, _, err = run("replay", *arguments, "--state", "state")
        assert (status, err[:40]) == (1, "replay: state: of a replay to another UR")
    assert (tmp_path / "state").read_text() == before
    for junk in ("", "[]", "{}", before.replace('"number": 1', '"number": "1"')):
        (tmp_path / "state").write_text(junk)
        said = "replay: state: not the state of a replay; move it away\n"
        assert run("replay", url, "--state", "state") == (1, "", said)


def test_a_replay_that_is_interrupted_goes_on_where_it_was(path, fill, tmp_path):
    fill(*((f"t{n}", {}) for n in range(4)))
    reached = threading.Event()
    go_on = threading.Event()

    def answer(number, visitor):
        if number == 3:
            reached.set()
            go_on.wait(20)
        return taken(visitor)

    with answering(answer) as (url, asked):
        process = spawn("replay", url, "--db", path, "--state", tmp_path / "state")
        assert reached.wait(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (130, "", "replay: interrupted\n")
        go_on.set()
        assert manage.main(["replay", url, "--db", path, "--state", str(tmp_path / "state")]) == 0
    assert [visitor["token"] for _, visitor in asked] == ["t0", "t1", "t2", "t2", "t3"]


def test_a_replay_that_is_killed_goes_on_not_far_before(path, fill, tmp_path):
    tokens = [f"t{n}" for n in range(replay.PAGE + 3)]
    fill(*((token, {}) for token in tokens))
    reached, go_on = threading.Event(), threading.Event()

    def answer(number, visitor):
        if number == len(tokens):
            reached.set()
            go_on.wait(20)
        return taken(visitor)

    command = ["replay", "--db", path, "--state", str(tmp_path / "state")]
    with answering(answer) as (url, asked):
        process = spawn(*command, url)
        assert reached.wait(20)
        process.kill()
        process.communicate()
        go_on.set()
        assert manage.main([*command, url]) == 0
    assert [visitor["token"] for _, visitor in asked] == tokens + tokens[replay.PAGE :]


def test_a_state_is_no_link_and_no_pipe(run, fill, tmp_path):
    fill(("a", {}))
    (tmp_path / "link").symlink_to(tmp_path / "made")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("link", "Too many levels"), ("pipe", "not the state of a replay")):
        status, _, err = run("replay", "http://127.0.0.1:9", "--state", name)
        assert (status, err.startswith(f"replay: {name}: {reason}")) == (1, True)
    assert not (tmp_path / "made").exists()


def test_a_replay_reads_no_state_for_long(path, fill, tmp_path):
    """Or the WAL would grow for hours."""
    fill(("a", {}))
    with closing(storage.Database(path)) as database:
        store = storage.VisitorStore(database)
        store.register("gone", {"name": "Secret"})
        said = []

        def answer(number, visitor):
            if number == 1:
                began = time.monotonic()
                store.erase("gone")
                said.append(time.monotonic() - began)
            return taken(visitor)

        with answering(answer) as (url, _):
            assert manage.main(["replay", url, "--db", path, "--state", str(tmp_path / "s")]) == 0
    assert said[0] < ERASE_TIME  # for which it would have waited
