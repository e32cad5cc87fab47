"""The forms as tables: of parameter leaves, of the tensors that a folder holds, of the keys of its config.json.

A tensor is made of whole leaves (one layer of them), joined along the output dim and perhaps transposed: whatever form
is here can be exported and imported alike (forms.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crystal_jax.config import ModelConfig

LEAVES: dict[str, str] = {
    "embed": "V|D",
    "positions": "T|D",
    "layers.attn_norm.scale": "L:D",
    "layers.attn_norm.bias": "L:D",
    "layers.attn.q": "L:D|NH",
    "layers.attn.q_bias": "L:NH",
    "layers.attn.k": "L:D|KH",
    "layers.attn.k_bias": "L:KH",
    "layers.attn.v": "L:D|KH",
    "layers.attn.v_bias": "L:KH",
    "layers.attn.o": "L:NH|D",
    "layers.attn.o_bias": "L:D",
    "layers.mlp_norm.scale": "L:D",
    "layers.mlp_norm.bias": "L:D",
    "layers.mlp.gate": "L:D|F",
    "layers.mlp.gate_bias": "L:F",
    "layers.mlp.up": "L:D|F",
    "layers.mlp.up_bias": "L:F",
    "layers.mlp.down": "L:F|D",
    "layers.mlp.down_bias": "L:D",
    "final_norm.scale": "D",
    "final_norm.bias": "D",
    "head": "V|D",
}
"""Leaf of any family to its dims (T: max_length): L: in front where layers are stacked, | between the input and the
output of a matrix."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a form: where its values lie in the parameters."""

    name: str
    leaves: tuple[str, ...]
    """Joined along the last dim."""
    transposed: bool
    """Stored [out, in], as torch.nn.Linear has it."""
    layer: int | None = None
    """Index into the stacked leaves; None for a tensor outside the layers."""


@dataclass(frozen=True)
class Form:
    """A way to lay out the models of one family in a folder for PyTorch."""

    name: str
    family: str
    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    """In file order; `{}` in a name stands for the layer."""
    config_keys: dict[str, str]
    """Field of ModelConfig to key of config.json."""
    config_constants: dict[str, Any]
    """Keys of config.json that say what the architecture is; another value would be another model."""
    config_optional: dict[str, Any]
    """Keys written for other readers, of no effect here."""
    head: str = ""
    """A second name of the first tensor, as the tied output matrix; "" where that is a tensor of its own."""
    writes_head: bool = False
    """Whether the export holds the first tensor under its second name, too."""
    ignored: tuple[str, ...] = ()
    """Names of buffers that an import passes over; `{}` stands for the layer."""
    config_choices: dict[str, tuple[str, dict[Any, Any]]] = field(default_factory=dict)
    """Field of ModelConfig to a key of config.json and what it says for each value of the field."""
    implied: dict[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    """Fields of ModelConfig without a key, and the value that each has in every model of the form."""
    normalise: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """A config.json as any release wrote it to one with the keys above."""
    auto_map: dict[str, str] = field(default_factory=dict)
    code_files: tuple[str, ...] = ()
    """Files of code that auto_map needs beside the weights."""
    ships_code: bool = False
    """Whether the export brings these files; if not, they are someone else's to give."""
    width_scale_key: str | None = None
    """Key that holds mup_base_width / embed_dim, in a form without the width itself."""
    logit_scale_key: str | None = None
    """Key that holds the product that multiplies the logits."""


def _linear(name: str, *leaves: str, transposed: bool) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{name}.weight", leaves, transposed),
        Tensor(f"{name}.bias", tuple(f"{leaf}_bias" for leaf in leaves), False),
    )


def _norm(name: str, leaf: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (f"{leaf}.scale",), False), Tensor(f"{name}.bias", (f"{leaf}.bias",), False)


