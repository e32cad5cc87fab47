"""PyTorch → JAX: a published folder as parameters, bit for bit, or as a checkpoint that training can start from.

Tensors go from the mapped files of the folder straight into their places, which an import maps from files beside its
output: no more than one tensor is in memory.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crystal_jax import files
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
from crystal_jax.stream import check_space, clear, find_place, locked, new_file

BRANCH = re.compile(r"CrystalCoder_(phase\d+)_checkpoint_(\d{6})")
"""Name of a published checkpoint's branch: its phase, and its step in the phase."""
ROWS = ("embed", "head")
"""Leaves with a row for each id of the vocabulary."""
BLOCK = 1 << 22
"""Values that are looked at together."""

New = Callable[[dict[str, tuple[int, ...]], np.dtype], dict[str, np.ndarray]]
"""(leaf to its shape, dtype of all) to leaf to an array for it."""


def read_torch_folder(folder: Path, form: str, new: New | None = None) -> tuple[Params, ModelConfig, Path | None]:
    """(parameters in their stored dtype, the model, tokenizer.json where there is one) of a folder in a known form.

    Buffers of attention masks and a second copy of the tied head are passed over. `new` makes the arrays that are
    filled, in memory unless it is given.

    Raises:
      UserError: a file that is missing or damaged; a tensor that is missing, unknown, misshapen, not finite or of
        another dtype than the rest; a head that isn't the embedding; more rows than the vocabulary, or fewer than a
        tokenizer has ids.
    """
    table, folder = get_form(form, "--from"), Path(folder)
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: missing; --input must be a folder with config.json and weights")
    model = parse_config(table, _read_object(path), str(path))
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists():
        _check_tokenizer(tokenizer, model)
    readers = open_tensors(folder)
    _check_names(table, model, readers, folder)
    params = _read_params(table, model, readers, folder, new or _in_memory)
    return unflatten(params), model, tokenizer if tokenizer.exists() else None


def _read_object(path: Path) -> dict[str, Any]:
    data = files.read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object")
    return data


def _check_tokenizer(path: Path, model: ModelConfig) -> None:
    data = _read_object(path)
    try:
        vocab = data["model"]["vocab"]  # an object, or for Unigram a list of pieces
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        used = 1 + max([*ids, *(token["id"] for token in data.get("added_tokens") or [])])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({error!r}); fetch it again") from None
    if used > model.vocab_size:
        raise UserError(f"{path}: has {used} ids, but config.json says {model.vocab_size} rows; it is another model's "
                        "tokenizer: replace it, or take it away")


def _check_names(form: Form, model: ModelConfig, readers: dict[str, Reader], folder: Path) -> None:
    expected = {tensor.name for tensor in tensors(form, model)}
    for name in sorted(expected - set(readers)):
        raise UserError(f"{folder}: the tensor {name} is missing from the weights; fetch the folder again")
    for name in sorted(set(readers) - expected - ignored_names(form, model) - {form.head}):
        raise UserError(f"{folder}: the tensor {name} is not part of a {model.num_layers}-layer model in the form "
                        f"{form.name}; is it the right --from?")


def _in_memory(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, np.ndarray]:
    return {leaf: np.empty(shape, dtype) for leaf, shape in shapes.items()}


def _check_tensors(form: Form, model: ModelConfig, readers: dict[str, Reader], folder: Path) -> np.dtype:
    """Refuses shapes and dtypes that aren't the model's, before any value is read; returns the dtype of all."""
    first, dtype = form.tensors[0].name, readers[form.tensors[0].name]().dtype
    for tensor in tensors(form, model):
        values, shape = readers[tensor.name](), tensor_shape(tensor, model)
        if tensor.leaves[0] in ROWS and values.shape[1:] == shape[1:] and values.shape[0] > shape[0]:
            key = form.config_keys["vocab_size"]
            raise UserError(f"{folder}: the tensor {tensor.name} has {values.shape[0]} rows, config.json says {key} "
                            f"{shape[0]}; if the last ones are padding, cut them off, else say {values.shape[0]} there")
        if values.shape != shape:
            raise UserError(f"{folder}: the tensor {tensor.name} has shape {values.shape}, config.json says {shape}")
        if values.dtype.name not in DTYPES:
            raise UserError(f"{folder}: the tensor {tensor.name} is {values.dtype}, not one of {', '.join(DTYPES)}")
        if values.dtype != dtype:
            raise UserError(f"{folder}: the tensor {tensor.name} is {values.dtype.name}, but {first} is {dtype.name}; "
                            "save the weights in one dtype")
    return dtype


