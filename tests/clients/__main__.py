"""Run the JavaScript client against the real server: `make test-clients`, which needs Node.js."""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.server import Server


def main():
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder)).wait()
        try:
            script = Path(__file__).with_name("sdk.js")
            return subprocess.run(
                ["node", str(script), f"http://127.0.0.1:{server.port}"]
            ).returncode
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
