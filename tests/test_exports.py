"""Permanent checkpoints: the calendar, written once, read back, and made later where one is missing."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_states import FAULTS, MESHES, MODEL, SPECS, bits, make_state

from crystal_jax import files, sharding, trees
from crystal_jax.checkpoint import load_weights, outline
from crystal_jax.config import CheckpointConfig, Config, to_dict
from crystal_jax.errors import UserError
from crystal_jax.exports import Calendar, catch_up
from crystal_jax.fingerprint import fingerprint
from crystal_jax.model import abstract_params
from crystal_jax.states import RollingStates

PLANNED = {2: "one/step_000002", 4: "one/step_000004", 6: "two/step_000002"}


def info(step: int, name: str) -> dict[str, Any]:
    return {"name": name, "step": step, "phase": name[:3], "plan_hash": "abc", "config": {"long": 1},
            "tokens": step * 9}


def manifest(run: Path) -> dict[str, bool]:
    listed = json.loads((run / "manifest.json").read_text())["checkpoints"]
    return {entry["name"]: entry["exported"] for entry in listed}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MESHES["mixed"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    return tmp_path / "run"


def write(calendar: Calendar, mesh: jax.sharding.Mesh, step: int) -> Any:
    params = make_state(mesh, step)["params"]
    calendar.write(PLANNED[step], params, MODEL, "bfloat16", info(step, PLANNED[step]))
    return params


@pytest.mark.parametrize("place", ["local", "gs"])
def test_what_is_read_back_is_the_cast_bit_for_bit(place: str, request: pytest.FixtureRequest, run: Path,
                                                   mesh: jax.sharding.Mesh) -> None:
    """F18; and the folder never changes again."""
    folder: Any = run
    if place == "gs":
        folder = files.as_path(request.getfixturevalue("gcs").folder())
        files.write_bytes(folder / "tokenizer.json", b"{}")
    calendar = Calendar(folder, PLANNED)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), write(calendar, mesh, 2))
    kept = load_weights(folder / "exports" / PLANNED[2])
    assert bits(kept.params) == bits(cast) and kept.info == info(2, PLANNED[2])
    said = files.read_json(folder / "exports" / PLANNED[2] / "checkpoint.json")
    assert said["fingerprint"] == fingerprint(cast) and said["model"] == to_dict(MODEL)
    before = sorted(files.list_files(folder / "exports"))
    calendar.write(PLANNED[2], make_state(mesh, 9)["params"], MODEL, "bfloat16", info(2, PLANNED[2]))
    assert sorted(files.list_files(folder / "exports")) == before
    assert bits(load_weights(folder / "exports" / PLANNED[2]).params) == bits(cast)
    found = files.read_json(folder / "manifest.json")
    assert [(entry["name"], entry["exported"]) for entry in found["checkpoints"]] == [
        (PLANNED[2], True), (PLANNED[4], False), (PLANNED[6], False)]
    assert "config" not in found["checkpoints"][0] and found["checkpoints"][0]["tokens"] == 18


def test_bytes_that_come_back_changed_make_no_checkpoint(run: Path, mesh: jax.sharding.Mesh,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    read = trees.read

    def changed(folder: Any, abstract: Any) -> Any:
        found = read(folder, abstract)
        embed = np.array(found["embed"])
        embed.view(np.uint16)[3, 3] ^= 1
        return {**found, "embed": jax.device_put(embed, found["embed"].sharding)}

    calendar = Calendar(run, PLANNED)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"read back differs .* embed has fingerprint"):
        patch.setattr(trees, "read", changed)
        write(calendar, mesh, 2)
    assert calendar.missing(6) == PLANNED and not (run / "manifest.json").exists()
    with pytest.raises(UserError, match="neither a run"):
        load_weights(run / "exports" / PLANNED[2])
    write(calendar, mesh, 2)
    assert list(calendar.missing(6)) == [4, 6]


def test_an_unfinished_one_is_written_anew(run: Path, mesh: jax.sharding.Mesh) -> None:
    calendar = Calendar(run, PLANNED)
    write(calendar, mesh, 2)
    folder = run / "exports" / PLANNED[2]
    (folder / "checkpoint.json").unlink()
    for file in (folder / "params" / "d").iterdir():
        file.write_bytes(b"a kill came here")
    params = write(Calendar(run, PLANNED), mesh, 2)
    assert bits(load_weights(folder).params) == bits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_what_is_missing_is_made_from_the_state_of_its_step(run: Path, mesh: jax.sharding.Mesh) -> None:
    states = RollingStates(run / "checkpoints", CheckpointConfig(keep_last=1), [4])
    for step in (4, 6):
        position = {"model": to_dict(MODEL), "interval": {}, "window": {}, **info(step, PLANNED[step])}
        states.save(step, make_state(mesh, step), position)
    calendar = Calendar(run, PLANNED)
    calendar.refresh("abc")
    write(calendar, mesh, 6)
    assert manifest(run) == {PLANNED[2]: False, PLANNED[4]: False, PLANNED[6]: True}
    states.wait()
    config = Config(model=MODEL)
    lines = catch_up(calendar, 6, states, abstract_params(SPECS, mesh), config)
    assert lines == ["exports/one/step_000002: missing, and no state of step 2 is kept to make it from",
                     "exports/one/step_000004: was missing, made from the state of step 4"]
    assert manifest(run) == {PLANNED[2]: False, PLANNED[4]: True, PLANNED[6]: True}
    made = load_weights(run / "exports" / PLANNED[4])
    assert made.info == info(4, PLANNED[4])
    assert bits(made.params) == bits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16),
                                                  make_state(mesh, 4)["params"]))
    states.close()
    (run / "manifest.json").unlink()
    again = Calendar(run, PLANNED)
    again.refresh("abc")
    assert manifest(run) == {PLANNED[2]: False, PLANNED[4]: True, PLANNED[6]: True}, "the folders are the truth"


def test_a_kept_state_that_is_damaged_stops_no_run(run: Path, mesh: jax.sharding.Mesh) -> None:
    states = RollingStates(run / "checkpoints", CheckpointConfig(), [])
    states.save(4, make_state(mesh, 4), {"model": to_dict(MODEL), "interval": {}, "window": {}, **info(4, PLANNED[4])})
    states.close()
    FAULTS["a flipped bit"](max((run / "checkpoints/4/params/d").iterdir(), key=lambda file: file.stat().st_size))
    lines = catch_up(Calendar(run, {4: PLANNED[4]}), 6, states, abstract_params(SPECS, mesh), Config(model=MODEL))
    assert len(lines) == 1 and "can't be made from the state of step 4: " in lines[0] and "damaged" in lines[0]
    assert not (run / "exports").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_of_a_permanent_checkpoint_is_one_line(fault: str, run: Path, mesh: jax.sharding.Mesh) -> None:
    write(Calendar(run, PLANNED), mesh, 2)
    folder = run / "exports" / PLANNED[2]
    FAULTS[fault](max((folder / "params" / "d").iterdir(), key=lambda file: file.stat().st_size))
    with pytest.raises(UserError) as caught:
        load_weights(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("change", [{"format": 2}, {"model": None}, {"fingerprint": None}])
def test_what_it_says_of_itself_is_checked(change: dict[str, Any], run: Path, mesh: jax.sharding.Mesh) -> None:
    write(Calendar(run, PLANNED), mesh, 2)
    path = run / "exports" / PLANNED[2] / "checkpoint.json"
    files.write_json(path, {**json.loads(path.read_text()), **change})
    for reader in (load_weights, outline):
        with pytest.raises(UserError, match=r"format 2|model|fingerprints"):
            reader(path.parent)
