"""Data that a run passes over: just the rows that the log saw, once, and everything that counts knows of it."""

import copy
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCli
from hypothesis import given
from hypothesis import strategies as st
from inspected import make_small, small_config, write_run
from world import make_config, write_config

from crystal_jax.amend import _check_skips
from crystal_jax.config import Config, Phase, Source
from crystal_jax.config_file import load_config
from crystal_jax.data.pipeline import Batches, Stores
from crystal_jax.errors import UserError
from crystal_jax.history import load_run, read_record
from crystal_jax.inspect import describe_counts, describe_document, open_config, open_run
from crystal_jax.inspect_page import render_counts
from crystal_jax.phases import Era, make_plan


def skipping(config: Config, *skips: list[int]) -> Config:
    config = copy.deepcopy(config)
    config.data.skip = list(skips)
    return config


def rows(batches: Batches, *steps: int) -> Counter:
    """What the updates (from 0) read: (key, epoch, row)."""
    return Counter((draw.reading.key, draw.epoch, draw.row) for step in steps for draw in batches.draws(step))


def same(ours: Batches, theirs: Batches, step: int) -> bool:
    return all(np.array_equal(ours[step][name], theirs[step][name]) for name in ours[step])


@pytest.mark.parametrize("first, steps, amended_from", [(9, 3, 8), (9, 3, 7), (10, 2, 6), (3, 2, 0), (17, 1, 15)])
def test_just_the_data_of_those_steps_is_passed_over(world: Path, first: int, steps: int, amended_from: int) -> None:
    old = make_config(world)
    stores = Stores(old)
    eras = [Era(amended_from, old, stores.fingerprints())] if amended_from else []
    before, after = Batches(old, stores), Batches(skipping(old, [first, steps]), stores, eras=eras)
    assert all(same(before, after, step) for step in range(first - 1)), "nothing changes before"
    passed = rows(before, *range(first - 1, first - 1 + steps))
    read = rows(after, *range(len(after)))
    assert not passed & read and set(read.values()) == {1}
    everything = rows(before, *range(len(before)))
    end = make_plan(old).at(first - 1)[0].end
    if end == len(before):  # in the last phase, all that isn't passed over is read
        assert everything - passed == read & everything
    for batches in (before, after):
        assert batches.counts(18) == Counter(draw.source for step in range(18) for draw in batches.draws(step))
    for step in range(first - 1, len(after)):
        for draw in after.draws(step):
            assert (step, draw.slot, draw.epoch) in after.steps_of(draw.reading, draw.row)
    key, epoch, row = next(iter(passed))
    reading = next(reading for readings in after.readings for reading in readings.values() if reading.key == key)
    assert all(visit[2] != epoch for visit in after.steps_of(reading, row))


def test_what_is_behind_comes_forward(world: Path) -> None:
    """Each source reads on, in its own order, where it would have stood after the steps that are passed over."""
    old = make_config(world)
    stores = Stores(old)
    before, after = Batches(old, stores), Batches(skipping(old, [2, 2]), stores)

    def order(batches: Batches, *steps: int) -> list[tuple]:
        return [(draw.epoch, draw.row) for step in steps for draw in batches.draws(step) if draw.source == "text"]

    expected = order(before, 3, 4, 5)
    assert order(after, *range(1, 6))[: len(expected)] == expected


def test_a_second_skip_leaves_the_first_as_it_was(world: Path) -> None:
    old = make_config(world)
    stores = Stores(old)
    known = stores.fingerprints()
    once, twice = skipping(old, [8, 2]), skipping(old, [8, 2], [11, 1])
    middle = Batches(once, stores, eras=[Era(7, old, known)])
    last = Batches(twice, stores, eras=[Era(7, old, known), Era(10, once, known)])
    assert all(same(middle, last, step) for step in range(10))
    assert not rows(middle, 10) & rows(last, *range(18))
    assert not rows(Batches(old, stores), 7, 8) & rows(last, *range(18))
    assert [segment.start for segment in last.plan.segments] == [0, 6, 7, 10, 14]


@given(st.floats(0.05, 0.95), st.integers(3, 60), st.integers(1, 7), st.data())
def test_quotas_hold_around_what_is_passed_over(share: float, steps: int, batch: int, data) -> None:
    mix = {"a": share, "b": 1 - share}
    old = Config(sources={"a": Source("a"), "b": Source("b", "code")},
                 phases=[Phase("one", steps=steps, global_batch_size=batch, mix=mix)])
    first = data.draw(st.integers(1, steps))
    skip = [first, data.draw(st.integers(1, steps - first + 1))]
    plan, was = make_plan(skipping(old, skip), [Era(first - 1, old, {})] if first > 1 else []), make_plan(old)
    assert sum(plan.counts(steps).values()) == steps * batch and plan.tokens(steps) == was.tokens(steps)
    for name in mix:
        given_before = [was.counts(step)[name] for step in (first - 1, first - 1 + skip[1])]
        assert sum(segment.passed.get(name, 0) for segment in plan.segments) == given_before[1] - given_before[0]
        assert all(abs(plan.counts(step)[name] - mix[name] * step * batch) < 4 for step in range(steps + 1))


