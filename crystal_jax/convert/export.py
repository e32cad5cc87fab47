"""JAX → PyTorch: a checkpoint as a folder that transformers can load.

A folder appears whole or not at all: it is written beside its place, read back bit by bit, its logits compared with
the checkpoint's (parity.py), then renamed.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from crystal_jax.config import nearest
from crystal_jax.convert import parity
from crystal_jax.convert.card import companion_files
from crystal_jax.convert.made import MAX_SHARD_SIZE, Made, Options, Weights
from crystal_jax.convert.makers import MAKERS
from crystal_jax.errors import UserError
from crystal_jax.stream import check_space, find_place

CARD = "README.md"
"""It quotes the command, which can be spelled in many ways: weights and config decide whether two exports are one."""


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
    """Writes the checkpoint as a folder in the form `to`, checks it, and returns a summary with what the check found.

    `dtype` is that of the stored tensors (float32, bfloat16 or float16), by default the checkpoint's; a shard has at
    most `max_shard_size` bytes; `heads` is for the forms that widen the model; `command` is quoted in the model card.
    An output folder that already holds exactly this export is left as it is, whatever its model card says.

    Raises:
      UserError: parameters that aren't the model's, values that aren't finite, an output folder with other things in
        it, a full disk, logits that aren't the checkpoint's.
    """
    made, companions = make(weights, to, Options(dtype, max_shard_size, heads), command)
    output, place = Path(output), find_place(output)
    unchanged = output.exists() and not _is_empty(output)
    if unchanged:
        found = _check_same(made, companions, output)
    else:
        try:
            found = _write(made, weights, companions, output, place)
        except OSError as error:
            full = "; free some space, or choose another disk" if error.errno == errno.ENOSPC else ""
            raise UserError(f"{output}: can't be written: {error.strerror}{full}") from None
    return {"output": str(output), "form": made.form, "dtype": made.dtype, "tensors": len(made.storage.names),
            "bytes": made.storage.nbytes,
            "files": sorted([*made.storage.files, *companions, parity.FILE]),
            "unchanged": unchanged, "parity": found}


def make(weights: Weights, to: str, options: Options, command: str) -> tuple[Made, dict[str, bytes]]:
    """What an export would write: its tensors, not yet computed, and the files beside them.

    Raises:
      UserError: a form or an option that doesn't fit the model; a tokenizer that isn't the model's.
    """
    if to not in MAKERS:
        raise UserError(f"--to={to}: no such form{nearest(to, MAKERS)}")
    if options.max_shard_size < 1:
        raise UserError(f"--max_shard_size={options.max_shard_size}: must be above 0 bytes")
    made = MAKERS[to](weights, options)
    return made, companion_files(weights, made, made.dtype, command)


def partial_folder(place: Path) -> Path:
    """Where a folder is written that is to become `place`."""
    return place.with_name(f".{place.name}.partial")


def _is_empty(output: Path) -> bool:
    if not output.is_dir():
        raise UserError(f"{output}: is a file; --output must name a folder")
    return next(output.iterdir(), None) is None


def _check_same(made: Made, companions: dict[str, bytes], output: Path) -> dict[str, Any]:
    """Refuses a folder that holds anything but this export; returns what its check found."""
    way_out = "choose another --output, or delete the folder"
    expected = {*made.storage.files, *companions, parity.FILE}
    found = {path.name for path in output.iterdir()}
    if missing := sorted(expected - found):
        raise UserError(f"{output}: not empty, and without {missing[0]} it isn't this export; {way_out}")
    if extra := sorted(found - expected - set(made.code_files)):
        raise UserError(f"{output}: not empty, and {extra[0]} isn't part of this export; {way_out}")
    checked = parity.read(output)
    for name, content in (companions | parity.files(checked, b"")).items():
        if name != CARD and (output / name).read_bytes() != content:
            raise UserError(f"{output / name}: exists and differs from what this export would write; {way_out}")
    if problem := made.storage.difference(output):
        raise UserError(f"{output}: exists, and {problem}; {way_out}")
    return checked


def _write(made: Made, weights: Weights, companions: dict[str, bytes], output: Path,
           place: Path) -> dict[str, Any]:
    """Writes beside `place`, reads back, compares logits, renames; returns what that found."""
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial_folder(place)
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an export that was killed
    check_space(place.parent, made.storage.nbytes, "the export")
    unfinished.mkdir()
    try:
        made.storage.write(unfinished)
        for name, content in companions.items():
            (unfinished / name).write_bytes(content)
        if problem := made.storage.difference(unfinished):
            raise UserError(f"{output}: read back after writing, {problem}; the disk or the memory is at fault")
        checked = parity.check(made, unfinished, weights)
        for name, content in parity.files(checked, companions[CARD]).items():
            (unfinished / name).write_bytes(content)
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        os.replace(unfinished, place)
        _sync(place.parent)
        return checked
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that can't do it with folders
            raise
    finally:
        os.close(descriptor)
