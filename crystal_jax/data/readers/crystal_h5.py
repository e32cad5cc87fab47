"""The published HDF5 files: rows of tokens that were trained on as they are.

This file owns their layout: dataset "data", integers [n, 3, T] of input ids, mask and labels. Its invariant: the
labels are the inputs one place later wherever the mask is on; a row that differs is an error, never a choice between
the two.
"""

import re
from typing import Any

import numpy as np

from crystal_jax.data.readers.base import Documents, Input, Reader, SourceSpec, Tokens
from crystal_jax.data.readers.listing import group, list_files, one_line, open_input
from crystal_jax.errors import UserError

FILES = re.compile(r"\.(h5|hdf5)$")
DATASET = "data"
BATCH_ROWS = 256


def list_inputs(source: SourceSpec) -> list[Input]:
    """An input per file, or per files_per_input of them."""
    files = list_files(source, FILES, ".h5 or .hdf5")
    return group(files, range(len(files)), source.files_per_input)


def read(_: SourceSpec, item: Input) -> Documents:
    """Documents called by file:row, from 0: a row's inputs and its last label, as far as the mask goes."""
    import h5py

    for path, name in item.files:
        try:
            with open_input(path) as handle, h5py.File(handle, "r") as file:
                data = _dataset(path, file)
                for start in range(0, len(data), BATCH_ROWS):
                    yield from _tokens(path, name, start, data[start : start + BATCH_ROWS])
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"{path}: no whole HDF5 file ({one_line(error)}); fetch the file again") from error


def _dataset(path: str, file: Any) -> Any:
    data = file.get(DATASET)
    if data is None:
        raise UserError(f"{path}: no dataset {DATASET!r}; it has {', '.join(file) or 'none'}")
    shape: tuple[int, ...] = getattr(data, "shape", ())
    if len(shape) != 3 or shape[1] != 3 or not np.issubdtype(data.dtype, np.integer):
        form = f"{data.dtype} {list(shape)}" if hasattr(data, "dtype") else "a group"
        raise UserError(f"{path}: {DATASET!r} is {form}, not integers [rows, 3, length]")
    return data


def _tokens(path: str, name: str, start: int, rows: np.ndarray) -> Documents:
    """Documents of rows [n, 3, T], the first of which is row number `start`."""
    inputs, mask, labels = rows[:, 0], rows[:, 1], rows[:, 2]
    on = mask != 0
    lengths = on.sum(axis=1)
    checks = {
        "the mask is all zeros, as HDF5 reads a lost piece": ~on[:, 0],
        "the mask isn't ones, then zeros": ((mask != 0) & (mask != 1)).any(axis=1)
                                           | (on[:, 1:] & ~on[:, :-1]).any(axis=1),
        "the labels aren't the inputs one place later": ((inputs[:, 1:] != labels[:, :-1]) & on[:, 1:]).any(axis=1),
        "an id isn't from 0 to 2^31 - 1": ((np.stack([inputs, labels]) >> 31 != 0) & on).any(axis=(0, 2)),
    }  # fmt: skip
    for rule, broken in checks.items():
        if broken.any():
            raise UserError(f"{path}: row {start + int(broken.argmax())}: {rule}; fetch the file again")
    for row, length in enumerate(lengths.tolist()):
        identity = f"{name}:{start + row}"
        ids = np.concatenate([inputs[row, :length], labels[row, length - 1 : length]]).astype(np.int32)
        yield Tokens(identity, ids, name, identity)


READER = Reader(list_inputs, read, "the published HDF5 files, whose tokens stay as they are",
                frozenset({"files_per_input"}), heldout=0.0)
