"""A run whose folder is on gs://, by the commands that a user types: killed, refused, preempted, done, looked at."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import Recipe, assert_same, reached, starts
from world import make_config

from crystal_jax import cli, files, objects
from crystal_jax.checkpoint import load_weights
from crystal_jax.errors import RestartError, UserError
from crystal_jax.history import load_run, read_record
from crystal_jax.run_dir import check
from crystal_jax.states import saved_states

pytestmark = pytest.mark.drill  # half a dozen trainings, one after the other
QUICK = {"CRYSTAL_LEASE_SECONDS": "0.5"}


@pytest.fixture(scope="module")
def remote(recipe: Recipe, gcs) -> Recipe:
    return recipe.using({**gcs.environment, **QUICK})


@pytest.fixture(scope="module")
def run(remote: Recipe, gcs) -> str:
    """Killed behind its first state, with a second trainer refused meanwhile; preempted; then finished."""
    folder = gcs.folder()
    first = remote.start(folder)
    assert first.wait_until(lambda: saved_states(folder))
    code, said = remote.start(folder).end()
    assert code == RestartError.exit_code, said
    assert re.search(rf"{folder}: another process is training there \(process {first.process.pid} ", said), said
    first.kill()
    second = remote.start(folder)
    lock = files.as_path(folder) / ".lock"
    assert second.wait_until(lambda: f'"process": {second.process.pid},' in objects.read(lock)[0].decode())
    second.signal(signal.SIGTERM)
    code, said = second.end()
    assert code == 3 and f"{folder}/.lock: held by process {first.process.pid}" in said, said
    remote.finish(folder)
    return folder


def command(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def test_it_left_what_an_undisturbed_local_run_leaves(run: str, undisturbed: dict[str, Any]) -> None:
    assert_same(run, undisturbed, (6, 14, 18))
    assert len(starts(run)) == 3 and reached(run) == 18
    names = files.list_files(files.as_path(run))
    assert not [name for name in names if name.startswith((".", "tensorboard"))]


def test_it_is_done(run: str, remote: Recipe) -> None:
    assert f"{run}: done already, all 18 steps" in remote.finish(run)


def test_report(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("report", f"--run_dir={run}")
    assert capsys.readouterr().out.strip() == f"{run}/report/report.html"
    page = files.read_bytes(f"{run}/report/report.html")
    assert b"100" in page and len(page) > 20000
    assert load_run(run).resumed_at == starts(run)[1:]


def test_inspect(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", f"--run_dir={run}", "--step=9", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == run and found["batch_hash_in_log"] == 8
    command("inspect", f"--run_dir={run}", "--counts")


@pytest.mark.parametrize("checkpoint", ["", "/checkpoints/18", "/exports/phase3/step_000004"])
def test_generate_and_score(run: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("generate", f"--checkpoint={run}{checkpoint}", "--prompt=def", "--max_tokens=2")
    assert capsys.readouterr().out.startswith("def")
    np.save(tmp_path / "in.npy", np.zeros((1, 8), np.int32))
    command("score", f"--checkpoint={run}{checkpoint}", f"--tokens={tmp_path}/in.npy", f"--output={tmp_path}/out.npy")
    assert np.load(tmp_path / "out.npy").shape == (1, 7)


def test_convert(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("convert", "export", "--to=crystal", f"--checkpoint={run}/exports/phase2/step_000008",
            f"--output={tmp_path}/out", "--json")
    assert json.loads(capsys.readouterr().out)["tensors"] and (tmp_path / "out" / "config.json").exists()


def test_a_run_begins_from_its_weights(run: str, remote: Recipe, gcs) -> None:
    folder = gcs.folder()
    begun = remote.using({}, f"--init_from={run}/exports/phase1/step_000006", "--config.checkpoints.every_steps=1")
    trainer = begun.start(folder)
    assert trainer.wait_until(lambda: saved_states(folder))
    trainer.signal(signal.SIGTERM)
    assert trainer.end()[0] == 3
    assert files.read_json(f"{folder}/plan.json")["plan"]["init_from"]
    assert load_weights(folder).model == load_weights(run).model


def test_it_is_amended_and_what_lay_beyond_is_set_aside(run: str, remote: Recipe) -> None:
    """Last: it changes the run."""
    amended = remote.using({}, "--amend_from=6", "--config.phases[1].lr.peak=0.004")
    trainer = amended.start(run)
    came = trainer.wait_until(lambda: len(starts(run)) == 4 and reached(run) >= 8)
    assert came, trainer.kill()
    trainer.kill()
    names = files.list_files(files.as_path(run))
    aside = {name.split("/", 2)[2] for name in names if name.startswith("superseded/")}
    assert {"checkpoints/14/position.json", "checkpoints/18/position.json",
            "exports/phase2/step_000008/checkpoint.json"} <= aside
    assert {"checkpoints/6/position.json", "exports/phase1/step_000006/checkpoint.json"} <= names
    record = read_record(files.as_path(run))
    for step in saved_states(run):
        assert record.accepts(files.read_json(f"{run}/checkpoints/{step}/position.json")["plan_hash"], step)


def test_what_no_run_can_be_in(gcs, world: Path) -> None:
    stranger = files.as_path(gcs.folder())
    files.write_bytes(stranger / "thesis.txt", b"x")
    with pytest.raises(UserError, match="not empty and no run's folder"):
        check(stranger, {}, make_config(world))
    assert files.list_files(stranger) == {"thesis.txt"}
    with pytest.raises(UserError, match=r"gs://no-such-bucket/run: no such bucket; create it, or correct the name"):
        check(files.as_path("gs://no-such-bucket/run"), {}, make_config(world))
