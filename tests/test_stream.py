"""Streaming: stored arrays as mapped files with the same bits, whatever the chunks; little in memory; resumable."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax import checkpoint, files, sharding, stream
from crystal_jax.checkpoint import load_weights, open_weights, save_weights
from crystal_jax.config import CheckpointConfig, MeshConfig, ModelConfig, to_dict
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, init_params, map_specs
from crystal_jax.states import RollingStates

MODEL = ModelConfig(vocab_size=64, embed_dim=24, num_layers=2, num_heads=2, mlp_dim=36, max_length=16, rotary_dim=4)


def drawn(dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: rng.standard_normal(spec.shape).astype(dtype), Crystal(MODEL).specs())


def leaves(params: Any) -> dict[str, tuple[str, bytes]]:
    """Path to dtype and bits."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): (leaf.dtype.name, np.asarray(leaf).tobytes()) for path, leaf in found}


def opened(path: Any, scratch: Path) -> checkpoint.Weights:
    scratch.mkdir(exist_ok=True)
    return open_weights(path, scratch)


def refused(*args: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    save_weights(tmp_path / "w", drawn(), MODEL, tmp_path / "tokenizer.json", {"step": 4})
    return tmp_path / "w"


# The same bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_permanent_checkpoint(dtype: str, tmp_path: Path) -> None:
    save_weights(tmp_path / "w", drawn(np.dtype(dtype)), MODEL, None, {"step": 4})
    loaded, found = load_weights(tmp_path / "w"), opened(tmp_path / "w", tmp_path / "s")
    assert leaves(found.params) == leaves(loaded.params) == leaves(drawn(np.dtype(dtype)))
    assert (found.model, found.info, found.tokenizer) == (loaded.model, loaded.info, None)
    assert all(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(found.params))


@pytest.mark.parametrize("piece", [8, 100, 1 << 18])
def test_the_newest_state_of_a_run_on_several_devices(piece: int, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", piece)
    params = init_params(Crystal(MODEL).specs(), 3, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    kept = RollingStates(tmp_path / "checkpoints", CheckpointConfig(), [])
    kept.save(7, {"params": params, "moments": {"mu": params}}, {"model": to_dict(MODEL), "step": 7})
    kept.close()
    for path in (tmp_path, tmp_path / "checkpoints" / "7"):
        found = opened(path, tmp_path / "s")
        assert leaves(found.params) == leaves(params)
        assert found.info == {"step": 7}
        shutil.rmtree(tmp_path / "s")


def upload(folder: Path, place: Any) -> None:
    """All files of a folder to gs://; gcsfs sends them in a way from which the emulator drops a last line end."""
    for file in folder.rglob("*"):
        if file.is_file():
            store, key = files.kvstore(place / file.relative_to(folder).as_posix())
            store.write(key, file.read_bytes()).result()


def test_from_gs(saved: Path, gcs: Any, tmp_path: Path) -> None:
    place = files.as_path(gcs.folder())
    upload(saved, place)
    found = opened(str(place), tmp_path / "s")
    assert leaves(found.params) == leaves(drawn())
    assert found.tokenizer == tmp_path / "s" / "tokenizer.json"
    assert found.tokenizer.read_text() == "{}"
    assert "neither a run" in refused(f"{place}/nowhere", tmp_path / "s")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape, chunk, part) of an array: chunks and parts may reach beyond its end."""
    part = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    chunk = [n * draw(st.integers(1, 3)) for n in part]
    return tuple(draw(st.integers(1, 12)) for _ in part), tuple(chunk), tuple(part)


@given(layout=layouts(), piece=st.integers(2, 64), dtype=st.sampled_from(list(stream.TYPES)))
def test_any_grid_of_chunks_and_parts(layout: Any, piece: int, dtype: str, tmp_path_factory: Any) -> None:
    import tensorstore as ts

    shape, chunk, part = layout
    folder = tmp_path_factory.mktemp("grid")
    values = np.random.default_rng(0).standard_normal(shape).astype(np.dtype(dtype))
    codec = {"name": "sharding_indexed", "configuration": {
        "chunk_shape": part, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]}}
    ts.open({"driver": "zarr3", "create": True, "store_data_equal_to_fill_value": True,
             "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": "x/"},
             "metadata": {"shape": shape, "data_type": dtype, "codecs": [codec], "chunk_grid": {
                 "name": "regular", "configuration": {"chunk_shape": chunk}}}}).result().write(values).result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE", max(piece, values.itemsize))
        patch.setattr(stream, "IN_FLIGHT", 100)
        tree = stream.Tree(files.as_path(folder))
        target = np.full_like(values, 9)
        tree.copy(tree.arrays["x"], target)
    assert target.tobytes() == values.tobytes()


@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), itemsize=st.sampled_from([2, 4]),
       piece=st.integers(4, 99))
def test_boxes_are_runs_of_bytes_and_cover_the_array(shape: list[int], itemsize: int, piece: int) -> None:
    order = np.arange(np.prod(shape)).reshape(shape)
    runs = []
    for offset, box, size in stream.boxes(tuple(shape), itemsize, piece):
        found = order[box]
        assert found.shape == size and found.size * itemsize <= piece
        assert found.reshape(-1)[0] * itemsize == offset
        runs.append(found.reshape(-1))
    np.testing.assert_array_equal(np.concatenate(runs), np.arange(order.size))


# Memory


def test_no_more_is_asked_for_than_may_be_in_flight(saved: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 64)
    monkeypatch.setattr(stream, "IN_FLIGHT", 200)
    tree = stream.Tree(files.as_path(saved / "params"))
    held, ask = [0], tree._read

    class Read:
        def __init__(self, key: str, first: int, end: int) -> None:
            self.size, self.future = end - first, ask(key, first, end)
            held.append(held[-1] + self.size)

        def result(self) -> Any:
            held.append(held[-1] - self.size)
            return self.future.result()

    def counted(key: str, first: int, end: int | None = None) -> Any:
        return ask(key, first) if end is None else Read(key, first, end)  # the former an index

    monkeypatch.setattr(tree, "_read", counted)
    (tmp_path / "s").mkdir()
    stream.map_arrays(tree, tmp_path / "s")
    assert 128 < max(held) <= 200
    assert held[-1] == 0


# Going on


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the arrays that are read."""
    names: list[str] = []
    copy = stream.Tree.copy

    def noted(self: stream.Tree, array: stream.Array, target: np.ndarray) -> None:
        names.append(array.name)
        copy(self, array, target)
        if names.count(array.name) == 1 and len(names) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(stream.Tree, "copy", noted)
    return names


def test_what_was_whole_at_a_kill_is_not_read_again(saved: Path, read: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        opened(saved, tmp_path / "s")
    assert leaves(opened(saved, tmp_path / "s").params) == leaves(drawn())
    assert sorted(set(read)) == sorted(read[:3] + read[4:]) and len(read) == 22 and read[3] == read[4]
    assert leaves(opened(saved, tmp_path / "s").params) == leaves(drawn())
    assert len(read) == 22


@pytest.mark.parametrize("changed", ["tree", "boot"])
def test_copies_of_another_tree_or_before_a_restart_of_the_machine_are_made_anew(
        changed: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(saved, tmp_path / "s")
    if changed == "tree":
        shutil.rmtree(saved)
        save_weights(saved, drawn(seed=1), MODEL, None, {})
    else:
        (tmp_path / "boot").write_text("another")
        monkeypatch.setattr(stream, "BOOT", tmp_path / "boot")
        for file in (tmp_path / "s").glob("layers*"):
            file.write_bytes(bytes(file.stat().st_size))  # lost
    assert leaves(opened(saved, tmp_path / "s").params) == leaves(load_weights(saved).params)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with stream.locked(tmp_path / "s"), pytest.raises(UserError, match="in use"), stream.locked(tmp_path / "s"):
        pass
    with stream.locked(tmp_path / "s"):
        (tmp_path / "s" / "array").write_text("1")
        stream.clear(tmp_path / "s")
        with stream.locked(tmp_path / "s"):  # of another process, that came when it was gone
            (tmp_path / "s" / "array").write_text("2")
    assert (tmp_path / "s" / "array").read_text() == "2"


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process opens the file, the one that has the lock removes it, and a third comes."""
    flock, tries = stream.fcntl.flock, []

    def late(file: Any, operation: int) -> None:
        tries.append(file)
        if len(tries) == 1:
            (tmp_path / "s" / stream.LOCK).unlink()
            (tmp_path / "s").rmdir()
        flock(file, operation)

    monkeypatch.setattr(stream.fcntl, "flock", late)
    with stream.locked(tmp_path / "s"):
        monkeypatch.undo()
        assert len(tries) == 2 and tries[0].closed
        with pytest.raises(UserError, match="in use"), stream.locked(tmp_path / "s"):
            pass


def test_of_the_folders_above_those_that_stay_empty_go_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with stream.locked(tmp_path / "mine" / "a" / "b" / "s"):
        stream.clear(tmp_path / "mine" / "a" / "b" / "s")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"), stream.locked(tmp_path / "file" / "a" / "s"):
        pass
    with stream.locked(tmp_path / "a" / "s"):
        (tmp_path / "a" / "out").mkdir()
        stream.clear(tmp_path / "a" / "s")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


# Refused


def test_files_that_are_missing_or_damaged(saved: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(saved, whole)
    largest = max((saved / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.unlink()
    assert f"{saved}/params: missing or damaged files" in refused(saved, tmp_path / "s")
    (saved / "params" / "manifest.ocdbt").write_bytes(b"x")
    assert f"{saved}/params: missing or damaged files" in refused(saved, tmp_path / "s")
    (saved / "params" / "manifest.ocdbt").unlink()
    assert f"{saved}/params: missing or damaged files" in refused(saved, tmp_path / "s")
    shutil.rmtree(saved)
    whole.rename(saved)
    assert leaves(opened(saved, tmp_path / "s").params) == leaves(drawn())


def test_a_chunk_that_is_missing_is_no_zero(saved: Path, tmp_path: Path) -> None:
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{saved}/params/"}).result()
    store.write("layers.attn.q/c/0/0/0/0", None).result()
    assert "layers.attn.q/c/0/0/0/0 is missing" in refused(saved, tmp_path / "s")
    store.write("layers.attn.q/zarr.json", None).result()
    assert "no leaf layers.attn.q" in refused(saved, tmp_path / "s")


def test_another_layout_is_named(saved: Path, tmp_path: Path) -> None:
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{saved}/params/"}).result()
    text = store.read("embed/zarr.json").result().value
    store.write("embed/zarr.json", text.replace(b"float32", b"float64")).result()
    assert "embed: float64" in refused(saved, tmp_path / "s")


def test_a_full_disk_is_one_line(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert "no space left" in refused(saved, tmp_path / "s")
    assert leaves(opened(saved, tmp_path / "s").params) == leaves(drawn())


def test_bfloat16_is_what_ml_dtypes_calls_so() -> None:
    assert stream.TYPES["bfloat16"] == np.dtype(ml_dtypes.bfloat16)
