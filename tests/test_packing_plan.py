"""A plan's files: the same whoever writes them and whatever stops it, and refused where they don't belong."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gcs import Emulator
from test_packing import LENGTHS, PACKINGS, T, make_store

from crystal_jax import files
from crystal_jax.data import packing
from crystal_jax.data.packing import BestFitRows, cut, plan_folder, read_plan, write_plan
from crystal_jax.data.rows import ConcatRows, make_rows
from crystal_jax.data.store import TokenStore
from crystal_jax.data.verify import verify
from crystal_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """With a plan for T."""
    store = make_store(tmp_path_factory.mktemp("plan") / "made")
    write_plan(store.path, T)
    return store


def contents(folder: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_plan_is_the_same_for_any_number_of_workers(made: TokenStore, tmp_path: Path) -> None:
    told: list[int] = []
    expected = contents(plan_folder(made, T))
    store = make_store(tmp_path / "made")
    plan = write_plan(store.path, T, 2, told.append)
    assert contents(plan_folder(store, T)) == expected
    assert sum(told) == sum(map(len, LENGTHS)) + 2
    found = plan["splits"]["train"]
    assert found["rows"] == make_rows(store, "train", "all", 1.0, "best_fit", T).num_rows
    assert found["padding"] == found["rows"] * (T + 1) - sum(
        size for documents in LENGTHS for size in cut(np.cumsum(documents), T)[1].tolist())
    assert found["padding_share"] == found["padding"] / (found["rows"] * (T + 1))


def test_a_plan_that_is_there_is_kept(made: TokenStore) -> None:
    before = {path: path.stat() for path in plan_folder(made, T).iterdir()}
    assert write_plan(made.path, T) == read_plan(made, T)
    assert before == {path: path.stat() for path in plan_folder(made, T).iterdir()}


def test_the_order_of_rows_never_changes_silently(made: TokenStore) -> None:
    """Frozen: another plan of the same store is another run."""
    assert read_plan(made, T)["splits"]["train"]["sha256"]["pieces"][:16] == "5e45675d16e9f64b"


@pytest.mark.parametrize("moment", [0, 1, 3])
def test_a_stop_at_any_moment_leaves_no_plan_and_no_litter(made: TokenStore, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    store = make_store(tmp_path / "made")
    (tmp_path / "made" / "packing" / f"{files.PARTIAL}killed").mkdir(parents=True)
    publish, done = files.publish, []

    def stopping(*args: Any) -> None:
        if len(done) == moment:
            raise KeyboardInterrupt
        done.append(publish(*args))

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_plan(store.path, T)
    with pytest.raises(UserError, match="no plan of best_fit packing"):
        read_plan(store, T)
    write_plan(store.path, T)
    assert contents(plan_folder(store, T)) == contents(plan_folder(made, T))
    assert [path.name for path in (tmp_path / "made" / "packing").iterdir()] == [f"best_fit-{T}"]


def start(program: str, *args: object) -> subprocess.Popen[bytes]:
    program = f"import os, sys\nfrom crystal_jax import files\nfrom crystal_jax.data import packing\n{program}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, args)], env=environment)


def test_a_killed_process_leaves_no_plan_and_the_next_one_cleans_up(made: TokenStore, tmp_path: Path) -> None:
    store = make_store(tmp_path / "made")
    killed = start(f"files.publish = lambda *args: os.kill(os.getpid(), {signal.SIGKILL:d})\n"
                   "packing.write_plan(sys.argv[1], int(sys.argv[2]))", store.path, T)
    assert killed.wait() == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "made" / "packing").iterdir()]
    assert len(left) == 1 and left[0].startswith(files.PARTIAL)
    write_plan(store.path, T)
    assert contents(plan_folder(store, T)) == contents(plan_folder(made, T))
    assert [path.name for path in (tmp_path / "made" / "packing").iterdir()] == [f"best_fit-{T}"]


def test_processes_that_plan_at_once_wait_for_each_other(made: TokenStore, tmp_path: Path) -> None:
    store = make_store(tmp_path / "made")
    together = [start("packing.write_plan(sys.argv[1], int(sys.argv[2]))", store.path, T) for _ in range(2)]
    assert [process.wait() for process in together] == [0, 0]
    assert contents(plan_folder(store, T)) == contents(plan_folder(made, T))


def test_without_a_plan_the_command_is_named(made: TokenStore) -> None:
    with pytest.raises(UserError, match=r"best_fit-17: no plan .*--packing=best_fit --sequence_length=17"):
        make_rows(made, "train", "all", 1.0, "best_fit", 17)


def test_another_stores_plan_is_refused_and_written_anew(tmp_path: Path) -> None:
    ours, theirs = make_store(tmp_path / "a"), make_store(tmp_path / "b", name="other")
    write_plan(ours.path, T)
    plan_folder(theirs, T).parent.mkdir()
    plan_folder(ours, T).rename(plan_folder(theirs, T))
    with pytest.raises(UserError, match=f"planned for store {ours.fingerprint}, but .*b is {theirs.fingerprint}"):
        make_rows(theirs, "train", "all", 1.0, "best_fit", T)
    assert write_plan(theirs.path, T)["store"] == theirs.fingerprint
    assert make_rows(theirs, "train", "all", 1.0, "best_fit", T).num_rows


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("train.rows", lambda data: data[:-8], "train.rows: .* bytes, the manifest says"),
    ("train.pieces", None, "train.pieces: can't be read"),
    ("manifest.json", lambda data: data.replace(b'"rows": 2,', b'"rows": 3,'), "manifest.json: damaged"),
    ("manifest.json", lambda data: data[:20], "manifest.json: can't be read"),
    ("manifest.json", lambda data: b"[]", "manifest.json: can't be read")])
def test_a_damaged_plan_is_named_and_mended(made: TokenStore, tmp_path: Path, name: str, damage: Any,
                                            message: str) -> None:
    store = make_store(tmp_path / "made")
    write_plan(store.path, T)
    file = plan_folder(store, T) / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        make_rows(store, "train", "all", 1.0, "best_fit", T)
    write_plan(store.path, T)
    assert contents(plan_folder(store, T)) == contents(plan_folder(made, T))


def test_all_plans_of_a_store_are_verified(tmp_path: Path) -> None:
    store = make_store(tmp_path / "made")
    assert packing.plan_problems(store) == []
    for length in (T, 5, 9):
        write_plan(store.path, length)
    read: list[int] = []
    assert packing.plan_problems(store, read.append) == []
    assert sum(read) == sum(len(data) for length in (T, 5, 9)
                            for name, data in contents(plan_folder(store, length)).items()
                            if name != "manifest.json")
    flipped, missing = plan_folder(store, 5) / "heldout.pieces", plan_folder(store, T) / "train.rows"
    data = bytearray(flipped.read_bytes())
    data[8] ^= 1
    flipped.write_bytes(data)
    missing.unlink()
    problems = packing.plan_problems(store)
    assert [str(flipped) in problems[0], str(missing) in problems[1], len(problems)] == [True, True, 2]
    assert "its contents changed" in problems[0] and f"remove {flipped.parent} " in problems[0]
    assert verify(store.path) == problems


def test_impossible_lengths_and_places_are_refused(made: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sequence_length: 0 must be 1 or more"):
        write_plan(made.path, 0)
    with pytest.raises(UserError, match="no finished token store"):
        write_plan(tmp_path, T)
    store = make_store(tmp_path / "made")
    (tmp_path / "made" / "packing").write_text("a file")
    with pytest.raises(UserError, match="best_fit-16: can't be written"):
        write_plan(store.path, T)


def test_a_run_is_told_apart_by_its_plan(made: TokenStore) -> None:
    concat, packed = (make_rows(made, "train", "all", 1.0, packing, T) for packing in PACKINGS)
    assert isinstance(concat, ConcatRows)
    assert isinstance(packed, BestFitRows)


def test_plans_on_cloud_storage(made: TokenStore, gcs: Emulator) -> None:
    folder = gcs.folder()
    for file in sorted(Path(made.path).rglob("*")):
        relative = file.relative_to(made.path)
        if file.is_file() and relative.parts[0] != "packing":
            files.write_bytes(f"{folder}/{relative}", file.read_bytes())
    store = TokenStore.open(folder)
    with pytest.raises(UserError, match="no plan of best_fit packing"):
        make_rows(store, "train", "all", 1.0, "best_fit", T)
    assert write_plan(folder, T) == read_plan(made, T) == write_plan(folder, T)
    there, here = (make_rows(place, "train", "odd", 1.0, "best_fit", T) for place in (store, made))
    rows = np.array([3, 0, 3, there.num_rows - 1])
    for found, expected in zip(there.read(rows), here.read(rows), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert there.pieces(1) == here.pieces(1)
    np.testing.assert_array_equal(there.rows_of("00003", 0, 40), here.rows_of("00003", 0, 40))
