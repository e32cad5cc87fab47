"""The published forms as tables: which tensors a folder holds, how each is laid out, what its config.json says.

One table of parameter leaves and one of tensors per form serve both directions, so an export and its import can't
disagree: a tensor is made of whole leaves (one layer of them), joined along the output dim and perhaps transposed.
Nothing is computed, only moved, so every conversion keeps the bits.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np

from crystal_jax.config import ModelConfig, nearest
from crystal_jax.errors import UserError

Params = dict[str, Any]
"""A nested dict of arrays."""

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

LEAVES: dict[str, str] = {
    "embed": "V|D",
    "layers.attn_norm.scale": "L:D",
    "layers.attn_norm.bias": "L:D",
    "layers.attn.q": "L:D|NH",
    "layers.attn.q_bias": "L:NH",
    "layers.attn.k": "L:D|NH",
    "layers.attn.k_bias": "L:NH",
    "layers.attn.v": "L:D|NH",
    "layers.attn.v_bias": "L:NH",
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
}
"""Leaf to its dims: L: in front where layers are stacked, | between the input and the output of a matrix."""


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
    """A way to lay out the model in a folder for PyTorch."""

    name: str
    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    """In file order; `{}` in a name stands for the layer."""
    head: str
    """The output matrix: tied, so that it equals the first tensor."""
    writes_head: bool
    ignored: tuple[str, ...]
    """Names of buffers that an import passes over; `{}` stands for the layer."""
    config_keys: dict[str, str]
    """Field of ModelConfig to key of config.json."""
    config_constants: dict[str, Any]
    """Keys of config.json that say what the architecture is; another value would be another model."""
    config_optional: dict[str, Any]
    """Keys written for other readers, of no effect here."""
    auto_map: dict[str, str]
    code_files: tuple[str, ...]
    """Files of code that auto_map needs beside the weights."""
    ships_code: bool
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
    writes_head=False,
    ignored=(),
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
    ships_code=False,
    width_scale_key="mup_width_scale",
)

FORMS: dict[str, Form] = {form.name: form for form in (CRYSTAL, LLM360)}


def get_form(name: str, option: str) -> Form:
    """The form that the command-line `option` names."""
    if name not in FORMS:
        raise UserError(f"{option}={name}: no such form{nearest(name, FORMS)}")
    return FORMS[name]


def sizes(model: ModelConfig) -> dict[str, int]:
    """Dim letter to its size."""
    return {"L": model.num_layers, "V": model.vocab_size, "D": model.embed_dim, "N": model.num_heads,
            "H": model.head_dim, "F": model.mlp_dim}


def leaf_shape(leaf: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of a leaf, with its layers in front where they are stacked."""
    size = sizes(model)
    return tuple(size[dim] for dim in LEAVES[leaf] if dim in size)


