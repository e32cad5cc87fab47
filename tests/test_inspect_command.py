"""`inspect` as a command: runs and their logs, mistakes in one line, JSON, and what a person reads."""

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import RunCli
from hypothesis import given
from hypothesis import strategies as st
from inspected import BATCH, STEPS, make_small, small_config, write_run
from world import write_config

from crystal_jax import cli, inspect
from crystal_jax.config import to_dict
from crystal_jax.data.pipeline import Stores, batch_hash
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.errors import UserError
from crystal_jax.history import Record
from crystal_jax.inspect import describe_counts, describe_document, describe_step, open_config, open_run
from crystal_jax.inspect_page import render_counts, render_document, render_step, visible
from crystal_jax.run_dir import results_depend_on


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(world, tmp_path_factory.mktemp("small"))


@pytest.fixture
def run_dir(small: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", small_config(small, "concat"))


def test_a_run_is_checked_against_the_hashes_in_its_log(run_dir: Path) -> None:
    subject = open_run(run_dir)
    assert subject.reached == 12
    for step, known in ((3, 3), (4, 3), (5, 6), (9, 9), (7, 6), (13, 12), (16, 12)):
        found = describe_step(subject, step)
        assert found["batch_hash"] == batch_hash(subject.batches[step - 1]) and found["batch_hash_in_log"] == known
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    changed = [line.replace(json.loads(line).get("batch_hash", "-"), "0123456789abcdef") for line in lines]
    (run_dir / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    with pytest.raises(UserError, match="the log has batch 0123456789abcdef at step 6, but plan and stores give"):
        describe_step(open_run(run_dir), 7)


def test_the_page_says_how_far_the_log_vouches(run_dir: Path, small: Path) -> None:
    subject = open_run(run_dir)
    for step, said in ((6, "the log has the same"), (7, "that of step 6, the nearest in the log, is the same"),
                       (16, "not reached yet; that of step 12")):
        assert said in render_step(describe_step(subject, step))
    assert "log at step 9: loss 3.5000, text 4.0000, gradient norm 0.5" in render_step(describe_step(subject, 8))
    assert "no run has seen it yet" in render_step(describe_step(open_config(small_config(small, "concat")), 6))


def test_a_run_before_its_first_log_line_has_trained_on_nothing(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "resumed": false}\n')
    subject = open_run(run_dir)
    assert subject.reached == 0 and describe_step(subject, 1)["batch_hash_in_log"] is None
    assert "not reached yet" in render_step(describe_step(subject, 1))
    place = describe_document(subject, "text/0-1")["found"][0]
    assert place["visits"] and not any(visit["done"] for visit in place["visits"])
    assert describe_counts(subject)["phases"] == [] and render_counts(describe_counts(subject))


def test_a_document_before_and_after_a_step(run_dir: Path) -> None:
    subject = open_run(run_dir)
    visited = describe_document(subject, "code/1-2")["found"][0]["visits"]
    first, last = visited[0]["step"], visited[-1]["step"]
    assert first < last
    place = describe_document(subject, "code/1-2", first)["found"][0]
    assert [visit["done"] for visit in place["visits"]] == [visit["step"] <= first for visit in visited]
    page = render_document(describe_document(subject, "code/1-2", first))
    assert f"trained on up to step {first}: " in page and "more come later" in page and "  later" in page
    if first > 1:
        assert f"not trained on up to step {first - 1}; first at step {first}" in render_document(
            describe_document(subject, "code/1-2", first - 1))
    assert "(the log's last)" in render_document(describe_document(subject, "code/1-2"))


def test_an_amended_run_is_shown_as_it_was_and_as_it_is(run_dir: Path, small: Path) -> None:
    old = small_config(small, "concat")
    new = copy.deepcopy(old)
    new.phases[1].mix = {"text": 0.75, "code": 0.25}
    stores = Stores(old)
    left = {"from_step": 9, "plan": results_depend_on(old, stores, None), "config": to_dict(old)}
    record = Record(results_depend_on(new, stores, None), [left])
    (run_dir / "config.json").write_text(json.dumps(to_dict(new)))
    (run_dir / "plan.json").write_text(json.dumps(dataclasses.asdict(record) | {"hash": record.hash}))
    (run_dir / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "resumed": false}\n')
    subject = open_run(run_dir)
    seen: Counter[tuple[str, int]] = Counter()
    for step in range(1, STEPS + 1):
        found = describe_step(subject, step, chars=0)
        assert found["sources"][0]["recipe_share"] == {1: 0.9, 2: 0.35 if step <= 9 else 0.75, 3: 0.2}[
            int(found["phase"][-1])]
        seen.update((part["document"], step) for sequence in found["sequences"] for part in sequence["parts"]
                    if part["in_sequence"][0] < part["in_sequence"][1])
    for identity in ("text/1-0", "text/3-2", "code/0-3", "code/2-1"):
        (place,) = describe_document(subject, identity)["found"]
        visits = Counter((identity, visit["step"]) for visit in place["visits"])
        assert visits == {key: count for key, count in seen.items() if key[0] == identity}
    phases = describe_counts(subject, STEPS)["phases"]
    assert [(phase["name"], phase["first_step"]) for phase in phases] == [
        ("phase1", 1), ("phase2", 7), ("phase2", 10), ("phase3", 15)]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake ends with."""
    assert cli.main(["inspect", *arguments]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and said.err.startswith("crystal-jax inspect: ")
    return said.err


@pytest.mark.parametrize(("arguments", "said"), [
    (["--step=0"], "--step=0: {run} has the steps 1 to 18"),
    (["--step=19"], "--step=19: {run} has the steps 1 to 18"),
    (["--counts", "--step=-1"], "--step=-1"),
    (["--document=text/0-1", "--step=19"], "--step=19"),
    (["--step=2", "--slot=8"], "--slot=8: step 2 has the slots 0 to 7"),
    (["--step=2", "--slot=-1"], "--slot=-1"),
    (["--step=2", "--text=-1"], "--text=-1"),
    (["--counts", "--slot=2"], "together with --step=N alone"),
    ([], "give --step=N, --document=ID or --counts"),
    (["--document=text/0-9"], "--document=text/0-9: no document of {small}/code, {small}/text has this id"),
    (["--document=0-1"], "the nearest: code/0-1"),
    (["--document=text/0-44"], "the nearest: text/0-4, text/1-0"),
    (["--counts", "--document=a"], "not allowed with argument"),
    (["--step=two"], "invalid int value"),
    (["--step=2", "--config.data.seed=5"], "unrecognized arguments"),
])
def test_a_mistake_is_one_line(run_dir: Path, small: Path, arguments: list[str], said: str,
                              capsys: pytest.CaptureFixture) -> None:
    assert said.format(run=run_dir, small=small) in fails([f"--run_dir={run_dir}", *arguments], capsys)


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert f"{tmp_path / 'none'}: no run" in fails([f"--run_dir={tmp_path / 'none'}", "--counts"], capsys)
    assert "one of the arguments --run_dir --config is required" in fails(["--counts"], capsys)
    assert "not allowed with" in fails([f"--run_dir={run_dir}", "--config=configs/crystal_tiny.py", "--counts"], capsys)
    (run_dir / "plan.json").unlink()
    assert "plan.json" in fails([f"--run_dir={run_dir}", "--counts"], capsys)


def test_stores_that_are_missing_or_changed_are_refused_by_name(
        run_dir: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recorded = json.loads((run_dir / "config.json").read_text())
    recorded["sources"]["code"]["store"] = "absent"
    (run_dir / "config.json").write_text(json.dumps(recorded))
    assert str(small / "absent") in fails([f"--run_dir={run_dir}", "--step=3"], capsys)
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"text": "something else " * 40}) + "\n" + json.dumps({"text": "and more " * 90}) + "\n")
    prepare(SourceSpec("jsonl", (str(raw),)), "other", small / "tokenizer.json", tmp_path, Options(heldout=0))
    recorded["sources"]["code"]["store"] = str(tmp_path / "other")
    (run_dir / "config.json").write_text(json.dumps(recorded))
    capsys.readouterr()
    said = fails([f"--run_dir={run_dir}", "--step=3"], capsys)
    was, now = (Stores(small_config(small, "concat")).fingerprints()["store.code"],
                json.loads((tmp_path / "other" / "manifest.json").read_text())["digest"])
    assert f"{run_dir}: has read store {was}, but {tmp_path / 'other'} is {now}; the answer would be wrong" in said


@pytest.mark.parametrize("arguments", [["--step=9"], ["--step=9", "--slot=3"], ["--document=code/1-2"], ["--counts"],
                                       ["--step=3", "--text=5"], ["--counts", "--step=7"]])
def test_json_is_what_the_function_returns_and_the_page_shows_it(
        run_dir: Path, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["inspect", f"--run_dir={run_dir}", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["inspect", f"--run_dir={run_dir}", *arguments]) == 0
    page = capsys.readouterr().out
    subject = open_run(run_dir)
    options = dict(argument.removeprefix("--").split("=") for argument in arguments if "=" in argument)
    if "document" in options:
        expected, render = describe_document(subject, options["document"]), render_document
    elif "--counts" in arguments:
        step = options.get("step")
        expected, render = describe_counts(subject, None if step is None else int(step)), render_counts
    else:
        slot = options.get("slot")
        chars = options.get("text", inspect.EXCERPT if slot is None else None)
        expected = describe_step(subject, int(options["step"]), None if slot is None else int(slot),
                                 None if chars is None else int(chars))
        render = render_step
    assert found == json.loads(json.dumps(expected)) and page == render(expected) + "\n" == render(found) + "\n"
    assert max(map(len, page.splitlines())) < 180 and all(char.isprintable() or char == "\n" for char in page)


def test_a_step_is_shown_with_a_line_for_each_document_and_its_text_below(run_dir: Path) -> None:
    found = describe_step(open_run(run_dir), 9)
    lines = render_step(found).splitlines()
    assert lines[0].startswith("step 9 of 18: phase2, its step 3; lr ") and found["batch_hash"] in lines[1]
    starts = [number for number, line in enumerate(lines) if line.startswith("slot ")]
    assert len(starts) == BATCH
    part = found["sequences"][0]["parts"][0]
    shown = lines[starts[0] + 1]
    assert shown.split()[:2] == [f"[0:{part['in_sequence'][1]}]", part["document"]]
    assert f"of {part['length']:,}" in shown and f"shard {part['shard']}" in shown
    assert lines[starts[0] + 2].strip().startswith(visible(part["text"]).strip()[:20])


def test_a_slot_is_shown_with_its_lines_as_they_are(run_dir: Path) -> None:
    subject = open_run(run_dir)
    slot = next(sequence["slot"] for sequence in describe_step(subject, 9, chars=None)["sequences"]
                if sequence["source"] == "code" and sequence["parts"][0]["text"].count("\n") > 1)
    found = describe_step(subject, 9, slot, None)
    shown = [line.removeprefix("      | ") for line in render_step(found).splitlines() if line.startswith("      |")]
    expected = [line for part in found["sequences"][0]["parts"] for line in part["text"].split("\n")]
    assert [line.removesuffix("↵").rstrip() for line in shown] == [line.rstrip() for line in expected]


@given(st.text())
def test_no_text_of_a_document_moves_the_cursor(text: str) -> None:
    shown = visible(text)
    assert all(char.isprintable() for char in shown) and len(shown) >= len(text)
    assert visible("a\n\tb\x1b[31m\r\x00") == "a↵⇥b\\x1b[31m\\r\\x00"


def test_long_ids_keep_their_end(run_dir: Path) -> None:
    found = describe_step(open_run(run_dir), 1)
    found["sequences"][0]["parts"][0]["document"] = "x" * 200 + "/the_end.py"
    lines = render_step(found).splitlines()
    assert any("…" in line and "xx/the_end.py" in line and len(line) < 160 for line in lines)


def test_the_commands_as_a_user_runs_them(world: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """A real run: its log's hashes are the recomputed ones, at every step that it logged."""
    config_file = write_config(world, tmp_path / "world_config.py")
    result = run_cli("inspect", f"--config={config_file}", "--step=4", "--config.data.seed=3", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["step"] == 4, result.stderr
    run = f"--run_dir={tmp_path / 'run'}"
    trained = run_cli("train", f"--config={config_file}", run, "--config.model.num_layers=1",
                      "--config.training.eval_every=1000", "--config.checkpoints.every_steps=1000",
                      env={"XLA_FLAGS": "--xla_backend_optimization_level=0"})
    assert trained.returncode == 0, trained.stderr
    subject = open_run(tmp_path / "run")
    assert subject.log and [line["step"] for line in subject.log] == list(range(2, 19, 2))
    for line in subject.log:
        assert describe_step(subject, line["step"], 0)["batch_hash"] == line["batch_hash"]
    shown = run_cli("inspect", run, "--step=9")
    assert shown.returncode == 0 and "slot 7  " in shown.stdout and not shown.stderr
    missing = run_cli("inspect", run, "--document=nothing")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1 and not missing.stdout
