"""Measure a page of visitors.search with its total, and visitors.info, among many visitors.

Run from the project's root: `.venv/bin/python -m bench.search [VISITORS]`.
"""

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import storage
from bench.pieces import Batch

TERMS = {
    "everybody": ("", {}),
    "nobody": ("no such text", {}),
    "one by a part of the name": ("Visitor 77777 ", {}),
    "one by email": ("v77777@example.org", {}),
    "many": ("é", {}),
    "many by name": ("é", {"name": 1}),
    "everybody by name": ("", {"name": 1}),
    "everybody by update, then name": ("", {"_updatedAt": -1, "name": 1}),
}


def fill(database, visitors):
    """Register visitors, many in a transaction, as one each would take minutes."""

    def register(start, connection):
        store = storage.VisitorStore(Batch(connection))
        for number in range(start, min(start + 10_000, visitors)):
            given = {
                "name": f"Visitor {number} {'Émile' if number % 5 == 0 else 'Bob'}",
                "email": f"v{number}@example.org",
                "phone": f"+{number}",
            }
            field = {"key": "address", "value": f"{number} Main Street", "overwrite": True}
            store.register(f"token-{number:032}", given, [field])

    for start in range(0, visitors, 10_000):
        database.write(partial(register, start))


def measure(call):
    times = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main(visitors):
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "livechat.db")
        storage.prepare(path)
        database = storage.Database(path)
        fill(database, visitors)
        store = storage.VisitorStore(database)
        print(f"{visitors} visitors, {Path(path).stat().st_size / visitors:.0f} bytes each; ms:")
        for name, (term, sort) in TERMS.items():
            found, total = store.search(term, sort, 0, 50)
            took = measure(lambda term=term, sort=sort: store.search(term, sort, 0, 50))
            print(f"  {took:6.1f}  search: {name} ({len(found)} of {total})")
        id_ = store.search("", {}, 0, 1)[0][0]["_id"]
        print(f"  {measure(lambda: store.find(id_, 'id')):6.1f}  info: a visitor by _id")
        database.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
