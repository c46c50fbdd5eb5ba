"""Make the picture of the page in the README: `make screenshot`."""

import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.page import people
from tests.server import Server


def main(target):
    with tempfile.TemporaryDirectory() as folder:
        people.register(Path(folder) / "livechat.db")
        server = Server(Path(folder), LIVECHAT_AGENT="agent:secret").wait()
        try:
            with sync_playwright() as playwright:
                options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
                with closing(playwright.chromium.launch(**options)) as browser:
                    tab = browser.new_page(viewport={"width": 1200, "height": 760})
                    tab.goto(f"http://127.0.0.1:{server.port}/inbox")
                    tab.get_by_label("User id").fill("agent")
                    tab.get_by_label("Token").fill("secret")
                    tab.get_by_role("button", name="Sign in").click()
                    tab.locator("#list tr").first.wait_for()
                    tab.mouse.move(0, 0)  # over no visitor
                    tab.screenshot(path=target)
        finally:
            server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
