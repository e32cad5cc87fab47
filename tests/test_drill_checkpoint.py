"""Drills of checkpoints: damage in many places, whole calendars, hundreds of saves, interrupted deletions."""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from drills import DrillRecord
from test_states import FAULTS, MESHES, MODEL, abstract, accept, bits, make_state, opened, save, saved_run
from world import write_config

from crystal_jax import files, sharding
from crystal_jax.checkpoint import load_weights
from crystal_jax.config import ModelConfig, to_dict
from crystal_jax.config_file import load_config
from crystal_jax.exports import Calendar
from crystal_jax.layers import ParamSpec
from crystal_jax.model import Crystal, init_params, map_specs
from crystal_jax.phases import make_plan
from crystal_jax.states import RollingStates, saved_states
from crystal_jax.trees import read_numpy

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MESHES["mixed"])


@pytest.fixture(scope="module")
def saved(mesh: jax.sharding.Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the states 1 and 2."""
    return saved_run(tmp_path_factory.mktemp("saved"), mesh, 1, 2)


def everywhere(state: Path) -> Iterator[Path]:
    """Every file of a state that a restore reads, in a fixed order."""
    yield from sorted(path for path in state.rglob("*") if path.is_file() and (
        (path.parent.name == "d" and "process" not in path.parent.parent.name)
        or path.name in ("manifest.ocdbt", "position.json")) and "ocdbt.process" not in str(path))


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_in_every_file(fault: str, saved: Path, tmp_path: Path, mesh: jax.sharding.Mesh,
                              drill_record: DrillRecord) -> None:
    """F5: never other bits than those of the step that is gone on from, and at most one save is lost."""
    drill = drill_record("F5", f"one file of the newest state: {fault}")
    names = [file.relative_to(saved) for file in everywhere(saved / "checkpoints" / "2")]
    assert len(names) >= 5
    before = {step: bits(make_state(mesh, step)) for step in (1, 2)}
    for number, name in enumerate(names):
        run = shutil.copytree(saved, tmp_path / str(number))
        FAULTS[fault](run / name)
        with drill.attempt():
            found = opened(run).restore_newest(abstract(mesh), accept)
            assert found is not None and bits(found[1]) == before[found[0]]
            assert found[0] == 1, f"{name}: not noticed"
    drill.lost = "the newest save"


def train(config: Path, run_dir: Path, cache: Path, stop_at: int | None = None) -> int:
    environment = {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                   "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen([sys.executable, "-m", "crystal_jax", "train", f"--config={config}",
                                f"--run_dir={run_dir}"], env=environment, stderr=subprocess.PIPE, text=True)
    while stop_at is not None and process.poll() is None:
        log = run_dir / "metrics.jsonl"
        if log.exists() and f'"step": {stop_at}' in log.read_text():
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    _, said = process.communicate(timeout=400)
    assert process.returncode in (0, 3), said
    return process.returncode


def test_straight_against_stopped_and_resumed(world: Path, tmp_path: Path, drill_record: DrillRecord) -> None:
    """F10: equal parameters, moments and count, bit for bit."""
    config = write_config(world, tmp_path / "config.py")
    assert train(config, tmp_path / "straight", tmp_path / "xla") == 0
    drill = drill_record("F10", "stopped by SIGTERM, the same command again")
    for stop_at in (4, 8):
        with drill.attempt():
            run = tmp_path / f"stopped{stop_at}"
            train(config, run, tmp_path / "xla", stop_at)
            assert train(config, run, tmp_path / "xla") == 0
            for item in ("params", "moments"):
                straight, resumed = (read_numpy(files.as_path(folder / "checkpoints" / "18" / item))
                                     for folder in (tmp_path / "straight", run))
                assert bits(straight) == bits(resumed)


def test_a_whole_run_of_7b_leaves_exactly_its_calendar(tmp_path: Path, drill_record: DrillRecord) -> None:
    """F12: three phases of 7B's recipe and every save that its policies want, with a tiny tree for the model."""
    config = load_config("configs/crystal_7b.py")
    plan = make_plan(config)
    layout = sharding.replicated(sharding.make_mesh(MESHES["data"]))
    (tmp_path / "tokenizer.json").write_text("{}")
    calendar = Calendar(tmp_path, plan.calendar())
    every_tenth = sorted(calendar.planned)[9::10]
    ends = [placed.end for placed in plan.phases]
    states = RollingStates(tmp_path / "checkpoints", config.checkpoints, [*ends, *every_tenth])
    drill = drill_record("F12", "the calendar of the 7B recipe: all 136 permanent checkpoints, and their states")

    def full_of(step: int, spec: ParamSpec) -> jax.Array:
        return jax.device_put(np.full(spec.shape, step, np.float32), layout)

    for step, name in calendar.planned.items():
        with drill.attempt():
            params = map_specs(partial(full_of, step), Crystal(MODEL).specs())
            calendar.write(name, params, MODEL, "bfloat16", {"name": name, "step": step, "plan_hash": "abc"})
            states.save(step, {"params": params, "moments": params}, {"step": step})
    states.close()
    there = [path.parent.relative_to(tmp_path / "exports").as_posix()
             for path in tmp_path.glob("exports/*/*/checkpoint.json")]
    assert len(there) == 136 and sorted(there) == sorted(calendar.planned.values())
    listed = files.read_json(tmp_path / "manifest.json")["checkpoints"]
    assert [entry["name"] for entry in listed if entry["exported"]] == list(calendar.planned.values())
    latest = sorted(calendar.planned)[-config.checkpoints.keep_last :]
    assert states.steps() == sorted({*ends, *every_tenth, *latest})


def test_states_of_another_structure(tmp_path: Path, mesh: jax.sharding.Mesh, drill_record: DrillRecord,
                                     capfd: pytest.CaptureFixture[str]) -> None:
    """F13: the path is named before any step, and nothing of that state is trained on."""
    drill = drill_record("F13", "a leaf missing, left over, or of another shape")
    good = make_state(mesh)
    missing = {**good, "params": {key: value for key, value in good["params"].items() if key != "embed"}}
    extra = {**good, "params": {**good["params"], "spare": good["params"]["embed"]}}
    wide = Crystal(ModelConfig(**{**to_dict(MODEL), "mlp_dim": 32})).specs()
    cases = {"no leaf embed": missing, "leaf spare": extra,
             "leaf layers.mlp.down is": {**good, "params": init_params(wide, 1, mesh)}}
    for number, (said, state) in enumerate(cases.items()):
        kept = opened(tmp_path / str(number))
        save(kept, mesh, 1)
        kept.save(2, state, {"step": 2})
        kept.close()
        with drill.attempt():
            found = opened(tmp_path / str(number)).restore_newest(abstract(mesh), accept)
            assert found is not None and found[0] == 1 and said in capfd.readouterr().err


def slope(values: list[float]) -> float:
    """Least squares, per item."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def test_136_saves_in_a_row(tmp_path: Path, drill_record: DrillRecord) -> None:
    """F14 and more: memory that grows by less than 1% of the state per save, and no save that takes ever longer."""
    from benchmarks.measure import memory_mb

    size, layout = 8, sharding.replicated(sharding.make_mesh(MESHES["data"]))

    def tree(step: int) -> dict[str, Any]:
        return {"x": jax.device_put(np.full((size << 18,), step, np.float32), jax.sharding.NamedSharding(
            layout.mesh, jax.sharding.PartitionSpec("data")))}

    kept = opened(tmp_path, keep_last=3)
    drill = drill_record("F14", "136 saves in a row of one process")
    memory, seconds = [], []
    for step in range(136):
        began = time.monotonic()
        with drill.attempt():
            kept.save(step, {"params": tree(step), "moments": tree(step)}, {"step": step})
            kept.wait()
        seconds.append(time.monotonic() - began)
        memory.append(memory_mb())
    kept.close()
    assert saved_states(tmp_path) == [133, 134, 135]
    assert slope(memory[16:]) < 0.01 * 2 * size, f"{slope(memory[16:]):.3f} MB a save"
    print(f"seconds a save: {statistics.median(seconds[16:76]):.3f}, then {statistics.median(seconds[76:]):.3f}")
    assert len(list(tmp_path.rglob("*"))) < 200, "nothing of the old ones is left"


def test_deletions_that_are_cut_off(tmp_path: Path, mesh: jax.sharding.Mesh, drill_record: DrillRecord,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """F16 on a disk: wherever it stops, the torn state is neither listed nor restored."""
    drill = drill_record("F16", "a deletion on a disk cut off after so many files")
    for number, allowed in enumerate((0, 1, 5, 20)):
        run, left = tmp_path / str(number), [allowed]
        kept = opened(run, keep_last=1)
        save(kept, mesh, 1)
        kept.wait()
        unlink = os.unlink

        def limited(path: Any, *args: Any, left: list[int] = left, unlink: Any = unlink, **kwargs: Any) -> None:
            if "checkpoints/1" in os.fspath(path) or kwargs.get("dir_fd") is not None:
                if not left[0]:
                    raise PermissionError(13, "Permission denied")
                left[0] -= 1
            unlink(path, *args, **kwargs)

        with drill.attempt(), monkeypatch.context() as patch:
            patch.setattr(os, "unlink", limited)
            save(kept, mesh, 2)
            kept.wait()
            assert saved_states(run) in ([2], [1, 2]), "listed only while it is whole"
            if saved_states(run) == [1, 2]:
                assert bits(opened(run).restore(1, abstract(mesh))[0]) == bits(make_state(mesh, 1))
            found = opened(run).restore_newest(abstract(mesh), accept)
            assert found is not None and found[0] == 2
        kept.close()


def test_read_back(tmp_path: Path, gcs: Any, drill_record: DrillRecord) -> None:
    """F18: what a permanent checkpoint gives back is the state's cast, from every mesh, on disk and gs://."""
    drill = drill_record("F18", "permanent checkpoints from each mesh, on disk and gs://, read back")
    for name, config in MESHES.items():
        mesh = sharding.make_mesh(config)
        for folder in (files.as_path(tmp_path / name), files.as_path(gcs.folder())):
            files.write_bytes(folder / "tokenizer.json", b"{}")
            with drill.attempt():
                params = make_state(mesh, 3)["params"]
                Calendar(folder, {3: "one/step_000003"}).write(
                    "one/step_000003", params, MODEL, "bfloat16",
                    {"name": "one/step_000003", "step": 3, "plan_hash": "abc"})
                found = load_weights(folder / "exports" / "one/step_000003").params
                assert bits(found) == bits(jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), params))
