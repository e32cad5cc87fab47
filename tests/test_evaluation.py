"""`evaluate` on a small run of three phases, by the commands that a user types, and what the report makes of it."""

import csv
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from running import copied

from crystal_jax import cli, execute, files, sandbox
from crystal_jax.data.pipeline import Stores
from crystal_jax.errors import UserError
from crystal_jax.evaluation import infilling, walk
from crystal_jax.evaluation.subject import Subject
from crystal_jax.evaluation.walk import Task, evaluate_all, read_results
from crystal_jax.history import load_run
from crystal_jax.plots_evaluations import as_published, draw_evaluations, panels_of
from crystal_jax.published import HEADLINE
from crystal_jax.run_dir import locked

HELD = all(sandbox.layers()[name] for name in execute.REQUIRED)
needs_sandbox = pytest.mark.skipif(not HELD, reason=f"needs Landlock and seccomp; this is {platform.platform()}")
CHECKPOINTS = ["phase1/step_000003", "phase1/step_000006", "phase2/step_000005", "phase2/step_000008",
               "phase3/step_000002"]


@pytest.fixture(scope="module")
def run(evaluated_run: Path) -> Path:
    return evaluated_run


@pytest.fixture(scope="module")
def problems(made_problems: Path) -> Path:
    return made_problems


def command(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def table(run_dir: Path | str) -> list[dict[str, str]]:
    return list(csv.DictReader(files.read_bytes(f"{run_dir}/evaluations/table.csv").decode().splitlines()))


# Over a run's calendar


@pytest.fixture(scope="module")
def walked(run: Path, problems: Path) -> Path:
    """A copy of the run, evaluated by a process that is killed when it has begun, and by another one."""
    place = run.with_name("walked")
    shutil.copytree(run, place)
    arguments = [sys.executable, "-m", "crystal_jax", "evaluate", f"--checkpoint={place}", "--all", "--samples=10",
                 "--tasks=losses,infilling,memorisation,humaneval", "--seen_at_step=1", "--gaps=4",
                 f"--humaneval={problems}", *(["--run_untrusted_code"] if HELD else [])]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(run.with_name("xla")), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    given = {"env": {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **cache}, "cwd": ROOT}
    first = place / "evaluations" / CHECKPOINTS[0] / "losses.json"
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **given) as process:
        while not first.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = {result["task"] for result in read_results(place)}
    made = first.stat().st_mtime_ns
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, **given)
    assert result.returncode == 0, result.stderr
    assert "losses" in before and first.stat().st_mtime_ns == made
    assert f"{20 - len(before)} results made; table: {place}/evaluations/table.csv" in result.stdout
    assert f"{CHECKPOINTS[4]} (5/5): losses: " in result.stderr
    return place


def test_an_interrupt_is_one_line_and_no_crash(run: Path, tmp_path: Path) -> None:
    """While infilling compiles what it needs, and later."""
    place = tmp_path / "run"
    shutil.copytree(run, place)
    arguments = [sys.executable, "-m", "crystal_jax", "evaluate", f"--checkpoint={place}", "--all",
                 "--tasks=losses,infilling", "--gaps=100"]
    given = {"env": {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}, "cwd": ROOT}
    for delay in (0.5, 1.5, 2.5):
        shutil.rmtree(place / "evaluations", ignore_errors=True)
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              **given) as process:
            assert process.stderr is not None
            assert "losses: " in process.stderr.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert process.returncode == 130, said
        assert said.endswith("crystal-jax evaluate: interrupted; the same command goes on where it was\n")


