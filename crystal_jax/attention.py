"""Causal attention: one function, and the module that owns its projections.

Scores are scaled by 1/head_dim (muP), not by its root; the softmax runs in float32 or wider.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from crystal_jax import sharding
from crystal_jax.config import ModelConfig
from crystal_jax.layers import Param, declare, project, rotary_matrix, rotate
from crystal_jax.sharding import Axes

KV = tuple[jax.Array, jax.Array]
"""Keys and values [B, N, S, H]."""

Rotary = tuple[jax.Array, jax.Array]
"""cos and sin [B, 1, T, H]."""


CAUSAL_BLOCKS = 4
"""Blocks of queries, each of which meets only the keys up to its end: 3/8 of the products are hidden and never made."""


def attention(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, mask: jax.Array, causal: bool) -> jax.Array:
    """softmax(q k^T / H) v with `mask` [B or 1, 1, T, S] True where a query may look; returns [B, N, T, H].

    `causal` promises that T = S and that the mask hides every key after the query.
    """
    # q is scaled once, in its own dtype: T*H products instead of T*S, and exact where H is a power of two.
    q_BNTH = q_BNTH * jnp.asarray(1.0 / q_BNTH.shape[-1], q_BNTH.dtype)
    length = q_BNTH.shape[2]
    if not causal or length % CAUSAL_BLOCKS:
        return _attend(q_BNTH, k_BNSH, v_BNSH, mask)
    ends = [length // CAUSAL_BLOCKS * (block + 1) for block in range(CAUSAL_BLOCKS)]
    return jnp.concatenate(
        [_attend(q_BNTH[:, :, start:end], k_BNSH[:, :, :end], v_BNSH[:, :, :end], mask[:, :, start:end, :end])
         for start, end in zip([0, *ends], ends, strict=False)], axis=2)


def _attend(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, mask: jax.Array) -> jax.Array:
    wide = jnp.promote_types(q_BNTH.dtype, jnp.float32)
    scores_BNTS = jnp.einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH, preferred_element_type=wide)
    scores_BNTS = jnp.where(mask, scores_BNTS, jnp.finfo(wide).min)
    top_BNT1 = jax.lax.stop_gradient(jnp.max(scores_BNTS, axis=-1, keepdims=True))
    weights_BNTS = jnp.exp(scores_BNTS - top_BNT1)
    # The division comes after the product with v: T*H divisions instead of T*S.
    total_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    mixed_BNTH = jnp.einsum("bnts,bnsh->bnth", weights_BNTS.astype(v_BNSH.dtype), v_BNSH, preferred_element_type=wide)
    return (mixed_BNTH / total_BNT1).astype(q_BNTH.dtype)


def causal_mask(length: int, segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """[B or 1, 1, T, T]: a query sees itself and what lies before it, inside its own document if ids are given."""
    index = jnp.arange(length)
    mask = (index[:, None] >= index[None, :])[None, None]
    if segment_ids_BT is None:
        return mask
    return mask & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])


class Attention(nnx.Module):
    """Multi-head attention with biases on all four projections and partial interleaved rotary positions."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = ()):
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        lead: Axes = tuple("layers" for _ in stack)

        def projection() -> tuple[Param, Param]:
            return (declare((*stack, D, N, H), (*lead, "embed", "heads", None), "matrix", std=config.matrix_std),
                    declare((*stack, N, H), (*lead, "heads", None), "vector"))

        self.q, self.q_bias = projection()
        self.k, self.k_bias = projection()
        self.v, self.v_bias = projection()
        self.o = declare((*stack, N, H, D), (*lead, "heads", None, "embed"), "matrix", std=config.output_std)
        self.o_bias = declare((*stack, D), (*lead, "embed"), "vector")
        self.config = config

    def __call__(self, x_BTD: jax.Array, rotary: Rotary, mask: jax.Array, cache: KV | None = None,
                 at: jax.Array | None = None) -> tuple[jax.Array, KV]:
        """The output [B, T, D] and the keys and values it attended to.

        With a `cache` [B, N, S, H] the T new keys are written at slot `at` (a scalar) and all S slots are attended to.
        """
        heads: Axes = ("batch", "heads", "length", None)
        q_BNTH = project("btd,dnh->bnth", x_BTD, self.q, self.q_bias, heads)
        k_BNTH = project("btd,dnh->bnth", x_BTD, self.k, self.k_bias, heads)
        v_BNTH = project("btd,dnh->bnth", x_BTD, self.v, self.v_bias, heads)
        matrix = rotary_matrix(self.config)
        q_BNTH, k_BNTH = rotate(q_BNTH, *rotary, matrix), rotate(k_BNTH, *rotary, matrix)
        if cache is not None:
            assert at is not None, "a cache is written at a slot"
            k_BNTH, v_BNTH = (
                jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=2)
                for old, new in zip(cache, (k_BNTH, v_BNTH), strict=True)
            )
        mixed_BNTH = attention(q_BNTH, k_BNTH, v_BNTH, mask, causal=cache is None)
        out_BTD = project("bnth,nhd->btd", mixed_BNTH, self.o, self.o_bias, ("batch", "length", "embed"))
        return out_BTD, (k_BNTH, v_BNTH)


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> KV:
    """Zeros [L, B, N, S, H] for keys and for values."""
    shape = (config.num_layers, batch, config.num_heads, slots, config.head_dim)
    axes = sharding.used("layers", "batch", "heads", "length", None)
    return jnp.zeros(shape, dtype, out_sharding=axes), jnp.zeros(shape, dtype, out_sharding=axes)
