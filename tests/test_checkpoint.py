"""Checkpoints: one unit, whole or not at all, written once, and refused when they don't fit."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from crystal_jax import files, sharding, stream, trees
from crystal_jax.checkpoint import load_weights, save_weights
from crystal_jax.config import CheckpointConfig, MeshConfig, ModelConfig, to_dict
from crystal_jax.errors import UserError
from crystal_jax.exports import Calendar
from crystal_jax.fingerprint import fingerprint
from crystal_jax.model import Crystal, abstract_params, init_params
from crystal_jax.states import RollingStates, newest_state
from crystal_jax.trees import check_tree

MODEL = ModelConfig(vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=16, rotary_dim=4)
SPECS = Crystal(MODEL).specs()


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def state(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    params = init_params(SPECS, 1, mesh)
    count = jax.device_put(np.int32(7), sharding.replicated(mesh))
    return {"params": params, "moments": {"count": count, "mu": init_params(SPECS, 2, mesh),
                                          "nu": init_params(SPECS, 3, mesh)}}


def abstract(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    params = abstract_params(SPECS, mesh)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return {"params": params, "moments": {"count": count, "mu": params, "nu": params}}


def states(folder: Path, keep: tuple[int, ...] = (), keep_last: int = 2) -> RollingStates:
    return RollingStates(folder / "checkpoints", CheckpointConfig(keep_last=keep_last), list(keep))


def position(step: int) -> dict[str, Any]:
    return {"model": to_dict(MODEL), "step": step, "plan_hash": "abc"}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_state_comes_back_bit_for_bit_also_on_another_mesh(tmp_path: Path, state: dict, mesh) -> None:
    kept = states(tmp_path)
    kept.save(5, state, position(5))
    kept.close()
    alone, spread = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), sharding.make_mesh(MeshConfig(1, 8, 1))
    for other in (mesh, alone, spread):
        found, where = states(tmp_path).restore(5, abstract(other))
        assert bits(found) == bits(state)
        assert where.pop("fingerprint") == fingerprint(state) and where == {"format": 1, **position(5)}
        want = jax.tree.leaves(abstract(other))
        assert all(leaf.sharding == w.sharding for leaf, w in zip(jax.tree.leaves(found), want, strict=True))


def test_the_latest_and_the_named_steps_stay(tmp_path: Path, state: dict) -> None:
    kept = states(tmp_path, keep=(2,))
    for step in range(1, 7):
        kept.save(step, state, position(step))
        kept.check()
    kept.save(6, state, position(6))
    kept.close()
    assert sorted(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir()) == [2, 5, 6]
    assert newest_state(tmp_path) == 6 and states(tmp_path).steps() == [2, 5, 6]
    assert load_weights(tmp_path).info["step"] == 6
    assert load_weights(tmp_path / "checkpoints" / "2").info["step"] == 2


def test_a_state_that_was_not_finished_is_not_seen(tmp_path: Path, state: dict) -> None:
    kept = states(tmp_path)
    kept.save(1, state, position(1))
    kept.close()
    for name in ("2.orbax-checkpoint-tmp", "3"):
        shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "3" / "position.json").unlink()
    assert newest_state(tmp_path) == 1 and load_weights(tmp_path).info["step"] == 1
    again = states(tmp_path)
    again.save(4, state, position(4))
    again.close()
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]


def without(tree: dict, *path: str) -> dict:
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    node = copy
    for name in path[:-1]:
        node[name] = dict(node[name])
        node = node[name]
    del node[path[-1]]
    return copy


def test_a_missing_an_extra_and_a_misshaped_leaf_are_named(tmp_path: Path, state: dict, mesh) -> None:
    """Against real checkpoints, since Orbax restores some of these in silence."""
    cases = {
        "no leaf layers.mlp.up": ({**state, "params": without(state["params"], "layers", "mlp", "up")}, abstract(mesh)),
        "leaf layers.mlp.up .* is not in the model":
            (state, {**abstract(mesh), "params": without(abstract(mesh)["params"], "layers", "mlp", "up")}),
    }
    wrong = abstract(mesh)
    wrong["params"] = {**wrong["params"], "embed": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
    cases["leaf embed is float32\\[64, 16\\], but the model wants float32\\[64, 32\\]"] = (state, wrong)
    for number, (said, (saved, wanted)) in enumerate(cases.items()):
        kept = states(tmp_path / str(number))
        kept.save(1, saved, position(1))
        kept.close()
        with pytest.raises(UserError, match=said):
            states(tmp_path / str(number)).restore(1, wanted)


def test_check_tree_compares_dtypes() -> None:
    with pytest.raises(UserError, match="a is bfloat16\\[2\\], but the model wants float32\\[2\\]"):
        check_tree("x", {"a": jnp.zeros(2, jnp.bfloat16)}, {"a": jnp.zeros(2)})


def host(params: Any, dtype: Any = np.float32) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_weights_are_whole_equal_and_written_once(tmp_path: Path, state: dict, dtype: Any) -> None:
    params = host(state["params"], dtype)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_weights(tmp_path / "w", params, MODEL, tmp_path / "tokenizer.json", {"step": 3})
    before = {path: path.read_bytes() for path in (tmp_path / "w").rglob("*") if path.is_file()}
    save_weights(tmp_path / "w", host(state["moments"]["mu"]), MODEL, None, {"step": 4})
    assert before == {path: path.read_bytes() for path in (tmp_path / "w").rglob("*") if path.is_file()}
    found = load_weights(tmp_path / "w")
    assert bits(found.params) == bits(params) and found.model == MODEL and found.info["step"] == 3
    assert found.tokenizer == tmp_path / "w" / "tokenizer.json"
    assert not list(tmp_path.glob(".*partial"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, state: dict) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no checkpoint"):
        save_weights(tmp_path / "w", host(state["params"]), MODEL, None, {})
    assert (tmp_path / "w" / "thesis.txt").read_text() == "years of work"


def test_bytes_that_come_back_changed_make_no_checkpoint(tmp_path: Path, state: dict, monkeypatch) -> None:
    received = stream._received

    def flipped(read: Any, place: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        _, values = received(read, place, shape)
        changed = values.copy()
        if values.shape[1:] == (16, 24):
            changed.view(np.uint8).flat[77] ^= 1
        return place, changed

    monkeypatch.setattr(stream, "_received", flipped)
    with pytest.raises(UserError, match=r"layers.mlp.\w+ read back differs"):
        save_weights(tmp_path / "w", host(state["params"]), MODEL, None, {})
    assert not (tmp_path / "w").exists()


def test_a_full_disk_leaves_no_part_of_a_checkpoint(tmp_path: Path, state: dict, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(UserError, match="no space left"):
        save_weights(tmp_path / "w", host(state["params"]), MODEL, None, {})
    assert not list(tmp_path.iterdir())


def test_a_write_that_was_cut_off_is_done_again(tmp_path: Path, state: dict) -> None:
    partial = tmp_path / ".w.partial" / "params"
    partial.mkdir(parents=True)
    (partial / "half").write_text("a kill came here")
    save_weights(tmp_path / "w", host(state["params"]), MODEL, None, {"step": 1})
    assert bits(load_weights(tmp_path / "w").params) == bits(state["params"])


def test_what_is_no_checkpoint_or_a_newer_one_is_refused(tmp_path: Path, state: dict) -> None:
    with pytest.raises(UserError, match="neither a run with a saved state"):
        load_weights(tmp_path / "nowhere")
    save_weights(tmp_path / "w", host(state["params"]), MODEL, None, {})
    for place in (tmp_path, tmp_path / "v"):
        with pytest.raises(UserError, match=f"neither a run .*; in {tmp_path} there are w$"):
            load_weights(place)
    info = tmp_path / "w" / "checkpoint.json"
    original = json.loads(info.read_text())
    files.write_json(info, {**original, "format": 2})
    with pytest.raises(UserError, match="format 2, but this version reads 1"):
        load_weights(tmp_path / "w")
    files.write_json(info, {**original, "model": {**original["model"], "num_layers": 3}})
    with pytest.raises(UserError, match=r"is float32\[2, .*\], but the model wants float32\[3"):
        load_weights(tmp_path / "w")
    info.write_text("{")
    with pytest.raises(UserError, match=r"checkpoint\.json: damaged \("):
        load_weights(tmp_path / "w")


def test_the_manifest_lists_the_whole_checkpoints_in_order(tmp_path: Path, state: dict) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    calendar = Calendar(tmp_path)
    for step, name in ((9, "phase2/step_000003"), (3, "phase1/step_000003")):
        info = {"name": name, "step": step, "phase": name[:6], "plan_hash": "abc", "config": {"long": 1}}
        calendar.write(name, state["params"], MODEL, "bfloat16", info)
    (tmp_path / "exports" / "phase2" / ".step_000006.partial").mkdir()
    calendar.refresh("abc")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["checkpoints"]] == ["phase1/step_000003", "phase2/step_000003"]
    assert all(entry["exported"] and "config" not in entry for entry in manifest["checkpoints"])
    kept = load_weights(tmp_path / "exports" / "phase1" / "step_000003")
    assert bits(kept.params) == bits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state["params"]))


def test_a_full_disk_is_one_line(tmp_path: Path, state: dict, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = states(tmp_path)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", full)
    with pytest.raises(UserError, match="no space left on the device; the states saved before are whole"):
        kept.save(1, state, position(1))
    monkeypatch.undo()
    monkeypatch.setattr(trees.Writer, "wait", full)
    kept.save(1, state, position(1))
    with pytest.raises(UserError, match="no space left"):
        kept.close()
    assert newest_state(tmp_path) is None
