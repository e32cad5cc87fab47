"""Attention and rotary positions against their definitions in float64, the causal blocks, and the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.attention import empty_cache, empty_tails
from crystal_jax.config import ModelConfig
from crystal_jax.kernels import CAUSAL_BLOCKS, Seen, attention, causal_mask
from crystal_jax.layers import rotary_matrix, rotary_tables, rotate
from crystal_jax.model import Crystal

CONFIG = ModelConfig(vocab_size=40, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=24, max_length=64, rotary_dim=4,
                     mup_base_width=8)
HEAD = CONFIG.head_dim


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# attention()


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """softmax(q k^T / H) v as it is written, in float64."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scores = np.where(mask, q @ k.swapaxes(-1, -2) / q.shape[-1], -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


LENGTHS = {"one block": CAUSAL_BLOCKS + 1, "blocks": 3 * CAUSAL_BLOCKS}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize(("dtype", "scale", "limit"), [
    ("float64", 5, 1e-14), ("float32", 5, 2e-6), ("bfloat16", 1, 2e-2)])
def test_attention_is_softmax_over_what_a_query_sees(length: int, dtype: str, scale: float, limit: float) -> None:
    """In blocks or whole, with scores over head_dim (not its root); outputs have q's dtype."""
    segments = np.sort(np.random.default_rng(1).integers(0, 3, (2, length)))
    with jax.enable_x64(dtype == "float64"):
        q, k, v = (jnp.asarray(scale * normal(2, 3, length, HEAD, seed=seed), dtype) for seed in range(3))
        mask = causal_mask(length, jnp.asarray(segments))
        ours = attention(q, k, v, Seen(allowed=mask))
        assert ours.dtype == q.dtype
        ours, q, k, v = (np.asarray(array.astype(jnp.promote_types(dtype, jnp.float32))) for array in (ours, q, k, v))
    assert np.abs(ours - plain(q, k, v, np.asarray(mask))).max() <= limit * scale


def test_attention_with_any_mask() -> None:
    """Fewer queries than keys and holes in the mask, as with a cache."""
    q, k, v = normal(2, 3, 4, HEAD), normal(2, 3, 7, HEAD, seed=1), normal(2, 3, 7, HEAD, seed=2)
    mask = np.random.default_rng(3).random((2, 1, 4, 7)) < 0.5
    mask[..., 2] = True
    seen = Seen(allowed=jnp.asarray(mask), causal=False)
    ours = attention(*(jnp.asarray(array, jnp.float32) for array in (q, k, v)), seen)
    assert np.abs(ours - plain(q, k, v, mask)).max() <= 2e-6


def test_extreme_scores_give_finite_values_and_gradients() -> None:
    q, k, v = (jnp.asarray(scale * normal(1, 2, 8, HEAD, seed=seed), jnp.float32)
               for seed, scale in enumerate((1e6, 1e6, 1.0)))
    value, grads = jax.jit(jax.value_and_grad(
        lambda *qkv: jnp.sum(attention(*qkv, Seen(allowed=causal_mask(8)))), (0, 1, 2)),
        compiler_options=oracle.QUICK)(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@jax.enable_x64(True)
def test_gradients_of_attention_are_those_of_the_definition() -> None:
    """The maximum is left out of the derivative, where it cancels; blocks change nothing."""
    q, k, v, away = (jnp.asarray(normal(1, 2, 8, HEAD, seed=seed)) for seed in range(4))
    mask = causal_mask(8, jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1]]))

    def definition(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.where(mask, jnp.einsum("bnth,bnsh->bnts", q, k) / HEAD, -jnp.inf)
        return jnp.sum(away * jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores), v))

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(away * attention(q, k, v, Seen(allowed=mask)))

    for found, expected in zip(*(jax.jit(jax.grad(f, (0, 1, 2)), compiler_options=oracle.QUICK)(q, k, v)
                                 for f in (ours, definition)), strict=True):
        assert np.abs(found - expected).max() <= 1e-14


@given(segments=st.lists(st.integers(0, 2), min_size=6, max_size=6).map(sorted))
def test_the_mask_is_causal_and_stays_inside_a_document(segments: list[int]) -> None:
    mask = np.asarray(causal_mask(6, jnp.asarray([segments])))
    assert mask.shape == (1, 1, 6, 6)
    for t in range(6):
        for s in range(6):
            assert mask[0, 0, t, s] == (s <= t and segments[s] == segments[t])
    assert np.array_equal(causal_mask(6)[0, 0], np.tri(6, dtype=bool))


