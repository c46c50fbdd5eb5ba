"""What docs/deploying.md tells to do, as far as this machine can."""

import configparser
import re
import shutil
import signal
import subprocess

import pytest

from tests.server import ROOT, wait_until


def test_honcho_starts_and_stops_the_procfile(make_server):
    server = make_server(command=["honcho", "start", "--no-colour"], PORT="0")
    wait_until(lambda: "Listening at: " in server.log(), "the server listens")
    wait_until(lambda: "Booting worker" in server.log(), "the worker boots")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) in (0, 128 + signal.SIGINT)
    assert "Shutting down: Master" in server.log()


def test_systemd_takes_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    unit = (ROOT / "deploy" / "livechat-visitors.service").read_text()
    python = shutil.which("gunicorn") or str(ROOT / ".venv" / "bin" / "gunicorn")
    assert "ExecStart=/opt/livechat-visitors/.venv/bin/gunicorn\n" in unit
    here = tmp_path / "livechat-visitors.service"
    here.write_text(unit.replace("/opt/livechat-visitors/.venv/bin/gunicorn", python))
    ran = subprocess.run(
        ["systemd-analyze", "verify", here], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def test_every_file_of_deploy_is_in_the_document():
    document = (ROOT / "docs" / "deploying.md").read_text()
    for file in (ROOT / "deploy").iterdir():
        assert f"deploy/{file.name}" in document


def test_the_image_holds_every_package_and_file_of_the_service():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = set(re.findall(r"\w+", setup["options"]["packages"]))
    kept = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert kept == packages | {"*.py", "requirements.txt", "LICENSE"}


def test_the_settings_of_compose_are_those_of_the_readme():
    table = (ROOT / "README.md").read_text().partition("## Configuration")[2].partition("##")[0]
    settings = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    shown = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert shown == settings - {"PORT", "LIVECHAT_HOST", "LIVECHAT_DB"} | {"LIVECHAT_DOMAIN"}
