"""Build the image and run it, and the systemd units in a container: `make test-image`.

It needs root, podman, buildah, runc and mmdebstrap, and no registry: the base is Debian, made once
and kept by podman until `podman rmi livechat-visitors-test-debian`. BASE names another one for the
image: `make test-image BASE=docker.io/library/python:3.13-slim`.
"""

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from settings import VERSION
from tests.server import PATH, ROOT, wait_until

TOOLS = ("podman", "buildah", "runc", "mmdebstrap")
DEBIAN = "localhost/livechat-visitors-test-debian"
PACKAGES = "python3,python3-venv,ca-certificates,make,systemd,systemd-sysv,dbus"
# Of those that come with systemd, the ones that would set up the machine below the container.
NOT_OURS = "systemd-sysctl.service getty.target console-getty.service"
IMAGE = "localhost/livechat-visitors-test"
OWNER = 10001  # as docs/deploying.md says
# The least that podman needs: neither a systemd nor a network of its own.
CONFIGURATION = """
[containers]
netns = "host"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
# pip in a container trusts whom this machine trusts, such as the proxy of a company.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
TRUST = [f"--volume={CERTIFICATES}:{CERTIFICATES}:ro"] if CERTIFICATES.exists() else []
# As compose.yaml has it. Docker has no /tmp where the root is read-only, podman has unless told.
HARDENED = (
    *("--read-only", "--read-only-tmpfs=false"),
    *("--cap-drop=all", "--security-opt=no-new-privileges"),
)


def podman(*arguments, status=0, **options):
    """Run podman, which has to end with `status`; return what it printed."""
    ran = subprocess.run(["podman", *map(str, arguments)], capture_output=True, **options)
    said = (ran.stdout + ran.stderr).decode()
    assert ran.returncode == status, f"podman {arguments[0]}: exit {ran.returncode}\n{said}"
    return ran.stdout.decode()


def done(what):
    print(f"ok: {what}", flush=True)


class Container:
    """A container on the machine's own network, removed in the end with its volumes."""

    def __init__(self, image, *arguments, options=()):
        self.name = f"livechat-visitors-test-{secrets.token_hex(4)}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        podman(
            *("run", "--detach", f"--name={self.name}", f"--env=PORT={self.port}"),
            *(*options, image, *arguments),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        podman("rm", "--force", "--time=0", "--volumes", self.name)

    def run(self, *command, status=0, **options):
        """Run a command in the container, which has to end with `status`; return its output."""
        return podman("exec", "--interactive", self.name, *command, status=status, **options)

    def log(self):
        ran = subprocess.run(["podman", "logs", self.name], capture_output=True, text=True)
        return ran.stdout + ran.stderr

    def state(self, key):
        return podman("inspect", f"--format={{{{.State.{key}}}}}", self.name).strip()

    def request(self, method, path, body=None):
        """Return status and body, parsed as JSON, of one request to the service."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, body and json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def ready(self):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.request("GET", "/readyz")[0] == 200
        return False

    def wait(self):
        try:
            wait_until(self.ready, "the service answers")
        except AssertionError:
            print(self.log(), file=sys.stderr)
            raise

    def register(self, token, **fields):
        """Register a visitor, which has to go well; return it."""
        status, answer = self.request("POST", PATH, {"visitor": {"token": token, **fields}})
        assert status == 200, (answer, self.log())
        return answer["visitor"]

    def find(self, visitor):
        """Fail unless the visitor is there as it was registered."""
        status, answer = self.request("GET", f"{PATH}/{visitor['token']}")
        assert (status, answer["visitor"]) == (200, visitor), (status, answer)


def make_debian():
    """Make the base with Python and systemd, unless podman has it."""
    if subprocess.run(["podman", "image", "exists", DEBIAN]).returncode == 0:
        return
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"]
    command += [f"--customize-hook=chroot $1 systemctl mask {NOT_OURS}", "bookworm", "-"]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.tar"
        with base.open("wb") as file:
            subprocess.run(command, stdout=file, check=True)
        podman("import", base, DEBIAN)
    done("Debian's base was made, and is kept")


@contextlib.contextmanager
def new_volume():
    """Yield the option that mounts a new volume, as a compose file does."""
    name = f"livechat-visitors-test-{secrets.token_hex(4)}"
    try:
        yield f"--volume={name}:/data"
    finally:
        podman("volume", "rm", "--force", name)


def build(base):
    podman(
        *("build", "--format=docker", "--network=host", *TRUST, f"--build-arg=BASE={base}"),
        *(f"--tag={IMAGE}", ROOT),
    )
    (image,) = json.loads(podman("inspect", IMAGE))
    assert image["Config"]["Labels"]["org.opencontainers.image.version"] == VERSION
    assert image["Config"]["StopSignal"] == "SIGTERM"
    files = podman("run", "--rm", IMAGE, "find", ".", "-maxdepth", "1").split()
    assert {"./app.py", "./LICENSE"} < set(files), files
    assert not {"./tests", "./docs", "./.git", "./.venv", "./.env"} & set(files), files
    assert podman("run", "--rm", IMAGE, "sh", "-c", "ls /venv/bin/pip* || true") == ""
    done(f"the image is built on {base}")


def test_image(folder, volume):
    """What docs/deploying.md says about a container."""
    options = (*HARDENED, volume)
    with Container(IMAGE, options=options) as service:
        service.wait()
        assert service.run("id", "-u").strip() == str(OWNER)
        assert service.run("stat", "-c", "%u %a", "/data").strip() == f"{OWNER} 700"
        for writable in ("/app", "/venv", "/tmp", "/"):
            service.run("test", "-w", writable, status=1)
        visitor = service.register("hull", name="Ann Example", email="ann@example.org")
        done("it runs read-only, without capabilities and not as root, and registers")

        podman("healthcheck", "run", service.name)
        done("its health check is content")

        def register_much(token):
            for value in "abc":
                field = {"value": 900 * value, "overwrite": True}
                service.register(token, customFields=[{"key": f"k{n}", **field} for n in range(60)])

        with ThreadPoolExecutor(32) as clients:
            list(clients.map(register_much, map(str, range(64))))
        done("large visitors at once, whose transactions SQLite cannot undo in memory")

        podman("kill", "--signal=KILL", service.name)
        wait_until(lambda: service.state("Status") == "exited", "the container ends")
        podman("start", service.name)
        service.wait()
        service.find(visitor)
        done("after kill -9 and a start the visitor is there")

        backup = folder / "livechat.db"
        with backup.open("wb") as file:
            backing_up = ["podman", "exec", service.name, "python", "manage.py", "backup", "-"]
            subprocess.run(backing_up, stdout=file, check=True)
        assert "sound: 65 visitors" in service.run("python", "manage.py", "check")
        later = service.register("later")
        done("it is backed up and checked beside the running service")

        podman("stop", "--time=40", service.name)
        assert service.state("ExitCode") == "0", service.log()
        assert "ann@example.org" not in service.log()
        done("it stops with 0")

    with Container(IMAGE, options=options) as service:  # as an update does
        service.wait()
        for one in (visitor, later):
            service.find(one)
        done("another container on the same volume has the visitors")

        podman("stop", "--time=40", service.name)
        here = "/data/backup.db"
        restoring = f"cat > {here} && python manage.py restore {here} && rm {here}"
        command = ("run", "--rm", "--interactive", *options, IMAGE, "sh", "-c", restoring)
        podman(*command, input=backup.read_bytes())
        podman("start", service.name)
        service.wait()
        service.find(visitor)
        assert service.request("GET", f"{PATH}/later")[0] == 400
        done("the backup is restored into the volume")

    with Container(IMAGE, "sleep", "60") as idle:
        podman("healthcheck", "run", idle.name, status=1)
        done("the health check finds a service that does not answer")

    mounted = f"--volume={folder}:/data"
    with Container(IMAGE, options=(*HARDENED, mounted)) as refused:
        wait_until(lambda: refused.state("Status") == "exited", "the start is refused")
        assert refused.state("ExitCode") != "0"
        assert "/data" in refused.log(), refused.log()
    for path in (folder, folder / "livechat.db"):
        os.chown(path, OWNER, OWNER)
    with Container(IMAGE, options=(*HARDENED, mounted)) as service:
        service.wait()
        service.find(visitor)
    done("a mounted folder serves the backup once it belongs to the image's user, and not before")

    file = f"--volume={folder}/livechat.db:/data/livechat.db"
    with Container(IMAGE, options=(*HARDENED, file)) as refused:
        wait_until(lambda: refused.state("Status") == "exited", "the start is refused")
        assert refused.state("ExitCode") != "0"
    done("a file that is mounted alone is refused")


def documented():
    """Return the commands with which docs/deploying.md sets up the units, without the clone."""
    section = (ROOT / "docs" / "deploying.md").read_text().partition("\n## systemd\n")[2]
    section = section.partition("\n## ")[0]
    commands = re.findall(r"^    (\S.*)$", section, re.MULTILINE)
    assert commands[0].startswith("git clone"), commands
    return commands[1:]


def test_systemd():
    """What docs/deploying.md says about systemd, by its own commands."""
    options = ("--privileged", "--systemd=always", *TRUST)
    with Container(DEBIAN, "/lib/systemd/systemd", options=options) as machine:

        def show(unit, name):
            return machine.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

        def started():
            ran = subprocess.run(
                ["podman", "exec", machine.name, "systemctl", "is-system-running"],
                capture_output=True,
                text=True,
            )
            return ran.stdout.strip() in ("running", "degraded")

        wait_until(started, "systemd is up", 60)
        assert machine.run("systemctl", "is-system-running").strip() == "running"
        files = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        checkout = subprocess.run(
            ["tar", "--create", "--files-from=-"],
            cwd=ROOT,
            check=True,
            input=files.stdout,
            capture_output=True,
        )
        machine.run("mkdir", "/opt/livechat-visitors")
        target = "--directory=/opt/livechat-visitors"
        machine.run("tar", "--extract", "--no-same-owner", target, input=checkout.stdout)
        setting = f"PORT={machine.port}\nLIVECHAT_HOST=127.0.0.1\n".encode()
        machine.run("sh", "-c", "umask 077; cat > /etc/livechat-visitors.env", input=setting)
        timer = "livechat-visitors-backup.timer"  # which has missed a night
        machine.run("mkdir", "--parents", "/var/lib/systemd/timers")
        machine.run("touch", "--date=2 days ago", f"/var/lib/systemd/timers/stamp-{timer}")
        machine.run("sh", "-euxc", "\n".join(documented()))
        service, backup = "livechat-visitors.service", "livechat-visitors-backup.service"
        folder, backups = "/var/lib/livechat-visitors", "/var/lib/livechat-visitors-backups"
        machine.wait()
        visitor = machine.register("hull", name="Ann Example", email="ann@example.org")
        main = show(service, "MainPID")
        user = int(machine.run("stat", "--format=%u", f"/proc/{main}"))
        assert user in range(61184, 65520), user  # those of DynamicUser: systemd.exec(5)
        done("systemd runs the service as a user of its own, and it registers")

        machine.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", service)
        wait_until(lambda: show(service, "NRestarts") == "1", "systemd starts it again")
        machine.wait()
        machine.find(visitor)
        done("after kill -9 systemd starts it again, with the visitor")

        wait_until(lambda: show(backup, "ExecMainExitTimestamp"), "the timer starts a backup")
        assert "n/a" not in show(timer, "NextElapseUSecRealtime")
        assert show(backup, "Result") == "success", machine.run("journalctl", f"--unit={backup}")
        (made,) = machine.run("ls", backups).split()
        modes = machine.run("stat", "--format=%u %a", backups, f"{backups}/{made}").splitlines()
        assert modes == ["0 700", "0 600"], modes
        done("the timer makes up for a missed backup, which is root's alone")

        machine.run("systemctl", "stop", service)
        assert (show(service, "Result"), show(service, "ExecMainStatus")) == ("success", "0")
        machine.run("rm", f"{backups}/{made}")
        machine.run("systemctl", "start", backup)  # which fails where the backup does
        (made,) = machine.run("ls", backups).split()
        check = ("/opt/livechat-visitors/.venv/bin/python", "/opt/livechat-visitors/manage.py")
        checked = machine.run(*check, "check", "--db", f"{backups}/{made}")
        assert "sound: 1 visitor," in checked, checked
        owners = machine.run("sh", "-c", f"stat --format=%u {folder}/*").split()
        assert set(owners) == {str(user)}, owners
        machine.run("systemctl", "start", service)
        machine.find(visitor)
        done("it stops with 0, is backed up while it is stopped, and starts again")


def main():
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() or missing:
        why = f"{', '.join(missing)} missing" if missing else "it needs root"
        print(f"SKIPPED, the image and the units were not tried: {why}; on Debian")
        print(f"    sudo apt-get install {' '.join(TOOLS)} && sudo make test-image")
        return
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "containers.conf"
        configuration.write_text(CONFIGURATION)
        os.environ["CONTAINERS_CONF"] = str(configuration)
        data = Path(folder) / "data"
        data.mkdir(mode=0o700)
        make_debian()
        build(os.environ.get("BASE") or DEBIAN)
        with new_volume() as volume:
            test_image(data, volume)
        test_systemd()


if __name__ == "__main__":
    main()
