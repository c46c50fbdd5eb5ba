"""Bytes in pieces, on their way to a server."""

import sys
from pathlib import Path

from tests.server import wait_until

LINUX = sys.platform == "linux"


def pieces(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


def chunks(body, size):
    parts = pieces(body, size)
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def unread(client):
    """Return how many bytes of a client the server has not read yet; only Linux says it."""
    if not LINUX:
        return 0
    ends = [f"0100007F:{end[1]:04X}" for end in (client.getpeername(), client.getsockname())]
    lines = map(str.split, Path("/proc/net/tcp").read_text().splitlines())
    return sum(int(line[4].partition(":")[2], 16) for line in lines if line[1:3] == ends)


def send_in_pieces(client, parts):
    """Send bytes in parts, each when the server has read the one before."""
    for part in parts:
        client.sendall(part)
        wait_until(lambda: unread(client) == 0, "the server reads")
