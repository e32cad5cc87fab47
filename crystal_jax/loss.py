"""Next-token cross-entropy against a tied embedding.

log p(target) = h . E[target] - logsumexp(h E^T). The two terms are computed apart: the first is a lookup like the
input embedding's, the second reduces over a vocabulary that may be split over devices. Its gradient is made in the
forward pass, while the exponentials are at hand, so that the backward pass computes no logits again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from crystal_jax import sharding


def lookup(embed_VD: jax.Array, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows [B, T, D] of the embedding, cast to `dtype`."""
    table_VD = sharding.gather(embed_VD, (None, None), dtype)
    return table_VD.at[ids_BT].get(out_sharding=sharding.used("batch", "length", "embed"))


def logits(hidden_BTD: jax.Array, embed_VD: jax.Array, scale: float) -> jax.Array:
    """[B, T, V] in float32 or wider."""
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    head_VD = sharding.gather(embed_VD, ("vocab", "embed"), hidden_BTD.dtype)
    return _logits(hidden_BTD, head_VD) * jnp.asarray(scale, wide)


def _logits(hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    return jnp.einsum("btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=wide,
                      out_sharding=sharding.used("batch", "length", "vocab"))


def cross_entropy(hidden_BTD: jax.Array, embed_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
                  scale: float) -> tuple[jax.Array, jax.Array]:
    """(sum of weights * nll, nll [B, T] in nats); only the first is differentiable.

    `weights_BT` is the loss mask, `scale` the logits' multiplier; both are constants of the derivative.
    """
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    head_VD = sharding.gather(embed_VD, ("vocab", "embed"), hidden_BTD.dtype)
    total_lse, lse_BT = _weighted_logsumexp(hidden_BTD, head_VD, weights_BT.astype(wide), scale)
    target_BTD = lookup(embed_VD, targets_BT, hidden_BTD.dtype)
    target_BT = jnp.sum(hidden_BTD.astype(wide) * target_BTD.astype(wide), axis=-1) * scale
    total = total_lse - jnp.sum(weights_BT.astype(wide) * target_BT)
    return total, jax.lax.stop_gradient(lse_BT - target_BT)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_logsumexp(hidden_BTD: jax.Array, head_VD: jax.Array, weights_BT: jax.Array,
                        scale: float) -> tuple[jax.Array, jax.Array]:
    """(sum of weights * lse, lse [B, T]) with lse = logsumexp(scale * hidden head^T)."""
    scaled_BTV = _logits(hidden_BTD, head_VD) * scale
    lse_BT = jax.nn.logsumexp(scaled_BTV, axis=-1)
    return jnp.sum(weights_BT * lse_BT), lse_BT


def _forward(hidden_BTD: jax.Array, head_VD: jax.Array, weights_BT: jax.Array, scale: float):
    scaled_BTV = _logits(hidden_BTD, head_VD) * scale
    top_BT1 = jnp.max(scaled_BTV, axis=-1, keepdims=True)
    exp_BTV = jnp.exp(scaled_BTV - top_BT1)
    sum_BT1 = jnp.sum(exp_BTV, axis=-1, keepdims=True)
    lse_BT = (top_BT1 + jnp.log(sum_BT1))[..., 0]
    # The gradient of the logits is a probability times a weight: the compute dtype holds it as well as an activation.
    grad_BTV = (exp_BTV * (weights_BT[..., None] * scale / sum_BT1)).astype(hidden_BTD.dtype)
    grad_hidden_BTD = jnp.einsum("btv,vd->btd", grad_BTV, head_VD,
                                 out_sharding=sharding.used("batch", "length", "embed"))
    grad_head_VD = jnp.einsum("btv,btd->vd", grad_BTV, hidden_BTD, out_sharding=sharding.used("vocab", "embed"))
    return (jnp.sum(weights_BT * lse_BT), lse_BT), (grad_hidden_BTD, grad_head_VD, weights_BT)


def _backward(scale: float, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]):
    grad_hidden_BTD, grad_head_VD, weights_BT = residuals
    total, _ = cotangents
    return (grad_hidden_BTD * total.astype(grad_hidden_BTD.dtype), grad_head_VD * total.astype(grad_head_VD.dtype),
            jnp.zeros_like(weights_BT))


_weighted_logsumexp.defvjp(_forward, _backward)
