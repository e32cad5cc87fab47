"""The transformer, for Crystal exactly as published, its parameters, and how they are drawn.

A module holds declarations (layers.py); arrays live in a plain nested dict `params` with the module's own names, which
is what optimizer, checkpoints and conversion see. `model.bind(params)` joins the two for computing.
"""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from crystal_jax import sharding
from crystal_jax.attention import KV, Attention, Past, Rotary
from crystal_jax.config import REMAT, ModelConfig
from crystal_jax.kernels import Seen, make_seen
from crystal_jax.layers import MLP, Norm, Param, ParamSpec, declare, rotary_tables
from crystal_jax.loss import EMBED, Softmax, cross_entropy, logits
from crystal_jax.products import rows

Params = dict[str, Any]
"""Nested dict of arrays; layers are stacked on the leading axis."""


class Block(nnx.Module):
    """One pre-norm layer; declared once for all layers, with their number as leading axis."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...], pad_to: int = 1):
        self.attn_norm = Norm(config, stack)
        self.attn = Attention(config, stack)
        self.mlp_norm = Norm(config, stack)
        self.mlp = MLP(config, stack, pad_to)

    def __call__(self, h_BTD: jax.Array, rotary: Rotary, seen: Seen, past: Past | None = None) -> tuple[
            jax.Array, KV]:
        mixed_BTD, kv = self.attn(self.attn_norm(h_BTD), rotary, seen, past)
        h_BTD = h_BTD + mixed_BTD
        return h_BTD + self.mlp(self.mlp_norm(h_BTD)), kv


class Crystal(nnx.Module):
    """Pre-norm decoder with muP multipliers; config.choices sets its family (the default: LLM360 CrystalCoder).

    `dtype` is that of activations and of weights in products; `remat`, `unroll`, `kernel` (of attention) and `pad_to`
    choose how it is compiled and change no result beyond rounding.
    """

    def __init__(self, config: ModelConfig, dtype: str = "float32", remat: str = "none", unroll: int = 1,
                 kernel: str = "xla", pad_to: int = 1):
        V, D, L = config.vocab_size, config.embed_dim, config.num_layers
        self.embed = declare((V, D), EMBED, "embedding", std=config.init_std, pad_to=pad_to)
        self.layers = Block(config, (L,), pad_to)
        self.final_norm = Norm(config)
        if config.choices.positions == "learned":
            shape = (config.max_length, D)
            self.positions = declare(shape, ("length", "embed"), "embedding", std=config.init_std)
        if not config.choices.tied:
            self.head = declare((V, D), EMBED, "embedding", std=config.init_std, pad_to=pad_to)
        self.config, self.dtype, self.remat, self.unroll, self.kernel = config, dtype, remat, unroll, kernel

    def bind(self, params: Params) -> "Crystal":
        """This module with `params` in it."""
        leaves, treedef = _leaves(self)
        return jax.tree_util.tree_unflatten(treedef, [param.replace(_get(params, path)) for path, param in leaves])

    def specs(self) -> Params:
        """The declarations as a nested dict with the shape of `params`."""
        specs: Params = {}

        for path, param in _leaves(self)[0]:
            node = specs
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = param.spec
        return specs

    def hidden(self, ids_BT: jax.Array, positions_BT: jax.Array | None = None,
               segment_ids_BT: jax.Array | None = None, branch_ids_BT: jax.Array | None = None) -> jax.Array:
        """The final, normalised stream [B, T, D] for tokens [B, T]; for segments and branches see `causal_mask`."""
        h_BTD = self._last(ids_BT, positions_BT, segment_ids_BT, branch_ids_BT)
        return sharding.lay(h_BTD, "batch", "length", "embed")

    def _last(self, ids_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None,
              branch_ids_BT: jax.Array | None = None) -> jax.Array:
        """The final, normalised stream, laid out as between the layers."""
        if positions_BT is None:
            positions_BT = jnp.arange(ids_BT.shape[1])[None, :]
        h_BTD = self.embedded(ids_BT, positions_BT)
        return self.final_norm(self.stream(h_BTD, positions_BT, segment_ids_BT, branch_ids_BT))

    def stream(self, h_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None,
               branch_ids_BT: jax.Array | None = None) -> jax.Array:
        """The stream [B, T, D] that leaves the last layer, for the one that enters the first."""
        rotary = rotary_tables(self.config, positions_BT, self._wide)
        seen = make_seen(self.kernel, h_BTD.shape[1], segment_ids_BT, branch_ids_BT)

        def layer(h_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(h_BTD, rotary, seen)[0], None

        if (saved := REMAT[self.remat]) is not None:
            # A loop keeps what is computed twice apart; unrolled layers need a barrier for it.
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*saved),
                                   prevent_cse=self.unroll > 1)
        return jax.lax.scan(layer, h_BTD, self.layers, unroll=self.unroll)[0]

    def embedded(self, ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The stream that enters the first layer [B, T, D]; positions [B or 1, T]."""
        out: sharding.Axes = ("batch", sharding.stream(ids_BT.shape[1]), "embed")
        dtype = jnp.dtype(self.dtype)
        h_BTD = rows(self.embed[...], EMBED, ids_BT, out, dtype) * self.config.embed_scale
        if self.config.choices.positions == "learned":
            positions_BT = jnp.broadcast_to(positions_BT, ids_BT.shape, out_sharding=sharding.used("batch", "length"))
            learned_BTD = rows(self.positions[...], ("length", "embed"), positions_BT, ("batch", "length", "embed"),
                               dtype)
            h_BTD = h_BTD + sharding.lay(learned_BTD, *out)
        return h_BTD

    def __call__(self, ids_BT: jax.Array, positions_BT: jax.Array | None = None,
                 segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, V] in float32 (float64 where that is the dtype)."""
        return self.logits(self.hidden(ids_BT, positions_BT, segment_ids_BT))

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        return logits(hidden_BTD, self._output[...], self._softmax())

    def loss(self, ids_BT: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array,
             positions_BT: jax.Array | None = None,
             segment_ids_BT: jax.Array | None = None, z_loss: float = 0.0,
             sequences: float | None = None) -> tuple[jax.Array, jax.Array]:
        """(sum(nll * mask) / (B * T), nll [B, T] in nats): masked tokens stay in the denominator, as published.

        z_loss: see `cross_entropy`; a term of the first only.
        sequences: B, where rows that count for nothing fill the batch up.
        """
        h_BTD = self._last(ids_BT, positions_BT, segment_ids_BT)
        total, nll_BT = cross_entropy(h_BTD, self._output[...], targets_BT, mask_BT, self._softmax(z_loss))
        rows, length = targets_BT.shape
        return total / (length * (sequences or rows)), nll_BT

    def blocks(self) -> list[Block]:
        """Each layer alone, for `extend`: copies, which on a CPU each token would else make again."""
        leaves, treedef = jax.tree.flatten(self.layers)
        return [jax.tree.unflatten(treedef, parts) for parts in zip(*leaves, strict=True)]

    def extend(self, blocks: list[Block], ids_BT: jax.Array, tails: list[KV], start: jax.Array | int,
               cache: KV | None = None, length_B: jax.Array | None = None) -> tuple[jax.Array, list[KV]]:
        """The normalised stream [B, T, D] of T more tokens, and each layer's tail [B, K, R, H] with their keys and
        values from slot `start` on.

        Each sees the slots of the tail up to its own, and before them the first `length` [B] of a cache
        [L, B, K, S, H].
        """
        index_T = start + jnp.arange(ids_BT.shape[1])
        positions_BT = index_T[None, :] if length_B is None else index_T[None, :] + length_B[:, None]
        rotary = rotary_tables(self.config, positions_BT, self._wide)
        mask = (jnp.arange(tails[0][0].shape[2])[None, :] <= index_T[:, None])[None, None]
        seen = Seen(allowed=mask, causal=False)

        h_BTD, found = self.embedded(ids_BT, positions_BT), []
        for index, (block, tail) in enumerate(zip(blocks, tails, strict=True)):
            h_BTD, tail = block(h_BTD, rotary, seen, Past(tail, start, cache, index, length_B))
            found.append(tail)
        return sharding.lay(self.final_norm(h_BTD), "batch", "length", "embed"), found

    def _softmax(self, z_loss: float = 0.0) -> Softmax:
        return Softmax(self.config.logit_scale, self.config.vocab_size, z_loss)

    @property
    def _output(self) -> Param:
        """The matrix [V, D] that gives the logits."""
        return self.embed if self.config.choices.tied else self.head

    @property
    def _wide(self) -> jnp.dtype:
        return jnp.promote_types(self.dtype, jnp.float32)


def _leaves(module: Crystal) -> tuple[list[tuple[tuple[str, ...], Param]], Any]:
    """((path of names, Param) of every parameter, tree definition)."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda node: isinstance(node, Param))
    return [(tuple(key.name for key in path), param) for path, param in leaves], treedef


