"""Parameters as declarations, and the small layers: LayerNorm, rotary positions, the gated MLP.

A module is born abstract: each parameter states its shape, logical axes, initial distribution and optimizer group,
where it is used, and holds no array. `init_params` (model.py) draws them; `Crystal.bind` lends a module its arrays.

Names of dims, here and in every file of the model:
  B batch, T query length, S key length, D embed_dim, N heads, H head_dim, F mlp_dim, V vocab, L layers.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crystal_jax import sharding
from crystal_jax.config import ModelConfig
from crystal_jax.sharding import Axes


@dataclass(frozen=True)
class ParamSpec:
    """All there is to know of a parameter before it has values."""

    shape: tuple[int, ...]
    axes: Axes
    group: str
    """matrix, embedding or vector: decides learning rate and weight decay (optimizer.py)."""
    mean: float = 0.0
    std: float = 0.0
    """Of a normal distribution that is cut off at two of these standard deviations."""


class Param(nnx.Param):
    """A parameter that carries its declaration as `spec`."""


def declare(shape: tuple[int, ...], axes: Axes, group: str, mean: float = 0.0, std: float = 0.0) -> Param:
    spec = ParamSpec(shape, axes, group, mean, std)
    return Param(jax.ShapeDtypeStruct(shape, jnp.float32), spec=spec)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, biased variance, computed in float32 or wider."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = ()):
        axes: Axes = (*("layers" for _ in stack), "embed")
        self.scale = declare((*stack, config.embed_dim), axes, "vector", mean=1.0)
        self.bias = declare((*stack, config.embed_dim), axes, "vector")
        self.eps = config.norm_eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        x = x_BTD.astype(wide)
        scale = sharding.gather(self.scale[...], ("embed",), wide)[None, None, :]
        bias = sharding.gather(self.bias[...], ("embed",), wide)[None, None, :]
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x_BTD.dtype)


def rotary_tables(config: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, 1, T, H] for `rotate`; dims from rotary_dim on take angle 0 and so stay as they are."""
    pair = np.arange(config.rotary_dim) // 2
    inv_freq = np.zeros(config.head_dim)
    inv_freq[: config.rotary_dim] = config.rotary_base ** (-2.0 * pair / config.rotary_dim)
    angle = positions_BT[:, None, :, None].astype(dtype) * jnp.asarray(inv_freq, dtype)[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotary_matrix(config: ModelConfig) -> np.ndarray:
    """[H, H] signed permutation with (x @ R)[2i] = -x[2i+1], (x @ R)[2i+1] = x[2i] inside the rotary dims.

    A product with it replaces lane slices, which cost more on a TPU, and serves interleaved pairs as they are stored.
    """
    matrix = np.zeros((config.head_dim, config.head_dim), np.float32)
    even = np.arange(0, config.rotary_dim, 2)
    matrix[even + 1, even] = -1.0
    matrix[even, even + 1] = 1.0
    return matrix


def rotate(x_BNTH: jax.Array, cos: jax.Array, sin: jax.Array, matrix: np.ndarray) -> jax.Array:
    """Rotary position embedding on interleaved pairs, in the tables' precision."""
    # The product only moves and negates values, so that the activations' dtype loses nothing.
    turned = jnp.einsum("bnth,hk->bntk", x_BNTH, jnp.asarray(matrix, x_BNTH.dtype))
    return (x_BNTH.astype(cos.dtype) * cos + turned.astype(cos.dtype) * sin).astype(x_BNTH.dtype)


class MLP(nnx.Module):
    """SwiGLU with biases: (x W_up + b_up) * silu(x W_gate + b_gate), then down."""

    def __init__(self, config: ModelConfig, stack: tuple[int, ...] = ()):
        D, F = config.embed_dim, config.mlp_dim
        lead: Axes = tuple("layers" for _ in stack)

        def widening() -> tuple[Param, Param]:
            return (declare((*stack, D, F), (*lead, "embed", "mlp"), "matrix", std=config.matrix_std),
                    declare((*stack, F), (*lead, "mlp"), "vector"))

        self.gate, self.gate_bias = widening()
        self.up, self.up_bias = widening()
        self.down = declare((*stack, F, D), (*lead, "mlp", "embed"), "matrix", std=config.output_std)
        self.down_bias = declare((*stack, D), (*lead, "embed"), "vector")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        # Tokens in one dim (M = B*T): with two of them XLA's CPU compiler picks layouts that cost 20% more.
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        gate_MF = project("md,df->mf", x_MD, self.gate, self.gate_bias, ("batch", "mlp"))
        up_MF = project("md,df->mf", x_MD, self.up, self.up_bias, ("batch", "mlp"))
        # In float32: each bfloat16 operation would round, and on a CPU convert to float32 and back.
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        mid_MF = (up_MF.astype(wide) * jax.nn.silu(gate_MF.astype(wide))).astype(x_BTD.dtype)
        out_MD = project("mf,fd->md", mid_MF, self.down, self.down_bias, ("batch", "embed"))
        return out_MD.reshape(x_BTD.shape, out_sharding=sharding.used("batch", "length", "embed"))


def project(equation: str, x: jax.Array, weight: nnx.Variable, bias: nnx.Variable, out: Axes) -> jax.Array:
    """einsum(x, weight) + bias in x's dtype; `out` names the dims of the result."""
    lead = len(weight.spec.axes) - weight[...].ndim
    w = sharding.gather(weight[...], weight.spec.axes[lead:], x.dtype)
    b = sharding.gather(bias[...], bias.spec.axes[lead:], x.dtype)
    result = jnp.einsum(equation, x, w, out_sharding=sharding.used(*out))
    names, kept = equation.split("->")[1], set(equation.split(",")[0])
    shape = [size if name not in kept else 1 for name, size in zip(names, result.shape, strict=True)]
    assert math.prod(shape) == b.size, (equation, shape, b.shape)
    return result + jnp.expand_dims(b, [i for i, name in enumerate(names) if name in kept])
