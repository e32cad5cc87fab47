"""Runs of several real processes: the losses of one, one stop for all, and processes that hang."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from pods import start_pod
from world import write_config

from crystal_jax import processes
from crystal_jax.errors import UserError
from crystal_jax.history import read_metrics
from crystal_jax.metrics import BY_THE_CLOCK
from crystal_jax.processes import Watchdog
from crystal_jax.progress import Timer
from crystal_jax.sharding import Part

STEPS = 50


@pytest.fixture(scope="module")
def arguments(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run long enough for a signal to arrive before its end."""
    config = write_config(world, tmp_path_factory.mktemp("configs") / "world_config.py")
    return [f"--config={config}", "--config.phases[1].steps=40", "--config.training.fingerprint_every=10"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def two(arguments: list[str], cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two")
    pod = start_pod(folder / "run", folder / "logs", arguments, 2, 2, env=cache)
    assert pod.codes() == [0, 0], pod.said(0) + pod.said(1)
    return folder / "run"


def lines(run_dir: Path, kind: str) -> dict[int, dict[str, Any]]:
    """The last lines of a kind, without what depends on the clock."""
    return {record["step"]: {key: value for key, value in record.items() if key not in BY_THE_CLOCK}
            for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == kind}


def final(run_dir: Path) -> dict[str, str]:
    """Fingerprints of every leaf of the last state."""
    found = json.loads((run_dir / "checkpoints" / str(STEPS) / "position.json").read_text())["fingerprint"]
    assert len(found) > 40
    return found


def same_as(run_dir: Path, other: Path) -> None:
    """The same batches, and losses that differ by rounding only."""
    ours, theirs = lines(run_dir, "train"), lines(other, "train")
    assert ours.keys() == theirs.keys() and len(ours) >= STEPS // 2
    for step, line in ours.items():
        assert line["batch_hash"] == theirs[step]["batch_hash"]
        assert line["tokens_per_source"] == theirs[step]["tokens_per_source"]
        assert line["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
    for step, line in lines(run_dir, "eval").items():
        for domain, values in line["heldout"].items():
            assert values["loss"] == pytest.approx(lines(other, "eval")[step]["heldout"][domain]["loss"], rel=1e-5)


@pytest.mark.drill
def test_two_processes_do_what_one_does(two: Path, arguments: list[str], cache: dict[str, str], tmp_path: Path) -> None:
    pod = start_pod(tmp_path / "run", tmp_path, arguments, 1, 4, env=cache)
    assert pod.codes() == [0], pod.said(0)
    same_as(two, tmp_path / "run")


@pytest.mark.drill
@pytest.mark.parametrize("mesh", [(1, 4, 1), (2, 1, 2), (1, 1, 4)], ids=str)
def test_four_processes_do_what_two_do(mesh: tuple[int, int, int], two: Path, arguments: list[str],
                                       cache: dict[str, str], tmp_path: Path) -> None:
    """Also where some of them hold the same rows, or all do."""
    axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    sizes = [f"--config.training.mesh.{axis}={size}" for axis, size in axes]
    pod = start_pod(tmp_path / "run", tmp_path, [*arguments, *sizes], 4, 1, env=cache)
    assert pod.codes() == [0] * 4, pod.said(0)
    same_as(tmp_path / "run", two)


@pytest.mark.drill
def test_a_batch_that_three_processes_fill_up_is_that_of_two(two: Path, arguments: list[str], cache: dict[str, str],
                                                             tmp_path: Path) -> None:
    pod = start_pod(tmp_path / "run", tmp_path, [*arguments, "--config.training.fill_batch=true"], 3, 1, env=cache)
    assert pod.codes() == [0] * 3, pod.said(0)
    same_as(tmp_path / "run", two)


def test_a_signal_to_either_process_stops_both_at_one_step(two: Path, arguments: list[str], cache: dict[str, str],
                                                           tmp_path: Path) -> None:
    """And the same command goes on, to the same bits. Only the main process says how it goes."""
    run_dir = tmp_path / "run"
    for victim, step in ((1, 4), (0, 18)):
        pod = start_pod(run_dir, tmp_path / "logs", arguments, 2, 2, env=cache).wait_for(step)
        pod.signal(victim, signal.SIGTERM)
        assert pod.codes() == [3, 3], pod.said(0) + pod.said(1)
        saved = max(int(path.parent.name) for path in run_dir.glob("checkpoints/*/position.json"))
        assert step <= saved < STEPS and f"saved step {saved};" in pod.said(0)
    assert "SIGTERM: saving" in pod.said(0) and "SIGTERM: saving" in pod.said(1) and "saved step" not in pod.said(1)
    assert start_pod(run_dir, tmp_path / "logs", arguments, 2, 2, env=cache).codes() == [0, 0]
    assert final(run_dir) == final(two)
    assert lines(run_dir, "train") == lines(two, "train")
    assert lines(run_dir, "fingerprint") == lines(two, "fingerprint")


@pytest.mark.drill
def test_a_second_signal_ends_a_process_at_once(two: Path, arguments: list[str], cache: dict[str, str],
                                                tmp_path: Path) -> None:
    """The others end too, and the same command goes on, to the same bits."""
    run_dir = tmp_path / "run"
    pod = start_pod(run_dir, tmp_path / "logs", arguments, 2, 1, env=cache).wait_for(18)
    pod.signal(1, signal.SIGTERM)
    while "SIGTERM: saving" not in pod.said(1):  # two signals that wait together are one
        time.sleep(0.001)
    pod.signal(1, signal.SIGTERM)
    codes = pod.codes()
    assert codes[1] == 130 and codes[0] != 0, pod.said(0) + pod.said(1)
    assert start_pod(run_dir, tmp_path / "logs", arguments, 2, 2, env=cache).codes() == [0, 0]
    assert lines(run_dir, "train").keys() == lines(two, "train").keys()
    assert sorted(path.parent.name for path in run_dir.glob("exports/*/*/checkpoint.json")) == sorted(
        path.parent.name for path in two.glob("exports/*/*/checkpoint.json"))


@pytest.mark.drill
def test_two_processes_save_by_the_clock(arguments: list[str], cache: dict[str, str], tmp_path: Path) -> None:
    often = [*arguments, "--config.checkpoints.every_steps=1000", "--config.checkpoints.every_minutes=0.005",
             "--config.checkpoints.keep_last=50"]
    pod = start_pod(tmp_path / "run", tmp_path, often, 2, 2, env=cache)
    assert pod.codes() == [0, 0], pod.said(0)
    saved = {path.parent.name for path in tmp_path.glob("run/checkpoints/*/position.json")}
    assert len(saved - {"6", "46", "50"}) > 1, "states between the ends of phases"


@pytest.mark.drill
def test_two_processes_replay_and_skip(two: Path, arguments: list[str], cache: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two, run_dir)
    again = start_pod(run_dir, tmp_path / "replay", ["--from=6", "--steps=12"], 2, 2, env=cache, command="replay")
    assert again.codes() == [0, 0], again.said(0)
    assert "equal bit for bit: 6 log lines" in again.said(0) and "equal" not in again.said(1)
    skipping = [*arguments, "--config.data.skip=[[9,3]]", "--amend_from=6"]
    pod = start_pod(run_dir, tmp_path / "logs", skipping, 2, 2, env=cache)
    assert pod.codes() == [0, 0], pod.said(0)
    found, before = lines(run_dir, "train"), lines(two, "train")
    assert {step for step in found if found[step]["batch_hash"] != before[step]["batch_hash"]} >= {10, 12}
    assert all(found[step] == before[step] for step in found if step < 9)


def mesh_of(processes: list[Any], shape: tuple[int, int, int]) -> Any:
    devices = np.array([SimpleNamespace(process_index=process) for process in processes], dtype=object)
    sizes = dict(zip(("slice", "data", "fsdp", "tensor"), (1, *shape), strict=True))
    return SimpleNamespace(devices=devices.reshape(1, *shape), shape=sizes, empty=False)


@pytest.mark.parametrize(("owners", "shape", "held", "counted"), [
    ([0, 0, 1, 1], (4, 1, 1), [(0, 1), (2, 3)], [(0, 1), (2, 3)]),
    ([0, 1, 0, 1], (2, 2, 1), [(0, 2), (1, 3)], [(0, 2), (1, 3)]),
    ([0, 0, 1, 1], (1, 1, 4), [(0,), (0,)], [(0,), ()]),
    ([0, 1, 0, 1], (2, 1, 2), [(0, 1), (0, 1)], [(0, 1), ()]),
])
def test_the_rows_of_a_process_are_those_of_its_devices(owners: list[int], shape: tuple[int, int, int],
                                                        held: list[Any], counted: list[Any]) -> None:
    """Also if they don't adjoin, and each row is counted once."""
    parts = [Part.of(mesh_of(owners, shape), process) for process in (0, 1)]
    assert [part.held for part in parts] == held and [part.counted for part in parts] == counted
    together = np.concatenate([part.slots(8, counted=True) for part in parts])
    assert sorted(together) == list(range(8))
    assert parts[0].slots(8).size == len(held[0]) * 8 // (shape[0] * shape[1])


@pytest.mark.parametrize(("environment", "said"), [
    ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID isn't; set all three"),
    ({"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "must be HOST:PORT"),
    ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2"),
    ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "whole numbers"),
    ({"CRYSTAL_HEARTBEAT_SECONDS": "0"}, "CRYSTAL_HEARTBEAT_SECONDS=0: must be a whole number"),
])
def test_a_wrong_environment_is_one_line(environment: dict[str, str], said: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        processes.start()


HANG = """
import time
from crystal_jax.processes import Watchdog
with Watchdog(0.2) as watchdog:
    for _ in range(3):
        watchdog.step()
    def hang_here():
        sum(iter(int, 1))  # keeps Python's lock
    hang_here()
"""


def test_what_hangs_is_named_and_ended(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    done = subprocess.run([sys.executable, tmp_path / "hang.py"], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, check=False)
    assert done.returncode == -signal.SIGALRM, done.stderr
    assert "hang.py\", line 8 in hang_here" in done.stderr


def test_a_step_may_take_ten_times_as_long_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, armed = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watchdog = Watchdog(120)
    monkeypatch.setattr(watchdog, "_arm", armed.append)
    watchdog.slow()
    for seconds in (30, 30, 30, 5000):
        watchdog.step()
        clock[0] += seconds
    watchdog.slow(6000)
    watchdog.step()
    assert armed == [1200, 120, 300, 300, 300, 6120, 300], "what came before a slow part isn't a step"


def test_a_save_by_the_clock_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    timer, never = Timer(2), Timer(0)
    asked = []
    for now in (60, 119, 120, 121, 500):
        clock[0] = now
        asked.append(timer.due())
        assert not never.due()
    assert asked == [False, False, True, False, False]
    timer.saved()
    clock[0] += 120
    assert timer.due()
