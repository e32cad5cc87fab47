"""How a form lays out the model in a folder for PyTorch, tensor by tensor, and what its config.json says.

One table of parameter leaves and one of tensors per form (tables.py) serve both directions, so an export and its import
can't disagree. Nothing is computed, only moved, so every conversion keeps the bits.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import ml_dtypes
import numpy as np

from crystal_jax.config import ModelConfig, nearest
from crystal_jax.convert.tables import CRYSTAL, LEAVES, LLAMA, LLM360, STARCODER, Form, Tensor
from crystal_jax.errors import UserError

Params = dict[str, Any]
"""A nested dict of arrays."""

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

FORMS: dict[str, Form] = {form.name: form for form in (CRYSTAL, LLM360, LLAMA, STARCODER)}


def get_form(name: str, option: str) -> Form:
    """The form that the command-line `option` names."""
    if name not in FORMS:
        raise UserError(f"{option}={name}: no such form{nearest(name, FORMS)}")
    return FORMS[name]


def leaves(model: ModelConfig) -> list[str]:
    """The leaves of the model's family, in the order of LEAVES."""
    choices = model.choices
    there = {"_bias": choices.biases, ".bias": choices.norm == "layer", ".gate": choices.mlp == "gated",
             ".gate_bias": choices.mlp == "gated", "positions": choices.positions == "learned",
             "head": not choices.tied}
    return [leaf for leaf in LEAVES if all(has for ending, has in there.items() if leaf.endswith(ending))]


def sizes(model: ModelConfig) -> dict[str, int]:
    """Dim letter to its size."""
    return {"L": model.num_layers, "V": model.vocab_size, "D": model.embed_dim, "N": model.num_heads,
            "K": model.kv_heads, "H": model.head_dim, "F": model.mlp_dim, "T": model.max_length}


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
    """The tensors of the model in this form without a tied head, in file order: those of a layer stand together."""
    layered = [i for i, tensor in enumerate(form.tensors) if "{}" in tensor.name]
    first, last = layered[0], layered[-1] + 1
    yield from form.tensors[:first]
    for layer in range(model.num_layers):
        for tensor in form.tensors[first:last]:
            yield replace(tensor, name=tensor.name.format(layer), layer=layer)
    yield from form.tensors[last:]


def ignored_names(form: Form, model: ModelConfig) -> set[str]:
    """The buffers that a folder may hold beside the parameters."""
    return {name.format(layer) for name in form.ignored for layer in range(model.num_layers)}


def tensor_shape(tensor: Tensor, model: ModelConfig) -> tuple[int, ...]:
    """The shape under which a folder stores it."""
    shape = (*flat_shape(tensor.leaves[0], model)[:-1], sum(_widths(tensor, model)))
    return shape[::-1] if tensor.transposed else shape


def _widths(tensor: Tensor, model: ModelConfig) -> list[int]:
    return [flat_shape(leaf, model)[-1] for leaf in tensor.leaves]


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
    ends = np.cumsum(_widths(tensor, model))
    for leaf, part in zip(tensor.leaves, np.split(matrix, ends[:-1], axis=-1), strict=True):
        target = params[leaf] if tensor.layer is None else params[leaf][tensor.layer]
        target.reshape(part.shape)[...] = part  # a view: the leaf's own order of values


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
    flat, expected = flatten(params), leaves(model)
    for leaf in expected:
        if leaf not in flat:
            raise UserError(f"{where}: {leaf} is missing; the checkpoint isn't whole")
    for leaf, value in flat.items():
        if leaf not in expected:
            raise UserError(f"{where}: {leaf} is not a parameter of the model{nearest(leaf, expected)}")
        if np.shape(value) != leaf_shape(leaf, model):
            raise UserError(f"{where}: {leaf} has shape {np.shape(value)}, its config says {leaf_shape(leaf, model)}")
    return {leaf: np.asarray(flat[leaf]) for leaf in expected}


