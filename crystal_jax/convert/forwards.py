"""Each form's own forward pass in numpy, written from the definition of its architecture and from nothing of ours.

A class reads the tensors of an opened folder by the names that its readers know, and the settings from config.json, in
float32 and a block of rows at a time. The invariant: no table of the conversion is used here, so that a mistake in one
can't hide itself. Dims: T tokens, D width of the stream, N heads, K heads of keys and values, H size of a head.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crystal_jax.errors import UserError

BLOCK = 1 << 20
"""Numbers of a stored tensor that are held in float32 at a time: 4 MiB."""

Turn = Callable[[np.ndarray], np.ndarray]
"""Rotates x [T, heads, H] by its positions."""


class Forward:
    """A form's forward pass over opened tensors: `embed`, then each `layer`, `final`, then `logits`."""

    rounds = False
    """Whether the form's tensors are computed and rounded, not moved."""
    layers_key = "num_hidden_layers"
    head = "lm_head.weight"
    """The tensor [V, D] that gives the logits."""

    def __init__(self, tensors: dict[str, Callable[[], Any]], config: dict[str, Any]):
        """`tensors`: name to a function that gives the array, or what slices like one in its rows."""
        self.tensors, self.config = tensors, config
        self.layers: int = config[self.layers_key]

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        """The stream [T, D] that enters the first layer."""
        raise NotImplementedError

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        """The stream after one layer."""
        raise NotImplementedError

    def final(self, h_TD: np.ndarray) -> np.ndarray:
        """What the head reads of the last layer's stream: [T, D], normalised, and scaled as the logits are."""
        raise NotImplementedError

    def logits(self, x_TD: np.ndarray, rows: slice) -> np.ndarray:
        """Those of some rows of the vocabulary, from what `final` gave."""
        return self.product(x_TD, self.head, rows)

    def read(self, name: str) -> Any:
        """The tensor as it is stored.

        Raises:
          UserError: it isn't there.
        """
        if name not in self.tensors:
            raise UserError(f"the tensor {name} is missing from what was written")
        return self.tensors[name]()

    def blocks(self, name: str, rows: slice = slice(None)) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, their values in float32), through the tensor or a part of it."""
        tensor = self.read(name)
        first, last, _ = rows.indices(tensor.shape[0])
        step = max(1, BLOCK // int(np.prod(tensor.shape[1:])))
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            yield part, _float(tensor[part])

    def vector(self, name: str) -> np.ndarray:
        return _float(self.read(name)[:])

    def rows(self, name: str, ids_T: np.ndarray) -> np.ndarray:
        """[T, D]: rows of an embedding."""
        return _float(self.read(name)[ids_T])

    def product(self, x_TD: np.ndarray, name: str, rows: slice = slice(None)) -> np.ndarray:
        """x W^T for a W stored [out, in], or some rows of it."""
        x_DT = np.ascontiguousarray(x_TD.T)
        # W x^T: for a few tokens and large blocks BLAS takes five times as long over x W^T.
        found = np.empty((len(range(*rows.indices(self.read(name).shape[0]))), x_DT.shape[1]), np.float32)
        for part, values in self.blocks(name, rows):
            first = part.start - (rows.start or 0)
            np.matmul(values, x_DT, out=found[first : first + len(values)])
        return found.T

    def linear(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        """torch.nn.Linear with a bias."""
        found = self.product(x_TD, f"{name}.weight")
        found += self.vector(f"{name}.bias")
        return found

    def conv1d(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        """GPT-2's Conv1D: W stored [in, out], with a bias."""
        found = np.tile(self.vector(f"{name}.bias"), (len(x_TD), 1))
        for part, values in self.blocks(f"{name}.weight"):
            found += x_TD[:, part] @ values
        return found

    def layer_norm(self, x_TD: np.ndarray, name: str, eps: float) -> np.ndarray:
        x = x_TD - x_TD.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))
        return x * self.vector(f"{name}.weight") + self.vector(f"{name}.bias")

    def rms_norm(self, x_TD: np.ndarray, name: str, eps: float) -> np.ndarray:
        x = x_TD / np.sqrt(np.square(x_TD).mean(-1, keepdims=True) + np.float32(eps))
        return x * self.vector(f"{name}.weight")


