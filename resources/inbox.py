"""GET /inbox: the page that shows an agent who came (contract, section 7).

It is one file, and all that it knows it asks the API for, as any other client does.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

import falcon

from settings import Settings


class InboxResource:
    """GET /inbox: the page, from memory."""

    def __init__(self, settings: Settings) -> None:
        page = files(__package__).joinpath("inbox.html").read_text("utf-8")
        self._policy = "; ".join(
            (
                "default-src 'none'",
                "connect-src 'self'",
                "img-src data:",  # its icon
                f"style-src {_hash('style', page)}",
                f"script-src {_hash('script', page)}",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",  # nothing that parses HTML takes a text
                "trusted-types 'none'",
            )
        )
        # Without an agent nobody can sign in, and the page says how to set one.
        agent = "set" if settings.agent else "unset"
        self._body = page.replace("<body>", f'<body data-agent="{agent}">', 1).encode()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the page."""
        resp.content_type = "text/html; charset=utf-8"
        resp.set_header("Content-Security-Policy", self._policy)
        resp.set_header("Referrer-Policy", "no-referrer")
        resp.data = self._body

    on_head = on_get


def _hash(element: str, page: str) -> str:
    """Return what a policy calls the one element of that name in `page`."""
    (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