def make_config(form: Form, model: ModelConfig) -> dict[str, Any]:
    """config.json of the form, without token ids and dtype.

    Raises:
      UserError: a setting that the form can't express.
    """
    if model.family != form.family:
        raise UserError(f"model.family: {model.family!r} can't be said in the form {form.name}, which is for "
                        f"{form.family!r}; use --to={model.family}")
    model = replace(model, num_kv_heads=model.kv_heads)
    usual = replace(ModelConfig(), num_kv_heads=model.num_heads)
    said = {*form.config_keys, *form.config_choices, "family", "init_std",
            *(("mup_base_width",) if form.width_scale_key else ())}
    for name in (item.name for item in fields(model) if item.name not in said):
        value = getattr(model, name)
        always = form.implied[name](model) if name in form.implied else getattr(usual, name)
        if value != always:
            way_out = "; use --to=crystal" if form.name == "llm360" else ""
            raise UserError(f"model.{name}: {value!r} can't be said in the form {form.name}, where it is always "
                            f"{always!r}{way_out}")
    config: dict[str, Any] = {"architectures": [form.architecture], "model_type": form.model_type}
    config |= {key: getattr(model, name) for name, key in form.config_keys.items()}
    config |= {key: names[getattr(model, name)] for name, (key, names) in form.config_choices.items()}
    if form.width_scale_key:
        config[form.width_scale_key] = model.width_scale
    if form.logit_scale_key:
        config[form.logit_scale_key] = model.logit_scale
    config |= form.config_constants | form.config_optional
    return config | ({"auto_map": form.auto_map} if form.auto_map else {})


def parse_config(form: Form, config: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes; settings it doesn't name keep their defaults.

    Raises:
      UserError: another model type, a missing or mistyped key, an architecture that this model isn't.
    """
    found = config.get("model_type")
    if found != form.model_type:
        raise UserError(f"{where}: model_type {found!r} is not that of --from={form.name}, {form.model_type!r}")
    config = form.normalise(config)
    for key, value in form.config_constants.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} is {config[key]!r}; this model has {value!r} and nothing else")
    kinds: dict[str, Callable[[Any], Any]] = {item.name: type(item.default) for item in fields(ModelConfig)}
    kinds["num_kv_heads"] = int
    values = {name: _number(config, key, kinds[name], where) for name, key in form.config_keys.items()}
    for name, (key, names) in form.config_choices.items():
        chosen = [value for value, said in names.items() if said == config.get(key)]
        if not chosen:
            raise UserError(f"{where}: {key} is {config.get(key)!r}; this model has one of "
                            f"{', '.join(map(repr, names.values()))}")
        values[name] = chosen[0]
    if form.width_scale_key:
        scale = _number(config, form.width_scale_key, float, where)
        width = round(min(scale * values["embed_dim"], 1e18))  # inf can't be rounded
        if width < 1 or not math.isclose(width, scale * values["embed_dim"], rel_tol=1e-6):
            raise UserError(f"{where}: {form.width_scale_key} {scale!r} times {values['embed_dim']} must be a whole "
                            "number, the base width of the parametrisation")
        values["mup_base_width"] = width
    model = ModelConfig(family=form.family, **values)
    model = replace(model, **{name: value(model) for name, value in form.implied.items()})
    if model.num_kv_heads == model.num_heads:
        model = replace(model, num_kv_heads=None)
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
    if model.num_heads % model.kv_heads:
        raise UserError(f"{where}: {keys['num_heads']} {model.num_heads} must be a multiple of {keys['num_kv_heads']} "
                        f"{model.num_kv_heads}")
    if model.rotary_dim % 2 or model.rotary_dim > model.head_dim:
        raise UserError(f"{where}: {keys.get('rotary_dim', 'the head size')} {model.rotary_dim} must be even and at "
                        f"most the head size {model.head_dim}")
    return model


def _number(config: dict[str, Any], key: str, kind: Callable[[Any], Any], where: str) -> Any:
    if key not in config:
        raise UserError(f"{where}: the key {key} is missing{nearest(key, config)}")
    value = config[key]
    right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not right or not abs(value) <= sys.float_info.max or value < 0 or (value == 0 and key != "rotary_dim"):
        raise UserError(f"{where}: {key} {value!r} must be a {'whole ' if kind is int else ''}number above 0")
    return kind(value)