class Crystal(Forward):
    """The form crystal: llama's names, biases everywhere, scores divided by H."""

    head = "model.embed_tokens.weight"

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        return self.rows("model.embed_tokens.weight", ids_T) * np.float32(self.config["embed_scale"])

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        c, at = self.config, f"model.layers.{layer}."
        turn = interleaved(len(h_TD), c["rotary_dim"], c["rotary_base"])
        x = self.layer_norm(h_TD, at + "input_layernorm", c["layer_norm_eps"])
        q, k, v = (heads(self.linear(x, f"{at}self_attn.{name}_proj"), c["num_attention_heads"]) for name in "qkv")
        mixed = attend(turn(q), turn(k), v, 1 / q.shape[-1])
        h_TD = h_TD + self.linear(mixed, at + "self_attn.o_proj")
        x = self.layer_norm(h_TD, at + "post_attention_layernorm", c["layer_norm_eps"])
        inner = silu(self.linear(x, at + "mlp.gate_proj"))
        inner *= self.linear(x, at + "mlp.up_proj")
        return h_TD + self.linear(inner, at + "mlp.down_proj")

    def final(self, h_TD: np.ndarray) -> np.ndarray:
        x = self.layer_norm(h_TD, "model.norm", self.config["layer_norm_eps"])
        return x * np.float32(self.config["logit_scale"])


class Llm360(Forward):
    """LLM360's modeling_crystalcoder.py: Conv1D throughout, the gate is c_fc2."""

    layers_key = "n_layer"

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        return self.rows("transformer.wte.weight", ids_T) * np.float32(self.config["mup_embeddings_scale"])

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        c, at = self.config, f"transformer.h.{layer}."
        turn = interleaved(len(h_TD), c["rotary_dim"], 10000.0)
        x = self.layer_norm(h_TD, at + "ln_1", c["layer_norm_epsilon"])
        q, k, v = (heads(part, c["n_head"]) for part in np.split(self.conv1d(x, at + "attn.c_attn"), 3, axis=1))
        mixed = attend(turn(q), turn(k), v, 1 / q.shape[-1])
        h_TD = h_TD + self.conv1d(mixed, at + "attn.c_proj")
        x = self.layer_norm(h_TD, at + "ln_2", c["layer_norm_epsilon"])
        inner = silu(self.conv1d(x, at + "mlp.c_fc2"))
        inner *= self.conv1d(x, at + "mlp.c_fc")
        return h_TD + self.conv1d(inner, at + "mlp.c_proj")

    def final(self, h_TD: np.ndarray) -> np.ndarray:
        x = self.layer_norm(h_TD, "transformer.ln_f", self.config["layer_norm_epsilon"])
        return x * np.float32(self.config["mup_output_alpha"] * self.config["mup_width_scale"])


class StableLm(Forward):
    """transformers' StableLmForCausalLM without biases, query norms and the parallel residual."""

    rounds = True

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        return self.rows("model.embed_tokens.weight", ids_T)

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        c, at = self.config, f"model.layers.{layer}."
        x = self.layer_norm(h_TD, at + "input_layernorm", c["layer_norm_eps"])
        q, k, v = (heads(self.product(x, f"{at}self_attn.{name}_proj.weight"), c[count]) for name, count in (
            ("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")))
        turn = halves(len(h_TD), self.rotary_dims(q.shape[-1]), c["rope_theta"])
        mixed = attend(turn(q), turn(k), v, q.shape[-1] ** -0.5)
        h_TD = h_TD + self.product(mixed, at + "self_attn.o_proj.weight")
        x = self.layer_norm(h_TD, at + "post_attention_layernorm", c["layer_norm_eps"])
        inner = silu(self.product(x, at + "mlp.gate_proj.weight"))
        inner *= self.product(x, at + "mlp.up_proj.weight")
        return h_TD + self.product(inner, at + "mlp.down_proj.weight")

    def final(self, h_TD: np.ndarray) -> np.ndarray:
        return self.layer_norm(h_TD, "model.norm", self.config["layer_norm_eps"])

    def rotary_dims(self, head_dim: int) -> int:
        return int(head_dim * self.config["partial_rotary_factor"])


