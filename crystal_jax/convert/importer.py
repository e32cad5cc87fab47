"""PyTorch → JAX: a published folder as parameters, bit for bit, or as a checkpoint that training can start from."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from crystal_jax.config import ModelConfig
from crystal_jax.convert.folder import Reader, open_tensors, same_bits
from crystal_jax.convert.forms import (
    DTYPES,
    Form,
    Params,
    get_form,
    ignored_names,
    leaf_shape,
    leaves,
    parse_config,
    tensor_shape,
    tensors,
    unflatten,
    write_tensor,
)
from crystal_jax.errors import UserError


def read_torch_folder(folder: Path, form: str) -> tuple[Params, ModelConfig, Path | None]:
    """(parameters in their stored dtype, the model, tokenizer.json where there is one) of a folder in a known form.

    Buffers of attention masks and a second copy of the tied head are passed over.

    Raises:
      UserError: a file that is missing or damaged; a tensor that is missing, unknown, misshapen, not finite; a head
        that isn't the embedding.
    """
    table, folder = get_form(form, "--from"), Path(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; --input must be a folder with config.json and weights") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must be a JSON object")
    model = parse_config(table, config, str(path))
    readers = open_tensors(folder)
    _check_names(table, model, readers, folder)
    params = _read_params(table, model, readers, folder)
    tokenizer = folder / "tokenizer.json"
    return unflatten(params), model, tokenizer if tokenizer.exists() else None


def _check_names(form: Form, model: ModelConfig, readers: dict[str, Reader], folder: Path) -> None:
    expected = {tensor.name for tensor in tensors(form, model)}
    for name in sorted(expected - set(readers)):
        raise UserError(f"{folder}: the tensor {name} is missing from the weights; fetch the folder again")
    for name in sorted(set(readers) - expected - ignored_names(form, model) - {form.head}):
        raise UserError(f"{folder}: the tensor {name} is not part of a {model.num_layers}-layer model in the form "
                        f"{form.name}; is it the right --from?")


def _read_params(form: Form, model: ModelConfig, readers: dict[str, Reader], folder: Path) -> dict[str, np.ndarray]:
    params: dict[str, np.ndarray] = {}
    for tensor in tensors(form, model):
        values = readers[tensor.name]()
        shape = tensor_shape(tensor, model)
        if values.shape != shape:
            raise UserError(f"{folder}: the tensor {tensor.name} has shape {values.shape}, config.json says {shape}")
        if values.dtype.name not in DTYPES:
            raise UserError(f"{folder}: the tensor {tensor.name} is {values.dtype}, not one of {', '.join(DTYPES)}")
        if not np.isfinite(values).all():
            raise UserError(f"{folder}: the tensor {tensor.name} has values that are NaN or inf")
        for leaf in tensor.leaves:
            target = params.setdefault(leaf, np.empty(leaf_shape(leaf, model), values.dtype))
            if target.dtype != values.dtype:
                raise UserError(f"{folder}: the tensor {tensor.name} is {values.dtype.name}, but in other layers it is "
                                f"{target.dtype.name}")
        write_tensor(params, tensor, model, values)
    if form.head in readers and not same_bits(readers[form.head](), params["embed"]):
        raise UserError(f"{folder}: {form.head} differs from {form.tensors[0].name}; this model's head is tied to it")
    return {leaf: params[leaf] for leaf in leaves(model)}


def import_checkpoint(form: str, folder: Path, output: Path) -> dict[str, Any]:
    """Writes a published folder as a checkpoint without optimizer state, for train --init_from, and returns a summary.

    Raises:
      UserError: as read_torch_folder; an output that holds something already, or can't be written.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and next(output.iterdir(), None) is None):
        raise UserError(f"{output}: exists; choose another --output, or delete it")
    from crystal_jax.checkpoint import save_weights

    params, model, tokenizer = read_torch_folder(folder, form)
    unknown = dict.fromkeys(("phase", "phase_step", "step", "tokens", "lr", "plan_hash"))
    info: dict[str, Any] = {"name": Path(folder).resolve().name, "imported_from": f"{folder} ({form})", **unknown,
            "tokens_per_source": {}, "config": {}}
    save_weights(output, params, model, tokenizer, info)
    return {"output": str(output), "form": form, "dtype": params["embed"].dtype.name,
            "tokenizer": str(tokenizer) if tokenizer else None}
