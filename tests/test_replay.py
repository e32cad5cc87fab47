"""`replay`: the steps of a run come out again bit for bit, and whatever doesn't is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from running import Recipe, committed, records

from crystal_jax.config import digest
from crystal_jax.errors import UserError
from crystal_jax.replay import Compared, Replay, render, replay

STEPS = 18


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three phases, a NaN batch, fingerprints every four steps."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "config.py").write_text(
        f"from pathlib import Path\nfrom world import make_config\n\n\ndef get_config():\n"
        f"    return make_config(Path({str(world)!r}), fingerprint_every=4)\n")
    return Recipe(folder / "config.py", {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "POISON": '{"9": "nan"}'}, program=(str(Path(__file__).parent / "poisoned.py"),))


@pytest.fixture(scope="module")
def run_dir(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replayed") / "run"
    recipe.finish(folder)
    return folder


Again = Callable[[Path, int, int], tuple[int, Replay]]


@pytest.fixture(scope="module")
def again(recipe: Recipe) -> Again:
    """again(run_dir, from, steps) -> (exit code, what --json says) of a process like the one that trained."""

    def run(folder: Path, start: int, steps: int) -> tuple[int, Replay]:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        result = subprocess.run(
            [sys.executable, *recipe.program, "replay", f"--run_dir={folder}", f"--from={start}", f"--steps={steps}",
             "--json"], capture_output=True, text=True, check=False, cwd=ROOT,
            env={**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                 **recipe.environment})
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "nothing is written"
        assert result.stdout, result.stderr
        said = json.loads(result.stdout)
        found = Replay(said["run"], said["start"], said["steps"], [Compared(**row) for row in said["compared"]],
                       said["environment"], said["stopped"])
        assert said["equal"] == (result.returncode == 0) and said["first_difference"] == found.first_difference
        return result.returncode, found

    return run


def test_every_step_comes_out_again(run_dir: Path, again: Again) -> None:
    """From the end of phase 1 to the end: two phases, a fresh optimizer, a skipped update, states and exports."""
    code, found = again(run_dir, 6, STEPS - 6)
    assert code == 0 and found.first_difference is None and not found.environment and found.stopped is None
    what = [(row.step, row.what) for row in found.compared]
    logged = {record["step"]: record for record in records(run_dir) if record["kind"] == "train"}
    assert {step for step, name in what if name == "log line"} == {step for step in logged if step > 6}
    assert [step for step, name in what if name == "skipped update"] == [9]
    assert [step for step, name in what if name == "fingerprint"] == [8, 12, 16]
    assert [step for step, name in what if name == "state"] == [step for step in committed(run_dir) if step > 6]
    assert [name for _, name in what if name.startswith("export")] == [
        "export phase2/step_000005", "export phase2/step_000008", "export phase3/step_000004"]
    assert all(row.kept == row.found and row.kept for row in found.compared)
    lines = render(found).splitlines()
    assert lines[0] == f"{run_dir}: steps 7 to 18 again, from the state of step 6"
    assert lines[-1] == "equal bit for bit: 3 fingerprints, 6 log lines, 1 skipped update, 3 exports, 3 states"
    assert any(f"equal: loss {logged[16]['loss']}, grad_norm {logged[16]['grad_norm']}, batch_hash "
               f"{logged[16]['batch_hash']}" in line for line in lines)


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def test_each_difference_is_named(copied: Path, again: Again) -> None:
    """A loss, a skip that the log lacks and one that it invents, fingerprints of a state and an export, another JAX."""
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    loss = next(line for line in lines if (line["kind"], line["step"]) == ("train", 12))["loss"]
    for line in lines:
        if line["kind"] == "start":
            line["versions"]["jax"] = "0.1"
        elif (line["kind"], line["step"]) == ("train", 12):
            line["loss"] = loss + 1e-12
        elif line["kind"] == "skip":
            line["step"] = 10
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (copied / "exports/phase2/step_000008/checkpoint.json", copied / "checkpoints/15/position.json"):
        known = json.loads(path.read_text())
        known["fingerprint"][sorted(known["fingerprint"])[3]] = "0" * 16
        known.pop("digest", None)
        path.write_text(json.dumps({**known, "digest": digest(known)}))
    code, found = again(copied, 6, 9)
    assert code == 1 and found.first_difference == 9
    assert {(row.step, row.what): len(row.differing) for row in found.compared if row.differing} == {
        (9, "skipped update"): 8, (10, "skipped update"): 8, (12, "log line"): 1, (14, "export phase2/step_000008"): 1,
        (15, "state"): 1}
    assert any(line.startswith("environment.versions.jax was '0.1', is '") for line in found.environment)
    shown = render(found)
    assert "DIFFERS, first at step 9:" in shown.splitlines()[-1] and "DIFFERS in 1 of" in shown
    assert f"loss was {loss + 1e-12}, is {loss}" in shown
    assert "DIFFERS: the run has none" in shown and "DIFFERS: the run has it, the replay hasn't" in shown


@pytest.mark.parametrize("start, steps, says", [
    (7, 2, "--from=7: no state of that step"), (14, 5, "--steps=5: from step 14 the run has made 4 by one recipe"),
    (14, 0, "--steps=0: from step 14"), (18, 1, "--from=18: the log ends there")])
def test_what_cannot_be_replayed_is_refused(start: int, steps: int, says: str, run_dir: Path) -> None:
    with pytest.raises(UserError, match=says):
        replay(str(run_dir), start, steps)


def test_stores_that_have_changed_are_refused(copied: Path) -> None:
    plan = json.loads((copied / "plan.json").read_text())
    plan["plan"]["fingerprints"]["store.text"] = "another"
    (copied / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"config\.fingerprints\.store\.text was 'another', is '.*put back"):
        replay(str(copied), 6, 2)


@pytest.mark.drill
def test_an_amended_run_is_replayed_by_the_recipe_of_its_time(recipe: Recipe, copied: Path, again: Again) -> None:
    change = ("--config.data.skip=[[17,1]]", "--config.phases[2].lr.peak=0.004", "--amend_from=15")
    recipe.using({}, *change).finish(copied)
    for start, steps in ((6, 9), (15, 3)):
        code, found = again(copied, start, steps)
        assert code == 0 and found.compared, render(found)
    with pytest.raises(UserError, match="from step 6 the run has made 9 by one recipe"):
        replay(str(copied), 6, 10)
