"""What a form makes of a checkpoint, before anything is written: the interface between forms and export.py.

Nothing is computed before it is asked for, so an export holds one block of one tensor in memory, whatever the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crystal_jax.config import ModelConfig
from crystal_jax.convert.computed import Computed
from crystal_jax.convert.folder import Safetensors
from crystal_jax.convert.forms import (
    DTYPES,
    Form,
    Tensor,
    check_params,
    flat_shape,
    make_config,
    tensor_shape,
    tensors,
)
from crystal_jax.errors import UserError

MAX_SHARD_SIZE = 5_000_000_000


class Weights(Protocol):
    """What a checkpoint gives: checkpoint.load_weights and open_weights return one."""

    @property
    def params(self) -> dict[str, Any]:
        """A nested dict of arrays, layers stacked."""
        ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, where it is known."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """Where in its run the checkpoint stands; a value that isn't known is None or absent."""
        ...


@dataclass(frozen=True)
class Options:
    """What the command line says of an export beside the form."""

    dtype: str | None = None
    """Of the stored tensors; None for the checkpoint's."""
    max_shard_size: int = MAX_SHARD_SIZE
    """Bytes of one file."""
    heads: int | None = None
    """Of the model in the forms that widen it."""


class Storage(Protocol):
    """The files of the weights; folder.Safetensors is one."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors."""
        ...

    @property
    def tensors(self) -> Mapping[str, Computed]:
        """The same names to the values, before they are rounded."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """The names of all that `write` writes."""
        ...

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        ...

    def write(self, place: Path) -> None:
        """Writes the files into a folder and waits until they are on the disk.

        Raises:
          UserError: a value that isn't finite, or beyond the range of its dtype.
        """
        ...

    def difference(self, place: Path) -> str:
        """The first way in which a folder's files aren't these, bit by bit; "" if they are."""
        ...


@dataclass(frozen=True)
class Made:
    """All that a form says of a checkpoint."""

    form: str
    dtype: str
    """Of the stored tensors, as --dtype names it."""
    storage: Storage
    config: dict[str, Any]
    """config.json without token ids and dtype; empty for a form without one."""
    code_files: tuple[str, ...] = ()
    """Files of code that config.json needs beside the weights."""
    ships_code: bool = False
    """Whether the export brings these files; if not, they are someone else's to give."""


Make = Callable[[Weights, Options], Made]


def moved(form: Form, weights: Weights, options: Options) -> Made:
    """The tensors of a table, with the parameters' bits.

    Raises:
      UserError: parameters that aren't the model's, or a setting that the form can't express.
    """
    if options.heads is not None:
        raise UserError(f"--heads={options.heads}: the form {form.name} has the model's own heads; leave the flag out")
    model = weights.model
    config = make_config(form, model)
    params = check_params(weights.params, model, "the checkpoint")
    dtype = stored_dtype(params, options.dtype)
    found = {tensor.name: Computed(tensor_shape(tensor, model), partial(_rows, params, tensor, model),
                                   ", ".join(tensor.leaves))
             for tensor in tensors(form, model)}
    if form.writes_head:
        found[form.head] = found[form.tensors[0].name]
    storage = Safetensors(found, DTYPES[dtype], options.max_shard_size)
    return Made(form.name, dtype, storage, config, form.code_files, form.ships_code)


def stored_dtype(params: dict[str, np.ndarray], dtype: str | None) -> str:
    """The dtype asked for, or the one that all parameters have.

    Raises:
      UserError: another dtype, or parameters in several.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}; q8_0 is for --to=gguf alone")
        return dtype
    first = params["embed"].dtype.name
    for leaf, value in params.items():
        if value.dtype.name not in DTYPES or value.dtype.name != first:
            raise UserError(f"{leaf} has dtype {value.dtype.name} and embed {first}; choose one for all with "
                            "--dtype=float32")
    return first


def _rows(params: dict[str, np.ndarray], tensor: Tensor, model: ModelConfig, start: int, stop: int) -> np.ndarray:
    """Rows of a stored tensor: its leaves joined along the last dim, then perhaps transposed."""
    parts = [(params[leaf] if tensor.layer is None else params[leaf][tensor.layer]).reshape(flat_shape(leaf, model))
             for leaf in tensor.leaves]
    if not tensor.transposed and parts[0].ndim > 1:
        return np.concatenate([part[start:stop] for part in parts], axis=-1) if parts[1:] else parts[0][start:stop]
    found, offset = [], 0
    for part in parts:
        found.append(part.T[max(0, start - offset) : max(0, stop - offset)])
        offset += part.shape[-1]
    return np.concatenate(found) if parts[1:] else found[0]
