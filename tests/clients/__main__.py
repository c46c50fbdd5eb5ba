"""Run the JavaScript client against the real server: `make test-clients`, which needs Node.js."""

import subprocess
import sys
from pathlib import Path

import livechat_standin


def main():
    with livechat_standin.start() as standin:
        script = Path(__file__).with_name("sdk.js")
        return subprocess.run(["node", str(script), standin.url]).returncode


if __name__ == "__main__":
    sys.exit(main())
