"""Files: whole or not there, the same on gs:// as locally, and each fault in one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax import files
from crystal_jax.errors import UserError

DATA = bytes(range(256)) * 40


@pytest.fixture(params=["local", "gs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path):
    """An empty place, local or on gs://."""
    return files.as_path(tmp_path if request.param == "local" else request.getfixturevalue("gcs").folder())


# Paths


def test_paths_of_both_kinds(gcs) -> None:
    assert not files.is_remote("a/b") and not files.is_remote(Path("/a")) and files.is_remote("gs://a/b")
    assert os.fspath(files.as_path("gs://a/b") / "c") == "gs://a/b/c"
    assert os.fspath(files.as_path(Path("a") / "b")) == "a/b"


@pytest.mark.parametrize("path", ["s3://a/b", "http://a/b"])
def test_other_storage_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=rf"{path}: storage of another kind; give a local path or gs://"):
        files.as_path(path)


def test_without_the_package_one_line_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_can_gs", lambda: False)
    with pytest.raises(UserError, match=r"gs://a/b: gs:// needs the package gcsfs; pip install .*data.txt"):
        files.as_path("gs://a/b")
    assert files.as_path("a/b").name == "b"


def test_importing_it_is_light() -> None:
    program = "import sys, crystal_jax.files; print(*sorted(set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[1]).stdout.split()
    assert not {"tensorstore", "gcsfs", "fsspec", "tensorflow", "jax"} & set(found)


# Whole files


def test_what_is_written_is_read(folder) -> None:
    path = folder / "new" / "a.json"
    for data in ({"x": [1, "é\ud800"]}, [], None):
        files.write_json(path, data)
        assert files.read_json(path) == data
    files.write_bytes(path, DATA)
    assert files.read_bytes(path) == DATA and files.file_size(path) == len(DATA)
    files.write_bytes(path, b"")
    assert files.read_bytes(path) == b"" and files.file_size(path) == 0
    assert files.list_files(folder) == {"new/a.json"}


def test_json_that_cant_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside(
        tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_kill_leaves_a_hidden_name_that_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: names.extend(os.listdir(tmp_path)))
    files.write_bytes(tmp_path / "a", b"new")
    (name,) = names
    assert name.startswith(f".a{files.PARTIAL}")


def test_missing_and_damaged_json_is_named(folder) -> None:
    with pytest.raises(UserError, match=r"/a\.json: no such file$"):
        files.read_json(folder / "a.json")
    for data in (b"{", b"\xff", b""):
        files.write_bytes(folder / "a.json", data)
        with pytest.raises(UserError, match=r"/a\.json: damaged \("):
            files.read_json(folder / "a.json")


def test_a_missing_file_is_an_oserror(folder) -> None:
    for read in (files.read_bytes, files.file_size):
        with pytest.raises(FileNotFoundError):
            read(folder / "none")


def test_listing_goes_down_and_not_beside(folder) -> None:
    assert files.list_files(folder / "a") == set()
    for name in ("a/1", "a/b/2", "a/b/c/3", "ab/4", "a.5", "b/6"):
        files.write_bytes(folder / name, b"x")
    assert files.list_files(folder / "a") == {"1", "b/2", "b/c/3"}
    assert files.list_files(folder / "b") == {"6"}


# Publishing


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's own
@pytest.mark.parametrize("size", [0, 10, 9_000_000])
def test_a_published_file_moves(folder, tmp_path: Path, size: int) -> None:
    local, data = tmp_path / "made", (DATA * (size // len(DATA) + 1))[:size]
    for target in (folder / "x" / "y", os.fspath(folder / "x" / "y")):
        local.write_bytes(data)
        files.publish(local, target)
        assert not local.exists()
        assert files.read_bytes(folder / "x" / "y") == data
    assert files.list_files(folder) == {"x/y"}


def test_a_file_is_published_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def across(old: os.PathLike, new: os.PathLike) -> None:
        if Path(old).parent != Path(new).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(old, new)

    monkeypatch.setattr(os, "replace", across)
    (tmp_path / "made").write_bytes(DATA)
    files.publish(tmp_path / "made", tmp_path / "x" / "y")
    assert files.list_files(files.as_path(tmp_path)) == {"x/y"}
    assert (tmp_path / "x" / "y").read_bytes() == DATA


def test_another_fault_of_publishing_is_raised(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "made").write_bytes(DATA)
    with pytest.raises(IsADirectoryError):
        files.publish(tmp_path / "made", tmp_path / "x")
    assert (tmp_path / "made").exists()


# Ranges


@given(data=st.data())
def test_ranges_are_slices(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges"
    path.write_bytes(DATA)
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 500)).map(
        lambda pair: (pair[0], min(pair[1], len(DATA) - pair[0])))))
    found = files.read_ranges(files.as_path(path), [start for start, _ in pairs], [length for _, length in pairs])
    assert found == [DATA[start : start + length] for start, length in pairs]


def test_ranges_of_several_files(folder) -> None:
    for name in "ab":
        files.write_bytes(folder / name, name.encode() * 300)
    assert files.read_many([(folder / "b", 1, 2), (folder / "a", 0, 300), (folder / "b", 299, 1)]) == [
        b"bb", b"a" * 300, b"b"]


@pytest.mark.parametrize("start", [99, 100, 5000])
def test_a_short_file_is_named(folder, start: int) -> None:
    files.write_bytes(folder / "a", b"x" * 100)
    with pytest.raises(UserError, match=rf"/a: bytes {start} to {start + 7} .*short") as error:
        files.read_ranges(folder / "a", [0, start], [5, 7])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="/none: missing"):
        files.read_ranges(folder / "none", [start], [7])


def test_relative_paths_are_the_processs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(DATA)
    assert files.read_ranges(files.as_path("a"), [1], [3]) == [DATA[1:4]]


# Whole large files


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_blocks_and_hashes_of_a_whole_file(folder, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(files, "LOCAL_BLOCK", 100)
    monkeypatch.setattr(files, "REMOTE_BLOCK", 100)
    data = DATA[:size]
    files.write_bytes(folder / "a", data)
    blocks = [bytes(block) for block in files.read_blocks(folder / "a")]
    assert b"".join(blocks) == data and all(len(block) == 100 for block in blocks[:-1])
    read: list[int] = []
    assert files.sha256(folder / "a", read.append) == hashlib.sha256(data).hexdigest()
    assert sum(read) == size