CRYSTAL = Form(
    name="crystal",
    family="crystal",
    model_type="crystal",
    architecture="CrystalForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("embed",), False),
        *_norm("model.layers.{}.input_layernorm", "layers.attn_norm"),
        *_linear("model.layers.{}.self_attn.q_proj", "layers.attn.q", transposed=True),
        *_linear("model.layers.{}.self_attn.k_proj", "layers.attn.k", transposed=True),
        *_linear("model.layers.{}.self_attn.v_proj", "layers.attn.v", transposed=True),
        *_linear("model.layers.{}.self_attn.o_proj", "layers.attn.o", transposed=True),
        *_norm("model.layers.{}.post_attention_layernorm", "layers.mlp_norm"),
        *_linear("model.layers.{}.mlp.gate_proj", "layers.mlp.gate", transposed=True),
        *_linear("model.layers.{}.mlp.up_proj", "layers.mlp.up", transposed=True),
        *_linear("model.layers.{}.mlp.down_proj", "layers.mlp.down", transposed=True),
        *_norm("model.norm", "final_norm"),
    ),
    head="lm_head.weight",
    config_keys={
        "vocab_size": "vocab_size",
        "embed_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "max_length": "max_position_embeddings",
        "rotary_dim": "rotary_dim",
        "rotary_base": "rotary_base",
        "norm_eps": "layer_norm_eps",
        "mup_base_width": "mup_base_width",
        "embed_scale": "embed_scale",
        "output_scale": "output_scale",
        "init_std": "initializer_range",
    },
    config_constants={"tie_word_embeddings": True},
    config_optional={"use_cache": True},
    auto_map={
        "AutoConfig": "modeling_crystal.CrystalConfig",
        "AutoModel": "modeling_crystal.CrystalModel",
        "AutoModelForCausalLM": "modeling_crystal.CrystalForCausalLM",
    },
    code_files=("modeling_crystal.py",),
    ships_code=True,
    logit_scale_key="logit_scale",
)