def test_what_is_done_is_passed_over(walked: Path, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("evaluate", f"--checkpoint={walked}", "--all", "--tasks=losses,humaneval", f"--humaneval={problems}",
            "--samples=10", *(["--run_untrusted_code"] if HELD else []))
    said = capsys.readouterr()
    assert said.out.startswith("0 results made") and said.err.count("done already") == 5


def test_the_manifest_says_what_was_evaluated(walked: Path, run: Path) -> None:
    def said() -> list[list[str]]:
        return [entry["evaluated"] for entry in files.read_json(walked / "manifest.json")["checkpoints"]]

    assert said() == [["humaneval", "infilling", "losses", "memorisation-1"]] * 5
    before = (walked / "manifest.json").read_bytes()
    (walked / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    assert said() == [[]] * 5
    with locked(files.as_path(walked)):  # as a process that trains there does
        evaluate_all(walked, [], "float32", print)
    assert said() == [[]] * 5
    evaluate_all(walked, [], "float32", print)
    assert (walked / "manifest.json").read_bytes() == before


def test_a_task_that_fails_leaves_what_was_made(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "run"
    shutil.copytree(run, place)

    def fails(subject: Subject) -> dict[str, float]:
        if subject.info["step"] == 11:
            raise UserError("its file is gone")
        return {"acc": 0.5}

    tasks = [Task("works", lambda subject: {"acc": subject.info["step"] / 100}, {}), Task("fails", fails, {})]
    with pytest.raises(UserError, match="its file is gone"):
        evaluate_all(place, tasks, "float32", print)
    assert [(row["checkpoint"], row["works.acc"], row["fails.acc"]) for row in table(place)] == [
        (CHECKPOINTS[0], "0.03", "0.5"), (CHECKPOINTS[1], "0.06", "0.5"), (CHECKPOINTS[2], "0.11", "")]
    entries = files.read_json(place / "manifest.json")["checkpoints"]
    assert [entry["evaluated"] for entry in entries] == [["fails", "works"]] * 2 + [["works"], [], []]

    with monkeypatch.context() as broken:
        broken.setattr(walk, "write_table", Mock(side_effect=UserError("the disk is full")))
        with pytest.raises(UserError, match="its file is gone"):
            evaluate_all(place, tasks, "float32", print)
    assert evaluate_all(place, tasks[:1], "float32", print) == 2, "the same command goes on"


def test_averages_are_of_whole_sides() -> None:
    """A point where every task of a side has a value, at that number of tokens; in percent."""
    values = {"arc_challenge": {10: 0.2, 20: 0.3}, "hellaswag": {10: 0.4, 20: 0.5}, "mmlu": {10: 0.6, 20: 0.7},
              "truthfulqa": {20: 0.9}, "humaneval": {10: 0.1, 20: 0.3}, "mbpp": {10: 0.3}}
    results = [{"task": task, "tokens": tokens, "metrics": {HEADLINE[task]: value}, "settings": {}}
               for task, points in values.items() for tokens, value in points.items()]
    panels = panels_of(results)
    assert panels["Language and code averages (%)"] == {"language": [(20, pytest.approx(60))],
                                                        "code": [(10, pytest.approx(20))]}
    assert panels[f"mbpp ({HEADLINE['mbpp']}, %)"] == {"mbpp": [(10, pytest.approx(30))]}


def test_the_table_has_each_checkpoint_and_measurement(walked: Path) -> None:
    rows = table(walked)
    assert [row["checkpoint"] for row in rows] == CHECKPOINTS
    assert [int(row["step"]) for row in rows] == [3, 6, 11, 14, 16]
    assert [int(row["tokens"]) for row in rows] == [512 * step for step in (3, 6, 11, 14, 16)]
    assert {name.split(".")[0] for name in rows[0]} == {"checkpoint", "phase", "step", "tokens", "losses", "infilling",
                                                        "humaneval", "memorisation-1"}
    assert all(all(row.values()) for row in rows)


def test_losses_are_those_that_training_measured(walked: Path) -> None:
    rows = {int(row["step"]): row for row in table(walked)}
    compared = 0
    for line in load_run(walked).evals:
        for domain, found in line["heldout"].items():
            if line["step"] in rows:
                row = rows[line["step"]]
                assert float(row[f"losses.{domain}.loss"]) == pytest.approx(found["loss"], rel=1e-5)
                assert float(row[f"losses.{domain}.tokens"]) == found["tokens"]
                for name in ("perplexity", "bits_per_byte"):
                    assert float(row[f"losses.{domain}.{name}"]) == pytest.approx(found[name], rel=1e-4)
                assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
                compared += 1
    assert compared >= 6


def test_bits_per_byte_are_of_the_text(walked: Path) -> None:
    """Nats over the bytes of what the windows' targets say, without special tokens."""
    run = load_run(walked)
    stores = Stores(run.config)
    for domain in ("text", "code"):
        row = table(walked)[-1]
        view = stores.by_source[domain].view("heldout")
        length = run.config.data.sequence_length
        count = (view.num_tokens - 1) // length
        chosen = np.unique(np.linspace(0, count - 1, min(count, run.config.training.eval_sequences)).astype(int))
        targets = view.rows(chosen * length, length + 1)[:, 1:]
        size = sum(len(stores.tokenizer.piece_bytes(token)) for token in targets.ravel().tolist())
        expected = float(row[f"losses.{domain}.loss"]) * targets.size / np.log(2) / size
        assert float(row[f"losses.{domain}.bits_per_byte"]) == pytest.approx(expected, rel=1e-6)


@needs_sandbox
def test_code_is_sampled_and_scored(walked: Path) -> None:
    for row in table(walked):
        assert (float(row["humaneval.pass@1"]), float(row["humaneval.pass@10"])) == (0.5, 0.5)
        assert float(row["humaneval.samples"]) == 20
        name = row["checkpoint"].replace("/", "-")
        samples = execute.read_lines(walked / "evaluations" / f"humaneval-{name}.jsonl", "--samples")
        assert [sample["task_id"] for _, sample in samples] == ["Made/1"] * 10 + ["Made/2"] * 10
    assert len(read_results(walked)) == 20


def test_a_setting_or_another_checkpoint_makes_it_anew(walked: Path, capsys: pytest.CaptureFixture[str],
                                                       tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(walked, place)
    for made, dtype in ((0, "float32"), (5, "bfloat16"), (0, "bfloat16")):
        command("evaluate", f"--checkpoint={place}", "--all", "--tasks=losses", f"--dtype={dtype}")
        assert capsys.readouterr().out.startswith(f"{made} results made")
    info = files.read_json(place / "manifest.json")
    info["checkpoints"][1]["fingerprint"]["embed"] = "another"
    files.write_json(place / "manifest.json", info)
    command("evaluate", f"--checkpoint={place}", "--all", "--tasks=losses", "--dtype=bfloat16")
    assert capsys.readouterr().out.startswith("1 results made")
    config = load_run(place).config
    assert infilling.infilling_task(config, 3).settings != infilling.infilling_task(config, 4).settings


def test_the_report_shows_it(walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("report", f"--run_dir={walked}", f"--output={tmp_path}")
    page = (tmp_path / "report.html").read_text()
    assert ">Evaluations<" in page and (tmp_path / "evaluations.png").stat().st_size > 30000
    assert not [part for part in page.split('"') if part.startswith("http")]
    other = walked.with_name("other")
    shutil.copytree(walked, other)
    config = files.read_json(other / "config.json")
    config["training"]["seed"] = 7
    files.write_json(other / "config.json", config)
    command("report", "--compare", walked, other, f"--output={tmp_path / 'two'}")
    page = (tmp_path / "two" / "compare.html").read_text()
    assert "training.seed" in page and ">walked<" in page and ">other<" in page
    final = load_run(walked).evals[-1]["heldout"]["text"]["loss"]
    assert page.count(f"{final:.4f}") == 2


@pytest.mark.parametrize(("task", "problems", "sound"), [
    ("humaneval", 164, True), ("humaneval", 163, False), ("humaneval", None, False), ("mbpp", 500, True),
    ("mbpp", 257, False), ("mmlu", None, True),
])
def test_published_values_are_of_all_problems(task: str, problems: int | None, sound: bool) -> None:
    metrics = {HEADLINE[task]: 0.1} | ({"problems": float(problems)} if problems else {})
    assert as_published({"task": task, "settings": {}, "metrics": metrics}) == sound


@pytest.mark.drill
def test_published_values_stand_beside_whole_tasks_only(walked: Path) -> None:
    run = load_run(walked)

    def drawn(**settings: Any) -> bytes | None:
        return draw_evaluations(run, [{"task": "hellaswag", "tokens": tokens, "step": tokens, "metrics": {
            "acc_norm": 0.4}, "settings": settings} for tokens in (100, 200)])

    assert drawn() == drawn(limit=None, add_bos=False) != drawn(limit=5)
    assert drawn(limit=5) == drawn(add_bos=True) is not None


def test_a_run_on_gs(run: Path, gcs, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = copied(run, gcs.folder())
    arguments = ["evaluate", f"--checkpoint={place}", "--all", "--tasks=losses,humaneval", f"--humaneval={problems}",
                 "--samples=1", *(["--run_untrusted_code"] if HELD else [])]
    command(*arguments)
    assert capsys.readouterr().out == f"10 results made; table: {place}/evaluations/table.csv\n"
    assert [row["checkpoint"] for row in table(place)] == CHECKPOINTS
    assert files.exists(f"{place}/evaluations/humaneval-phase3-step_000002.jsonl")
    command(*arguments)
    assert capsys.readouterr().out.startswith("0 results made")
    command("report", f"--run_dir={place}")
    assert files.exists(f"{place}/report/evaluations.png")
