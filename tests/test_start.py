"""What only a real start shows: its lines, what stops it, and where it works (contract, 8)."""

import os
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.server import ROOT, wait_until

INFO = re.compile(r"^\[[^]]+\] \[\d+\] \[(?:INFO|WARNING)\] (.*)$", re.MULTILINE)


def lines(server):
    """Return what the start says, up to the line with the URL."""
    wait_until(lambda: "answers at " in server.log(), "the start says where it answers")
    return INFO.findall(server.log().partition("] Booting worker")[0])


def test_the_start_says_database_visitors_configuration_and_last_the_url_that_answers(make_server):
    server = make_server().wait()
    *_, database, configured, agent, listening, _, url = lines(server)
    assert database == f"new database at {server.database}"
    assert configured == (
        f"configured: PORT=0 LIVECHAT_HOST=127.0.0.1 LIVECHAT_DB={server.database}"
    )
    assert agent == ("LIVECHAT_AGENT is not set: /inbox and the calls for the agent answer nobody")
    assert listening.startswith("Listening at: ")
    url_ = f"http://127.0.0.1:{server.port}"
    assert url == f"answers at {url_} and shows visitors at {url_}/inbox"
    for token in "abc":
        server.register(token)
    assert server.stop() == 0
    server = make_server(
        LIVECHAT_AGENT="agent:S3CRET", LIVECHAT_MATCH="token,phone", LIVECHAT_COLOR="S3CRET"
    ).wait()
    *_, database, configured, unknown, listening, _, url = lines(server)
    assert database == f"opened {server.database} (3 visitors)"
    assert configured.endswith(" LIVECHAT_MATCH=token,phone LIVECHAT_AGENT=(not shown)")
    assert unknown == "unknown variables, which have no effect: LIVECHAT_COLOR"
    with urllib.request.urlopen(f"{url.split()[2]}/livez") as answer:
        assert answer.status == 200
    assert "S3CRET" not in server.log()


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_the_url_of_the_start_answers_whatever_the_host(make_server, host):
    server = make_server(LIVECHAT_HOST=host)
    url = lines(server)[-1].split()[2]
    assert re.fullmatch(r"http://(127\.0\.0\.1|\[::1\]):[1-9]\d*", url)
    with urllib.request.urlopen(f"{url}/livez") as answer:
        assert answer.status == 200


def test_the_start_names_the_path_of_a_unix_socket(make_server, tmp_path):
    server = make_server(GUNICORN_CMD_ARGS=f"--bind unix:{tmp_path}/s").wait()
    assert lines(server)[-1] == f"answers at unix:{tmp_path}/s"


@pytest.mark.parametrize("worker", ["", "-k gthread"])
@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"PORT": "x"},
            "PORT: 'x' is not valid; it has to be a number from 0 to 65535",
        ),
        (
            {"PORT": "70000"},
            "PORT: '70000' is not valid; it has to be a number from 0 to 65535",
        ),
        (
            {"LIVECHAT_MATCH": '"token"'},
            "LIVECHAT_MATCH: '\"token\"' begins or ends with a quote, which would be a part of it;"
            " it has to be token | token,phone | token,email | token,phone,email",
        ),
        (
            {"LIVECHAT_AGENT": "agent:S3CRET\r"},
            "LIVECHAT_AGENT: its value begins or ends with a blank or a line break;"
            " it has to be userId:authToken",
        ),
        (
            {"LIVECHAT_RATELIMIT": "5"},
            "LIVECHAT_RATELIMIT: there is no such variable; did you mean LIVECHAT_RATE_LIMIT?",
        ),
    ],
    ids=str,
)
def test_an_invalid_variable_stops_the_start_in_one_line_before_the_database_is_made(
    make_server, worker, environ, line
):
    server = make_server(GUNICORN_CMD_ARGS=worker, **environ)
    assert server.process.wait(20) != 0
    assert server.log() == f"{line}\n"
    assert not server.database.exists()


@pytest.mark.parametrize("worker", ["", "-k gthread"])
def test_it_starts_in_any_folder_and_reads_the_environment_once(make_server, tmp_path, worker):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for module in ("app", "settings", "storage"):  # another project's own
        (folder / f"{module}.py").write_text("raise ImportError('not ours')")
    start = f'cd "{folder}" && exec gunicorn -c {ROOT}/gunicorn.conf.py {worker}'
    server = make_server(command=["sh", "-c", start], LIVECHAT_DB="data/x.db", LIVECHAT_COLOR="")
    assert server.wait().register("t")[0] == 200
    assert f"new database at {folder}/data/x.db" in lines(server)
    assert server.log().count("configured: ") == server.log().count("LIVECHAT_COLOR") == 1
    assert server.log().count("opened") == 0
    assert server.stop() == 0
    assert (folder / "data" / "x.db").exists()


@pytest.mark.parametrize("limit", [None, "5"])
@pytest.mark.parametrize("shm", [True, False])
def test_it_serves_where_only_the_databases_folder_can_be_written(
    make_server, tmp_path, limit, shm
):
    folder = tmp_path / "data"
    folder.mkdir()
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    keep = {"/proc", "/dev", *(["/dev/shm"] if shm else [])}
    read_only = [mount for mount in mounts if mount not in keep]
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--mount", *user, "sh", "-c"]
    remount = 'mount --bind "$0" "$0" && for m; do mount -o remount,bind,ro "$m" || exit 1; done'
    tried = subprocess.run([*command, remount, folder, *read_only], stderr=subprocess.DEVNULL)
    if tried.returncode:
        pytest.skip("nobody may mount anything here, as in most containers")
    start = f"{remount}; touch {tmp_path}/tried || exec gunicorn"
    server = make_server(
        command=[*command, start, str(folder), *read_only],
        LIVECHAT_DB=str(folder / "livechat.db"),
        LIVECHAT_RATE_LIMIT=limit,
        HOME="/nonexistent",
    ).wait()
    assert server.register("t", name="n")[0] == 200
    assert server.request("GET", "/readyz")[0] == 200
    assert {file.name for file in folder.iterdir()} == {
        "livechat.db",
        "livechat.db-wal",
        "livechat.db-shm",
    }
    assert server.stop() == 0
    assert not (tmp_path / "tried").exists()
    assert server.query("SELECT name FROM visitor") == [["n"]]