LLM360 = Form(
    name="llm360",
    family="crystal",
    model_type="crystalcoder",
    architecture="CrystalCoderLMHeadModel",
    tensors=(
        Tensor("transformer.wte.weight", ("embed",), False),
        *_linear("transformer.h.{}.attn.c_attn", "layers.attn.q", "layers.attn.k", "layers.attn.v", transposed=False),
        *_linear("transformer.h.{}.attn.c_proj", "layers.attn.o", transposed=False),
        *_norm("transformer.h.{}.ln_1", "layers.attn_norm"),
        *_norm("transformer.h.{}.ln_2", "layers.mlp_norm"),
        *_linear("transformer.h.{}.mlp.c_fc", "layers.mlp.up", transposed=False),
        *_linear("transformer.h.{}.mlp.c_fc2", "layers.mlp.gate", transposed=False),
        *_linear("transformer.h.{}.mlp.c_proj", "layers.mlp.down", transposed=False),
        *_norm("transformer.ln_f", "final_norm"),
    ),
    head="lm_head.weight",
    writes_head=True,
    ignored=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
    config_keys={
        "vocab_size": "vocab_size",
        "embed_dim": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "mlp_dim": "n_inner",
        "max_length": "n_positions",
        "rotary_dim": "rotary_dim",
        "norm_eps": "layer_norm_epsilon",
        "embed_scale": "mup_embeddings_scale",
        "output_scale": "mup_output_alpha",
    },
    config_constants={
        "activation_function": "swiglu",
        "position_embedding_type": "rotary",
        "mup_scale_qk_dot_by_d": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    config_optional={"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "use_cache": True},
    auto_map={
        "AutoConfig": "configuration_crystalcoder.CrystalCoderConfig",
        "AutoModel": "modeling_crystalcoder.CrystalCoderModel",
        "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
    },
    code_files=("configuration_crystalcoder.py", "modeling_crystalcoder.py"),
    width_scale_key="mup_width_scale",
)

PLAIN: dict[str, Callable[[ModelConfig], Any]] = {
    "mup_base_width": lambda model: model.embed_dim,
    "embed_scale": lambda _: 1.0,
    "output_scale": lambda _: 1.0,
}
"""A model without the multipliers of the maximal-update parametrisation."""


def _llama_config(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes the rotary base and its scaling into one object; old releases leave out what is usual."""
    known = {key: value for key, value in config.items() if value is not None}
    usual: dict[str, Any] = {"rope_theta": 10000.0, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
                             "num_key_value_heads": config.get("num_attention_heads")}
    for key in ("rope_parameters", "rope_scaling"):
        rope = known.pop(key, {})
        scaling = _scaling(rope)
        if scaling != "default":
            return usual | known | {"rope_scaling": scaling}
        usual["rope_theta"] = rope.get("rope_theta", usual["rope_theta"])
    return usual | known


def _scaling(rope: Any) -> Any:
    """The name of a rotary scaling: "default" for none; what isn't understood is given back as it is."""
    if not isinstance(rope, dict):
        return rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    return rope if kind == "default" and rope.keys() - {"rope_type", "type", "rope_theta"} else kind


LLAMA = Form(
    name="llama",
    family="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=(
        Tensor("model.embed_tokens.weight", ("embed",), False),
        Tensor("model.layers.{}.input_layernorm.weight", ("layers.attn_norm.scale",), False),
        Tensor("model.layers.{}.self_attn.q_proj.weight", ("layers.attn.q",), True),
        Tensor("model.layers.{}.self_attn.k_proj.weight", ("layers.attn.k",), True),
        Tensor("model.layers.{}.self_attn.v_proj.weight", ("layers.attn.v",), True),
        Tensor("model.layers.{}.self_attn.o_proj.weight", ("layers.attn.o",), True),
        Tensor("model.layers.{}.post_attention_layernorm.weight", ("layers.mlp_norm.scale",), False),
        Tensor("model.layers.{}.mlp.gate_proj.weight", ("layers.mlp.gate",), True),
        Tensor("model.layers.{}.mlp.up_proj.weight", ("layers.mlp.up",), True),
        Tensor("model.layers.{}.mlp.down_proj.weight", ("layers.mlp.down",), True),
        Tensor("model.norm.weight", ("final_norm.scale",), False),
        Tensor("lm_head.weight", ("head",), False),
    ),
    ignored=("model.layers.{}.self_attn.rotary_emb.inv_freq",),
    config_keys={
        "vocab_size": "vocab_size",
        "embed_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "mlp_dim": "intermediate_size",
        "max_length": "max_position_embeddings",
        "rotary_base": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "init_std": "initializer_range",
    },
    config_constants={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    config_optional={"attention_dropout": 0.0, "use_cache": True},
    implied={**PLAIN, "rotary_dim": lambda model: model.head_dim},
    normalise=_llama_config,
)

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""Names in transformers of one function: GELU in its tanh form. "gelu" is the exact one."""


def _starcoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fills in what GPTBigCodeConfig lets a config.json leave out."""
    known = {key: value for key, value in config.items() if value is not None}
    if known.get("activation_function") in TANH_GELU:
        known["activation_function"] = TANH_GELU[0]
    width = config.get("n_embd")
    return {"n_inner": 4 * width if isinstance(width, int) else None, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-5, **known}


STARCODER = Form(
    name="starcoder",
    family="starcoder",
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    tensors=(
        Tensor("transformer.wte.weight", ("embed",), False),
        Tensor("transformer.wpe.weight", ("positions",), False),
        *_norm("transformer.h.{}.ln_1", "layers.attn_norm"),
        *_linear("transformer.h.{}.attn.c_attn", "layers.attn.q", "layers.attn.k", "layers.attn.v", transposed=True),
        *_linear("transformer.h.{}.attn.c_proj", "layers.attn.o", transposed=True),
        *_norm("transformer.h.{}.ln_2", "layers.mlp_norm"),
        *_linear("transformer.h.{}.mlp.c_fc", "layers.mlp.up", transposed=True),
        *_linear("transformer.h.{}.mlp.c_proj", "layers.mlp.down", transposed=True),
        *_norm("transformer.ln_f", "final_norm"),
    ),
    head="lm_head.weight",
    ignored=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias", "transformer.bias"),
    config_keys={
        "vocab_size": "vocab_size",
        "embed_dim": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "mlp_dim": "n_inner",
        "max_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "init_std": "initializer_range",
    },
    config_constants={
        "multi_query": True,
        "scale_attn_weights": True,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    config_optional={
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "use_cache": True,
    },
    config_choices={"exact_gelu": ("activation_function", {False: TANH_GELU[0], True: "gelu"})},
    implied={**PLAIN, "num_kv_heads": lambda _: 1, "rotary_dim": lambda _: 0},
    normalise=_starcoder_config,
)