class Gguf(StableLm):
    """llama.cpp's stablelm, opened by `open_gguf`."""

    def rotary_dims(self, head_dim: int) -> int:
        return self.config["rotary_dims"]


class Llama(Forward):
    """transformers' LlamaForCausalLM."""

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        return self.rows("model.embed_tokens.weight", ids_T)

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        c, at = self.config, f"model.layers.{layer}."
        x = self.rms_norm(h_TD, at + "input_layernorm", c["rms_norm_eps"])
        q, k, v = (heads(self.product(x, f"{at}self_attn.{name}_proj.weight"), c[count]) for name, count in (
            ("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")))
        turn = halves(len(h_TD), q.shape[-1], c["rope_theta"])
        mixed = attend(turn(q), turn(k), v, q.shape[-1] ** -0.5)
        h_TD = h_TD + self.product(mixed, at + "self_attn.o_proj.weight")
        x = self.rms_norm(h_TD, at + "post_attention_layernorm", c["rms_norm_eps"])
        inner = silu(self.product(x, at + "mlp.gate_proj.weight"))
        inner *= self.product(x, at + "mlp.up_proj.weight")
        return h_TD + self.product(inner, at + "mlp.down_proj.weight")

    def final(self, h_TD: np.ndarray) -> np.ndarray:
        return self.rms_norm(h_TD, "model.norm", self.config["rms_norm_eps"])


class StarCoder(Forward):
    """transformers' GPTBigCodeForCausalLM with one head of keys and values, which follow the queries in c_attn."""

    layers_key = "n_layer"
    head = "transformer.wte.weight"

    def embed(self, ids_T: np.ndarray) -> np.ndarray:
        return self.rows("transformer.wte.weight", ids_T) + self.rows("transformer.wpe.weight", np.arange(len(ids_T)))

    def layer(self, h_TD: np.ndarray, layer: int) -> np.ndarray:
        c, at = self.config, f"transformer.h.{layer}."
        width, head = c["n_embd"], c["n_embd"] // c["n_head"]
        x = self.layer_norm(h_TD, at + "ln_1", c["layer_norm_epsilon"])
        q, k, v = np.split(self.linear(x, at + "attn.c_attn"), [width, width + head], axis=1)
        mixed = attend(heads(q, c["n_head"]), heads(k, 1), heads(v, 1), head**-0.5)
        h_TD = h_TD + self.linear(mixed, at + "attn.c_proj")
        x = self.layer_norm(h_TD, at + "ln_2", c["layer_norm_epsilon"])
        activation = gelu if c["activation_function"] == "gelu" else tanh_gelu
        return h_TD + self.linear(activation(self.linear(x, at + "mlp.c_fc")), at + "mlp.c_proj")

    def final(self, h_TD: np.ndarray) -> np.ndarray:
        return self.layer_norm(h_TD, "transformer.ln_f", self.config["layer_norm_epsilon"])


FORWARDS: dict[str, type[Forward]] = {
    "crystal": Crystal, "llm360": Llm360, "stablelm": StableLm, "gguf": Gguf, "llama": Llama,
    "starcoder": StarCoder}


def heads(x_TD: np.ndarray, count: int) -> np.ndarray:
    """[T, count, H]."""
    return x_TD.reshape(len(x_TD), count, -1)


