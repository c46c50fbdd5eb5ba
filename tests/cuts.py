"""What a power cut can leave of files that are moved about, as far as our own code does that.

`recorded` runs a call and notes what it does to names: folders that are made, files that are moved,
and what is synced. `cuts` then says what the disk may hold after a cut at any moment: a change of
names is certain once the folders it stands in were synced, until then it may be there or not; the
content of a new file is certain once that was synced, until then the file may be empty.
"""

import os
import shutil
from contextlib import contextmanager
from itertools import product
from pathlib import Path


@contextmanager
def recorded(home, monkeypatch):
    """Yield a list that tells, after the block, what was done inside of the folder `home`."""
    journal = []
    written = {}  # the content of new files, once it was synced

    def name(path):
        return os.path.relpath(path, home)

    def mkdir(path, *mode):
        true["mkdir"](path, *mode)
        journal.append(("mkdir", None, name(path), None))

    def move(how):
        def moving(old, new):
            new_file = os.path.basename(old).startswith(".livechat-")
            true[how](old, new)
            content = written.get(old, b"") if new_file else None
            journal.append(("move", name(old), name(new), content))

        return moving

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            journal.append(("sync", None, name(path), None))
        else:
            written[path] = Path(path).read_bytes()

    changed = {"mkdir": mkdir, "fsync": fsync}
    changed |= {how: move(how) for how in ("rename", "replace", "link")}
    true = {how: getattr(os, how) for how in changed}
    with monkeypatch.context() as patched:
        for how, function in changed.items():
            patched.setattr(os, how, function)
        yield journal


def cuts(journal, before, folder):
    """Fill the empty `folder` with what each cut may leave; yield after each, and empty it again.

    `before` is a copy of what was there.
    """
    for moment in range(len(journal) + 1):
        unsure = [
            n for n, one in enumerate(journal[:moment]) if not is_certain(n, one, journal[:moment])
        ]
        for kept in product((True, False), repeat=len(unsure)):
            lost = {number for number, keep in zip(unsure, kept, strict=True) if not keep}
            shutil.copytree(before, folder, dirs_exist_ok=True)
            for number, operation in enumerate(journal[:moment]):
                if number not in lost and operation[0] != "sync":
                    apply(folder, *operation)
            yield f"after {[one[:3] for one in journal[:moment]]} without {lost}"
            shutil.rmtree(folder)
            folder.mkdir()


def is_certain(number, operation, journal):
    """Return whether the folders that an operation changes were synced after it."""
    what, old, new, content = operation
    changed = {os.path.dirname(new) or "."}
    if old is not None and content is None:
        changed.add(os.path.dirname(old) or ".")
    synced = {path for what, _, path, _ in journal[number:] if what == "sync"}
    return what == "sync" or changed <= synced


def apply(folder, what, old, new, content):
    """Do it again, unless what it stands on was lost."""
    target = folder / new
    if not target.parent.is_dir():
        return
    if what == "mkdir":
        target.mkdir(0o700)
    elif content is not None:
        target.write_bytes(content)
    elif (folder / old).exists():
        (folder / old).rename(target)
