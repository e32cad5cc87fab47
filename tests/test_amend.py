"""A run goes on with another recipe from a saved step: nothing is lost or read twice, all is recorded."""

import copy
import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCli
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from world import make_config, write_config

from crystal_jax.amend import _check_phases
from crystal_jax.config import Config, Phase, Source
from crystal_jax.data.pipeline import Batches, Stores
from crystal_jax.errors import UserError
from crystal_jax.history import load_run, read_metrics, read_record
from crystal_jax.phases import Era, make_plan, quotas


def changed(config: Config, share: float, phase: int = 1, steps: int | None = None) -> Config:
    config = copy.deepcopy(config)
    config.phases[phase].mix = {"text": share, "code": 1 - share}
    if steps is not None:
        config.phases[phase].steps = steps
    return config


def amended_plan(old: Config, new: Config, step: int):
    return make_plan(new, [Era(step, old, {})])


mixes = st.floats(0.05, 0.95)


@settings(max_examples=60, deadline=None)
@given(mixes, mixes, st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.data())
def test_counts_go_on_where_they_stood(before: float, after: float, first: int, second: int, batch: int, data) -> None:
    sources = {"a": Source("a"), "b": Source("b", "code")}
    old = Config(sources=sources, phases=[
        Phase("one", steps=first, global_batch_size=batch, mix={"a": before, "b": 1 - before}),
        Phase("two", steps=second, global_batch_size=batch, mix={"a": 0.5, "b": 0.5})])
    step = data.draw(st.integers(1, first + second - 1))
    new = copy.deepcopy(old)
    at = 0 if step < first else 1
    new.phases[at].mix = {"a": after, "b": 1 - after}
    assume(new.phases[at].mix != old.phases[at].mix)
    was, plan = make_plan(old), amended_plan(old, new, step)
    assert all(plan.counts(s) == {**dict.fromkeys(plan.counts(s), 0), **was.counts(s)} for s in range(step + 1))
    placed = plan.phases[at]
    rest = (placed.end - step) * batch
    given_rest = {name: plan.counts(placed.end)[name] - was.counts(step)[name] for name in ("a", "b")}
    assert given_rest == {name: quotas(new.phases[at].mix, rest).get(name, 0) for name in ("a", "b")}
    assert sum(placed.quotas.values()) == placed.steps * batch
    assert plan.tokens(plan.total_steps) == plan.total_steps * batch * plan.sequence_length


def test_an_amended_order_repeats_and_skips_nothing(world: Path) -> None:
    old = make_config(world)
    stores = Stores(old)
    for step in (2, 6, 9, 14, 16):
        new = changed(old, 0.6, phase=make_plan(old).at(step)[0].index)
        batches = Batches(new, stores, eras=[Era(step, old, stores.fingerprints())])
        before = Batches(old, stores)
        for s in range(step):
            assert all(np.array_equal(batches[s][name], before[s][name]) for name in before[s])
        seen: Counter = Counter()
        for s in range(len(batches)):
            assert Counter(draw.source for draw in batches.draws(s)) == Counter(
                {name: batches.counts(s + 1)[name] - batches.counts(s)[name] for name in ("text", "code")}) + Counter()
            seen.update((draw.reading.key, draw.epoch, draw.row) for draw in batches.draws(s))
            for draw in batches.draws(s):
                assert (s, draw.slot, draw.epoch) in batches.steps_of(draw.reading, draw.row)
        assert set(seen.values()) == {1}, "every row once an epoch"
        for key in {key for key, _, _ in seen}:
            epochs = {epoch for k, epoch, _ in seen if k == key}
            assert epochs == set(range(max(epochs) + 1))
            size = next(draw.reading.rows.num_rows for s in range(len(batches)) for draw in batches.draws(s)
                        if draw.reading.key == key)
            for epoch in range(max(epochs)):
                assert sum(k == key and e == epoch for k, e, _ in seen) == size, "an epoch ends before the next begins"


def test_a_replaced_store_begins_anew_and_its_past_is_not_invented(world: Path) -> None:
    old = make_config(world)
    stores = Stores(old)
    past = {**stores.fingerprints(), "store.code": "of another store"}
    batches = Batches(changed(old, 0.5), stores, eras=[Era(8, old, past)])
    code = [draw for s in range(8, len(batches)) for draw in batches.draws(s) if draw.source == "code"]
    assert min(draw.epoch for draw in code) == 0
    assert batches.readings[2]["code"].cursor == 0
    assert batches.readings[2]["text"].cursor > 0, "the same store goes on"
    with pytest.raises(Exception, match="was before the run was amended"):
        batches[7]
    assert batches.counts(8) == Batches(old, stores).counts(8), "what was read is still counted"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def config_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(world, tmp_path_factory.mktemp("configs") / "world_config.py")


