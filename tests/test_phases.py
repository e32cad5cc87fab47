"""The arithmetic of a recipe, against the published figures and against a second computation in fractions."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import tiny_600

from crystal_jax.config import Config, LearningRate, ModelConfig, Phase, Source
from crystal_jax.errors import UserError
from crystal_jax.phases import (
    Scale,
    checkpoint_name,
    code_share,
    learning_rate,
    make_plan,
    phase_steps,
    quotas,
    scaled,
)
from crystal_jax.rules import validate

from configs import crystal_7b, crystal_tiny

# LLM360's parameter files: steps, tokens, (peak, warm-up, end, decay).
PUBLISHED = (
    (79_721, 344_823_300_096, ("0.012", 86, "0.00012408", 294_337)),
    (214_387, 927_304_384_512, ("0.0087825", 86, "0.00013679", 214_301)),
    (27_728, 119_934_025_728, ("0.002", 276, "0.0002", 27_452)),
)
EPSILON = 4 * np.finfo(np.float64).eps


def exact_rate(peak: str, warmup: int, end: str, decay: int, step: int) -> Fraction:
    """The published schedule: linear from 0 to the peak, then linear to the end, which then stays."""
    if step < warmup:
        return Fraction(peak) * step / warmup
    return Fraction(peak) + (Fraction(end) - Fraction(peak)) * Fraction(min(step - warmup, decay), decay)


def test_steps_and_tokens_are_the_published_ones() -> None:
    plan = make_plan(validate(crystal_7b.get_config()))
    assert [placed.steps for placed in plan.phases] == [steps for steps, _, _ in PUBLISHED]
    ends = [plan.tokens(placed.end) for placed in plan.phases]
    assert np.diff([0, *ends]).tolist() == [tokens for _, tokens, _ in PUBLISHED]
    assert plan.total_steps == 321_836
    assert plan.tokens(plan.total_steps) == 1_392_061_710_336


@pytest.mark.parametrize(("variant", "counts"), [("published", [54, 72, 10]), ("original", [54, 143, 28])])
def test_the_calendar_is_the_published_one(variant: str, counts: list[int]) -> None:
    plan = make_plan(crystal_7b.get_config(variant))
    names = list(plan.calendar().values())
    assert [len(placed.kept_steps) for placed in plan.phases] == counts
    assert len(names) == len(set(names)) == sum(counts) == {"published": 136, "original": 225}[variant]
    assert {"phase1/step_079721", "phase2/step_214387", "phase3/step_027728"} <= set(names)
    assert list(plan.calendar()) == sorted(plan.calendar())


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_learning_rates_are_the_published_ones(phase: int) -> None:
    steps, _, published = PUBLISHED[phase]
    peak, warmup, _, _ = published
    plan = make_plan(crystal_7b.get_config())
    placed = plan.phases[phase]
    assert plan.learning_rate(placed.start) == 0
    assert plan.learning_rate(placed.start + warmup) == float(peak)
    for step in (1, warmup // 2, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1):
        expected = float(exact_rate(*published, step))
        assert plan.learning_rate(placed.start + step) == pytest.approx(expected, rel=1e-13), step


def test_only_phase_1_stops_before_its_decay_ends() -> None:
    for placed in make_plan(crystal_7b.get_config()).phases:
        whole = placed.steps == placed.phase.lr.warmup_steps + placed.phase.lr.decay_steps
        assert whole == (placed.index > 0)


def test_learning_rates_are_the_oracles(reference: Path) -> None:
    oracle = np.load(reference / "oracle_optim.npz")
    lr = crystal_7b.get_config().phases[0].lr
    for update in range(3):
        assert np.float32(learning_rate(lr, 40 + update)) == oracle[f"lr/{update}"]
    assert learning_rate(lr, 40) == pytest.approx(0.012 * 40 / 86, rel=EPSILON)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_the_recipe_is_the_released_one(phase: int, reference: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="reads the released parameter files")
    released = yaml.safe_load((reference / "phases_yaml" / f"phase{phase}" / "params.yaml").read_text())
    ours = crystal_7b.get_config("original").phases[phase - 1]
    data, run = released["train_input"], released["runconfig"]
    assert (ours.steps, ours.global_batch_size) == (run["max_steps"], data["batch_size"])
    assert ours.checkpoint_every == run["checkpoint_steps"]
    warmup, decay = released["optimizer"]["learning_rate"]
    lengths = [part.get("decay_steps", part.get("steps")) for part in (warmup, decay)]
    assert ours.lr == LearningRate(warmup["end_learning_rate"], lengths[0], decay["end_learning_rate"], lengths[1])
    assert ours.lr.peak == decay["initial_learning_rate"]
    folders = {entry["data_dir"].rstrip("/").split("/")[-1]: entry for entry in data["mixture"]}
    weights = {name.split("_")[0]: entry["weight"] for name, entry in folders.items()}
    assert ours.mix == weights
    firsts = {name.split("_")[0]: float(entry["data_subset"].split("-")[1])
              for name, entry in folders.items() if "data_subset" in entry}
    assert {name: subset.first for name, subset in ours.subset.items() if subset.first < 1} == firsts
    halves = {name: {"0": "even", "1": "odd"}[folder.split("_part")[1][0]]
              for folder in folders if "_part" in folder for name in [folder.split("_")[0]]}
    assert {name: subset.files for name, subset in ours.subset.items() if subset.files != "all"} == halves


def test_code_shares_are_the_published_ones() -> None:
    config = crystal_7b.get_config()
    assert [round(100 * code_share(phase, config.sources), 1) for phase in config.phases] == [5.0, 64.7, 83.3]


def test_starcoder_is_read_twice_and_the_languages_three_times() -> None:
    """About 291B tokens of StarCoderData, as its authors count them."""
    plan = make_plan(crystal_7b.get_config())
    tokens = plan.phases[1].quotas["StarCoder"] * 2048 / 2
    assert tokens == pytest.approx(291e9, rel=2e-3)
    assert [placed.phase.epochs.get("StarCoder") for placed in plan.phases] == [None, 2.0, None]
    assert {plan.phases[2].phase.epochs[name] for name in crystal_7b.LANGUAGES} == {3.0}


def test_a_budget_in_tokens_is_rounded_to_steps() -> None:
    for tokens, steps in ((2048, 1), (3071, 1), (3072, 2), (1_000_000, 488)):
        assert phase_steps(Phase(tokens=tokens, global_batch_size=8), 256) == steps
    assert phase_steps(Phase(tokens=927_304_384_512, global_batch_size=2112), 2048) == 214_387


mixes = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.floats(1e-6, 1.0), min_size=1, max_size=12)


@given(mixes, st.integers(0, 10**12))
def test_quotas_are_exact(mix: dict[str, float], sequences: int) -> None:
    found = quotas(mix, sequences)
    total = sum(map(Fraction, mix.values()))
    assert list(found) == list(mix)
    assert sum(found.values()) == sequences
    for name, weight in mix.items():
        assert abs(found[name] - Fraction(weight) / total * sequences) < 1


def test_ties_go_to_the_first_name() -> None:
    assert quotas({"b": 1.0, "a": 1.0, "c": 1.0}, 4) == {"b": 2, "a": 1, "c": 1}


rates = st.builds(LearningRate, peak=st.floats(1e-6, 1.0), warmup_steps=st.integers(0, 300), end=st.floats(0, 1.0),
                  decay_steps=st.integers(1, 300))


@given(rates, st.integers(0, 700))
def test_the_schedule_is_bounded_and_continuous(lr: LearningRate, step: int) -> None:
    value, following = learning_rate(lr, step), learning_rate(lr, step + 1)
    slack = EPSILON * max(lr.peak, lr.end)
    assert 0 <= value <= max(lr.peak, lr.end) + slack
    steepest = max(lr.peak / max(lr.warmup_steps, 1), abs(lr.peak - lr.end) / lr.decay_steps)
    assert abs(following - value) <= steepest + slack
    assert learning_rate(lr, lr.warmup_steps) == lr.peak
    assert learning_rate(lr, lr.warmup_steps + lr.decay_steps + step) == pytest.approx(lr.end, rel=1e-12, abs=slack)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Small recipes of one to four phases over two sources."""
    phases = [
        Phase(name=f"p{index}", steps=draw(st.integers(1, 40)), global_batch_size=draw(st.integers(1, 5)),
              mix={"a": 0.25, "b": 0.75}, checkpoint_every=draw(st.integers(1, 50)), lr=draw(rates))
        for index in range(draw(st.integers(1, 4)))
    ]
    return Config(sources={"a": Source("a"), "b": Source("b", "code")}, phases=phases)