def _get(params: Params, path: tuple[str, ...]) -> Any:
    node: Any = params
    for name in path:
        node = node[name]
    return node


def is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)


def parameter_count(specs: Params) -> int:
    """Exact, without padding, without allocating anything: 6,575,278,720 for the 7B config."""
    return sum(math.prod(spec.true_shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def map_specs(fn: Any, specs: Params, *rest: Params) -> Params:
    """fn(spec, ...) over the declarations and trees of the same shape."""
    return jax.tree.map(fn, specs, *rest, is_leaf=is_spec)


def unpadded(spec: ParamSpec, leaf: Any) -> Any:
    """A leaf without the padding that it was trained with."""
    return leaf[tuple(slice(size) for size in spec.true_shape)] if spec.true_shape != leaf.shape else leaf


def padded_to(spec: ParamSpec, leaf: np.ndarray) -> np.ndarray:
    """A leaf with the zeros that `spec` puts behind it."""
    return np.pad(leaf, [(0, n) for n in spec.padding]) if any(spec.padding) else leaf


def abstract_params(specs: Params, mesh: Mesh) -> Params:
    """Shapes, dtype float32 and layouts of the parameters on `mesh`."""
    return map_specs(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding.named(mesh, spec.axes)), specs)


def init_params(specs: Params, seed: int, mesh: Mesh) -> Params:
    """Draws all parameters, float32, straight into their shards.

    Values depend on the seed and a parameter's name and layer only, never on the mesh or the number of hosts, and are
    drawn by numpy: compiling a random initialisation on a CPU costs as much as compiling the training step.
    """

    def draw(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        name = "/".join(str(key.key) for key in path)
        layout = sharding.named(mesh, spec.axes)
        return jax.make_array_from_callback(spec.shape, layout, lambda index: _draw(spec, name, seed, index or ()))

    return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=is_spec)


def _draw(spec: ParamSpec, name: str, seed: int, index: tuple[slice, ...]) -> np.ndarray:
    """One shard: each layer of a stack has a random stream of its own; padding is zero."""
    if not spec.std:
        return np.full(spec.shape, spec.mean, np.float32)[index]
    more = [(0, n) for n in spec.padding]
    if spec.axes[0] != "layers":
        return np.pad(truncated_normal(spec.true_shape, spec.std, f"{seed}/{name}"), more)[index]
    layers = range(*index[0].indices(spec.shape[0]))
    return np.stack([np.pad(truncated_normal(spec.true_shape[1:], spec.std, f"{seed}/{name}/{i}"), more[1:])[index[1:]]
                     for i in layers])


def truncated_normal(shape: tuple[int, ...], std: float, key: str) -> np.ndarray:
    """Float32 draws of N(0, std^2) that lie within two standard deviations; redrawn where they don't."""
    digest = hashlib.sha256(key.encode()).digest()
    rng = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
    values = rng.standard_normal(math.prod(shape), np.float32)
    while (outside := np.flatnonzero(np.abs(values) > 2)).size:
        values[outside] = rng.standard_normal(outside.size, np.float32)
    return (values * np.float32(std)).reshape(shape)
