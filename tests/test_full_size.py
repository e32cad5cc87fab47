"""The full 7B recipe's data: its arithmetic at full scale, and the dry run over sparse stores on a small one."""

import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from benchmarks import full_size, loader, synthetic
from benchmarks.measure import measure_loader
from crystal_jax.config import Config
from crystal_jax.data.schedule import Interleave
from crystal_jax.data.store import TokenStore
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.phases import Plan, make_plan

from configs import crystal_7b

BATCH = 2112
STEPS = {"phase1": 79_721, "phase2": 214_387, "phase3": 27_728}
PREFIXES, WINDOWS = 20_000, 10_000


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(crystal_7b.get_config())


def shares(phase: str) -> dict[str, Fraction]:
    mix = next(one.mix for one in crystal_7b.get_config().phases if one.name == phase)
    return {name: Fraction(weight) / sum(map(Fraction, mix.values())) for name, weight in mix.items()}


# By arithmetic


def test_the_phases_have_the_published_sizes(plan: Plan) -> None:
    assert {placed.phase.name: placed.steps for placed in plan.phases} == STEPS
    assert plan.tokens(plan.total_steps) == 1_392_061_710_336


@pytest.mark.parametrize("phase", STEPS)
def test_every_source_is_exact_at_the_end_of_a_phase(plan: Plan, phase: str) -> None:
    placed = next(placed for placed in plan.phases if placed.phase.name == phase)
    sequences = STEPS[phase] * BATCH
    before, after = plan.counts(placed.start), plan.counts(placed.end)
    given = {name: after[name] - before.get(name, 0) for name in placed.phase.mix}
    assert given == placed.quotas and sum(given.values()) == sequences
    for name, share in shares(phase).items():
        assert abs(given[name] - share * sequences) < 1, name


@pytest.mark.parametrize("phase", STEPS)
def test_every_prefix_is_within_3_sequences_of_each_share(plan: Plan, phase: str) -> None:
    """At every step's end and in the middle of steps: within two of its part of the quota, which is within one."""
    placed = next(placed for placed in plan.phases if placed.phase.name == phase)
    interleave, rng = Interleave.make(placed.quotas), random.Random(phase)
    total = STEPS[phase] * BATCH
    places = [rng.randrange(total + 1) for _ in range(PREFIXES)]
    places += [rng.randrange(STEPS[phase] + 1) * BATCH for _ in range(PREFIXES)]
    places += [*range(50), *range(total - 50, total + 1)]
    wanted = {name: float(share) for name, share in shares(phase).items()}
    worst = max(abs(count - wanted[name] * place) for place in places
                for name, count in interleave.counts(place).items())
    assert worst <= 3


@pytest.mark.parametrize("phase", STEPS)
def test_any_batch_is_within_3_sequences_of_each_share(plan: Plan, phase: str) -> None:
    placed = next(placed for placed in plan.phases if placed.phase.name == phase)
    rng, share = random.Random(phase), {name: float(one) for name, one in shares(phase).items()}
    interleave = Interleave.make(placed.quotas)
    for step in [0, STEPS[phase] - 1, *(rng.randrange(STEPS[phase]) for _ in range(WINDOWS))]:
        before, after = interleave.counts(step * BATCH), interleave.counts((step + 1) * BATCH)
        for name, wanted in share.items():
            assert abs(after[name] - before[name] - wanted * BATCH) <= 3, (step, name)


@pytest.mark.parametrize("phase", STEPS)
def test_the_rows_of_a_batch_are_those_that_the_counts_say(plan: Plan, phase: str) -> None:
    """`locate`, which batches are made by, agrees with `counts`, and each ordinal comes back to its position."""
    placed = next(placed for placed in plan.phases if placed.phase.name == phase)
    rng, interleave = random.Random(phase), Interleave.make(placed.quotas)
    for step in [0, STEPS[phase] - 1, *(rng.randrange(STEPS[phase]) for _ in range(40))]:
        before = interleave.counts(step * BATCH)
        source, ordinal = interleave.locate(np.arange(step * BATCH, (step + 1) * BATCH))
        for index, name in enumerate(interleave.names):
            own = ordinal[source == index]
            assert own.tolist() == list(range(before[name], before[name] + len(own)))
            assert before[name] + len(own) == interleave.counts((step + 1) * BATCH)[name]
        for slot in rng.sample(range(BATCH), 5):
            found = interleave.position(interleave.names[source[slot]], int(ordinal[slot]))
            assert found == step * BATCH + slot


# On sparse files, small


