"""What a power cut can leave of the files and folders that our own code makes, moves and removes.

`recording` writes down what Python's `os` does to names, and what it syncs; writes are not
written down, as a file holds for certain only what was in it when it was synced. What SQLite does
by itself is not seen here, but in tests/power.py.

    with recording(folder) as recorder:
        ...
    for is_over, files in recorder.cuts():
        ...
"""

import os
import stat
from contextlib import contextmanager
from itertools import compress, count, product

import pytest


class Recorder:
    """A folder as it was at the beginning, and a journal of what was done since.

    Every file and folder has a number, for it may have several names, or none. In the journal
    stand lists of (folder, name, file or None), which change together, and (file, content).
    """

    def __init__(self, root):
        self.journal = []
        self._unused = count()
        self._numbers = {}  # by device and inode
        self._names = {}  # of each folder at the beginning: the files in it, by name
        self._contents = {}  # of each file at the beginning
        self._root = self._number(root)
        for path, folders, files in os.walk(root):
            inside = {name: self._number(os.path.join(path, name)) for name in folders + files}
            self._names[self._number(path)] = inside
            for name in files:
                with open(os.path.join(path, name), "rb") as file:
                    self._contents[inside[name]] = file.read()

    def cuts(self):
        """Yield what each possible cut leaves: whether all was over by then, and the files.

        Of these the content by path, None for a folder. A name that was changed since the last
        sync of its folder may be as before or as after, whatever became of the other names.
        """
        names, contents, waiting = self._names, dict(self._contents), []
        for number, event in enumerate([None, *self.journal]):
            if isinstance(event, list):
                waiting.append(event)
            elif event:
                synced, contents[synced] = event
                certain = [[one for one in change if one[0] == synced] for change in waiting]
                names = changed(names, certain)
                waiting = [[one for one in change if one[0] != synced] for change in waiting]
                waiting = [change for change in waiting if change]
            for kept in product((False, True), repeat=len(waiting)):
                left = changed(names, compress(waiting, kept))
                yield number == len(self.journal), dict(below(self._root, left, contents))

    def wrappers(self):
        """Return by name what stands in for functions of `os`: it does the same, and records it."""
        do = {name: getattr(os, name) for name in ("open", "mkdir", "link", "replace", "rmdir")}
        do |= {name: getattr(os, name) for name in ("unlink", "fsync")}

        def create(path, flags, *more, **options):
            is_new = flags & os.O_CREAT and not os.path.lexists(path)
            descriptor = do["open"](path, flags, *more, **options)
            if is_new:
                self._record((path, self._number(path, is_new=True)))
            return descriptor

        def mkdir(path, *more, **options):
            do["mkdir"](path, *more, **options)
            self._names[self._number(path, is_new=True)] = {}
            self._record((path, self._number(path)))

        def link(old, new, **options):
            do["link"](old, new, **options)
            self._record((new, self._number(new)))

        def move(old, new):
            do["replace"](old, new)
            self._record((old, None), (new, self._number(new)))

        def unlink(path):
            do["unlink"](path)
            self._record((path, None))

        def rmdir(path):
            do["rmdir"](path)
            self._record((path, None))

        def sync(descriptor):
            do["fsync"](descriptor)
            status = os.fstat(descriptor)
            is_file = stat.S_ISREG(status.st_mode)
            content = os.pread(descriptor, status.st_size, 0) if is_file else None
            self.journal.append((self._number(descriptor), content))

        functions = {"open": create, "mkdir": mkdir, "link": link, "rmdir": rmdir}
        functions |= dict.fromkeys(("rename", "replace"), move)
        functions |= dict.fromkeys(("unlink", "remove"), unlink)
        return functions | dict.fromkeys(("fsync", "fdatasync"), sync)

    def _number(self, file, is_new=False):
        """Return the number of a file or folder, which is given by its path or descriptor."""
        status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
        inode = status.st_dev, status.st_ino
        if is_new or inode not in self._numbers:  # the inode of a removed file is used again
            self._numbers[inode] = next(self._unused)
        return self._numbers[inode]

    def _record(self, *changes):
        self.journal.append(
            [
                (self._number(os.path.dirname(os.path.abspath(path))), os.path.basename(path), file)
                for path, file in changes
            ]
        )


def changed(names, changes):
    """Return the names in each folder after changes."""
    names = {folder: dict(inside) for folder, inside in names.items()}
    for folder, name, file in (one for change in changes for one in change):
        names.setdefault(folder, {})[name] = file
    return names


def below(folder, names, contents, path=""):
    """Yield path and content of all that is in a folder."""
    for name, file in names[folder].items():
        if file in names:
            yield f"{path}{name}", None
            yield from below(file, names, contents, f"{path}{name}/")
        elif file is not None:
            yield f"{path}{name}", contents.get(file, b"")  # as if nothing had been written


def lay_out(files, folder):
    """Make a new folder with what a cut has left."""
    os.mkdir(folder)
    for path, content in files.items():
        if content is None:
            os.mkdir(os.path.join(folder, path))
        else:
            with open(os.path.join(folder, path), "wb") as file:
                file.write(content)


@contextmanager
def recording(root):
    """Record what this process does to the files and folders in the folder `root`."""
    recorder = Recorder(root)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in recorder.wrappers().items():
            if hasattr(os, name):  # macOS has no fdatasync
                patch.setattr(os, name, function)
        yield recorder
