"""Packed rows and shared contexts against the plainest way: each request in a row of its own, all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_jax import scoring, sharding
from crystal_jax.config import MeshConfig, ModelConfig
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, Params, map_specs
from crystal_jax.scoring import Query, Scorer, fill, pack

MODEL = ModelConfig(vocab_size=60, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=200, rotary_dim=4,
                    mup_base_width=8, embed_scale=0.1)
CRYSTAL = Crystal(MODEL)


@pytest.fixture(scope="module")
def params() -> Params:
    return jax.tree.map(jnp.asarray, oracle.random_params(CRYSTAL.specs(), std=0.5))


@pytest.fixture(scope="module")
def logprobs(params: Params):
    """logprobs(ids) -> log-probabilities [T, V] of what follows each token, by the whole row."""
    @jax.jit
    def run(ids: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(CRYSTAL.bind(params)(ids[None])[0])

    def padded(ids: list[int]) -> np.ndarray:
        return np.asarray(run(jnp.asarray(np.pad(ids, (0, MODEL.max_length - len(ids))), jnp.int32)))[: len(ids)]

    return padded


def direct(logprobs, query: Query) -> tuple[float, bool]:
    context = query.context[-(MODEL.max_length - len(query.continuation) + 1):]
    rows = logprobs([*context, *query.continuation[:-1]])[len(context) - 1:]
    found = rows[np.arange(len(query.continuation)), query.continuation]
    return float(found.sum()), bool((rows.argmax(axis=1) == query.continuation).all())


IDS = st.lists(st.integers(0, 59), min_size=1, max_size=8).map(tuple)


@st.composite
def queries(draw: st.DrawFn) -> list[Query]:
    contexts = draw(st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=120).map(tuple), min_size=1, max_size=4))
    return draw(st.lists(st.builds(Query, st.sampled_from(contexts), IDS), min_size=1, max_size=12))


@settings(max_examples=20)
@given(queries())
def test_a_score_is_what_the_whole_row_gives(params: Params, logprobs, asked: list[Query]) -> None:
    found = Scorer(CRYSTAL, params, batch_tokens=512)(asked)
    for query, (logprob, greedy) in zip(asked, found, strict=True):
        expected, best = direct(logprobs, query)
        assert logprob == pytest.approx(expected, abs=2e-5) and greedy == best


def many(seed: int = 0) -> list[Query]:
    rng = np.random.default_rng(seed)
    contexts = [tuple(rng.integers(0, 60, int(n)).tolist()) for n in rng.integers(1, 260, 12)]
    return [Query(contexts[int(rng.integers(12))], tuple(rng.integers(0, 60, int(rng.integers(1, 30))).tolist()))
            for _ in range(60)]


def test_the_order_and_the_batch_change_nothing_beyond_rounding(params: Params, logprobs) -> None:
    asked = many()
    scorer = Scorer(CRYSTAL, params)
    found = scorer(asked)
    assert scorer.cut == sum(len(query.context) + len(query.continuation) - 1 > MODEL.max_length for query in asked) > 0
    order = np.random.default_rng(1).permutation(len(asked))
    other = Scorer(CRYSTAL, params, batch_tokens=200)([asked[i] for i in order])
    for place, i in enumerate(order):
        assert other[place].logprob == pytest.approx(found[i].logprob, abs=1e-4)
        assert found[i].logprob == pytest.approx(direct(logprobs, asked[i])[0], abs=1e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_devices_change_nothing_beyond_rounding(params: Params, mesh: MeshConfig) -> None:
    asked = many(2)
    expected = Scorer(CRYSTAL, params)(asked)
    devices = sharding.make_mesh(mesh)
    with jax.set_mesh(devices):
        placed = map_specs(lambda spec, leaf: jax.device_put(np.asarray(leaf), sharding.named(devices, spec.axes)),
                           CRYSTAL.specs(), params)
        found = Scorer(CRYSTAL, placed)(asked)
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in expected], abs=1e-4)
    assert [score.greedy for score in found] == [score.greedy for score in expected]


@given(queries())
def test_rows_hold_each_branch_once_and_nothing_too_long(asked: list[Query]) -> None:
    scorer = Scorer(CRYSTAL, {})
    rows = pack(scorer._pieces(asked), MODEL.max_length)
    placed = sorted(index for row in rows for piece in row.pieces for index, _ in piece.branches)
    assert placed == list(range(len(asked)))
    for row in rows:
        arrays = np.zeros((6, row.length), np.int32)
        fill(arrays, row)
        assert row.size == (arrays[2] > 0).sum() <= row.length and row.targets <= row.length
        assert arrays[1].max() < MODEL.max_length


def test_choices_share_their_context(params: Params) -> None:
    """The shape of HellaSwag with ten examples before each question: four endings of one context."""
    rng = np.random.default_rng(0)
    asked = [Query(context, tuple(rng.integers(0, 60, 8).tolist()))
             for context in (tuple(rng.integers(0, 60, 150).tolist()) for _ in range(20)) for _ in range(4)]
    naive = sum(len(query.context) + len(query.continuation) - 1 for query in asked)
    used = sum(row.size for row in pack(Scorer(CRYSTAL, {})._pieces(asked), MODEL.max_length))
    assert used <= 0.35 * naive


def test_choices_of_one_token_cost_nothing(params: Params, logprobs) -> None:
    scorer = Scorer(CRYSTAL, params)
    context = tuple(range(50))
    found = scorer([Query(context, (token,)) for token in range(60)])
    assert scorer.computed == scoring.BATCH_TOKENS // 128 * 128
    assert np.exp([score.logprob for score in found]).sum() == pytest.approx(1, abs=1e-5)
    assert sum(score.greedy for score in found) == 1
    assert [score.logprob for score in found] == pytest.approx(logprobs(list(context))[-1].tolist(), abs=1e-5)


@pytest.mark.parametrize(("query", "said"), [
    (Query((), (1,)), "request 0: its context has no token"), (Query((1,), ()), "request 0: its continuation has no"),
    (Query((1,), tuple([1] * 201)), "a continuation of 201 tokens doesn't fit the model's context of 200")])
def test_requests_that_make_no_sense(query: Query, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Scorer(CRYSTAL, {})([query])


def test_the_longest_request_fits(params: Params, logprobs) -> None:
    query = Query((5,), tuple([7] * MODEL.max_length))
    assert Scorer(CRYSTAL, params)([query])[0].logprob == pytest.approx(direct(logprobs, query)[0], abs=1e-3)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_rows_are_hardly_longer_than_what_they_hold(tokens: int, longest: int) -> None:
    length = scoring.row_length(min(tokens, longest), longest)
    assert min(tokens, longest) <= length <= longest
    assert length <= max(scoring.LEAST_ROW, 1.25 * tokens) and len({
        scoring.row_length(n, 4096) for n in range(1, 4097)}) == 21


def test_ten_shots_are_computed_once_for_four_endings(params: Params) -> None:
    """Documents of HellaSwag's shape, without computing anything: the tokens in rows against those of the requests."""
    rng = np.random.default_rng(3)
    asked = []
    for length in rng.integers(950, 1450, 60).tolist():
        context = tuple(rng.integers(0, 60, length).tolist())
        asked += [Query(context, tuple(range(int(size)))) for size in rng.integers(12, 36, 4)]
    long = dataclasses.replace(MODEL, max_length=2048)
    rows = pack(Scorer(Crystal(long), params)._pieces(asked), 2048)
    assert sum(row.length for row in rows) <= 0.35 * sum(len(context) + len(ids) - 1 for context, ids in asked)
