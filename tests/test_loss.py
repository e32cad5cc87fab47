"""Cross-entropy and its handmade gradient against jax.grad of the definition, whole and over a split vocabulary."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from crystal_jax import loss, sharding
from crystal_jax.config import MeshConfig

B, T, D, V = 4, 6, 16, 24
SCALE = 0.13875
SOFTMAX = loss.Softmax(SCALE, V)


def inputs(dtype: str = "float32", magnitude: float = 3.0) -> tuple[np.ndarray, ...]:
    """(hidden, embed, targets, weights), the weights between 0 and 1 with zeros among them."""
    rng = np.random.default_rng(0)
    hidden, embed = magnitude * rng.standard_normal((B, T, D)), magnitude * rng.standard_normal((V, D))
    weights = np.where(rng.random((B, T)) < 0.3, 0, rng.random((B, T)))
    hidden, embed, weights = (np.asarray(array, dtype) for array in (hidden, embed, weights))
    return hidden, embed, rng.integers(0, V, (B, T)).astype(np.int32), weights


def definition(hidden: jax.Array, embed: jax.Array, targets: jax.Array, weights: jax.Array,
               softmax: loss.Softmax) -> tuple[jax.Array, jax.Array]:
    logits = softmax.scale * jnp.einsum("btd,vd->btv", hidden, embed[: softmax.vocab_size])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + softmax.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2)), nll


def value_and_grads(function: Any, hidden: Any, embed: Any, targets: Any, weights: Any,
                    softmax: loss.Softmax = SOFTMAX) -> list[np.ndarray]:
    """[total, nll, d hidden, d embed] of twice the total plus one, so that the cotangent isn't 1."""

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def compute(hidden: jax.Array, embed: jax.Array, targets: jax.Array, weights: jax.Array) -> list[jax.Array]:
        def doubled(hidden: jax.Array, embed: jax.Array) -> tuple[jax.Array, Any]:
            total, nll = function(hidden, embed, targets, weights, softmax)
            return 2 * total + 1, (total, nll)

        (_, aux), grads = jax.value_and_grad(doubled, (0, 1), has_aux=True)(hidden, embed)
        return [*aux, *grads]

    return compute(hidden, embed, targets, weights)


@pytest.fixture(scope="module")
def exact() -> list[np.ndarray]:
    """The definition in float64."""
    with jax.enable_x64(True):
        return [np.asarray(value) for value in value_and_grads(definition, *inputs("float64"))]


def differences(found: list[np.ndarray], expected: list[np.ndarray]) -> list[float]:
    """Relative to the largest value of each."""
    return [float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())
            for a, b in zip(found, expected, strict=True)]


def test_value_and_gradients_in_float64(exact: list[np.ndarray]) -> None:
    with jax.enable_x64(True):
        found = value_and_grads(loss.cross_entropy, *inputs("float64"))
    assert max(differences(found, exact)) <= 1e-14


def test_value_and_gradients_in_float32(exact: list[np.ndarray]) -> None:
    found = value_and_grads(loss.cross_entropy, *inputs())
    assert [value.dtype for value in found] == [np.float32] * 4
    assert max(differences(found, exact)) <= 2e-6


def test_value_and_gradients_in_bfloat16(exact: list[np.ndarray]) -> None:
    """Against the definition on the rounded inputs: sums are float32, gradients round to the dtype of activations."""
    hidden, embed, targets, weights = inputs()
    half = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(half, np.float64), np.asarray(jnp.asarray(embed, jnp.bfloat16), np.float64)
    found = value_and_grads(loss.cross_entropy, half, embed, targets, weights)
    assert [value.dtype for value in found] == [np.float32, np.float32, jnp.bfloat16, np.float32]
    with jax.enable_x64(True):
        expected = value_and_grads(definition, *rounded, targets, weights)
    total, nll, *grads = differences(found, [np.asarray(value) for value in expected])
    assert max(total, nll) <= 1e-6
    assert max(grads) <= 2e-2
    assert differences(found, exact)[0] <= 1e-2


def test_a_mask_of_zeros_gives_nothing() -> None:
    """A masked token has an nll, but no part in the sum or its gradient, exactly."""
    hidden, embed, targets, _ = inputs()
    total, nll, *grads = value_and_grads(loss.cross_entropy, hidden, embed, targets, np.zeros((B, T), np.float32))
    assert total == 0
    assert nll.min() > 0
    assert not any(grad.any() for grad in grads)


def test_masked_tokens_take_no_part(exact: list[np.ndarray]) -> None:
    hidden, embed, targets, weights = inputs()
    found = value_and_grads(loss.cross_entropy, hidden, embed, np.where(weights == 0, 0, targets), weights)
    assert differences([found[0], found[2], found[3]], [exact[0], exact[2], exact[3]]) <= [2e-6] * 3
    assert not np.asarray(found[2])[weights == 0].any()