# Rotary positions


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x[..., H] with each interleaved pair as a complex number times exp(i position / 10000^(2 pair / rotary_dim))."""
    R = CONFIG.rotary_dim
    pairs = x[..., 0:R:2] + 1j * x[..., 1:R:2]
    pairs = pairs * np.exp(1j * positions[..., None] * CONFIG.rotary_base ** (-np.arange(0, R, 2) / R))
    result = x.copy()
    result[..., 0:R:2], result[..., 1:R:2] = pairs.real, pairs.imag
    return result


def ours_turned(x: np.ndarray, positions: np.ndarray, dtype: str = "float32") -> jax.Array:
    cos, sin = rotary_tables(CONFIG, jnp.asarray(positions), jnp.promote_types(dtype, jnp.float32))
    return rotate(jnp.asarray(x, dtype), cos, sin, rotary_matrix(CONFIG))


@jax.enable_x64(True)
def test_pairs_turn_as_complex_numbers() -> None:
    x = normal(2, 3, 5, HEAD)
    positions = np.array([[0, 1, 2, 3, 4], [0, 7, 100, 2046, 2047]])
    expected = turned(x, positions[:, None, :])
    assert np.abs(ours_turned(x, positions, "float64") - expected).max() <= 1e-12
    # A float32 angle near 2048 is known to 1.2e-4; its sine no better.
    assert np.abs(ours_turned(x, positions) - expected).max() <= 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dims_stay_bit_for_bit(dtype: str) -> None:
    x = jnp.asarray(normal(1, 2, 5, HEAD), dtype)
    result = ours_turned(x, np.array([[0, 1, 2, 1000, 2047]]), dtype)
    assert result.dtype == x.dtype
    assert np.array_equal(result[..., CONFIG.rotary_dim:], x[..., CONFIG.rotary_dim:])
    assert np.array_equal(result[..., 0, :], x[..., 0, :]), "nothing turns at position 0"
    assert not np.array_equal(result[..., 1, : CONFIG.rotary_dim], x[..., 1, : CONFIG.rotary_dim])


@jax.enable_x64(True)
@given(first=st.integers(0, 1000), second=st.integers(0, 1000), shift=st.integers(0, 1000))
def test_scores_depend_on_distance_only(first: int, second: int, shift: int) -> None:
    """q.k of two turned vectors is the same wherever the two stand, at one distance."""
    q, k = normal(1, 1, 2, HEAD), normal(1, 1, 2, HEAD, seed=1)

    def score(at_q: int, at_k: int) -> float:
        turned_q = ours_turned(q, np.array([[at_q, at_q]]), "float64")
        turned_k = ours_turned(k, np.array([[at_k, at_k]]), "float64")
        return float(np.vdot(np.asarray(turned_q)[0, 0, 0], np.asarray(turned_k)[0, 0, 0]))

    assert abs(score(first, second) - score(first + shift, second + shift)) <= 1e-10


def test_the_turning_matrix_only_moves_and_negates() -> None:
    matrix = rotary_matrix(CONFIG)
    R = CONFIG.rotary_dim
    assert set(np.unique(matrix)) == {-1, 0, 1}
    assert np.array_equal(matrix[:R, :R] @ matrix[:R, :R], -np.eye(R))
    assert not matrix[R:].any()
    assert not matrix[:, R:].any()


# The cache


def test_extending_piece_by_piece_is_the_whole_at_once() -> None:
    """Three pieces, the cache longer than the text, slots in order: the stream of `hidden`."""
    model = Crystal(CONFIG)
    params = jax.tree.map(jnp.asarray, oracle.random_params(model.specs()))
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 8)).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def both(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        bound = model.bind(params)
        tails = empty_tails(CONFIG, 2, 11, jnp.dtype(jnp.float32))
        pieces = []
        for start, end in ((0, 5), (5, 6), (6, 8)):
            piece, tails = bound.extend(bound.blocks(), ids[:, start:end], tails, start)
            pieces.append(piece)
        return jnp.concatenate(pieces, axis=1), bound.hidden(ids)

    pieces, whole = map(np.asarray, both(ids))
    assert np.abs(pieces - whole).max() <= 1e-5
    assert whole.std() > 0.5


def test_an_empty_cache_has_room_for_every_layer() -> None:
    keys, values = empty_cache(CONFIG, 3, 10, jnp.dtype(jnp.bfloat16))
    for part in (keys, values):
        assert part.shape == (CONFIG.num_layers, 3, CONFIG.num_heads, 10, HEAD)
        assert part.dtype == jnp.bfloat16
        assert not part.any()
