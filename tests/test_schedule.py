"""Quotas dealt out exactly, their inverse, and permutations that need no memory."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data.schedule import Interleave, Permutation
from crystal_jax.phases import PhasePlan, make_plan

from configs import crystal_7b

BATCH = 2112
quotas_of_sources = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any).map(
    lambda numbers: {f"source{i}": number for i, number in enumerate(numbers)})


def deviation(counts: dict[str, int], position: int, quotas: dict[str, int]) -> Fraction:
    """The largest distance from a source's share of the first `position` sequences."""
    total = sum(quotas.values())
    return max(abs(counts[name] - Fraction(position * quota, total)) for name, quota in quotas.items())


def bound(sources: int) -> float:
    """(1 + H(sources - 1)) / 2 sequences: 2.01 for 12 sources, below 5 for 4,500.

    Rounding a share costs at most 1/2; a source of the chain inherits, from each before it, 1/2 of what was left times
    its part of that rest, which in descending order is at most 1/1, 1/2, 1/3, ... .
    """
    return 0.5 + 0.5 * sum(1 / i for i in range(1, sources))


# Interleave


def check(quotas: dict[str, int]) -> None:
    """All that is promised, at every position."""
    order = Interleave.make(quotas)
    assert order.length == sum(quotas.values())
    assert dict(zip(order.names, order.quotas, strict=True)) == quotas
    source, ordinal = order.locate(np.arange(order.length))
    dealt = dict.fromkeys(quotas, 0)
    for position in range(order.length):
        name = order.names[source[position]]
        assert ordinal[position] == dealt[name], "the order inside a source is kept"
        assert order.position(name, dealt[name]) == position
        assert order.counts(position) == dealt
        assert deviation(dealt, position, quotas) <= bound(len(quotas))
        dealt[name] += 1
    assert order.counts(order.length) == dealt == quotas, "exact at the end of the phase"


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_every_small_phase(sources: int) -> None:
    for numbers in itertools.product(range(7), repeat=sources):
        if any(numbers):
            check(dict(zip("abc", numbers, strict=False)))


@given(quotas=quotas_of_sources)
def test_any_phase(quotas: dict[str, int]) -> None:
    check(quotas)


@given(quotas=quotas_of_sources, seed=st.integers(0, 99))
def test_positions_in_any_order_and_number(quotas: dict[str, int], seed: int) -> None:
    """A process asks for its own rows only; where a position is doesn't depend on what else is asked."""
    order = Interleave.make(quotas)
    everything = order.locate(np.arange(order.length))
    chosen = np.random.default_rng(seed).integers(0, order.length, 5)
    for whole, part in zip(everything, order.locate(chosen), strict=True):
        assert part.dtype == np.int64
        assert np.array_equal(whole[chosen], part)
    assert [len(part) for part in order.locate(np.arange(0))] == [0, 0]


def test_the_order_does_not_depend_on_how_sources_are_listed() -> None:
    quotas = {"text": 5, "code": 9, "html": 5}
    assert Interleave.make(quotas) == Interleave.make(dict(reversed(quotas.items())))
    assert Interleave.make(quotas).names == ("code", "html", "text"), "ties by name"


def test_positions_outside_the_phase_are_refused() -> None:
    order = Interleave.make({"a": 2, "b": 1})
    for position in (-1, 3):
        with pytest.raises(AssertionError, match="inside the phase"):
            order.locate(np.array([position]))
    with pytest.raises(AssertionError, match="within the source's quota"):
        order.position("b", 1)


PHASES = make_plan(crystal_7b.get_config()).phases


@pytest.mark.parametrize("placed", PHASES, ids=lambda placed: placed.phase.name)
def test_the_7b_recipe_at_full_scale(placed: PhasePlan) -> None:
    """At 450 million sequences: within 1.5 of its share at every prefix, within 3 in every batch of 2112."""
    order, quotas = Interleave.make(placed.quotas), placed.quotas
    assert order.length == placed.steps * BATCH
    rng = np.random.default_rng(0)
    steps = {0, 1, 2, placed.steps - 1, *rng.integers(0, placed.steps, 400).tolist()}
    share = {name: Fraction(quota * BATCH, order.length) for name, quota in quotas.items()}
    for step in steps:
        before, after = order.counts(step * BATCH), order.counts((step + 1) * BATCH)
        assert sum(before.values()) == step * BATCH
        assert deviation(before, step * BATCH, quotas) <= 1.5
        assert max(abs(after[name] - before[name] - share[name]) for name in quotas) <= 3
    assert order.counts(order.length) == quotas


