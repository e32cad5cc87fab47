"""Crystal as StableLM, which serving engines know: the same function from a wider model without most biases.

StableLM has no biases on the attention output and in the MLP, divides scores by sqrt(head_dim), rotates the halves of a
head against each other and has an output matrix of its own. The stream gets whole heads of further channels, all zero:

- What writes to the stream is centred, so that its mean stays 0 and further zeros only rescale the variance: d / d',
  taken back by each norm's eps and scale.
- A norm gives 1 at the last channel (scale 0, bias 1), the last dim of the last head has value 1 and so mixes to 1, the
  last unit of the MLP is silu(64) / 64 = 1. The last column of a matrix is therefore its bias, everywhere.

The invariant: every tensor is computed in float64 and rounded once, when it is stored.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from crystal_jax.config import ModelConfig
from crystal_jax.convert.computed import Computed
from crystal_jax.convert.folder import Safetensors
from crystal_jax.convert.forms import DTYPES, check_params
from crystal_jax.convert.made import Made, Options, Weights, stored_dtype
from crystal_jax.errors import UserError

FURTHER_HEADS = 2
"""34 heads at 7B: two devices can share them, and 4352 channels suit blocks of 256; 11% more parameters."""
GATE = 64.0
"""silu(64) is 64 in any precision, and 1/64 is exact."""


@dataclass(frozen=True)
class Widened:
    """The sizes of the wider model."""

    model: ModelConfig
    heads: int

    @property
    def embed_dim(self) -> int:
        return self.heads * self.model.head_dim

    @property
    def mlp_dim(self) -> int:
        """At least one more, and whole blocks of the quantised formats: 11008 for 10922."""
        block = 256 if self.model.mlp_dim >= 2048 else 32
        return (self.model.mlp_dim // block + 1) * block

    @property
    def share(self) -> float:
        """Of the channels that aren't always zero."""
        return self.model.embed_dim / self.embed_dim


def make(weights: Weights, options: Options) -> Made:
    """The form stablelm of a checkpoint.

    Raises:
      UserError: as widen; parameters that aren't the model's.
    """
    wide = widen(weights.model, options.heads)
    params = check_params(weights.params, weights.model, "the checkpoint")
    dtype = stored_dtype(params, options.dtype)
    storage = Safetensors(make_tensors(params, wide), DTYPES[dtype], options.max_shard_size)
    return Made("stablelm", dtype, storage, make_config(wide))


def widen(model: ModelConfig, heads: int | None) -> Widened:
    """The sizes for a number of heads, by default two more than the model has.

    Raises:
      UserError: no more heads than the model has, or a model that StableLM can't express.
    """
    if model.family != "crystal":
        raise UserError(f"model.family: {model.family} can't be said in the form stablelm, which is for crystal; use "
                        f"--to={model.family}")
    if not model.rotary_dim:
        raise UserError("model.rotary_dim: 0 can't be said in the form stablelm, which rotates a part of each head; "
                        "use --to=crystal")
    heads = model.num_heads + FURTHER_HEADS if heads is None else heads
    if heads <= model.num_heads:
        raise UserError(f"--heads={heads}: must be above the model's {model.num_heads}; a further head holds what "
                        "StableLM has no biases for")
    return Widened(model, heads)


def make_config(wide: Widened) -> dict[str, Any]:
    """config.json for transformers' own StableLmForCausalLM, without token ids and dtype."""
    model = wide.model
    part = model.rotary_dim / model.head_dim
    if int(model.head_dim * part) < model.rotary_dim:  # every reader rounds the product down
        part = math.nextafter(part, 1)
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "vocab_size": model.vocab_size,
        "hidden_size": wide.embed_dim,
        "intermediate_size": wide.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": wide.heads,
        "num_key_value_heads": wide.heads,
        "max_position_embeddings": model.max_length,
        "layer_norm_eps": model.norm_eps * wide.share,
        "hidden_act": "silu",
        "partial_rotary_factor": part,
        "rope_pct": part,  # SGLang's name for it
        "rope_theta": model.rotary_base,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def make_tensors(params: dict[str, np.ndarray], wide: Widened) -> dict[str, Computed]:
    """Tensor name to its values, in file order, from flat parameters (`forms.check_params`)."""
    shape = (wide.model.vocab_size, wide.embed_dim)
    found = {"model.embed_tokens.weight": Computed(shape, partial(_embedding, params["embed"], wide), "embed")}
    for layer in range(wide.model.num_layers):
        leaves = {leaf: values[layer] for leaf, values in params.items() if leaf.startswith("layers.")}
        found |= {f"model.layers.{layer}.{name}": tensor for name, tensor in _layer(leaves, wide).items()}
    found |= _norm("model.norm", params, "final_norm", wide)
    return found | {"lm_head.weight": Computed(shape, partial(_output, params["embed"], wide), "embed")}