@given(configs())
def test_a_plan_agrees_with_itself(config: Config) -> None:
    plan = make_plan(validate(config))
    walked, tokens = [], 0
    for placed in plan.phases:
        walked += [(placed, phase_step) for phase_step in range(placed.steps)]
    assert plan.total_steps == len(walked)
    for step, (placed, phase_step) in enumerate(walked):
        assert plan.at(step) == (placed, phase_step)
        assert plan.learning_rate(step) == learning_rate(placed.phase.lr, phase_step)
        assert plan.tokens(step) == tokens
        tokens += placed.phase.global_batch_size * plan.sequence_length
        assert plan.done(step + 1) == (placed, phase_step + 1), "a phase's end belongs to that phase"
    assert plan.tokens(plan.total_steps) == tokens == plan.tokens(plan.total_steps + 5)
    assert plan.at(plan.total_steps) == (plan.phases[-1], plan.phases[-1].steps)
    assert plan.done(0) == (plan.phases[0], 0)


@given(configs())
def test_the_calendar_keeps_each_nth_and_the_last(config: Config) -> None:
    plan = make_plan(config)
    expected = {}
    for step in range(1, plan.total_steps + 1):
        placed, phase_step = plan.done(step)
        if phase_step % placed.phase.checkpoint_every == 0 or phase_step == placed.steps:
            expected[step] = f"{placed.phase.name}/step_{phase_step:06d}"
    assert plan.calendar() == expected
    assert checkpoint_name("phase1", 50) == "phase1/step_000050"


