"""Next-token cross-entropy against the output embedding, whose float32 logits never exist whole.

Each device takes its own tokens, a chunk at a time, against its own share of the vocabulary. The gradient is made in
the forward pass, while the exponentials are at hand, so that the backward pass computes no logits again.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from crystal_jax import sharding
from crystal_jax.products import first_of, on_devices, product, products, spread, tensor_ways, whole
from crystal_jax.sharding import AXES, BATCH, COPIES, Axes

EMBED: Axes = ("vocab", "embed")
CHUNK_BYTES = 2**28
"""Of logits in float32 that a device holds at a time, at most."""


@dataclass(frozen=True)
class Softmax:
    """What becomes of logits."""

    scale: float
    """Their multiplier."""
    vocab_size: int
    """The rows of the embedding that are tokens; those behind them are padding."""
    z_loss: float = 0.0
    """Of the squared logarithm of the divisor, in the loss (PaLM: 1e-4)."""


def logits(hidden_BTD: jax.Array, embed_VD: jax.Array, softmax: Softmax) -> jax.Array:
    """[B, T, V] in float32 or wider, without the vocabulary's padding."""
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    found_BTV, = products("btd,vd->btv", hidden_BTD, [embed_VD], EMBED, ("batch", "length", "vocab"), wide)
    if softmax.vocab_size < len(embed_VD):
        found_BTV = sharding.lay(found_BTV, "batch", "length", None)[..., : softmax.vocab_size]
    return found_BTV * jnp.asarray(softmax.scale, wide)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(hidden_BTD: jax.Array, embed_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
                  softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """(sum of weights * (nll + z_loss * lse^2), nll [B, T] in nats); only the first is differentiable.

    lse is the logarithm of the sum that the exponentials are divided by. `weights_BT` is the loss mask, a constant of
    the derivative.
    """
    return _run(hidden_BTD, embed_VD, targets_BT, weights_BT, softmax, False)


def _forward(hidden_BTD: jax.Array, embed_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
             softmax: Softmax):
    total, nll_BT, *grads = _run(hidden_BTD, embed_VD, targets_BT, weights_BT, softmax, True)
    return (total, nll_BT), (*grads, weights_BT)


def _backward(softmax: Softmax, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]):
    grad_hidden_BTD, grad_embed_VD, weights_BT = residuals
    total, _ = cotangents
    return (grad_hidden_BTD * total.astype(grad_hidden_BTD.dtype), grad_embed_VD * total.astype(grad_embed_VD.dtype),
            None, jnp.zeros_like(weights_BT))


cross_entropy.defvjp(_forward, _backward)


def _run(hidden_BTD: jax.Array, embed_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, softmax: Softmax,
         gradients: bool) -> Any:
    """(sum, nll) and, if asked for, the gradients of the sum by hidden and embed, laid out as these are."""
    layout, rows, embed = spread(hidden_BTD), sharding.used("batch", "length"), sharding.stored(EMBED)
    local = partial(_local, softmax=softmax, gradients=gradients, split="tensor" in layout)
    return on_devices(local, (P(*layout), embed, rows, rows), (P(), rows, *((P(*layout), embed) if gradients else ())),
                      hidden_BTD, embed_VD, targets_BT, weights_BT)