def _layer(leaves: dict[str, np.ndarray], wide: Widened) -> dict[str, Computed]:
    D, F = wide.embed_dim, wide.mlp_dim
    return {
        **_norm("input_layernorm", leaves, "layers.attn_norm", wide),
        "self_attn.q_proj.weight": _projection(leaves, "q", wide),
        "self_attn.k_proj.weight": _projection(leaves, "k", wide),
        "self_attn.v_proj.weight": _projection(leaves, "v", wide),
        "self_attn.o_proj.weight": _linear(leaves, "layers.attn.o", (D, D), centred=True),
        **_norm("post_attention_layernorm", leaves, "layers.mlp_norm", wide),
        "mlp.gate_proj.weight": _linear(leaves, "layers.mlp.gate", (F, D), one=GATE),
        "mlp.up_proj.weight": _linear(leaves, "layers.mlp.up", (F, D), one=1 / GATE),
        "mlp.down_proj.weight": _linear(leaves, "layers.mlp.down", (D, F), centred=True),
    }


def _norm(name: str, leaves: dict[str, np.ndarray], leaf: str, wide: Widened) -> dict[str, Computed]:
    def widened(part: str, factor: float, last: float, start: int, stop: int) -> np.ndarray:
        values = np.zeros(wide.embed_dim)
        values[: wide.model.embed_dim] = leaves[part]
        values *= factor
        values[-1] = last
        return values[start:stop]

    parts = {"weight": (f"{leaf}.scale", math.sqrt(wide.share), 0.0), "bias": (f"{leaf}.bias", 1.0, 1.0)}
    return {f"{name}.{kind}": Computed((wide.embed_dim,), partial(widened, *part), part[0])
            for kind, part in parts.items()}


def _projection(leaves: dict[str, np.ndarray], name: str, wide: Widened) -> Computed:
    """Queries, keys or values; a head that serves several heads of queries stands once for each."""
    model = wide.model
    heads, dims = np.arange(model.num_heads), np.arange(model.head_dim)
    if name != "q":
        heads = heads // (model.num_heads // model.kv_heads)
    if name != "v":  # pairs (0, 1), (2, 3), ... become pairs (0, r/2), (1, r/2 + 1), ...
        turned = dims[: model.rotary_dim]
        dims = np.concatenate([turned[0::2], turned[1::2], dims[model.rotary_dim :]])
    order = (heads[:, None] * model.head_dim + dims).reshape(-1)
    # The form divides scores by sqrt(head_dim), the model by head_dim.
    factor = model.head_dim ** (0.5 - model.choices.attention_power) if name == "q" else 1.0
    return _linear(leaves, f"layers.attn.{name}", (wide.embed_dim, wide.embed_dim), order=order, factor=factor,
                   one=1.0 if name == "v" else 0.0)


def _linear(leaves: dict[str, np.ndarray], leaf: str, shape: tuple[int, int], **how: Any) -> Computed:
    bias = leaves[f"{leaf}_bias"].reshape(-1)
    matrix = _Linear(leaves[leaf].reshape(-1, bias.size), bias, shape, **how)
    return Computed(shape, matrix.rows, f"{leaf}, {leaf}_bias")


@dataclass
class _Linear:
    """A matrix [out, in] with its bias as last column."""

    matrix: np.ndarray
    """[in, out] of the model."""
    bias: np.ndarray
    shape: tuple[int, int]
    order: np.ndarray | None = None
    """Which output of the model each row is; None for the model's own order."""
    factor: float = 1.0
    one: float = 0.0
    """What the last row makes of the constant."""
    centred: bool = False
    """Whether the mean over the outputs is taken away."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        chosen = (np.arange(self.bias.size) if self.order is None else self.order)[start:stop]
        block = np.zeros((stop - start, self.shape[1]))
        filled = block[: chosen.size]
        filled[:, : self.matrix.shape[0]] = self.matrix[:, chosen].T
        filled[:, -1] = self.bias[chosen]
        if self.centred:
            filled -= self._means
        block *= self.factor
        if stop == self.shape[0] and self.one:
            block[-1, -1] = self.one
        return block

    @cached_property
    def _means(self) -> np.ndarray:
        means = np.zeros(self.shape[1])
        means[: self.matrix.shape[0]] = self.matrix.mean(1, dtype=np.float64)
        means[-1] = self.bias.mean(dtype=np.float64)
        return means


def _output(embed: np.ndarray, wide: Widened, start: int, stop: int) -> np.ndarray:
    block = np.zeros((stop - start, wide.embed_dim))
    block[:, : embed.shape[1]] = embed[start:stop]
    return block * wide.model.logit_scale


def _embedding(embed: np.ndarray, wide: Widened, start: int, stop: int) -> np.ndarray:
    block = np.zeros((stop - start, wide.embed_dim))
    rows = embed[start:stop].astype(np.float64)
    block[:, : embed.shape[1]] = rows - rows.mean(1, keepdims=True)
    return block * wide.model.embed_scale