@pytest.mark.parametrize("step", [-1, 601, 10**9])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    plan = make_plan(tiny_600())
    for call in (plan.at, plan.done, plan.learning_rate):
        with pytest.raises(UserError, match=f"step {step}: the run goes from step 0 to 600"):
            call(step)


def tiny_scale(steps: int) -> Scale:
    return Scale(steps=steps, global_batch_size=4, sequence_length=64, kept=9, min_warmup=2, sources={
        "text": (Source("t"), crystal_tiny.TEXT), "code": (Source("c", "code"), crystal_tiny.CODE)})


@given(st.integers(20, 100_000))
def test_a_scaled_recipe_is_the_same_recipe(steps: int) -> None:
    original = crystal_7b.get_config()
    small = validate(scaled(original, tiny_scale(steps), ModelConfig(max_length=64), "small"))
    plan, whole = make_plan(small), make_plan(original)
    assert plan.total_steps == steps
    assert [phase.name for phase in small.phases] == ["phase1", "phase2", "phase3"]
    for placed, old in zip(plan.phases, whole.phases, strict=True):
        phase = placed.phase
        assert abs(placed.steps - Fraction(old.steps * steps, whole.total_steps)) < 1
        assert code_share(phase, small.sources) == pytest.approx(code_share(old.phase, original.sources), rel=1e-12)
        assert set(phase.fim_rate.values()) == set(old.phase.fim_rate.values())
        assert (phase.spm_rate, phase.optimizer) == (old.phase.spm_rate, old.phase.optimizer)
        assert (phase.lr.peak, phase.lr.end) == (old.phase.lr.peak, old.phase.lr.end)
        assert {subset.files for subset in phase.subset.values()} <= {"all", "even", "odd"}


def test_a_scaled_schedule_keeps_its_shape() -> None:
    original = crystal_7b.get_config()
    small = scaled(original, tiny_scale(32_184), ModelConfig(max_length=64), "small")
    for placed, old in zip(make_plan(small).phases, make_plan(original).phases, strict=True):
        for share in (0.25, 0.5, 0.75, 1.0):
            ours = learning_rate(placed.phase.lr, round(share * placed.steps))
            theirs = learning_rate(old.phase.lr, round(share * old.steps))
            assert math.isclose(ours, theirs, rel_tol=2e-3, abs_tol=2e-6)


def test_scaling_leaves_the_original_alone() -> None:
    original = crystal_7b.get_config()
    scaled(original, tiny_scale(600), ModelConfig(max_length=64), "small")
    assert original == crystal_7b.get_config()


def test_the_demo_has_the_recipes_phases() -> None:
    """600 steps, about a million tokens, the FIM rates and code shares of the original."""
    config = validate(tiny_600())
    plan = make_plan(config)
    assert [placed.steps for placed in plan.phases] == [148, 400, 52]
    assert plan.tokens(600) == 1_228_800
    assert [phase.fim_rate for phase in config.phases] == [{}, {"code": 0.9}, {"code": 0.3}]
    assert [phase.subset["text"].files for phase in config.phases] == ["even", "odd", "all"]
    assert [phase.subset["text"].first for phase in config.phases] == [1.0, 1.0, 0.1]
    assert [round(100 * code_share(phase, config.sources), 1) for phase in config.phases] == [5.0, 64.7, 83.3]


def test_the_configs_know_their_variants() -> None:
    with pytest.raises(UserError, match="the variants are published, original"):
        crystal_7b.get_config("orignal")
    assert make_plan(crystal_tiny.get_config("60")).total_steps == 60
    demo = make_plan(validate(crystal_tiny.get_config()))
    assert (demo.total_steps, demo.tokens(1900)) == (1900, 1_945_600)