def test_an_amendment_that_leaves_the_mix_leaves_the_order(world: Path) -> None:
    old = make_config(world)
    stores = Stores(old)
    new = copy.deepcopy(old)
    new.phases[1].lr.peak = 0.1
    before, after = Batches(old, stores), Batches(new, stores, eras=[Era(9, old, stores.fingerprints())])
    assert all(same(before, after, step) for step in range(18))
    assert after.plan.settled(8) == 6 and after.plan.settled(9) == 9, "but from then on it is another phase"
    skipped = make_plan(skipping(old, [10, 2]), [Era(8, old, {})])
    assert [segment.start for segment in skipped.segments] == [0, 6, 8, 9, 14]
    assert skipped.settled(13) == 6, "passing data over changes nothing else"


def test_what_is_past_is_not_passed_over_any_more() -> None:
    _check_skips([[3, 1]], [[3, 1], [9, 2]], 8)
    for old, new in (([], [[8, 2]]), ([[3, 1]], []), ([[3, 1]], [[3, 2]])):
        with pytest.raises(UserError, match=r"config\.data\.skip before step 9 was .*amend it from a step before [38]"):
            _check_skips(old, new, 8)


def test_a_stretch_can_be_given_on_the_command_line(world: Path, tmp_path: Path) -> None:
    file = write_config(world, tmp_path / "config.py")
    assert load_config(str(file), ["--config.data.skip=[[9,6],[16,1]]"]).data.skip == [[9, 6], [16, 1]]
    with pytest.raises(UserError, match=r"--config\.data\.skip=9,6: must be a list of pairs, as in \[\[9,6\]\]"):
        load_config(str(file), ["--config.data.skip=9,6"])
    with pytest.raises(UserError, match=r"config\.data\.skip\[0\]: \[13, 3\] must be data of one phase"):
        load_config(str(file), ["--config.data.skip=[[13,3]]"])


def test_inspect_tells_what_was_passed_over(world: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    root = make_small(world, tmp_path / "small")
    config = small_config(root, "concat")
    run = open_run(write_run(tmp_path / "run", skipping(config, [9, 3])))
    before, after = open_config(config), open_config(skipping(config, [9, 3]))
    counts = describe_counts(run, 12)
    assert [(phase["name"], phase["first_step"]) for phase in counts["phases"]] == [
        ("phase1", 1), ("phase2", 7), ("phase2", 9)]
    passed = {source["name"]: source["passed_over"] for source in counts["phases"][2]["sources"]}
    assert passed == {name: before.batches.counts(11)[name] - before.batches.counts(8)[name] for name in passed}
    assert f"passed over before it: {passed['text']} of text, {passed['code']} of code" in render_counts(counts)
    draw = before.batches.draws(9)[0]
    piece = next(sequence for sequence in before.provenance.sequences(9, before.batches[9], [draw.slot], None))
    identity = piece.parts[0].document
    was, now = (describe_document(subject, identity)["found"][0]["visits"] for subject in (before, after))
    gone = [(visit["source"], visit["epoch"], visit["in_document"]) for visit in was if 9 <= visit["step"] <= 11]
    assert gone and not [visit for visit in now
                         if (visit["source"], visit["epoch"], visit["in_document"]) in gone]


@pytest.fixture(scope="module")
def config_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(world, tmp_path_factory.mktemp("configs") / "world_config.py")


@pytest.mark.drill
def test_a_run_goes_on_behind_it(config_file: Path, world: Path, run_cli: RunCli, tmp_path: Path) -> None:
    """Amended from the state before, with real processes: the log up to there stays bit for bit."""
    run_dir = tmp_path / "run"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = ("train", f"--config={config_file}", f"--run_dir={run_dir}")
    assert run_cli(*command, env=cache).returncode == 0
    before = {line["step"]: line for line in load_run(run_dir).train}
    shutil.copytree(run_dir, tmp_path / "other")
    late = run_cli(*command, "--config.data.skip=[[9,3]]", "--amend_from=14", env=cache)
    assert late.returncode == 1 and "amend it from a step before 9" in late.stderr
    result = run_cli(*command, "--config.data.skip=[[9,3]]", "--amend_from=6", env=cache)
    assert result.returncode == 0, result.stderr
    after = load_run(run_dir)
    assert read_record(run_dir).amendments[0]["from_step"] == 6 and after.step == 18
    lines = {line["step"]: line for line in after.train}
    assert (lines[8]["loss"], lines[8]["batch_hash"]) == (before[8]["loss"], before[8]["batch_hash"])
    assert lines[10]["batch_hash"] != before[10]["batch_hash"]
    config = make_config(world)
    old = Batches(config, Stores(config))
    assert lines[18]["tokens_per_source"] == {name: 32 * count for name, count in after.plan.counts(18).items()}
    found = run_cli("inspect", f"--run_dir={run_dir}", "--step=9", "--json")
    assert found.returncode == 0, found.stderr
    sequences = [(one["source"], one["epoch"], one["row"]) for one in json.loads(found.stdout)["sequences"]]
    passed = [(draw.source, draw.epoch, draw.row) for step in (8, 9, 10) for draw in old.draws(step)]
    assert not set(sequences) & set(passed)