def _read_params(form: Form, model: ModelConfig, readers: dict[str, Reader], folder: Path,
                 new: New) -> dict[str, np.ndarray]:
    dtype = _check_tensors(form, model, readers, folder)
    params = new({leaf: leaf_shape(leaf, model) for leaf in leaves(model)}, dtype)
    for tensor in tensors(form, model):
        values = readers[tensor.name]()
        if not _all_finite(values):
            raise UserError(f"{folder}: the tensor {tensor.name} has values that are NaN or inf")
        write_tensor(params, tensor, model, values)
    if form.head in readers and not same_bits(readers[form.head](), params["embed"]):
        raise UserError(f"{folder}: {form.head} differs from {form.tensors[0].name}; this model's head is tied to it")
    return params


def _all_finite(values: np.ndarray) -> bool:
    flat = values.reshape(-1)
    return all(np.isfinite(flat[start : start + BLOCK]).all() for start in range(0, flat.size, BLOCK))


def import_all(form: str, folder: Path, output: Path) -> Iterator[dict[str, Any]]:
    """Imports a folder, or each folder in it that is named as a published branch; gives a summary of each.

    A branch becomes OUTPUT/phaseP/step_NNNNNN; one that is there already is passed over.

    Raises:
      UserError: as import_checkpoint; a checkpoint there that is another branch's.
    """
    folder, output = Path(folder), Path(output)
    branches = {} if (folder / "config.json").exists() else _branches(folder)
    if not branches:
        yield import_checkpoint(form, folder, output)
    for name, path in branches.items():
        place = output / name
        if not (place / "checkpoint.json").exists():
            yield import_checkpoint(form, path, place)
            continue
        found = _read_object(place / "checkpoint.json").get("name")
        if found != path.name:
            raise UserError(f"{place}: is {found}, not {path.name}; choose another --output, or delete it")
        yield {"output": str(place), "passed_over": True}


def _branches(folder: Path) -> dict[str, Path]:
    """Name of a checkpoint to the folder of its branch, in the order of training."""
    found = {}
    for path in sorted(folder.glob("*/")):
        if match := BRANCH.fullmatch(path.name):
            found[f"{match[1]}/step_{match[2]}"] = path
    return found


def import_checkpoint(form: str, folder: Path, output: Path) -> dict[str, Any]:
    """Writes a published folder as a checkpoint without optimizer state, for train --init_from, and returns a summary.

    Raises:
      UserError: as read_torch_folder; an output that holds something already, or can't be written.
    """
    folder, output = Path(folder), Path(output)
    if output.exists() and not (output.is_dir() and next(output.iterdir(), None) is None):
        raise UserError(f"{output}: exists; choose another --output, or delete it")
    place = find_place(output)
    from crystal_jax.checkpoint import save_weights

    scratch = place.with_name(f".{place.name}.scratch")

    def mapped(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, np.ndarray]:
        size = sum(map(math.prod, shapes.values())) * dtype.itemsize
        check_space(place.parent, 2 * size, f"the checkpoint ({size:,}) and, while it is made, a copy of its arrays")
        return {leaf: new_file(scratch / leaf, shape, dtype) for leaf, shape in shapes.items()}

    with locked(scratch):
        try:
            params, model, tokenizer = read_torch_folder(folder, form, mapped)
            save_weights(place, params, model, tokenizer, _info(form, folder))
        except OSError as error:
            raise UserError(f"{output}: can't be written: {error.strerror}") from None
        finally:
            clear(scratch)
    return {"output": str(output), "form": form, "dtype": params["embed"].dtype.name,
            "tokenizer": str(tokenizer) if tokenizer else None}


def _info(form: str, folder: Path) -> dict[str, Any]:
    """What is known of where the checkpoint stands: a published branch says its phase and the step in it."""
    name = folder.resolve().name
    branch = BRANCH.fullmatch(name)
    place = {"phase": branch[1], "phase_step": int(branch[2])} if branch else {"phase": None, "phase_step": None}
    return {"name": name, "imported_from": f"{folder} ({form})", **place,
            **dict.fromkeys(("step", "tokens", "lr", "plan_hash")), "tokens_per_source": {}, "config": {}}