@pytest.fixture(scope="module")
def finished(config_file: Path, run_cli: RunCli, cache: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("amended") / "run"
    result = run_cli("train", f"--config={config_file}", f"--run_dir={run_dir}", env=cache)
    assert result.returncode == 0, result.stderr
    return run_dir


CHANGE = ("--config.phases[1].mix.text=0.8", "--config.phases[1].mix.code=0.2")


@pytest.fixture(scope="module")
def amended(finished: Path, config_file: Path, run_cli: RunCli, cache: dict, tmp_path_factory) -> Path:
    """The finished run, taken back to phase 1's end (step 6) and on with another phase 2, to the end."""
    run_dir = tmp_path_factory.mktemp("amended") / "run"
    shutil.copytree(finished, run_dir)
    result = run_cli("train", f"--config={config_file}", f"--run_dir={run_dir}", *CHANGE, "--amend_from=6", env=cache)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_a_changed_plan_names_the_way_out(finished: Path, config_file: Path, run_cli: RunCli) -> None:
    result = run_cli("train", f"--config={config_file}", f"--run_dir={finished}", *CHANGE)
    assert result.returncode == 1
    assert "config.phases[1].mix.text was 0.35, is 0.8" in result.stderr and "--amend_from=STEP" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_amended_run_keeps_its_past_and_ends_by_the_new_plan(amended: Path, finished: Path, world: Path) -> None:
    record, before = read_record(amended), read_record(finished)
    assert [left["from_step"] for left in record.amendments] == [6]
    assert record.amendments[0]["plan"] == before.plan and record.hash != before.hash
    run = load_run(amended)
    assert run.step == 18
    old, new = Batches(make_config(world), Stores(make_config(world))), run.plan
    assert run.train[-1]["tokens_per_source"] == {name: count * 32 for name, count in new.counts(18).items()}
    assert new.counts(6) == old.plan.counts(6)
    assert new.phases[1].quotas == quotas({"text": 0.8, "code": 0.2}, 64)
    steps = {entry["step"]: entry["plan_hash"] for entry in json.loads((amended / "manifest.json").read_text())[
        "checkpoints"]}
    assert steps.keys() == {3, 6, 11, 14, 18}
    assert {step: value == before.hash for step, value in steps.items()} == {
        3: True, 6: True, 11: False, 14: False, 18: False}
    aside = amended / "superseded" / before.hash
    assert (aside / "exports/phase2/step_000005/checkpoint.json").exists()
    assert (aside / "checkpoints/18/position.json").exists(), "moved, not removed"


def test_the_log_hashes_what_the_present_plan_reads(amended: Path, world: Path) -> None:
    from crystal_jax.data.pipeline import batch_hash

    run = load_run(amended)
    config = run.config
    batches = Batches(config, Stores(config), eras=read_record(amended).eras)
    lines = [line for line in read_metrics(amended / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [line["batch_hash"] for line in lines] == [batch_hash(batches[line["step"] - 1]) for line in lines]


def test_the_same_command_goes_on_and_another_change_is_one_more_amendment(
    amended: Path, config_file: Path, run_cli: RunCli, cache: dict, tmp_path: Path) -> None:
    command = ("train", f"--config={config_file}", f"--run_dir={amended}", *CHANGE)
    for again in ((), ("--amend_from=6",)):
        result = run_cli(*command, *again, env=cache)
        assert result.returncode == 0 and "done already" in result.stderr
    run_dir = tmp_path / "run"
    shutil.copytree(amended, run_dir)
    longer = ("train", f"--config={config_file}", f"--run_dir={run_dir}", *CHANGE, "--config.phases[2].tokens=2048")
    result = run_cli(*longer, "--amend_from=18", env=cache)
    assert result.returncode == 0, result.stderr
    assert [left["from_step"] for left in read_record(run_dir).amendments] == [6, 18]
    run = load_run(run_dir)
    assert run.step == run.plan.total_steps == 22
    assert len(run.plan.segments) == 4
    assert run_cli("report", f"--run_dir={run_dir}").returncode == 0


@pytest.mark.parametrize("arguments, says", [
    (("--amend_from=6",), r"follows this very plan"),
    ((*CHANGE, "--amend_from=7"), r"--amend_from=7: no state of that step; .* has .*18"),
    ((*CHANGE, "--amend_from=18"), r"phases\[1\] \(phase2\) ended at step 14, but is changed"),
    (("--config.phases[0].lr.peak=0.5", "--amend_from=14"), r"phases\[0\] \(phase1\) ended at step 6, but is changed"),
    (("--config.optimizer.beta1=0.8", "--amend_from=18"), r"ends at step 18; make it longer"),
    (("--config.model.num_heads=2", "--amend_from=6"), r"config.model.num_heads was 4, is 2: that can't change"),
    (("--config.data.seed=2", "--amend_from=6"), r"config.data.seed was 1, is 2: that can't change within a run"),
    (("--config.phases[0].steps=5", "--amend_from=6"), r"phases\[0\] \(phase1\) would end at step 5; make it"),
    (("--config.phases[0].name=other", "--amend_from=6"), r"phases\[0\] is other from step 0, but the run has begun"),
])
def test_what_cannot_be_amended_is_refused_in_one_line(
    arguments: tuple[str, ...], says: str, finished: Path, config_file: Path, run_cli: RunCli) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = run_cli("train", f"--config={config_file}", f"--run_dir={finished}", *arguments)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert re.search(says, result.stderr), result.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before, "nothing was touched"


def test_there_must_be_a_run_to_amend(config_file: Path, run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("train", f"--config={config_file}", f"--run_dir={tmp_path / 'new'}", "--amend_from=6")
    assert result.returncode == 1 and "holds no run to amend" in result.stderr


def test_a_source_may_join_but_not_leave(world: Path) -> None:
    old = make_config(world)
    new = changed(old, 0.5)
    new.sources["more"] = Source("text", "text")
    new.phases[2].mix = {"text": 0.2, "code": 0.6, "more": 0.2}
    stores = Stores(new)
    past = Stores(old).fingerprints()
    batches = Batches(new, stores, eras=[Era(8, old, past)])
    assert batches.counts(len(batches))["more"] == batches.plan.phases[2].quotas["more"]
    assert batches[0]["source"].max() <= 2
    lost = dataclasses.replace(new, sources={"code": new.sources["code"], "more": new.sources["more"]})
    for phase in lost.phases:
        phase.mix = {"code": 0.5, "more": 0.5}
    with pytest.raises(Exception, match=r"config\.sources\.text: left out"):
        Batches(lost, stores, eras=[Era(8, old, past)])


def test_a_source_may_be_dropped_also_when_its_store_is_gone(world: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    old = make_config(root)
    past = Stores(old).fingerprints()
    new = copy.deepcopy(old)
    for phase in new.phases:
        phase.mix, phase.fim_rate = {"text": 1.0}, {}
    eras = [Era(4, old, past)]
    stores = Stores(new, eras)
    assert stores.fingerprints().keys() == {"tokenizer", "store.text"}
    batches = Batches(new, stores, eras=eras)
    before = Batches(old, Stores(old))
    assert all(np.array_equal(batches[3][name], before[3][name]) for name in before[3])
    assert {draw.source for step in range(4, 18) for draw in batches.draws(step)} == {"text"}
    shutil.rmtree(root / "code")
    without = Batches(new, Stores(new, eras), eras=eras)
    assert without.counts(18) == batches.counts(18)
    assert np.array_equal(without[9]["inputs"], batches[9]["inputs"])
    with pytest.raises(UserError, match=r"read code as it was .* removed"):
        [without[step] for step in range(4)]


def test_each_recipe_keeps_its_own_learning_rate(world: Path) -> None:
    old = make_config(world)
    new = copy.deepcopy(old)
    new.phases[1].lr.peak, new.phases[1].steps = 0.1, 12
    plan, was = make_plan(new, [Era(9, old, {})]), make_plan(old)
    assert [plan.learning_rate(step) for step in range(9)] == [was.learning_rate(step) for step in range(9)]
    assert plan.learning_rate(9) > 10 * was.learning_rate(9)


def test_a_phase_under_way_stays_a_phase(world: Path) -> None:
    old = make_plan(make_config(world))
    gone, longer = make_config(world), make_config(world)
    del gone.phases[1]
    with pytest.raises(UserError, match=r"phases\[1\] is phase3 from step 6, but the run has begun phase2 at step 6"):
        _check_phases(old, make_plan(gone), 8)
    del gone.phases[1]
    with pytest.raises(UserError, match=r"phases\[1\] is missing, but the run has begun phase2"):
        _check_phases(old, make_plan(gone), 8)
    longer.phases[0].steps = 10
    _check_phases(old, make_plan(longer), 6)
    with pytest.raises(UserError, match=r"phases\[0\] \(phase1\) ended at step 6, but is changed"):
        _check_phases(old, make_plan(longer), 7)
