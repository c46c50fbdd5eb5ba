"""What docs/deploying.md tells to do, as far as this machine can."""

import configparser
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.database import rows
from tests.operating import VISITORS, files
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
    assert shown == settings - {"PORT", "LIVECHAT_HOST", "LIVECHAT_DB", "LIVECHAT_STANDIN"} | {
        "CADDY_DOMAIN"
    }


def test_the_line_of_cron_backs_up_in_silence_and_says_what_goes_wrong(fill, path, tmp_path):
    fill(*VISITORS)
    table = (ROOT / "deploy" / "livechat-visitors.cron").read_text()
    *settings, line = [line for line in table.splitlines() if line and not line.startswith("#")]
    *times, user, command = line.split(maxsplit=6)
    assert [bool(re.fullmatch(r"[0-9]+|\*", time)) for time in times] == [True] * 5
    assert (int(times[0]) < 60, int(times[1]) < 24, times[2:], user) == (
        True,
        True,
        ["*"] * 3,
        "root",
    )
    assert "%" not in command  # which cron takes for the end of the line
    for there, here in {
        "/opt/livechat-visitors/.venv/bin/python": sys.executable,
        "/opt/livechat-visitors": str(ROOT),
        "/var/lib/livechat-visitors": str(tmp_path),
        "/var/backups/livechat-visitors": str(tmp_path / "backups"),
    }.items():
        assert there in command
        command = command.replace(there, here)
    environ = dict(setting.split("=") for setting in settings) | {
        "HOME": "/root",
        "LOGNAME": "root",
    }

    def cron():
        shell = [environ["SHELL"], "-c", command]
        ran = subprocess.run(
            shell, env=environ, cwd="/", stdin=subprocess.DEVNULL, capture_output=True
        )
        return ran.returncode, ran.stdout, ran.stderr

    status, out, err = cron()
    assert (status, out) == (1, b"")
    assert err.endswith(b": No such file or directory\n")
    (tmp_path / "backups").mkdir()
    assert cron() == (0, b"", b"")
    (backup,) = files(tmp_path / "backups")
    assert rows(tmp_path / "backups" / backup) == rows(path)
