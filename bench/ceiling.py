"""What nobody can be faster than here: `app` answers a constant, `main` only commits.

`app` is a bare falcon application that reads the JSON of a registration and keeps nothing.
Run from the project's root: `.venv/bin/python -m bench.ceiling DATABASE SECONDS` commits one row
after the other, each on the disk before the next, in this one process.
"""

import json
import sys
import time

import apsw
import falcon

import storage
from storage.connection import configure
from tests.server import PATH


class ConstantResource:
    def on_post(self, req, resp):
        token = req.media["visitor"]["token"]
        assert token
        resp.media = CONSTANT


CONSTANT = {
    "visitor": {
        "_id": "b3c7SMriL729R3J8w",
        "username": "guest-2",
        "status": "online",
        "ts": "2022-06-29T06:05:01.392Z",
        "_updatedAt": "2022-06-29T06:05:01.408Z",
        "token": "867ad6a09fc4af29f6f1f2a9cf1deaba",
    },
    "success": True,
}

app = falcon.App()
app.add_route(PATH, ConstantResource())


def main(path, seconds):
    storage.prepare(path)
    connection = apsw.Connection(path)
    configure(connection)
    insert = "INSERT INTO visitor VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    took = []
    end = time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        token = f"raw-{len(took)}"
        texts = ("b3c7SMriL729R3J8w", token, "guest-2", f"Visitor {token}")
        contact = (f"{token}@example.com", f"+{token}", None)
        rest = (1, 1, f"visitor {token}\0guest-2\x001 main street", '{"address":"1 Main Street"}')
        connection.execute(insert, (None, *texts, *contact, *rest))
        took.append(1000 * (time.monotonic() - start))
    connection.close()
    took.sort()
    p50, p99 = (took[int(len(took) * part)] for part in (0.5, 0.99))
    print(json.dumps({"rate": len(took) / seconds, "p50": p50, "p99": p99, "rows": len(took)}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
