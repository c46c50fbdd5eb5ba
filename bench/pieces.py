"""Measure what CPU each part of a registration takes, in one thread and one process.

Run from the project's root: `.venv/bin/python -m bench.pieces`.
"""

import logging
import os
import tempfile
import time
from pathlib import Path

from falcon import testing

import app
import schemas
import storage
from bench.servers import BUILD
from resources.body import parse
from settings import Settings
from tests.server import PATH

BODY = (
    '{"visitor":{"token":"%s","name":"Visitor %s","email":"%s@example.com","phone":"+%s",'
    '"customFields":[{"key":"address","value":"1 Main Street","overwrite":true}]}}'
)


class Batch:
    """A database whose writes are parts of a transaction that has begun already."""

    def __init__(self, connection):
        self._connection = connection

    def write(self, work):
        return work(self._connection)


def cpu(call, calls=500, rounds=7):
    """Return the microseconds of CPU that `call`, given a new token, takes in this thread."""
    found = []
    for number in range(rounds):
        tokens = [f"{os.urandom(4).hex()}-{number}" for number in range(calls)]
        start = time.thread_time()
        for token in tokens:
            call(token)
        found.append((time.thread_time() - start) / calls * 1e6)
    return min(found)  # whatever else the machine does only adds


def main():
    BUILD.mkdir(exist_ok=True)
    logging.basicConfig(filename=os.devnull, level=logging.INFO)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        path = str(Path(folder) / "livechat.db")
        storage.prepare(path)
        database = storage.Database(path)
        for name, took in pieces(path, database):
            print(f"{took:4.0f} µs  {name}")
        database.close()


def pieces(path, database):
    store = storage.VisitorStore(database)
    service = app.create_app(store, Settings(database=path))
    body = BODY % (("model",) * 4)
    visitor = parse(body.encode())["visitor"]
    del visitor["token"]
    fields = visitor.pop("customFields")

    def request(token):
        body = BODY % ((token,) * 4)
        headers = {"Content-Type": "application/json"}
        environ = testing.create_environ(PATH, method="POST", body=body, headers=headers)
        return b"".join(service(environ, lambda status, headers: None))

    made = cpu(
        lambda token: testing.create_environ(PATH, method="POST", body=BODY % ((token,) * 4))
    )
    yield "a request in all, but for the server", cpu(request) - made
    yield "  JSON, strictly", cpu(lambda token: parse(body.encode()))
    check, value = schemas.match_checker("visitor"), parse(body.encode())
    yield "  the schema", cpu(lambda token: check(value))
    yield "  the store in all", cpu(lambda token: store.register(token, visitor, fields))
    yield "    BEGIN and COMMIT of nothing", cpu(lambda token: database.write(lambda _: 0))

    def grouped(connection):
        batch = storage.VisitorStore(Batch(connection))
        return cpu(lambda token: batch.register(token, visitor, fields))

    yield "    SELECT, INSERT and the answer", database.write(grouped)


if __name__ == "__main__":
    main()
