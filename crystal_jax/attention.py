"""The module that owns attention's projections, and the cache of its keys and values.

Scores are divided by head_dim to the family's power (muP: 1, not 1/2); kernels.py computes the rest.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from crystal_jax import sharding
from crystal_jax.config import ModelConfig
from crystal_jax.kernels import Seen, attention
from crystal_jax.layers import declare, project, rotary_matrix, rotate
from crystal_jax.sharding import Axes

BLOCK = 128
"""Slots of a cache that are read at a time, only as far as the longest text goes."""

KV = tuple[jax.Array, jax.Array]
"""Keys and values [B, K, S, H]; of all layers [L, B, K, S, H]."""

Rotary = tuple[jax.Array, jax.Array]
"""cos and sin [B, 1, T, H]."""


class Past(NamedTuple):
    """The tokens before those that are computed: the newest in `tail`, in the same slots of all rows."""

    tail: KV
    """Of this layer."""
    start: jax.Array | int
    """Slots of the tail that are taken."""
    cache: KV | None
    """The older ones, of all layers, and only ever read in blocks: a slice of one layer would be a copy."""
    layer: int
    length_B: jax.Array | None
    """Slots of each row of the cache that count, from the first on."""


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

    def __call__(self, x_BTD: jax.Array, rotary: Rotary, seen: Seen, past: Past | None = None) -> tuple[
            jax.Array, KV]:
        """The output [B, T, D], and the keys and values [B, K, T, H] of these tokens.

        With a `past` they come back in its tail, and `seen` says what is seen of that; of its cache all that counts is.
        """
        # Products for few tokens are as fast as their weights are read: in this order a CPU turns none of them round.
        dims = "bnth" if past is None else "btnh"
        axes = {"b": "batch", "t": "length", "h": None}
        heads: Axes = tuple({**axes, "n": "heads"}[dim] for dim in dims)
        if (kv_axis := _kv_axis(self.config)) == "heads":
            found = project(f"btd,dnh->{dims}", x_BTD, self, ("q", "k", "v"), heads)
        else:
            kv_heads: Axes = tuple({**axes, "n": kv_axis}[dim] for dim in dims)
            found = [*project(f"btd,dnh->{dims}", x_BTD, self, ("q",), heads),
                     *project(f"btd,dnh->{dims}", x_BTD, self, ("k", "v"), kv_heads)]
        q_BNTH, k_BKTH, v_BKTH = found if past is None else (jnp.swapaxes(part, 1, 2) for part in found)
        if self.config.rotary_dim:
            matrix = rotary_matrix(self.config)
            q_BNTH, k_BKTH = rotate(q_BNTH, *rotary, matrix), rotate(k_BKTH, *rotary, matrix)
        q_BNTH, k_BKTH = checkpoint_name(q_BNTH, "query"), checkpoint_name(k_BKTH, "key")
        if past is not None:
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=past.start, axis=2)
            k_BKTH, v_BKTH = put(past.tail[0], k_BKTH), put(past.tail[1], v_BKTH)
        if past is None or past.cache is None or past.length_B is None:
            mixed_BNTH = attention(q_BNTH, self._shared(k_BKTH), self._shared(v_BKTH), seen,
                                   self.config.choices.attention_power)
        else:
            mixed_BNTH = self._with_cache(q_BNTH, (k_BKTH, v_BKTH), seen, past.cache, past.layer, past.length_B)
        out: Axes = ("batch", sharding.stream(x_BTD.shape[1]), "embed")
        mixed = mixed_BNTH if past is None else jnp.swapaxes(mixed_BNTH, 1, 2)
        return project(f"{dims},nhd->btd", mixed, self, ("o",), out)[0], (k_BKTH, v_BKTH)

    def _with_cache(self, q_BNTH: jax.Array, tail: KV, seen: Seen, cache: KV, layer: int,
                    length_B: jax.Array) -> jax.Array:
        """The softmax over the tail and the cache, summed up block by block.

        Blocks behind a row's text add exact zeros, so that no row's result depends on how long another's text is.
        """
        wide = jnp.promote_types(q_BNTH.dtype, jnp.float32)
        q_BNTH = q_BNTH * jnp.asarray(q_BNTH.shape[-1] ** -self.config.choices.attention_power, q_BNTH.dtype)
        _, B, K, S, H = cache[0].shape
        size = min(BLOCK, S)
        assert S % size == 0, "whole blocks"

        def scores(k_BKSH: jax.Array, mask: jax.Array) -> jax.Array:
            found = jnp.einsum("bnth,bnsh->bnts", q_BNTH, self._shared(k_BKSH), preferred_element_type=wide)
            return jnp.where(mask, found, jnp.finfo(wide).min)

        def mix(weights_BNTS: jax.Array, v_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
            mixed_BNTH = jnp.einsum("bnts,bnsh->bnth", weights_BNTS.astype(v_BKSH.dtype), self._shared(v_BKSH),
                                    preferred_element_type=wide)
            return jnp.sum(weights_BNTS, axis=-1, keepdims=True), mixed_BNTH

        def block(number: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, mixed = so_far
            k_BKSH, v_BKSH = (jax.lax.dynamic_slice(part, (layer, 0, 0, number * size, 0), (1, B, K, size, H))[0]
                              for part in cache)
            mask_BS = (number * size + jnp.arange(size))[None, :] < length_B[:, None]
            found = scores(k_BKSH, mask_BS[:, None, None, :])
            highest = jnp.maximum(top, jnp.max(found, axis=-1, keepdims=True))
            shrunk = jnp.exp(top - highest)
            total_here, mixed_here = mix(jnp.exp(found - highest), v_BKSH)
            return highest, total * shrunk + total_here, mixed * shrunk + mixed_here

        assert seen.allowed is not None, "what is seen of the tail"
        found = scores(tail[0], seen.allowed)
        top = jnp.max(found, axis=-1, keepdims=True)
        blocks = -(-jnp.max(length_B) // size)
        _, total, mixed = jax.lax.fori_loop(0, blocks, block, (top, *mix(jnp.exp(found - top), tail[1])))
        return (mixed / total).astype(q_BNTH.dtype)

    def _shared(self, heads_BKSH: jax.Array) -> jax.Array:
        """[B, N, S, H]: each head once per head of queries that it serves."""
        times = self.config.num_heads // self.config.kv_heads
        if times == 1:
            return heads_BKSH
        return jnp.repeat(heads_BKSH, times, axis=1, out_sharding=sharding.used("batch", "heads", "length", None))


def _kv_axis(config: ModelConfig) -> str:
    return "heads" if config.kv_heads == config.num_heads else "kv_heads"


def empty_tails(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> list[KV]:
    """Zeros [B, K, R, H] for the keys and the values of each layer."""
    shape, layout = (batch, config.kv_heads, slots, config.head_dim), sharding.used(*_cached(config))
    zeros = jnp.zeros(shape, dtype, out_sharding=layout)
    return [(zeros, zeros)] * config.num_layers


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> KV:
    """Zeros [L, B, K, S, H] for keys and for values."""
    shape = (config.num_layers, batch, config.kv_heads, slots, config.head_dim)
    layout = cache_layout(config)
    return jnp.zeros(shape, dtype, out_sharding=layout), jnp.zeros(shape, dtype, out_sharding=layout)


def write(cache: KV, tails: list[KV], at_B: jax.Array) -> KV:
    """The cache with the layers' tails [B, K, R, H] from slot `at` of each row on."""
    put = jax.vmap(jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1)), in_axes=(0, 0, None))
    keys, values = map(jnp.stack, zip(*tails, strict=True))
    return put(cache[0], keys, at_B), put(cache[1], values, at_B)


def cache_layout(config: ModelConfig) -> jax.sharding.PartitionSpec | None:
    return sharding.used("layers", *_cached(config))


def _cached(config: ModelConfig) -> Axes:
    return "batch", _kv_axis(config), "length", None