def test_only_the_sum_has_a_gradient() -> None:
    hidden, embed, targets, weights = map(jnp.asarray, inputs())
    grads = jax.jit(jax.grad(lambda h, e, w: jnp.sum(loss.cross_entropy(h, e, targets, w, SOFTMAX)[1]), (0, 1, 2)),
                    compiler_options=oracle.QUICK)(hidden, embed, weights)
    assert not any(grad.any() for grad in grads)


def test_extreme_logits_do_not_overflow() -> None:
    """At logits of millions values and gradients are finite, and a sure token has no loss and no gradient.

    Beyond 1e9, where a float32 is known to 64 only, XLA's fused product and difference overflows here and in
    jax.nn.log_softmax alike.
    """
    hidden, embed, targets, weights = inputs(magnitude=1e3)
    values = value_and_grads(loss.cross_entropy, hidden, embed, targets, weights)
    assert all(np.isfinite(value).all() for value in values)
    assert np.abs(values[1]).max() > 1e6
    best = (hidden.astype(np.float64) @ embed.T.astype(np.float64)).argmax(-1).astype(np.int32)
    _, nll, grad, _ = value_and_grads(loss.cross_entropy, hidden, embed, best, weights)
    assert np.abs(nll).max() <= 0.5, "two roundings of 4e6"
    assert np.abs(grad).max() <= 1


def test_nll_does_not_depend_on_the_mask() -> None:
    hidden, embed, targets, weights = inputs()
    one = value_and_grads(loss.cross_entropy, hidden, embed, targets, weights)[1]
    other = value_and_grads(loss.cross_entropy, hidden, embed, targets, np.ones_like(weights))[1]
    assert np.array_equal(one, other)


def test_logits() -> None:
    hidden, embed, _, _ = map(jnp.asarray, inputs())
    expected = SCALE * np.asarray(hidden, np.float64) @ np.asarray(embed, np.float64).T
    found = loss.logits(hidden, embed, SOFTMAX)
    assert np.abs(found - expected).max() <= 1e-5
    half = loss.logits(hidden.astype(jnp.bfloat16), embed, SOFTMAX)
    assert half.dtype == jnp.float32, "sums and softmax see no bfloat16"
    assert 0 < np.abs(half - expected).max() <= 0.1


def padded(embed: np.ndarray) -> np.ndarray:
    """With rows behind the tokens that no result may depend on."""
    return np.concatenate([embed, np.full((8, D), 1e3, embed.dtype)])


@pytest.mark.parametrize("chunks", [1, 3, B * T])
@pytest.mark.parametrize("softmax", [SOFTMAX, loss.Softmax(SCALE, V, 1e-2)], ids=["plain", "z-loss"])
@pytest.mark.parametrize("sizes", [None, (2, 1, 4), (1, 4, 2), (8, 1, 1)], ids=str)
def test_chunks_padding_and_meshes_change_rounding_only(
        monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int] | None, softmax: loss.Softmax,
        chunks: int) -> None:
    """Rows over data and fsdp, the vocabulary over tensor, the embedding's columns over fsdp; z-loss too."""
    hidden, embed, targets, weights = inputs()
    if sizes == (8, 1, 1):
        hidden, targets, weights = (np.concatenate([array, array]) for array in (hidden, targets, weights))
    with jax.enable_x64(True):
        wide = [array.astype(np.float64) for array in (hidden, embed)]
        exact = [np.asarray(value) for value in value_and_grads(
            definition, *wide, targets, weights.astype(np.float64), softmax)]
    mesh = sharding.make_mesh(MeshConfig(*sizes or (1, 1, 1)), jax.devices()[: 8 if sizes else 1])
    rows = len(hidden) * T // sharding.batch_ways(mesh)
    per_token = (V + 8) // mesh.shape["tensor"] * 4
    monkeypatch.setattr(loss, "CHUNK_BYTES", max(1, rows // chunks) * per_token)
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, {"hidden": hidden, "targets": targets, "weights": weights})
        table = jax.device_put(padded(embed), sharding.named(mesh, loss.EMBED))
        found = value_and_grads(loss.cross_entropy, batch["hidden"], table, batch["targets"], batch["weights"], softmax)
        layout = P(sharding.BATCH)
        assert [jax.typeof(value).sharding.spec for value in found] == [
            P(), P(*layout, None), P(*layout, None, None), P("tensor", "fsdp")]
        logits = loss.logits(batch["hidden"], table, softmax)
    assert logits.shape == (*hidden.shape[:2], V)
    assert not np.asarray(found[3])[V:].any(), "padding has no gradient"
    assert max(differences([*found[:3], np.asarray(found[3])[:V]], exact)) <= 2e-6


def test_chunks_divide_the_tokens_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1000)
    assert [loss._chunks(tokens, 10) for tokens in (1, 25, 26, 60, 61)] == [1, 1, 2, 3, 61]
