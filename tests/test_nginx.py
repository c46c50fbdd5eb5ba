"""deploy/nginx.conf, in front of the service: what it promises, tried with Debian's nginx."""

import contextlib
import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from contextlib import contextmanager
from urllib.parse import quote

import pytest

from tests.server import BOUND, PATH, ROOT, Server, wait_until
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
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    # Who connects from 127.0.0.1 can be anybody: Server.request(headers={{"From": "192.0.2.1"}}).
    set_real_ip_from 127.0.0.1; real_ip_header From;
    {configuration}
}}
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Proxied(Server):
    """The service behind nginx: `port` is that of nginx."""

    def __init__(self, folder, tls=False, **environ):
        super().__init__(folder, LIVECHAT_TRUSTED_PROXIES="1", **environ)
        self.wait()
        self.behind, self.port, self.tls_port = self.port, free_port(), free_port()
        configuration = (ROOT / "deploy" / "nginx.conf").read_text()
        if tls:  # as its first lines say
            configuration = configuration.replace("    listen 80;\n    listen [::]:80;\n", "", 1)
            configuration = re.sub(r"^( *)#(?! \S)", r"\1", configuration, flags=re.MULTILINE)
        shown_and_here = {
            "listen 80;": f"listen 127.0.0.1:{self.port};",
            "listen [::]:80;": f"listen [::1]:{self.port};",
            "127.0.0.1:3000": f"127.0.0.1:{self.behind}",
            "/var/log/nginx/": f"{folder}/",
            "listen 443 ": f"listen 127.0.0.1:{self.tls_port} ",
            "listen [::]:443 ": f"listen [::1]:{self.tls_port} ",
            "/etc/letsencrypt/live/livechat.example.org/": f"{folder}/",
        }
        for shown, here in shown_and_here.items():
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
            return self.connect().close() is None
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
    assert server.request("GET", f"{PATH}/a%2Fb")[0] == 404
    answers = []
    for size in (70_000, 2**20 + 1):  # refused by the service, and by nginx
        headers = {"Content-Type": "application/json", "Origin": "https://example.org"}
        status, headers, answer = server.request("POST", PATH, b" " * size, headers)
        common = ("Content-Type", "Cache-Control", "X-Content-Type-Options")
        common += ("Access-Control-Allow-Origin",)
        answers.append((status, answer, [headers[name] for name in common]))
    assert answers[0] == answers[1]
    assert (answers[0][0], answers[0][1]["errorType"]) == (413, "error-body-too-large")


def test_it_is_reached_by_ipv6(server):
    with socket.create_connection(("::1", server.port), timeout=BOUND) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_the_lines_of_tls_work_and_send_everybody_there(tmp_path):
    key, certificate = str(tmp_path / "privkey.pem"), str(tmp_path / "fullchain.pem")
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x"
    command = [*request.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key]
    subprocess.run([*command, "-out", certificate], check=True, capture_output=True)
    with proxied(tmp_path, tls=True) as server:
        with contextlib.closing(server.http()) as client:
            client.request("GET", f"{PATH}/secret?secret")
            answer = client.getresponse()
            assert answer.status == 308
            assert answer.headers["Location"] == f"https://localhost{PATH}/secret?secret"
        context = ssl.create_default_context(cafile=certificate)
        context.set_alpn_protocols(["h2"])
        for host in ("127.0.0.1", "::1"):
            plain = socket.create_connection((host, server.tls_port), timeout=BOUND)
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
                assert client.selected_alpn_protocol() == "h2"
        context.set_alpn_protocols(["http/1.1"])
        client = http.client.HTTPSConnection("127.0.0.1", server.tls_port, context=context)
        with contextlib.closing(client):
            client.request("GET", "/api/info")
            assert client.getresponse().status == 200
        assert "secret" not in str([path.read_text() for path in tmp_path.glob("*.log")])


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


def write(server, path=PATH, address="192.0.2.1", method="POST", **headers):
    """Return the status of a request by a client at `address`, its headers and its body."""
    headers |= {"From": address, "Content-Type": "application/json"}
    return server.request(method, path, b"{}", headers)


def test_writes_have_a_limit_of_their_own_that_is_told_as_the_services(server):
    custom = [f"/api/v1/livechat/custom.{name}" for name in ("field", "fields")]
    paths = [PATH, *custom, f"{PATH}/"]  # which count together
    statuses = [write(server, paths[number % 4])[0] for number in range(40)]
    assert 31 <= statuses.count(400) <= 35
    assert set(statuses) == {400, 429}
    for path in paths:
        wait_until(lambda path=path: write(server, path)[0] == 429, "it is refused")
    status, headers, answer = write(server)
    assert (status, answer["errorType"]) == (429, "error-too-many-requests")
    assert headers["Content-Type"] == "application/json"
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert f" {headers['Retry-After']} seconds " in answer["error"]
    time.sleep(int(headers["Retry-After"]))  # which has to be enough
    assert write(server)[0] == 400
    assert write(server, f"{PATH}/t0", method="GET")[0] == 400  # reading has none
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert {write(server, method="OPTIONS", **ask)[0] for _ in range(40)} == {200}


def test_the_limit_is_of_an_address_or_of_an_ipv6_network(server):
    for addresses in (["192.0.2.1"], [f"2001:db8:1:2::{number:x}" for number in range(1, 41)]):
        statuses = [write(server, address=addresses[n % len(addresses)])[0] for n in range(40)]
        assert set(statuses) == {400, 429}
    for other in ("192.0.2.2", "2001:db8:1:3::1", "2001:db8::1", "2001:db8::2"):
        assert write(server, address=other)[0] == 400


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
    names = {"server.log", "livechat.log", "livechat.error.log", "error.log", "access.log"}
    assert set(logs) == names
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
