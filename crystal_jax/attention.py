"""Causal attention: one function, and the module that owns its projections.

Scores are divided by head_dim to the family's power (muP: 1, not 1/2); the softmax runs in float32 or wider.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from crystal_jax import sharding
from crystal_jax.config import ModelConfig
from crystal_jax.layers import declare, project, rotary_matrix, rotate
from crystal_jax.sharding import Axes

KV = tuple[jax.Array, jax.Array]
"""Keys and values [B, K, S, H]."""

Rotary = tuple[jax.Array, jax.Array]
"""cos and sin [B, 1, T, H]."""


CAUSAL_BLOCKS = 4
"""Blocks of queries, each of which meets only the keys up to its end: 3/8 of the products are hidden and never made."""


def attention(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, mask: jax.Array, causal: bool,
              power: float = 1.0) -> jax.Array:
    """softmax(q k^T / H^power) v with `mask` [B or 1, 1, T, S] True where a query may look; returns [B, N, T, H].

    `causal` promises that T = S and that the mask hides every key after the query.
    """
    # q is scaled once, in its own dtype: T*H products instead of T*S, and exact where H is a power of two.
    q_BNTH = q_BNTH * jnp.asarray(q_BNTH.shape[-1] ** -power, q_BNTH.dtype)
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


def causal_mask(length: int, segment_ids_BT: jax.Array | None = None,
                branch_ids_BT: jax.Array | None = None) -> jax.Array:
    """[B or 1, 1, T, T]: a query sees itself and what lies before it, inside its own document if ids are given.

    With branches a document is a stem, branch 0, and continuations of it that see the stem and themselves only.
    """
    index = jnp.arange(length)
    mask = (index[:, None] >= index[None, :])[None, None]
    if segment_ids_BT is not None:
        mask = mask & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
    if branch_ids_BT is not None:
        key_B11T = branch_ids_BT[:, None, None, :]
        mask = mask & ((key_B11T == 0) | (key_B11T == branch_ids_BT[:, None, :, None]))
    return mask


class Attention(nnx.Module):
    """Multi-head attention with rotary positions; K heads of keys and values serve N of queries."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = ()):
        D, N, K, H = config.embed_dim, config.num_heads, config.kv_heads, config.head_dim
        lead: Axes = tuple("layers" for _ in stack)
        for name, heads, axis in (("q", N, "heads"), ("k", K, _kv_axis(config)), ("v", K, _kv_axis(config))):
            weight = declare((*stack, D, heads, H), (*lead, "embed", axis, None), "matrix", std=config.matrix_std)
            setattr(self, name, weight)
            if config.choices.biases:
                setattr(self, f"{name}_bias", declare((*stack, heads, H), (*lead, axis, None), "vector"))
        self.o = declare((*stack, N, H, D), (*lead, "heads", None, "embed"), "matrix", std=config.output_std)
        if config.choices.biases:
            self.o_bias = declare((*stack, D), (*lead, "embed"), "vector")
        self.config = config

    def __call__(self, x_BTD: jax.Array, rotary: Rotary, mask: jax.Array, cache: KV | None = None,
                 at: jax.Array | None = None) -> tuple[jax.Array, KV]:
        """The output [B, T, D] and the keys and values it attended to.

        With a `cache` [B, K, S, H] the T new keys of each row are written from its slot `at` [B] on, and all S slots
        are attended to.
        """
        q_BNTH = project("btd,dnh->bnth", x_BTD, self, "q", ("batch", "heads", "length", None))
        kv: Axes = ("batch", _kv_axis(self.config), "length", None)
        k_BKTH = project("btd,dnh->bnth", x_BTD, self, "k", kv)
        v_BKTH = project("btd,dnh->bnth", x_BTD, self, "v", kv)
        if self.config.rotary_dim:
            matrix = rotary_matrix(self.config)
            q_BNTH, k_BKTH = rotate(q_BNTH, *rotary, matrix), rotate(k_BKTH, *rotary, matrix)
        if cache is not None:
            assert at is not None, "a cache is written at slots"
            write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
            k_BKTH, v_BKTH = write(cache[0], k_BKTH, at), write(cache[1], v_BKTH, at)
        mixed_BNTH = attention(q_BNTH, self._shared(k_BKTH), self._shared(v_BKTH), mask, causal=cache is None,
                               power=self.config.choices.attention_power)
        out_BTD = project("bnth,nhd->btd", mixed_BNTH, self, "o", ("batch", "length", "embed"))
        return out_BTD, (k_BKTH, v_BKTH)

    def _shared(self, heads_BKSH: jax.Array) -> jax.Array:
        """[B, N, S, H]: each head once per head of queries that it serves."""
        times = self.config.num_heads // self.config.kv_heads
        if times == 1:
            return heads_BKSH
        return jnp.repeat(heads_BKSH, times, axis=1, out_sharding=sharding.used("batch", "heads", "length", None))


def _kv_axis(config: ModelConfig) -> str:
    return "heads" if config.kv_heads == config.num_heads else "kv_heads"


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> KV:
    """Zeros [L, B, K, S, H] for keys and for values."""
    shape = (config.num_layers, batch, config.kv_heads, slots, config.head_dim)
    layout = cache_layout(config)
    return jnp.zeros(shape, dtype, out_sharding=layout), jnp.zeros(shape, dtype, out_sharding=layout)


def cache_layout(config: ModelConfig) -> jax.sharding.PartitionSpec | None:
    return sharding.used("layers", "batch", _kv_axis(config), "length", None)
