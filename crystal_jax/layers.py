"""Parameters as declarations, and the small layers: norms, rotary positions, MLPs.

A module is born abstract: each parameter states its shape, logical axes, initial distribution and optimizer group,
where it is used, and holds no array. `init_params` (model.py) draws them; `Crystal.bind` lends a module its arrays.

Names of dims, here and in every file of the model:
  B batch, T query length, S key length, D embed_dim, N heads, K kv heads, H head_dim, F mlp_dim, V vocab, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from crystal_jax import sharding
from crystal_jax.config import ModelConfig
from crystal_jax.products import products
from crystal_jax.sharding import Axes


@dataclass(frozen=True)
class ParamSpec:
    """All there is to know of a parameter before it has values."""

    shape: tuple[int, ...]
    """In memory."""
    true_shape: tuple[int, ...]
    """Without the padding, which lies behind, is zero and stays so."""
    axes: Axes
    group: str
    """matrix, embedding or vector: decides learning rate and weight decay (optimizer.py)."""
    mean: float = 0.0
    std: float = 0.0
    """Of a normal distribution that is cut off at two of these standard deviations."""

    @property
    def padding(self) -> tuple[int, ...]:
        """Of each dim."""
        return tuple(size - true for size, true in zip(self.shape, self.true_shape, strict=True))


class Param(nnx.Param):
    """A parameter that carries its declaration as `spec`."""


PADDED = ("mlp", "vocab")
"""The dims that may be padded in memory, so that a mesh can split them: nothing that they add reaches a result."""


def declare(shape: tuple[int, ...], axes: Axes, group: str, mean: float = 0.0, std: float = 0.0,
            pad_to: int = 1) -> Param:
    """A parameter of this shape, of which the dims in PADDED are filled up to a multiple of `pad_to`."""
    full = tuple(sharding.padded(size, pad_to) if axis in PADDED else size
                 for size, axis in zip(shape, axes, strict=True))
    spec = ParamSpec(full, shape, axes, group, mean, std)
    return Param(jax.ShapeDtypeStruct(full, jnp.float32), spec=spec)


class Norm(nnx.Module):
    """LayerNorm (biased variance) or RMSNorm, with a scale, computed in float32 or wider."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = ()):
        axes: Axes = (*("layers" for _ in stack), "embed")
        self.scale = declare((*stack, config.embed_dim), axes, "vector", mean=1.0)
        self.centred = config.choices.norm == "layer"
        if self.centred:
            self.bias = declare((*stack, config.embed_dim), axes, "vector")
        self.eps = config.norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        x = x_BTD.astype(wide)
        scale = sharding.lay(self.scale[...], "embed").astype(wide)[None, None, :]
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale
        if self.centred:
            x = x + sharding.lay(self.bias[...], "embed").astype(wide)[None, None, :]
        return x.astype(x_BTD.dtype)


def rotary_pairs(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second dim of each pair that rotates together."""
    index = np.arange(config.rotary_dim)
    if config.choices.positions == "halves":
        return index[: config.rotary_dim // 2], index[config.rotary_dim // 2 :]
    return index[0::2], index[1::2]


def rotary_tables(config: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, 1, T, H] for `rotate`; dims from rotary_dim on take angle 0 and so stay as they are."""
    inv_freq = np.zeros(config.head_dim)
    for dims in rotary_pairs(config):
        inv_freq[dims] = config.rotary_base ** (-2.0 * np.arange(len(dims)) / config.rotary_dim)
    angle = positions_BT[:, None, :, None].astype(dtype) * jnp.asarray(inv_freq, dtype)[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotary_matrix(config: ModelConfig) -> np.ndarray:
    """[H, H] signed permutation: of each pair (a, b) of dims, (x @ R)[a] = -x[b] and (x @ R)[b] = x[a].

    A product with it replaces lane slices, which cost more on a TPU, and serves both kinds of pairs as they are stored.
    """
    matrix = np.zeros((config.head_dim, config.head_dim), np.float32)
    first, second = rotary_pairs(config)
    matrix[second, first] = -1.0
    matrix[first, second] = 1.0
    return matrix


def rotate(x_BNTH: jax.Array, cos: jax.Array, sin: jax.Array, matrix: np.ndarray) -> jax.Array:
    """Rotary position embedding, in the tables' precision."""
    # The product only moves and negates values, so that the activations' dtype loses nothing.
    turned = jnp.einsum("bnth,hk->bntk", x_BNTH, jnp.asarray(matrix, x_BNTH.dtype))
    return (x_BNTH.astype(cos.dtype) * cos + turned.astype(cos.dtype) * sin).astype(x_BNTH.dtype)


class MLP(nnx.Module):
    """(x W_up + b_up) * silu(x W_gate + b_gate), or gelu(x W_up + b_up), then down; a family may have no biases."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = (), pad_to: int = 1):
        D, F = config.embed_dim, config.mlp_dim
        lead: Axes = tuple("layers" for _ in stack)
        self.exact_gelu = config.exact_gelu
        self.inward = ("gate", "up") if config.choices.mlp == "gated" else ("up",)
        for name in self.inward:
            weight = declare((*stack, D, F), (*lead, "embed", "mlp"), "matrix", std=config.matrix_std, pad_to=pad_to)
            setattr(self, name, weight)
            if config.choices.biases:
                setattr(self, f"{name}_bias", declare((*stack, F), (*lead, "mlp"), "vector", pad_to=pad_to))
        self.down = declare((*stack, F, D), (*lead, "mlp", "embed"), "matrix", std=config.output_std, pad_to=pad_to)
        if config.choices.biases:
            self.down_bias = declare((*stack, D), (*lead, "embed"), "vector")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        *gate_BTF, up_BTF = project("btd,df->btf", x_BTD, self, self.inward, ("batch", "length", "mlp"))
        # In float32: each bfloat16 operation would round, and on a CPU convert to float32 and back.
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        if gate_BTF:
            mid_BTF = up_BTF.astype(wide) * jax.nn.silu(gate_BTF[0].astype(wide))
        else:
            mid_BTF = jax.nn.gelu(up_BTF.astype(wide), approximate=not self.exact_gelu)
        out: Axes = ("batch", sharding.stream(x_BTD.shape[1]), "embed")
        return project("btf,fd->btd", mid_BTF.astype(x_BTD.dtype), self, ("down",), out)[0]


def project(equation: str, x: jax.Array, module: nnx.Module, names: Sequence[str], out: Axes) -> list[jax.Array]:
    """einsum(x, module.NAME) + module.NAME_bias, if it has one, for each of `names`, in x's dtype, laid out as `out`.

    The results are named so for what rematerialisation may save (config.REMAT).
    """
    weights = [getattr(module, name) for name in names]
    lead = len(weights[0].spec.axes) - weights[0][...].ndim
    axes = weights[0].spec.axes[lead:]
    found = products(equation, x, [weight[...] for weight in weights], axes, out)
    result, kept = equation.split("->")[1], set(equation.split(",")[0])
    ends = [i for i, letter in enumerate(result) if letter in kept]
    for i, name in enumerate(names):
        if (bias := getattr(module, f"{name}_bias", None)) is not None:
            # In float32, as is then the sum of its gradient over all tokens.
            wide = jnp.promote_types(x.dtype, jnp.float32)
            b = sharding.lay(bias[...], *bias.spec.axes[lead:]).astype(wide)
            found[i] = (found[i].astype(wide) + jnp.expand_dims(b, ends)).astype(x.dtype)
    return [checkpoint_name(value, name) for name, value in zip(names, found, strict=True)]
