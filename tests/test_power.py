"""200 outlives a power cut at any moment, and the next start needs no hand (contract, 2.3)."""

import os
import re
import shutil
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from random import Random, randrange
from tempfile import TemporaryDirectory

import pytest

import storage
from tests import power

CHANGES = 120  # in one recorded run: some 1,700 operations


@pytest.fixture
def record(tmp_path_factory):
    return lambda *arguments: power.record(tmp_path_factory.mktemp("run"), *arguments)


@pytest.fixture
def folder():
    # In memory where that can be: a disk would take most of the time for syncs of no use here.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder) / "cut"


def cuts(journal, seed, most=None):
    """Yield cuts, `most` of them by chance: name, kind, moment, and the files that are left."""
    every = [(number, kind) for number in range(len(journal)) for kind in power.KINDS]
    wanted = defaultdict(list)
    for number, kind in Random(seed).sample(every, min(most or len(every), len(every))):
        wanted[number].append(kind)
    for number, (disk, moment) in enumerate(power.history(journal)):
        for kind in wanted[number]:
            name = f"seed {seed}: after operation {number} of {len(journal)}, {kind} stays"
            yield name, kind, moment, disk.left(kind, Random(name))


def wrong(folder, moment, files):
    """Start on these files, as the service does; return what is wrong there, or None."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        storage.prepare(str(folder / power.NAME))
        data = b"".join(file.read_bytes() for file in folder.iterdir())
        with closing(storage.Database(str(folder / power.NAME))) as database:
            return fault(database, data, moment)
    except Exception as error:  # whatever a damaged database makes the code raise
        return f"damaged: {error!r}"


def fault(database, data, moment):
    """Return what is wrong with a database whose files hold `data`, or None."""
    check = database.read(lambda connection: connection.pragma("integrity_check"))
    if check != "ok":
        return f"damaged: {check}"
    sql = "SELECT token FROM visitor"
    tokens = database.read(lambda connection: connection.execute(sql).fetchall())
    store = storage.VisitorStore(database)
    kept = {token: store.find(token) for (token,) in tokens}
    if kept not in (moment.before, moment.after):
        tokens = moment.before | kept
        return f"lost: {[t for t in tokens if kept.get(t) != moment.before.get(t)]}"
    if store.register("next", {})["username"] in moment.usernames:
        return "a guest number for the second time"
    secrets = [set(re.findall(rb"secret-\d{5}", text)) for text in (data, str(kept).encode())]
    if not secrets[0] <= secrets[1]:
        return f"erased or replaced, and in the files: {secrets[0] - secrets[1]}"
    return None


def test_a_cut_while_the_database_is_made_leaves_what_the_next_start_can_use(record, folder):
    journal = record(1, CHANGES)
    first = [operation[0] for operation in journal].index("begin")
    for name, _, moment, files in cuts(journal[:first], 1):
        assert not (found := wrong(folder, moment, files)), f"{name}: {found}"


def test_a_cut_loses_no_answered_change_and_leaves_no_half_of_another(
    record, folder, often, capsys
):
    wanted = often(200, 10_000)
    first = seed = often(1, randrange(10**6))  # a cut that fails names its seed, to be put here
    tried, recorded = Counter(), Counter()
    while tried.total() < wanted:
        journal = record(seed, CHANGES)
        recorded.update(operation[0] for operation in journal)
        for name, kind, moment, files in cuts(journal, seed, wanted - tried.total()):
            assert not (found := wrong(folder, moment, files)), f"{name}: {found}"
            tried[kind] += 1
        seed += 1
    if often(False, True):
        with capsys.disabled():
            print(f"\nseeds {first} to {seed - 1}, {recorded.total()} operations: {dict(recorded)}")
            print(f"{tried.total()} cuts; what stays of that which was not synced: {dict(tried)}")


@pytest.mark.parametrize(
    ("synchronous", "faults"), [("NORMAL", {"lost"}), ("OFF", {"lost", "damaged"})]
)
def test_the_cuts_find_it_where_sqlite_syncs_less(record, folder, synchronous, faults):
    left = cuts(record(1, CHANGES, synchronous), 1, 60)
    found = [wrong(folder, moment, files) for _, _, moment, files in left]
    assert {what.partition(":")[0] for what in found if what} >= faults


def test_the_journal_holds_all_that_is_in_the_files(tmp_path):
    journal = power.record(tmp_path, 1, CHANGES)
    *_, (disk, _) = power.history(journal)
    files = disk.left("everything", Random())
    assert set(files) == {power.NAME, f"{power.NAME}-wal"}
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