def attend(q_TNH: np.ndarray, k_TKH: np.ndarray, v_TKH: np.ndarray, scale: float) -> np.ndarray:
    """Causal attention [T, N * H]; a head of keys and values serves N / K successive heads of queries."""
    T, N, _ = q_TNH.shape
    k_TNH, v_TNH = (np.repeat(x, N // x.shape[1], axis=1) for x in (k_TKH, v_TKH))
    scores_NTT = np.matmul(q_TNH.transpose(1, 0, 2), k_TNH.transpose(1, 2, 0)) * np.float32(scale)
    scores_NTT[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    weights_NTT = np.exp(scores_NTT - scores_NTT.max(-1, keepdims=True))
    weights_NTT /= weights_NTT.sum(-1, keepdims=True)
    return np.matmul(weights_NTT, v_TNH.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(T, -1)


def interleaved(length: int, dims: int, base: float) -> Turn:
    """Rotary positions on the first `dims` of each head, in pairs (0, 1), (2, 3), ..."""
    return _rotary(length, dims, base, slice(0, dims, 2), slice(1, dims, 2))


def halves(length: int, dims: int, base: float) -> Turn:
    """The same in pairs (0, dims / 2), (1, dims / 2 + 1), ..."""
    return _rotary(length, dims, base, slice(0, dims // 2), slice(dims // 2, dims))


def _rotary(length: int, dims: int, base: float, first: slice, second: slice) -> Turn:
    angle_T1R = np.arange(length)[:, None, None] * base ** (-np.arange(0, dims, 2) / max(dims, 1))
    cos, sin = np.cos(angle_T1R).astype(np.float32), np.sin(angle_T1R).astype(np.float32)

    def turn(x_TNH: np.ndarray) -> np.ndarray:
        turned, a, b = x_TNH.copy(), x_TNH[..., first], x_TNH[..., second]
        turned[..., first], turned[..., second] = a * cos - b * sin, b * cos + a * sin
        return turned

    return turn


def silu(x: np.ndarray) -> np.ndarray:
    divisor = np.negative(x)
    with np.errstate(over="ignore"):  # x / inf is 0, as it should be
        np.exp(divisor, out=divisor)
    divisor += 1
    return np.divide(x, divisor, out=divisor)


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution's share below x."""
    from scipy.special import erf

    return np.float32(0.5) * x * (1 + erf(x * np.float32(0.5**0.5)))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """In its tanh form (gelu_pytorch_tanh)."""
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x**3)))


def _float(values: Any) -> np.ndarray:
    return np.asarray(values).astype(np.float32, copy=False)


class _Quantised:
    """A tensor of a GGUF file, whose rows are dequantised when they are asked for."""

    def __init__(self, tensor: Any):
        self.data, self.kind = tensor.data, tensor.tensor_type
        self.dtype = GGUF_DTYPES.get(self.kind.name, self.kind.name.lower())
        self.shape = tuple(int(size) for size in reversed(tensor.shape))

    def __getitem__(self, rows: Any) -> np.ndarray:
        from gguf.quants import dequantize

        return dequantize(self.data[rows], self.kind)


GGUF_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}

GGUF_KEYS = {
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "layer_norm_eps": "attention.layer_norm_epsilon",
    "rotary_dims": "rope.dimension_count", "rope_theta": "rope.freq_base"}


def open_gguf(path: Path) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """(tensors under StableLM's names, settings under config.json's) of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"stablelm.{key}"].contents()

    tensors: dict[str, Callable[[], Any]] = {
        from_gguf(tensor.name): partial(_Quantised, tensor) for tensor in reader.tensors}
    return tensors, {key: value(theirs) for key, theirs in GGUF_KEYS.items()}


def from_gguf(name: str) -> str:
    """StableLM's name of a tensor that llama.cpp calls `name`."""
    *layer, part, kind = name.removeprefix("blk.").split(".")
    return f"model.layers.{layer[0]}.{GGUF_LAYER_NAMES[part]}.{kind}" if layer else f"{GGUF_NAMES[part]}.{kind}"