def flat_shape(leaf: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of one layer of a leaf as a tensor: [in, out], or [out]."""
    size = sizes(model)
    dims = LEAVES[leaf].removeprefix("L:")
    return tuple(math.prod(size[dim] for dim in side) for side in dims.split("|"))


def tensors(form: Form, model: ModelConfig) -> Iterator[Tensor]:
    """The tensors of the model in this form without the head, in file order: those of a layer stand together."""
    layered = [tensor for tensor in form.tensors if "{}" in tensor.name]
    yield form.tensors[0]
    for layer in range(model.num_layers):
        for tensor in layered:
            yield Tensor(tensor.name.format(layer), tensor.leaves, tensor.transposed, layer)
    yield from (tensor for tensor in form.tensors[1:] if "{}" not in tensor.name)


def ignored_names(form: Form, model: ModelConfig) -> set[str]:
    """The buffers that a folder may hold beside the parameters."""
    return {name.format(layer) for name in form.ignored for layer in range(model.num_layers)}


def tensor_shape(tensor: Tensor, model: ModelConfig) -> tuple[int, ...]:
    """The shape under which a folder stores it."""
    *head, last = flat_shape(tensor.leaves[0], model)
    shape = (*head, last * len(tensor.leaves))
    return shape[::-1] if tensor.transposed else shape


def read_tensor(params: dict[str, np.ndarray], tensor: Tensor, model: ModelConfig) -> np.ndarray:
    """The tensor's values, from flat parameters (`flatten`), contiguous, in the parameters' dtype."""
    parts = [
        (params[leaf] if tensor.layer is None else params[leaf][tensor.layer]).reshape(flat_shape(leaf, model))
        for leaf in tensor.leaves
    ]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(values.T if tensor.transposed else values)


def write_tensor(params: dict[str, np.ndarray], tensor: Tensor, model: ModelConfig, values: np.ndarray) -> None:
    """Puts a stored tensor into its place in flat parameters: the inverse of `read_tensor`."""
    matrix = values.T if tensor.transposed else values
    for leaf, part in zip(tensor.leaves, np.split(matrix, len(tensor.leaves), axis=-1), strict=True):
        target = params[leaf] if tensor.layer is None else params[leaf][tensor.layer]
        target[...] = part.reshape(target.shape)


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """Nested parameters as one dict by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return params


def check_params(params: Params, model: ModelConfig, where: str) -> dict[str, np.ndarray]:
    """The parameters by dotted path, once they are exactly the model's leaves.

    Raises:
      UserError: a leaf that is missing, not the model's, or of another shape than the config gives it.
    """
    flat = flatten(params)
    for leaf in LEAVES:
        if leaf not in flat:
            raise UserError(f"{where}: {leaf} is missing; the checkpoint isn't whole")
    for leaf, value in flat.items():
        if leaf not in LEAVES:
            raise UserError(f"{where}: {leaf} is not a parameter of the model{nearest(leaf, LEAVES)}")
        if np.shape(value) != leaf_shape(leaf, model):
            raise UserError(f"{where}: {leaf} has shape {np.shape(value)}, its config says {leaf_shape(leaf, model)}")
    return {leaf: np.asarray(flat[leaf]) for leaf in LEAVES}


def make_config(form: Form, model: ModelConfig) -> dict[str, Any]:
    """config.json of the form, without token ids and dtype.

    Raises:
      UserError: a setting that the form can't express.
    """
    defaults = ModelConfig()
    for field in fields(model):
        named = field.name in form.config_keys or (field.name == "mup_base_width" and form.width_scale_key)
        value, default = getattr(model, field.name), getattr(defaults, field.name)
        if not named and field.name != "init_std" and value != default:
            raise UserError(f"model.{field.name}: {value!r} can't be said in the form {form.name}, where it is always "
                            f"{default!r}; use --to=crystal")
    config: dict[str, Any] = {"architectures": [form.architecture], "model_type": form.model_type}
    config |= {key: getattr(model, field) for field, key in form.config_keys.items()}
    if form.width_scale_key:
        config[form.width_scale_key] = model.width_scale
    if form.logit_scale_key:
        config[form.logit_scale_key] = model.logit_scale
    return config | form.config_constants | form.config_optional | {"auto_map": form.auto_map}


def parse_config(form: Form, config: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes; settings it doesn't name keep their defaults.

    Raises:
      UserError: another model type, a missing or mistyped key, an architecture that this model isn't.
    """
    found = config.get("model_type")
    if found != form.model_type:
        raise UserError(f"{where}: model_type {found!r} is not that of --from={form.name}, {form.model_type!r}")
    for key, value in form.config_constants.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} is {config[key]!r}; this model has {value!r} and nothing else")
    types: dict[str, Callable[[Any], Any]] = {field.name: type(field.default) for field in fields(ModelConfig)}
    values = {field: _number(config, key, types[field], where) for field, key in form.config_keys.items()}
    if form.width_scale_key:
        scale = _number(config, form.width_scale_key, float, where)
        width = round(scale * values["embed_dim"])
        if width < 1 or not math.isclose(width, scale * values["embed_dim"], rel_tol=1e-6):
            raise UserError(f"{where}: {form.width_scale_key} {scale!r} times {values['embed_dim']} must be a whole "
                            "number, the base width of the parametrisation")
        values["mup_base_width"] = width
    model = ModelConfig(**values)
    if form.logit_scale_key:
        scale = _number(config, form.logit_scale_key, float, where)
        if not math.isclose(scale, model.logit_scale, rel_tol=1e-6):
            raise UserError(f"{where}: {form.logit_scale_key} {scale!r} must be output_scale * mup_base_width / "
                            f"hidden_size = {model.logit_scale!r}")
    return _checked(form, model, where)


def _checked(form: Form, model: ModelConfig, where: str) -> ModelConfig:
    keys = form.config_keys
    if model.embed_dim % model.num_heads:
        raise UserError(f"{where}: {keys['embed_dim']} {model.embed_dim} must be a multiple of {keys['num_heads']} "
                        f"{model.num_heads}")
    if model.rotary_dim % 2 or model.rotary_dim > model.head_dim:
        raise UserError(f"{where}: {keys['rotary_dim']} {model.rotary_dim} must be even and at most the head size "
                        f"{model.head_dim}")
    return model


def _number(config: dict[str, Any], key: str, kind: Callable[[Any], Any], where: str) -> Any:
    if key not in config:
        raise UserError(f"{where}: the key {key} is missing{nearest(key, config)}")
    value = config[key]
    right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not right or value < 0 or (value == 0 and key != "rotary_dim"):
        raise UserError(f"{where}: {key} {value!r} must be a {'whole ' if kind is int else ''}number above 0")
    return kind(value)
