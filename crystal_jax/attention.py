"""The module that owns attention's projections, and the cache of its keys and values.

Scores are divided by head_dim to the family's power (muP: 1, not 1/2); kernels.py computes the rest.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from crystal_jax import sharding
from crystal_jax.config import ModelConfig
from crystal_jax.kernels import Seen, attention
from crystal_jax.layers import declare, project, rotary_matrix, rotate
from crystal_jax.sharding import Axes

KV = tuple[jax.Array, jax.Array]
"""Keys and values [B, K, S, H]."""

Rotary = tuple[jax.Array, jax.Array]
"""cos and sin [B, 1, T, H]."""


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

    def __call__(self, x_BTD: jax.Array, rotary: Rotary, seen: Seen, cache: KV | None = None,
                 at: jax.Array | None = None) -> tuple[jax.Array, KV]:
        """The output [B, T, D] and the keys and values it attended to.

        With a `cache` [B, K, S, H] the T new keys of each row are written from its slot `at` [B] on, and all S slots
        are attended to.
        """
        heads: Axes = ("batch", "heads", "length", None)
        if (kv_axis := _kv_axis(self.config)) == "heads":
            q_BNTH, k_BKTH, v_BKTH = project("btd,dnh->bnth", x_BTD, self, ("q", "k", "v"), heads)
        else:
            q_BNTH, = project("btd,dnh->bnth", x_BTD, self, ("q",), heads)
            k_BKTH, v_BKTH = project("btd,dnh->bnth", x_BTD, self, ("k", "v"), ("batch", kv_axis, "length", None))
        if self.config.rotary_dim:
            matrix = rotary_matrix(self.config)
            q_BNTH, k_BKTH = rotate(q_BNTH, *rotary, matrix), rotate(k_BKTH, *rotary, matrix)
        q_BNTH, k_BKTH = checkpoint_name(q_BNTH, "query"), checkpoint_name(k_BKTH, "key")
        if cache is not None:
            assert at is not None, "a cache is written at slots"
            write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
            k_BKTH, v_BKTH = write(cache[0], k_BKTH, at), write(cache[1], v_BKTH, at)
        mixed_BNTH = attention(q_BNTH, self._shared(k_BKTH), self._shared(v_BKTH), seen,
                               self.config.choices.attention_power)
        out: Axes = ("batch", sharding.stream(x_BTD.shape[1]), "embed")
        return project("bnth,nhd->btd", mixed_BNTH, self, ("o",), out)[0], (k_BKTH, v_BKTH)

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