def _local(hidden_BTD: jax.Array, embed_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
           softmax: Softmax, gradients: bool, split: bool) -> tuple[jax.Array, ...]:
    """On one device: its rows, its share of the vocabulary. `split`: whether tensor splits the length of hidden."""
    if split:
        hidden_BTD = jax.lax.all_gather(hidden_BTD, "tensor", axis=1, tiled=True)
    head_VD = whole(embed_VD, EMBED, hidden_BTD.dtype)
    chunk = partial(_chunk, head_VD=head_VD, softmax=softmax, gradients=gradients)
    rows, (B, T, D) = (hidden_BTD, targets_BT, weights_BT), hidden_BTD.shape
    flat = [x.reshape(B * T, *x.shape[2:]) for x in rows]
    count = _chunks(B * T, len(head_VD))
    if count == 1:
        total, nll_M, grad_MD, grad_VD = chunk(*flat)
    else:
        def step(carry: Any, part: Any) -> Any:
            total, nll_M, grad_MD, grad_VD = chunk(*part)
            return jax.tree.map(jnp.add, carry, (total, grad_VD)), (nll_M, grad_MD)

        parts = [x.reshape(count, -1, *x.shape[1:]) for x in flat]
        wide = jnp.promote_types(head_VD.dtype, jnp.float32)
        first = _varying(jnp.zeros((), wide), BATCH), _varying(jnp.zeros(head_VD.shape, wide), AXES)
        (total, grad_VD), (nll_M, grad_MD) = jax.lax.scan(step, first, parts)
    found = (_sum(total, BATCH), nll_M.reshape(B, T))
    if not gradients:
        return found
    grad_BTD = grad_MD.reshape(B, T, D)
    if split:
        grad_BTD = jax.lax.psum_scatter(grad_BTD, "tensor", scatter_dimension=1, tiled=True)
    else:
        grad_BTD = _sum(grad_BTD, ("tensor",))
    grad_VD = grad_VD.astype(hidden_BTD.dtype)
    if not jax.sharding.get_abstract_mesh().empty:
        grad_VD = jax.lax.psum_scatter(grad_VD, "fsdp", scatter_dimension=1, tiled=True)
    return *found, grad_BTD, _sum(grad_VD, COPIES).astype(embed_VD.dtype)


def _chunk(hidden_MD: jax.Array, targets_M: jax.Array, weights_M: jax.Array, head_VD: jax.Array, softmax: Softmax,
           gradients: bool) -> tuple[jax.Array, ...]:
    """(sum, nll [M], gradient by hidden [M, D], gradient by the head [V, D]) of some tokens; zeros if not asked for."""
    wide = jnp.promote_types(hidden_MD.dtype, jnp.float32)
    logits_MV = jnp.einsum("md,vd->mv", hidden_MD, head_VD, preferred_element_type=wide) * softmax.scale
    targets_M = targets_M - first_of(len(head_VD))
    columns_1V = jnp.arange(len(head_VD))[None, :]
    if softmax.vocab_size < len(head_VD) * tensor_ways():
        logits_MV = jnp.where(columns_1V < softmax.vocab_size - first_of(len(head_VD)), logits_MV, jnp.finfo(wide).min)
    top_M1 = _top(jnp.max(logits_MV, axis=-1, keepdims=True))
    exp_MV = jnp.exp(logits_MV - top_M1)
    sum_M1 = _sum(jnp.sum(exp_MV, axis=-1, keepdims=True), ("tensor",))
    lse_M = (top_M1 + jnp.log(sum_M1))[:, 0]
    mine_MV = columns_1V == targets_M[:, None]
    nll_M = lse_M - _sum(jnp.sum(jnp.where(mine_MV, logits_MV, 0), axis=-1), ("tensor",))
    weights_M = weights_M.astype(wide)
    total = jnp.sum(weights_M * (nll_M + softmax.z_loss * lse_M * lse_M))
    if not gradients:
        return total, nll_M, jnp.zeros_like(hidden_MD), jnp.zeros_like(head_VD, wide)
    # The gradient of the logits is a probability times a weight: the compute dtype holds it as well as an activation.
    by_lse_M1 = (weights_M * (1 + 2 * softmax.z_loss * lse_M))[:, None]
    grad_MV = (exp_MV * (by_lse_M1 / sum_M1) - jnp.where(mine_MV, weights_M[:, None], 0)) * softmax.scale
    grad_MV = grad_MV.astype(hidden_MD.dtype)
    return (total, nll_M, product("mv,vd->md", grad_MV, head_VD),
            jnp.einsum("mv,md->vd", grad_MV, hidden_MD, preferred_element_type=wide))


def _chunks(tokens: int, vocab: int) -> int:
    """The smallest number of equal chunks whose logits stay within CHUNK_BYTES."""
    least = -(-tokens * vocab * 4 // CHUNK_BYTES)
    return next(count for count in range(least, tokens + 1) if tokens % count == 0)


def _varying(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return value if jax.sharding.get_abstract_mesh().empty else jax.lax.pcast(value, axes, to="varying")


def _sum(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return value if jax.sharding.get_abstract_mesh().empty else jax.lax.psum(value, axes)


def _top(value: jax.Array) -> jax.Array:
    return value if jax.sharding.get_abstract_mesh().empty else jax.lax.pmax(value, "tensor")
