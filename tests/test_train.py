"""Training as a user runs it: real processes, real kills, equal bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import OUTER_ENVIRONMENT, ROOT, RunCli
from etils import epath
from world import make_config, write_config

from crystal_jax import cli
from crystal_jax.checkpoint import load_weights
from crystal_jax.errors import UserError
from crystal_jax.goodput import ACTIVITIES, Account, account
from crystal_jax.history import read_all, read_metrics
from crystal_jax.loop import Run
from crystal_jax.metrics import BY_THE_CLOCK
from crystal_jax.states import newest_state
from crystal_jax.trees import read_numpy

STEPS = 18


@pytest.fixture(scope="module")
def config_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(world, tmp_path_factory.mktemp("configs") / "world_config.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One compilation cache for all runs: they are the same program."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def finished(config_file: Path, run_cli: RunCli, cache: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run_cli("train", f"--config={config_file}", f"--run_dir={run_dir}", "--profile=9:12", env=cache)
    assert result.returncode == 0, result.stderr
    return run_dir


def start(config_file: Path, run_dir: Path, cache: dict[str, str], *extra: str) -> subprocess.Popen[str]:
    environment = {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **cache}
    command = [sys.executable, "-m", "crystal_jax", "train", f"--config={config_file}", f"--run_dir={run_dir}", *extra]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(run_dir: Path, step: int, process: subprocess.Popen[str], written: int = 0) -> None:
    """Until the log has reached `step`, the first `written` lines, of earlier processes, aside."""
    while process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(record["kind"] == "train" and record["step"] >= step
                                 for record in read_all(path)[written:]):
            return
        time.sleep(0.02)


def finish(config_file: Path, run_dir: Path, cache: dict[str, str], *extra: str) -> None:
    process = start(config_file, run_dir, cache, *extra)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def leaves(run_dir: Path, step: int = STEPS) -> dict[str, bytes]:
    """Every byte of the state that decides the future: parameters, moments."""
    result = {}
    for item in ("params", "moments"):
        tree = read_numpy(epath.Path(run_dir / "checkpoints" / str(step) / item))
        result |= {f"{item}{jax.tree_util.keystr(path)}": leaf.tobytes()
                   for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    assert len(result) > 40
    return result


def train_records(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The last train record of each step, without what depends on the clock."""
    return {record["step"]: {key: value for key, value in record.items() if key not in BY_THE_CLOCK}
            for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"}


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    names = {entry.name for entry in finished.iterdir()}
    assert names == {".lock", "config.json", "plan.json", "metrics.jsonl", "manifest.json", "tokenizer.json",
                     "checkpoints", "code", "profile", "exports", "tensorboard"}
    manifest = json.loads((finished / "manifest.json").read_text())
    assert [(entry["name"], entry["step"]) for entry in manifest["checkpoints"]] == [
        ("phase1/step_000003", 3), ("phase1/step_000006", 6), ("phase2/step_000005", 11), ("phase2/step_000008", 14),
        ("phase3/step_000004", 18)]
    last = manifest["checkpoints"][-1]
    assert last["tokens"] == STEPS * 8 * 32 == sum(last["tokens_per_source"].values())
    assert last["lr"] == pytest.approx(0.002 - 0.001 * 2 / 3) and last["plan_hash"] == manifest["plan_hash"]
    kept = sorted(int(entry.name) for entry in (finished / "checkpoints").iterdir())
    assert kept == [6, 14, 15, 18], "each phase's end and the latest two"
    assert list((finished / "tensorboard").glob("events*"))


def test_the_log_has_a_loss_per_source_and_the_schedule(finished: Path, world: Path) -> None:
    from crystal_jax.phases import make_plan

    plan, records = make_plan(make_config(world)), train_records(finished)
    assert sorted(records) == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    for step, record in records.items():
        assert record["lr"] == plan.learning_rate(step - 1)
        assert set(record["loss_per_source"]) == {"text", "code"} and record["skipped"] == 0
        assert record["tokens"] == step * 256 == sum(record["tokens_per_source"].values())
        low, high = sorted(record["loss_per_source"].values())
        assert 1 < low and high < 12 and record["grad_norm"] > 0
    evaluated = {record["step"]: record["heldout"] for record in read_metrics(finished / "metrics.jsonl")
                 if record["kind"] == "eval"}
    assert sorted(evaluated) == [6, 7, 14, 18], "every 7 steps and each phase's end"
    assert all(0 < values["unigram_entropy"] < np.log(448) for found in evaluated.values() for values in found.values())


def test_the_log_says_what_the_process_was_and_where_its_time_went(finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    start, program, profile, end = (next(record for record in records if record["kind"] == kind)
                                    for kind in ("start", "program", "profile", "end"))
    assert (finished / "code" / f"{start['code']}.zip").is_file()
    assert len(list((finished / "code").glob("environment-*.json"))) == 1
    assert start["utilisation"]["flops_per_token"]["palm"] > 0 and start["utilisation"]["peak_tflops"] is None
    assert (program["step"], program["global_batch_size"], program["cache"]) == (1, 8, "miss")
    assert program["seconds"] > 0 and program["memory"]["program"]["total"] > 4 * 3 * start["parameters"]
    assert (profile["step"], end["step"], end["stopped"]) == (12, STEPS, False)
    assert {path.suffix for path in (finished / profile["folder"]).iterdir()} == {".pb", ".gz"}
    assert end["spent"].keys() == ACTIVITIES.keys()
    for record in records:
        if record["kind"] == "train":
            assert len(record["seconds_of_steps"]) == (1 if record["step"] == 2 else 2), "but for the first update"
            assert record["tflops_per_device"] > 0 and "mfu" not in record


def accounted(run_dir: Path) -> Account:
    """The account of a run, of which no time is missing."""
    found = account(read_all(run_dir / "metrics.jsonl"))
    assert found is not None and found.total == pytest.approx(found.wall, rel=0.02)
    return found


def test_the_time_of_an_undisturbed_run_is_accounted_for(finished: Path) -> None:
    found = accounted(finished)
    assert found.processes == 1 and found.seconds["lost"] == found.seconds["down"] == 0
    assert all(found.seconds[name] > 0 for name in ACTIVITIES)


def test_a_step_that_does_not_fit_is_refused_in_one_line(world: Path) -> None:
    def compile_it(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
                                         "memory space hbm. Used 33.10G of 31.25G hbm.\n\nTotal hbm usage:\n ...")

    run = SimpleNamespace(memory={}, train_step=SimpleNamespace(lower=compile_it), config=make_config(world))
    said = (r"a step of 8 sequences with remat=none and accumulate=1 doesn't fit.*33.10G of 31.25G hbm.*"
            r"try remat=full, accumulate=2")
    with pytest.raises(UserError, match=said):
        Run.compile(run, 8, ())  # type: ignore[arg-type]


def test_a_run_that_ends_by_itself_says_why(config_file: Path, run_cli: RunCli, cache: dict, tmp_path: Path) -> None:
    result = run_cli("train", f"--config={config_file}", "--config.phases[0].lr.peak=1e30",
                     "--config.training.skips_in_a_row=1", f"--run_dir={tmp_path / 'run'}", env=cache)
    end = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert result.returncode == 4 and end["kind"] == "end" and end["error"] in result.stderr
    assert "updates in a row were skipped" in end["error"]
    accounted(tmp_path / "run")


def test_it_learns(finished: Path) -> None:
    losses = [record["loss"] for record in train_records(finished).values()]
    assert losses[-1] < losses[0] - 1


def test_run_again_it_finds_its_work_done(finished: Path, config_file: Path, run_cli: RunCli, cache: dict) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = run_cli("train", f"--config={config_file}", f"--run_dir={finished}", env=cache)
    assert (result.returncode, result.stderr) == (0, f"{finished}: done already, all 18 steps\n")
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_second_process_is_kept_out_of_the_folder(config_file: Path, cache: dict, run_cli: RunCli,
                                                    tmp_path: Path) -> None:
    process = start(config_file, tmp_path / "run", cache)
    wait_for(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGSTOP)
    try:
        result = run_cli("train", f"--config={config_file}", f"--run_dir={tmp_path / 'run'}", env=cache)
        assert result.returncode == 1 and "another process is training there" in result.stderr, result.stderr
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=300)[1] and process.returncode == 0


def test_weights_that_a_run_began_with_are_part_of_its_plan(
        finished: Path, config_file: Path, cache: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed before the first saved state and given again without them, it must not begin from drawn ones."""
    export = finished / "exports" / "phase2" / "step_000008"
    process = start(config_file, tmp_path / "run", cache, f"--init_from={export}")
    wait_for(tmp_path / "run", 2, process)
    process.kill()
    process.communicate()
    assert newest_state(tmp_path / "run") is None
    for extra in ([], [f"--init_from={finished / 'exports' / 'phase1' / 'step_000003'}"]):
        for mode in ([], ["--dry_run"]):
            command = ["train", f"--config={config_file}", f"--run_dir={tmp_path / 'run'}", *extra, *mode]
            assert cli.main(command) == 1
            assert "config.init_from was" in capsys.readouterr().err
    finish(config_file, tmp_path / "run", cache, f"--init_from={export}")


def test_a_folder_that_a_kill_left_half_begun_is_begun_again(
        finished: Path, config_file: Path, cache: dict, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("tokenizer.json", ".plan.json.tmp"):
        (tmp_path / "run" / name).write_text("")
    finish(config_file, tmp_path / "run", cache)
    assert leaves(tmp_path / "run") == leaves(finished)


@pytest.mark.parametrize("at", [[2], [6, 10], [12, 14, 16]])
def test_killed_at_any_time_it_ends_with_the_bits_of_an_undisturbed_run(
        at: list[int], finished: Path, config_file: Path, cache: dict, tmp_path: Path) -> None:
    """kill -9 in phase 1 before any state was saved, around a phase's end, and again and again."""
    run_dir = tmp_path / "run"
    written = 0
    for step in at:
        process = start(config_file, run_dir, cache)
        wait_for(run_dir, step, process, written)
        process.kill()
        process.communicate()
        written = len(read_all(run_dir / "metrics.jsonl"))
    finish(config_file, run_dir, cache)
    assert leaves(run_dir) == leaves(finished)
    assert train_records(run_dir) == train_records(finished)
    found = accounted(run_dir)
    assert found.processes == len(at) + 1 and found.seconds["lost"] > 0 and found.seconds["down"] > 0
    programs = [record for record in read_all(run_dir / "metrics.jsonl") if record["kind"] == "program"]
    assert [record["cache"] for record in programs] == ["hit"] * (len(at) + 1)
    names = [entry["name"] for entry in json.loads((run_dir / "manifest.json").read_text())["checkpoints"]]
    assert names == [entry["name"] for entry in json.loads((finished / "manifest.json").read_text())["checkpoints"]]
    for name in names:
        ours, theirs = (load_weights(folder / "exports" / name).params for folder in (run_dir, finished))
        assert ours["embed"].tobytes() == theirs["embed"].tobytes()


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_3_and_the_same_command_goes_on(
        which: signal.Signals, finished: Path, config_file: Path, cache: dict, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(config_file, run_dir, cache)
    wait_for(run_dir, 8, process)
    process.send_signal(which)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 3 and f"{which.name}: saving after this step" in said, said
    saved = max(int(entry.name) for entry in (run_dir / "checkpoints").iterdir() if entry.name.isdigit())
    assert 8 <= saved < STEPS
    finish(config_file, run_dir, cache)
    assert leaves(run_dir) == leaves(finished)
    resumed = [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")
               if record["kind"] == "start" and record["resumed"]]
    assert resumed == [saved]


def test_a_run_goes_on_after_its_folder_and_its_data_moved(
        finished: Path, config_file: Path, world: Path, run_cli: RunCli, cache: dict, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(world, tmp_path / "data")
    for step in (15, 18):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    result = run_cli("train", f"--config={config_file}", f"--config.data.root={tmp_path / 'data'}",
                     f"--run_dir={tmp_path / 'run'}", env=cache)
    assert result.returncode == 0, result.stderr
    assert leaves(tmp_path / "run") == leaves(finished)


def test_init_from_takes_weights_only(finished: Path, config_file: Path, run_cli: RunCli, cache: dict,
                                      tmp_path: Path) -> None:
    result = run_cli("train", f"--config={config_file}", f"--run_dir={tmp_path / 'run'}",
                     f"--init_from={finished / 'exports' / 'phase2' / 'step_000008'}", env=cache)
    assert result.returncode == 0, result.stderr
    first, scratch = train_records(tmp_path / "run")[2], train_records(finished)[2]
    assert first["loss"] < scratch["loss"] - 1


@pytest.mark.parametrize(("arguments", "said"), [
    (["--config.phases[0].mix.code=0.2"], "config.phases[0].mix: the shares sum to 1.1, not 1"),
    (["--config.phases[0].mix.coed=0.2"], "config.phases[0].mix.coed: no such source; did you mean code?"),
    (["--config.phases[0].steps=None"], "config.phases[0]: steps = None, tokens = None: set exactly one"),
    (["--config.model.num_layer=3"], "no field num_layer; did you mean num_layers?"),
    (["--config.model.num_layers=three"], "--config.model.num_layers=three"),
    (["--config.model.num_layers=3"], "config.model.num_layers was 2, is 3"),
    (["--config.data.seed=5"], "config.data.seed was 1, is 5"),
    (["--config.phases[1].lr.peak=0.5"], "config.phases[1].lr.peak was 0.008, is 0.5"),
    (["--config.data.tokenizer=none.json"], "none.json"),
    (["--config.sources.text.store=none"], "none"),
    (["--profile=12:19"], "--profile=12:19: is a number of updates, such as 5, or FIRST:LAST"),
    (["--config.training.mesh.fsdp=3"], "doesn't fit 8 devices"),
    (["--config.training.mesh.data=1", "--config.training.mesh.fsdp=8", "--config.phases[0].global_batch_size=12"],
     "config.phases[0].global_batch_size: 12 doesn't divide into 8 equal parts (mesh axis slice x data x fsdp); the "
     "nearest that do are 8 and 16"),
])
def test_a_wrong_argument_ends_before_anything_is_overwritten(
        arguments: list[str], said: str, finished: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code = cli.main(["train", f"--config={config_file}", *arguments, f"--run_dir={finished}"])
    error = capsys.readouterr().err
    assert code == 1 and said in error and error.count("\n") == 1, error
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_unknown_arguments_and_other_folders_are_refused(
        config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", f"--config={config_file}", f"--run_dir={tmp_path}", "--nonsense=1"]) == 1
    assert "unknown flag --nonsense; known: " in capsys.readouterr().err
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.main(["train", f"--config={config_file}", f"--run_dir={tmp_path}"]) == 1
    assert "not empty and no run's folder" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_state_is_named_and_the_run_ends_with_the_same_bits(
        finished: Path, config_file: Path, run_cli: RunCli, cache: dict, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "18")
    metadata = tmp_path / "run" / "checkpoints" / "15" / "params" / "_METADATA"
    metadata.write_text(metadata.read_text().replace("gate_bias", "gate_bios"))
    result = run_cli("train", f"--config={config_file}", f"--run_dir={tmp_path / 'run'}", env=cache)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert "DAMAGED STATE" in result.stderr and "gate_bi" in result.stderr and "from step 14" in result.stderr
    assert (tmp_path / "run" / "damaged" / "15").is_dir() and leaves(tmp_path / "run") == leaves(finished)


def test_dry_run_prints_the_plan_and_writes_nothing(config_file: Path, run_cli: RunCli, cache: dict,
                                                    tmp_path: Path) -> None:
    result = run_cli("train", f"--config={config_file}", f"--run_dir={tmp_path / 'run'}", "--dry_run", env=cache)
    assert result.returncode == 0, result.stderr
    for part in ("phase1", "phase3", "mesh", "layers.mlp.gate", "with Adam's moments"):
        assert part in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a RAM disk to fill")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_with_one_line_and_loses_nothing(config_file: Path, run_cli: RunCli, cache: dict,
                                                          tmp_path: Path) -> None:
    """A real file system of 2 MB fills up in mid-run."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=False).returncode:
        pytest.skip("mounting isn't allowed here")
    try:
        result = run_cli("train", f"--config={config_file}", f"--run_dir={small / 'run'}", env=cache)
        assert result.returncode == 1, result.stderr
        assert "no space left" in result.stderr and "Traceback" not in result.stderr, result.stderr
    finally:
        subprocess.run(["umount", "-l", small], check=True)