def small_config(steps: tuple[int, int, int] = (60, 160, 24)) -> Config:
    """The 7B recipe with a quarter of its batch and sequences of 128."""
    config = crystal_7b.get_config()
    config.data.sequence_length = config.model.max_length = 128
    for phase, count in zip(config.phases, steps, strict=True):
        phase.steps, phase.global_batch_size = count, BATCH // 4
    return config


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    shards = {name: max(4, count // 60) for name, count in full_size.SHARDS.items()}
    return full_size.dry_run(tmp_path_factory.mktemp("sparse"), small_config(), shards)


def test_the_dry_run_gives_each_source_its_quota_and_its_epochs(found: dict) -> None:
    assert [phase["name"] for phase in found["phases"]] == list(STEPS)
    for phase, config in zip(found["phases"], small_config().phases, strict=True):
        assert sum(source["given"] for source in phase["sources"].values()) == phase["sequences"]
        for name, source in phase["sources"].items():
            assert source["given"] == source["quota"] and abs(source["given"] - source["wanted"]) < 1
            if name in config.epochs:
                assert source["epochs"] == pytest.approx(config.epochs[name], rel=0.002)


def test_the_dry_run_reads_the_rows_that_it_wrote(found: dict) -> None:
    for phase in found["phases"]:
        for place in ("first", "last"):
            batch = phase[place]
            assert batch["faults"] == [] and batch["hosts_agree"]
            assert batch["as_written"] + batch["fim"] >= BATCH // 4
            assert sum(batch["sources"].values()) == BATCH // 4
    first, second, third = (phase["first"] for phase in found["phases"])
    assert first["fim"] == 0 and second["fim"] > 0.5 * second["sources"]["StarCoder"] > 100 and third["fim"] > 20
    hashes = [phase[place]["hash"] for phase in found["phases"] for place in ("first", "last")]
    assert len(set(hashes)) == 6


def test_the_report_names_every_source_and_hash(found: dict) -> None:
    text = full_size.render(found)
    for phase in found["phases"]:
        assert f"{phase['steps']:,} steps" in text and phase["last"]["hash"] in text
        assert all(name in text for name in phase["sources"])
    assert "DIFFER" not in text and "rows wrong" not in text
    assert json.loads(json.dumps(found)) == found


def test_a_wrong_row_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = full_size.DryRun(tmp_path, small_config((2, 2, 2)), dict.fromkeys(full_size.SHARDS, 4))
    monkeypatch.setattr(synthetic, "write_at", lambda *_: None)
    assert len(run.look(0)["faults"]) == BATCH // 4


def test_sizes_are_those_that_the_recipe_states() -> None:
    sizes = full_size.store_sizes(crystal_7b.get_config(), full_size.SHARDS)
    slimpajama = sum(sum(sizes[name].values()) for name in crystal_7b.SLIMPAJAMA)
    assert 689e9 < slimpajama < 691e9 and 290e9 < sum(sizes["StarCoder"].values()) < 292e9
    assert Counter(map(len, sizes.values()))[925] == 7
    for name in crystal_7b.SLIMPAJAMA:
        halves = [sum(tokens for ordinal, tokens in sizes[name].items() if ordinal % 2 == half) for half in (0, 1)]
        assert halves[0] == pytest.approx(halves[1], rel=0.001)


def test_a_repeated_store_is_a_good_store(tmp_path: Path) -> None:
    """The one that benchmarks/loader.py reads."""
    from crystal_jax.data.verify import verify

    tokenizer = synthetic.make_tokenizer(tmp_path, 600)
    path = synthetic.write_repeated(tmp_path, "rows", tokenizer, shards=5, tokens=300_000)
    assert verify(path) == []
    store = TokenStore.open(path)
    assert len(store.view("train").shards) == 5 and store.view("train").num_tokens >= 300_000
    assert store.tokenizer_fingerprint == Tokenizer.load(tokenizer).fingerprint


def test_the_loader_bench_measures_ours_and_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SHARDS", 4), ("TOKENS", 1_200_000), ("BIG_TOKENS", 1_200_000), ("BATCH", 8)):
        monkeypatch.setattr(loader, name, value)
    loader.build(tmp_path)
    loader.build(tmp_path)  # finds all there
    figures = {}
    for name in ("ours", "ours, local FIM at 0.9", "ours, best_fit", "grain mix, ArrayRecord", "numpy memmap"):
        open_loader = loader.CONTENDERS[name](tmp_path)
        figures[name] = measure_loader(open_loader, 8, loader.STEPS, cpu_seconds=0.05, seeks=2)
        assert figures[name]["rows_per_cpu_s"] > 0
    assert loader.render(figures).count("\n") == 1 + len(figures)
