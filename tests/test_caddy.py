"""deploy/Caddyfile, in front of the service: what it promises, tried with Debian's Caddy."""

import json
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from urllib.parse import quote

import pytest

from tests.server import PATH, ROOT, Server, wait_until

CADDY = shutil.which("caddy")
pytestmark = pytest.mark.skipif(CADDY is None, reason="caddy is not installed")
# So that it runs beside others, and leaves the machine's own certificates as they are.
ALONE = "{{\n\tadmin off\n\tskip_install_trust\n\thttp_port {http}\n\thttps_port {https}\n"


class Proxied:
    """The service behind Caddy, which makes the certificate for localhost itself."""

    def __init__(self, folder, **environ):
        self.service = Server(folder, LIVECHAT_TRUSTED_PROXIES="1", **environ).wait()
        with socket.create_server(("", 0)) as http, socket.create_server(("", 0)) as https:
            ports = {"http": http.getsockname()[1], "https": https.getsockname()[1]}
        self.url = f"https://localhost:{ports['https']}"
        before, brace, after = (ROOT / "deploy" / "Caddyfile").read_text().partition("\n{\n")
        assert brace
        (folder / "Caddyfile").write_text(f"{before}\n{ALONE.format(**ports)}{after}")
        self.log = folder / "caddy.log"
        self.root = folder / "caddy/pki/authorities/local/root.crt"
        home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        home["CADDY_DOMAIN"] = "localhost"
        home["LIVECHAT_UPSTREAM"] = f"127.0.0.1:{self.service.port}"
        with self.log.open("wb") as log:
            command = [CADDY, "run", "--adapter", "caddyfile", "--config", folder / "Caddyfile"]
            self.caddy = subprocess.Popen(command, env=home, stdout=log, stderr=log)
        wait_until(self._answers, "Caddy answers")

    def _answers(self):
        with suppress(subprocess.CalledProcessError):
            return self.request("/livez")[1] == 200

    def request(self, path, *options):
        """Return the version of HTTP, status, header fields, and body, parsed as JSON."""
        command = ["curl", "-sS", "-i", "--path-as-is", "--noproxy", "*", "--cacert", self.root]
        command += [*options, f"{self.url}{path}"]
        answer = subprocess.run(command, check=True, capture_output=True).stdout.decode()
        head, _, body = answer.replace("\r\n", "\n").partition("\n\n")
        first, *fields = head.splitlines()
        version, status = first.split()[:2]
        return version, int(status), dict(re.split(": ?", f, maxsplit=1) for f in fields), body

    def register(self, token):
        body = json.dumps({"visitor": {"token": token}})
        _, status, _, answer = self.request(PATH, "--json", body)
        assert status == 200, answer

    def kill(self):
        self.caddy.terminate()
        self.caddy.wait()
        self.service.kill()


@pytest.fixture
def proxied(tmp_path):
    started = []

    def start(**environ):
        started.append(Proxied(tmp_path, **environ))
        return started[-1]

    yield start
    for proxy in started:
        proxy.kill()


def test_it_gives_tls_and_http_2_with_a_certificate_that_the_client_checks(proxied):
    version, status, _, body = proxied().request("/livez")
    assert (version, status, body) == ("HTTP/2", 200, '{"status":"ok"}')


def test_every_token_gets_through(proxied):
    proxy = proxied()
    for token in ("a b", "é", "%", "a?b", "..", "a&b=c"):
        proxy.register(token)
        _, status, _, body = proxy.request(f"{PATH}/{quote(token, safe='')}")
        assert (status, json.loads(body)["visitor"]["token"]) == (200, token)


def test_the_service_counts_by_the_address_of_the_client_and_not_by_what_it_says(proxied):
    proxy = proxied(LIVECHAT_RATE_LIMIT="2")
    statuses = []
    for number in range(6):
        forwarded = ("--header", f"X-Forwarded-For: 198.51.100.{number}")
        statuses.append(proxy.request(f"{PATH}/t", *forwarded)[1])
    assert 429 in statuses


def test_a_service_that_does_not_answer_is_a_503_in_json_and_no_token_reaches_the_log(proxied):
    proxy = proxied()
    proxy.register("secret")
    assert proxy.request(f"{PATH}/secret?secret")[1] == 200
    proxy.service.kill()
    for options in ((), ("--json", "{}")):
        _, status, fields, body = proxy.request(f"{PATH}/secret?secret", *options)
        assert (status, fields["retry-after"]) == (503, "5")
        assert fields["content-type"] == "application/json"
        assert fields["access-control-allow-origin"] == "*"
        assert json.loads(body)["errorType"] == "error-unavailable"
    assert "certificate obtained" in proxy.log.read_text()
    assert "secret" not in proxy.log.read_text()


def test_caddy_lets_go_of_a_connection_before_the_service_does():
    caddy = re.findall(r"^\t+keepalive (\d+)s$", (ROOT / "deploy/Caddyfile").read_text(), re.M)
    service = re.findall(r"^keepalive = (\d+)", (ROOT / "gunicorn.conf.py").read_text(), re.M)
    assert 5 < int(*caddy) < int(*service) - 5
