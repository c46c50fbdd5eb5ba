"""deploy/nginx.conf, in front of the service: what it promises, tried with Debian's nginx."""

import os
import re
import shutil
import socket
import subprocess
from contextlib import contextmanager
from urllib.parse import quote

import pytest

from tests.server import PATH, ROOT, Server, wait_until
from tests.slow import Attack, longest, wait_of_others

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

# What Debian's own /etc/nginx/nginx.conf says around it, as far as it matters here.
AROUND = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
{user}
events {{ worker_connections 768; }}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {configuration}
}}
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Proxied(Server):
    """The service behind nginx: `port` is that of nginx."""

    def __init__(self, folder, **environ):
        super().__init__(folder, LIVECHAT_TRUSTED_PROXIES="1", **environ)
        self.wait()
        self.behind, self.port = self.port, free_port()
        configuration = (ROOT / "deploy" / "nginx.conf").read_text()
        for shown, here in {
            "listen 80;": f"listen 127.0.0.1:{self.port};",
            "127.0.0.1:3000": f"127.0.0.1:{self.behind}",
            "/var/log/nginx/": f"{folder}/",
        }.items():
            assert shown in configuration
            configuration = configuration.replace(shown, here)
        user = "user root;" if os.geteuid() == 0 else ""
        text = AROUND.format(folder=folder, configuration=configuration, user=user)
        (folder / "nginx.conf").write_text(text)
        self.logs = folder
        self.nginx = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder)])
        wait_until(self._answers, "nginx answers", 5)

    def _answers(self):
        try:
            return self.request("GET", "/livez")[0] == 200
        except OSError:
            return False

    def kill(self):
        self.nginx.terminate()
        self.nginx.wait()
        super().kill()


@contextmanager
def proxied(folder, **environ):
    server = Proxied(folder, **environ)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(tmp_path):
    with proxied(tmp_path) as server:
        yield server


def test_the_answers_are_those_of_the_service(server):
    assert server.register("a")[1]["visitor"]["username"] == "guest-2"
    assert server.request("GET", f"{PATH}/a%2Fb")[0] == 400
    large = b'{"visitor":{"token":"t"}}' + b" " * 70_000
    status, _, answer = server.request("POST", PATH, large, {"Content-Type": "application/json"})
    assert (status, answer["errorType"]) == (413, "error-body-too-large")


def test_every_token_gets_through(server):
    for token in ("a b", "a/b", "a//", "é", "%", "a?b", "..", "a/../b"):
        server.register(token)
        status, _, answer = server.request("GET", f"{PATH}/{quote(token, safe='')}")
        assert (status, answer["visitor"]["token"]) == (200, token)


def test_the_service_counts_by_the_address_of_the_client_and_not_by_what_it_says(tmp_path):
    with proxied(tmp_path, LIVECHAT_RATE_LIMIT="2") as server:
        statuses = []
        for number in range(4):
            headers = {"X-Forwarded-For": f"198.51.100.{number}"}
            _, headers, _ = server.request("GET", f"{PATH}/t", headers=headers)
            statuses.append(headers["X-RateLimit-Remaining"])
        assert statuses in (["1", "0", "0", "0"], ["1", "0", "1", "0"], ["1", "1", "0", "0"])


def test_registrations_have_a_limit_of_their_own_that_is_told_as_the_services(server):
    answers = [server.register(f"t{number}") for number in range(40)]
    passed = [answer for status, answer in answers if status == 200]
    refused = [answer for status, answer in answers if status == 429]
    assert 31 <= len(passed) <= 35
    assert {answer["errorType"] for answer in refused} == {"error-too-many-requests"}
    status, headers, _ = server.request("POST", PATH, b"{}", {"Content-Type": "application/json"})
    assert (status, headers["Retry-After"]) == (429, "60")
    assert headers["Content-Type"] == "application/json"
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert server.request("POST", f"{PATH}/", b"{}")[0] == 429  # the same route
    assert server.request("GET", f"{PATH}/t0")[0] == 200  # reading has none
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert {server.request("OPTIONS", PATH, headers=ask)[0] for _ in range(40)} == {200}


def test_a_service_that_does_not_answer_is_a_503_in_json(server):
    server.stop()
    for path in (PATH, f"{PATH}/t", "/livez"):
        status, headers, answer = server.request("GET", path)
        assert (status, headers["Retry-After"]) == (503, "5")
        assert headers["Content-Type"] == "application/json"
        assert answer["errorType"] == "error-unavailable"


def test_no_token_and_no_query_reaches_a_log_of_nginx(server):
    server.register("secret")
    server.request("GET", f"{PATH}/secret?secret")
    server.request("GET", "/api/v1/livechat/visitors.search?term=secret")
    for number in range(40):
        server.register(f"secret{number}")
    server.process.terminate()
    server.process.wait()
    with server.connect() as client:
        client.sendall(f"GET {PATH}/secret HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 503 ")
    logs = {path.name: path.read_text() for path in server.logs.glob("*.log")}
    assert set(logs) == {"server.log", "livechat.log", "livechat.error.log", "error.log"}
    assert "secret" not in str(logs)
    assert "127.0.0.1" not in logs["livechat.log"]
    assert re.search(
        r"^\S+ GET /api/v1/livechat/visitor/\{token\} 200 \d+ \S+$", logs["livechat.log"], re.M
    )


def test_others_register_while_slow_clients_are_there(tmp_path):
    with proxied(tmp_path) as server:

        def ask():
            return server.request("GET", "/readyz")[0]

        idle = wait_of_others(server, 0.5, ask)
        with Attack(server.port, 200):
            waits = wait_of_others(server, 1, ask)
        assert max(waits) < longest(idle)
        assert server.request("GET", "/livez")[0] == 200


def test_nginx_lets_go_of_a_connection_before_the_service_does():
    nginx = re.findall(
        r"^    keepalive_timeout (\d+)s;$", (ROOT / "deploy/nginx.conf").read_text(), re.M
    )
    service = re.findall(r"^keepalive = (\d+)", (ROOT / "gunicorn.conf.py").read_text(), re.M)
    assert 5 < int(*nginx) < int(*service) - 5