@pytest.mark.parametrize("placed", PHASES, ids=lambda placed: placed.phase.name)
def test_a_batch_of_the_7b_recipe_is_what_its_counts_say(placed: PhasePlan) -> None:
    """No product overflows near the end of the phase either, and the inverse holds there."""
    order = Interleave.make(placed.quotas)
    for step in (0, placed.steps // 2, placed.steps - 1):
        source, ordinal = order.locate(np.arange(step * BATCH, (step + 1) * BATCH))
        before, after = order.counts(step * BATCH), order.counts((step + 1) * BATCH)
        for index, name in enumerate(order.names):
            assert ordinal[source == index].tolist() == list(range(before[name], after[name]))
        for row in (0, 1, BATCH - 1):
            assert order.position(order.names[source[row]], int(ordinal[row])) == step * BATCH + row


def test_the_order_of_sources_stays_the_same_between_versions() -> None:
    """Frozen: another order would make another run of the same plan."""
    order = Interleave.make({"text": 5, "code": 9, "html": 2})
    source, ordinal = order.locate(np.arange(16))
    assert order.names == ("code", "text", "html")
    assert source.tolist() == [0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 1, 0, 2, 0, 1, 0]
    assert ordinal.tolist() == [0, 0, 1, 0, 2, 1, 3, 4, 2, 5, 3, 6, 1, 7, 4, 8]


# Permutation


@given(n=st.integers(1, 3000), key=st.tuples(st.integers(0, 9), st.text(max_size=3), st.integers(0, 9)))
def test_a_permutation_is_one_and_has_an_inverse(n: int, key: tuple[object, ...]) -> None:
    permutation, index = Permutation(n, key), np.arange(n)
    image = permutation(index)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), index)
    assert np.array_equal(permutation.inverse(image), index)
    assert np.array_equal(permutation(permutation.inverse(index)), index)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_tiny_permutations_reach_every_order(n: int) -> None:
    found = {tuple(Permutation(n, (epoch,))(np.arange(n)).tolist()) for epoch in range(400)}
    assert found == set(itertools.permutations(range(n)))


def test_a_permutation_of_450_million() -> None:
    """Phase 2's number of sequences, sampled: in range, different, inverted, and without memory for all of them."""
    n = PHASES[1].steps * BATCH
    index = np.concatenate([np.arange(10_000), n - 1 - np.arange(10_000)])
    permutation = Permutation(n, (1, "StarCoder", 0))
    image = permutation(index)
    assert 0 <= image.min() and image.max() < n
    assert len(np.unique(image)) == len(index)
    assert np.array_equal(permutation.inverse(image), index)
    # Ten equal parts of the range get their tenth of the images: 4 standard deviations are 170.
    assert np.abs(np.bincount(image * 10 // n, minlength=10) - 2000).max() <= 170


def test_each_key_has_an_order_of_its_own() -> None:
    """Seed, source and epoch each change it; about one of n images falls on itself or on another key's."""
    keys = [(seed, source, epoch) for seed in (1, 2) for source in ("code", "text") for epoch in (0, 1)]
    images = [Permutation(1000, key)(np.arange(1000)) for key in keys]
    for a, b in itertools.combinations([np.arange(1000), *images], 2):
        assert (a == b).sum() <= 10
    assert np.array_equal(images[0], Permutation(1000, keys[0])(np.arange(1000)))


def test_neighbours_are_parted() -> None:
    """Documents that follow each other in a store don't in an epoch."""
    image = Permutation(100_000, (1, "code", 0))(np.arange(100_000))
    assert (np.abs(np.diff(image)) < 10).sum() <= 60  # 18 expected
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) <= 0.015


def test_one_index_alone_gives_the_same() -> None:
    permutation = Permutation(777, (3, "x", 1))
    whole = permutation(np.arange(777))
    assert [int(permutation(np.array([i]))[0]) for i in range(0, 777, 37)] == whole[::37].tolist()
    assert permutation(np.arange(0)).size == 0


@pytest.mark.parametrize(("n", "images"), [
    (10, [6, 3, 2, 0, 1, 8, 5, 9, 4, 7]),
    (1000, [453, 539, 226, 502, 905, 423, 296, 244, 196, 869]),
    (452_785_344, [431586485, 18173568, 80062420, 186495951, 1883922]),
])
def test_the_order_of_an_epoch_stays_the_same_between_versions(n: int, images: list[int]) -> None:
    """Frozen: a run resumed after an upgrade, of this or of numpy, must see the documents that it would have seen."""
    assert Permutation(n, (1, "text", 0))(np.arange(len(images))).tolist() == images
