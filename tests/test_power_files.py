"""What is said to be done outlives a power cut, also where it is a name or a moved file."""

import pytest

import storage
from tests.power_files import lay_out, recording

VISITORS = [(f"token-{number}", {"name": "John Doe"}) for number in range(3)]


@pytest.mark.parametrize("name", ["livechat.db", "there/livechat.db", "a/livechat.db", "a/b/c.db"])
def test_a_prepared_database_and_its_folders_are_there_after_a_cut(tmp_path, name):
    root = tmp_path / "disk"
    (root / "there").mkdir(parents=True)
    with recording(root) as recorder:
        assert storage.prepare(str(root / name)) == (True, 0)
    for number, (is_over, files) in enumerate(recorder.cuts()):
        assert name in files or not is_over
        left = tmp_path / f"cut {number}"
        lay_out(files, left)
        assert storage.prepare(str(left / name))[1] == 0  # the next start needs no hand


@pytest.mark.parametrize(
    ("command", "before"),
    [
        (["backup"], None),
        (["backup", "--force"], b"the backup before"),
        (["export", "--output"], None),
        (["export", "--output"], b"the export before"),
    ],
    ids=["backup", "backup over another one", "export", "export over another one"],
)
def test_a_written_file_is_whole_after_a_cut_and_the_one_before_never_gone_without_it(
    run, fill, tmp_path, command, before
):
    fill(*VISITORS)
    folder = tmp_path / "written"
    folder.mkdir()
    path = folder / "file"
    if before:
        path.write_bytes(before)
    with recording(folder) as recorder:
        assert run(*command, path)[0] == 0
    after = path.read_bytes()
    assert len(after) > 100
    seen = set()
    for is_over, files in recorder.cuts():
        found = files.get("file")
        assert found == after or (found == before and not is_over)
        seen.add(found)
    assert seen == {before, after}
