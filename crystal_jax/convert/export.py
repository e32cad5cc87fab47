"""JAX → PyTorch: a checkpoint as a folder that transformers can load.

A folder appears whole or not at all: it is written beside its place, read back bit by bit, then renamed.
"""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crystal_jax.convert import folder as files
from crystal_jax.convert.card import Weights, companion_files
from crystal_jax.convert.folder import Entry
from crystal_jax.convert.forms import (
    DTYPES,
    Form,
    Tensor,
    check_params,
    get_form,
    read_tensor,
    tensor_shape,
    tensors,
)
from crystal_jax.errors import UserError

MAX_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class _Plan:
    """All that an export will write, before anything is written."""

    form: Form
    sources: dict[str, Tensor]
    """Name in the folder to where the values lie."""
    dtype: np.dtype
    """Of the stored tensors."""
    weight_files: dict[str, list[Entry]]
    companions: dict[str, bytes]
    params: dict[str, np.ndarray]
    weights: Weights

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entries in self.weight_files.values() for entry in entries)

    def values(self, name: str) -> np.ndarray:
        """The tensor as it is to be stored.

        Raises:
          UserError: a value that isn't finite, or not in the dtype asked for.
        """
        tensor = self.sources[name]
        stored = read_tensor(self.params, tensor, self.weights.model)
        with np.errstate(over="ignore"):  # checked below
            cast = stored.astype(self.dtype, copy=False)
        bad = np.size(cast) - np.count_nonzero(np.isfinite(cast))
        if bad:
            beyond = f"beyond the range of {self.dtype.name}; use --dtype=bfloat16"
            why = beyond if np.isfinite(stored).all() else "NaN or inf"
            raise UserError(f"{name} (from {', '.join(tensor.leaves)}): {bad} of {np.size(cast)} values are {why}")
        return cast


def export(
    weights: Weights,
    to: str,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    command: str = "",
) -> dict[str, Any]:
    """Writes the checkpoint as a folder in the form `to`, checks it, and returns a summary.

    `dtype` is that of the stored tensors (float32, bfloat16 or float16), by default the checkpoint's; a shard has at
    most `max_shard_size` bytes; `command` is quoted in the model card. An output folder that already holds exactly
    this export is left as it is.

    Raises:
      UserError: parameters that aren't the model's, values that aren't finite, an output folder with other things in
        it, a full disk.
    """
    plan = _make_plan(weights, get_form(to, "--to"), dtype, max_shard_size, command)
    output = Path(output)
    unchanged = output.exists() and not _is_empty(output)
    if unchanged:
        _check_same(plan, output)
    else:
        try:
            _write(plan, output)
        except OSError as error:
            full = "; free some space, or choose another disk" if error.errno == errno.ENOSPC else ""
            raise UserError(f"{output}: can't be written: {error.strerror}{full}") from None
    return {"output": str(output), "form": plan.form.name, "dtype": plan.dtype.name, "tensors": len(plan.sources),
            "bytes": plan.nbytes, "files": sorted({*plan.weight_files, *plan.companions}), "unchanged": unchanged}


def _make_plan(weights: Weights, form: Form, dtype: str | None, max_shard_size: int, command: str) -> _Plan:
    if max_shard_size < 1:
        raise UserError(f"--max_shard_size={max_shard_size}: must be above 0 bytes")
    params = check_params(weights.params, weights.model, "the checkpoint")
    target = _stored_dtype(params, dtype)
    sources = {tensor.name: tensor for tensor in tensors(form, weights.model)}
    if form.writes_head:
        sources[form.head] = form.tensors[0]
    entries = [Entry(name, tensor_shape(tensor, weights.model), target) for name, tensor in sources.items()]
    weight_files = files.plan_files(entries, max_shard_size)
    companions = companion_files(weights, form, target.name, command)
    if len(weight_files) > 1:
        companions[files.INDEX] = files.index_text(weight_files).encode()
    return _Plan(form, sources, target, weight_files, companions, params, weights)


def _stored_dtype(params: dict[str, np.ndarray], dtype: str | None) -> np.dtype:
    """The dtype asked for, or the one that all parameters have."""
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    found = {leaf: value.dtype.name for leaf, value in params.items()}
    first = found["embed"]
    for leaf, name in found.items():
        if name not in DTYPES or name != first:
            raise UserError(f"{leaf} has dtype {name} and embed {first}; choose one for all with --dtype=float32")
    return DTYPES[first]


def _is_empty(output: Path) -> bool:
    if not output.is_dir():
        raise UserError(f"{output}: is a file; --output must name a folder")
    return next(output.iterdir(), None) is None


def _check_same(plan: _Plan, output: Path) -> None:
    """Refuses a folder that holds anything but this export."""
    way_out = "choose another --output, or delete the folder"
    expected = {*plan.weight_files, *plan.companions}
    found = {path.name for path in output.iterdir()}
    if missing := sorted(expected - found):
        raise UserError(f"{output}: not empty, and without {missing[0]} it isn't this export; {way_out}")
    if extra := sorted(found - expected - set(plan.form.code_files)):
        raise UserError(f"{output}: not empty, and {extra[0]} isn't part of this export; {way_out}")
    for name, content in plan.companions.items():
        if (output / name).read_bytes() != content:
            raise UserError(f"{output / name}: exists and differs from what this export would write; {way_out}")
    if problem := _difference(plan, output):
        raise UserError(f"{output}: exists, and {problem}; {way_out}")


def _difference(plan: _Plan, place: Path) -> str:
    """The first way in which the stored tensors aren't the planned ones, bit by bit; "" if they are."""
    readers = files.open_tensors(place)
    if names := sorted(set(readers) ^ set(plan.sources)):
        return f"its tensors differ from the model's in {names[0]}"
    for name, read in readers.items():
        expected, found = plan.values(name), read()
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            return f"its tensor {name} is {found.dtype.name} {found.shape}, not {expected.dtype.name} {expected.shape}"
        if not files.same_bits(found, expected):
            return f"its tensor {name} has other values"
    return ""


def _write(plan: _Plan, output: Path) -> None:
    """Writes beside `output`, reads back, renames."""
    place = Path(os.path.abspath(output))
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if free < plan.nbytes:
        raise UserError(f"{place.parent}: {free:,} bytes free, {plan.nbytes:,} needed; free some space, or choose "
                        "another disk")
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    partial.mkdir()
    try:
        for name, entries in plan.weight_files.items():
            files.write_safetensors(partial / name, entries, plan.values)
        for name, content in plan.companions.items():
            (partial / name).write_bytes(content)
        if problem := _difference(plan, partial):
            raise UserError(f"{output}: read back after writing, {problem}; the disk or the memory is at fault")
        os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
