"""JAX → PyTorch: a checkpoint as a folder that transformers can load.

A folder appears whole or not at all: it is written beside its place, read back bit by bit, then renamed.
"""

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from crystal_jax.config import nearest
from crystal_jax.convert.card import companion_files
from crystal_jax.convert.forms import FORMS
from crystal_jax.convert.made import MAX_SHARD_SIZE, Made, Make, Options, Weights, moved
from crystal_jax.errors import UserError

MAKERS: dict[str, Make] = {name: partial(moved, form) for name, form in FORMS.items()}
"""Form to the function that makes it of a checkpoint."""


def export(
    weights: Weights,
    to: str,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    heads: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Writes the checkpoint as a folder in the form `to`, checks it, and returns a summary.

    `dtype` is that of the stored tensors (float32, bfloat16 or float16), by default the checkpoint's; a shard has at
    most `max_shard_size` bytes; `heads` is for the forms that widen the model; `command` is quoted in the model card.
    An output folder that already holds exactly this export is left as it is.

    Raises:
      UserError: parameters that aren't the model's, values that aren't finite, an output folder with other things in
        it, a full disk.
    """
    made = _make(weights, to, Options(dtype, max_shard_size, heads))
    companions = companion_files(weights, made, made.dtype, command)
    output = Path(output)
    unchanged = output.exists() and not _is_empty(output)
    if unchanged:
        _check_same(made, companions, output)
    else:
        try:
            _write(made, companions, output)
        except OSError as error:
            full = "; free some space, or choose another disk" if error.errno == errno.ENOSPC else ""
            raise UserError(f"{output}: can't be written: {error.strerror}{full}") from None
    return {"output": str(output), "form": made.form, "dtype": made.dtype, "tensors": len(made.storage.names),
            "bytes": made.storage.nbytes, "files": sorted([*made.storage.files, *companions]), "unchanged": unchanged}


def _make(weights: Weights, to: str, options: Options) -> Made:
    if to not in MAKERS:
        raise UserError(f"--to={to}: no such form{nearest(to, MAKERS)}")
    if options.max_shard_size < 1:
        raise UserError(f"--max_shard_size={options.max_shard_size}: must be above 0 bytes")
    return MAKERS[to](weights, options)


def _is_empty(output: Path) -> bool:
    if not output.is_dir():
        raise UserError(f"{output}: is a file; --output must name a folder")
    return next(output.iterdir(), None) is None


def _check_same(made: Made, companions: dict[str, bytes], output: Path) -> None:
    """Refuses a folder that holds anything but this export."""
    way_out = "choose another --output, or delete the folder"
    expected = {*made.storage.files, *companions}
    found = {path.name for path in output.iterdir()}
    if missing := sorted(expected - found):
        raise UserError(f"{output}: not empty, and without {missing[0]} it isn't this export; {way_out}")
    if extra := sorted(found - expected - set(made.code_files)):
        raise UserError(f"{output}: not empty, and {extra[0]} isn't part of this export; {way_out}")
    for name, content in companions.items():
        if (output / name).read_bytes() != content:
            raise UserError(f"{output / name}: exists and differs from what this export would write; {way_out}")
    if problem := made.storage.difference(output):
        raise UserError(f"{output}: exists, and {problem}; {way_out}")


def _write(made: Made, companions: dict[str, bytes], output: Path) -> None:
    """Writes beside `output`, reads back, renames."""
    place = Path(os.path.abspath(output))
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if free < made.storage.nbytes:
        raise UserError(f"{place.parent}: {free:,} bytes free, {made.storage.nbytes:,} needed; free some space, or "
                        "choose another disk")
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    partial.mkdir()
    try:
        made.storage.write(partial)
        for name, content in companions.items():
            (partial / name).write_bytes(content)
        if problem := made.storage.difference(partial):
            raise UserError(f"{output}: read back after writing, {problem}; the disk or the memory is at fault")
        os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
