"""A stored tree of arrays, copied to one raw file per array and mapped: for trees that are larger than the memory.

Its invariant: at most IN_FLIGHT bytes are in memory at a time, however large an array or a stored chunk is. Chunks
without compression are read by byte range, which TensorStore's own arrays don't do: they hold a whole chunk.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from crystal_jax import files
from crystal_jax.errors import UserError

IN_FLIGHT = 1 << 25
"""Bytes that have been asked for and not yet copied."""
PIECE = 1 << 23
"""Bytes of one request."""
RECORD = "scratch.json"
"""In the folder of raw files: which arrays of which tree are whole."""
TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
BYTES = [{"name": "bytes", "configuration": {"endian": "little"}}]

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Array:
    """An array of the tree: a grid of chunks, which are files of the store, and each a grid of parts."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    part: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tree:
    """Arrays as Orbax stores them: zarr 3 in an OCDBT database, without compression; local or on gs://."""

    def __init__(self, folder: epath.Path):
        import tensorstore as ts

        self.folder, self._ts = folder, ts
        self.version = hashlib.sha256(files.read_bytes(folder / "manifest.ocdbt")).hexdigest()
        """Of this very tree: another one in the same folder has another."""
        bucket, _, key = os.fspath(folder).removeprefix("gs://").partition("/")
        base = ({"driver": "gcs", "bucket": bucket, "path": f"{key}/"} if files.is_remote(folder) else
                {"driver": "file", "path": f"{os.path.abspath(folder)}/"})
        self._store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        names = [key.decode().removesuffix("/zarr.json") for key in self._store.list().result()
                 if key.endswith(b"/zarr.json")]
        found = {name: self._store.read(f"{name}/zarr.json") for name in names}
        self.arrays = {name: _parse(name, json.loads(read.result().value)) for name, read in found.items()}

    def copy(self, array: Array, target: np.ndarray) -> None:
        """Fills `target` with the array's values.

        Raises:
          ValueError: a chunk or a part of one that isn't there.
        """
        pending: deque[tuple[Any, np.ndarray, tuple[int, ...]]] = deque()
        held = 0
        for key, first, size, view, shape in self._pieces(array, target):
            while pending and held + size > IN_FLIGHT:
                held -= _place(*pending.popleft())
            pending.append((self._store.read(key, byte_range=slice(first, first + size)), view, shape))
            held += size
        for read, view, shape in pending:
            _place(read, view, shape)

    def _pieces(self, array: Array, target: np.ndarray) -> Iterator[tuple[str, int, int, np.ndarray, tuple[int, ...]]]:
        """(key, first byte, number of bytes, the values' place in `target`, shape) of each request."""
        parts = [range(math.ceil(n / m)) for n, m in zip(array.chunk, array.part, strict=True)]
        grid = [range(math.ceil(n / m)) for n, m in zip(array.shape, array.chunk, strict=True)]
        count = math.prod(map(len, parts))
        tail = slice(-(16 * count + 4), None)  # where each part begins and its size; a checksum
        keys = {cell: f"{array.name}/c/{'/'.join(map(str, cell))}" for cell in product(*grid)}
        indexes = {cell: self._store.read(key, byte_range=tail) for cell, key in keys.items()}
        for cell, key in keys.items():
            found = indexes[cell].result()
            if found.state != "value":
                raise ValueError(f"{key} is missing")
            index = np.frombuffer(found.value[:-4], "<u8").reshape(count, 2)
            for (first, size), inner in zip(index.tolist(), product(*parts), strict=True):
                origin = [c * n + i * m for c, n, i, m in zip(cell, array.chunk, inner, array.part, strict=True)]
                place = target[tuple(slice(o, o + m) for o, m in zip(origin, array.part, strict=True))]
                if not place.size:
                    continue  # beyond the array's end
                if size != math.prod(array.part) * array.dtype.itemsize:
                    raise ValueError(f"{key} has {size} bytes in a part of {array.part} {array.dtype.name}")
                for offset, box, shape in boxes(array.part, array.dtype.itemsize):
                    if place[box].size:
                        yield key, first + offset, math.prod(shape) * array.dtype.itemsize, place[box], shape


def _place(read: Any, view: np.ndarray, shape: tuple[int, ...]) -> int:
    """Copies what has been read; what lies beyond the array's end is left out."""
    found = read.result()
    if found.state != "value":
        raise ValueError("a chunk went missing")
    values = np.frombuffer(found.value, view.dtype).reshape(shape)
    view[...] = values[tuple(map(slice, view.shape))]
    return values.nbytes


def boxes(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, Box, tuple[int, ...]]]:
    """(offset in bytes, box, its shape) of the pieces of a C-ordered array, each of neighbouring bytes, PIECE at most."""
    axis = next(axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) * itemsize <= PIECE)
    inner = math.prod(shape[axis + 1 :]) * itemsize
    rows = PIECE // inner
    whole, offset = tuple(slice(0, n) for n in shape[axis + 1 :]), 0
    for outer in product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], rows):
            stop = min(start + rows, shape[axis])
            box = (*(slice(i, i + 1) for i in outer), slice(start, stop), *whole)
            yield offset, box, (*(1 for _ in outer), stop - start, *shape[axis + 1 :])
            offset += (stop - start) * inner


def _parse(name: str, found: dict[str, Any]) -> Array:
    """Of zarr.json.

    Raises:
      ValueError: another layout than the one that checkpoints are written in.
    """
    (codec,) = found["codecs"]
    inner = codec["configuration"]
    if (codec["name"], inner["codecs"], found["data_type"] in TYPES) != ("sharding_indexed", BYTES, True):
        raise ValueError(f"{name}: {found['data_type']} in {json.dumps(found['codecs'])[:80]}, not as this version "
                         "writes it")
    return Array(name, tuple(found["shape"]), TYPES[found["data_type"]],
                 tuple(found["chunk_grid"]["configuration"]["chunk_shape"]), tuple(inner["chunk_shape"]))


@contextmanager
def locked(scratch: Path) -> Iterator[None]:
    """Keeps others from the folder, which is made.

    Raises:
      UserError: another process has it.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with open(scratch / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{scratch}: in use by another process; wait for it, or name another --output") from None
        yield


def map_arrays(tree: Tree, scratch: Path) -> dict[str, np.ndarray]:
    """Array name to its values, mapped from a raw file in `scratch`; those that an earlier call finished stay.

    Raises:
      UserError: too little space.
    """
    record, done = scratch / RECORD, []
    if record.exists() and (kept := files.read_json(record))["version"] == tree.version:
        done = kept["arrays"]
    left = sum(array.nbytes for name, array in tree.arrays.items() if name not in done)
    free = shutil.disk_usage(scratch).free
    if free < left:
        raise UserError(f"{scratch}: {free:,} bytes free, {left:,} needed for a copy of the arrays; free some space, "
                        "or choose an --output on another disk")
    for name, array in tree.arrays.items():
        if name not in done:
            _copy(tree, array, scratch / name)
            done.append(name)
            files.write_json(record, {"version": tree.version, "arrays": done})
    return {name: np.memmap(scratch / name, array.dtype, "r", shape=array.shape)
            for name, array in tree.arrays.items()}


def _copy(tree: Tree, array: Array, path: Path) -> None:
    with open(path, "wb+") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, array.nbytes)  # a full disk is an error here, a crash in a map
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{path}: no space left for {array.nbytes:,} bytes; free some space, or choose an --output "
                            "on another disk") from None
        target = np.memmap(file, array.dtype, "r+", shape=array.shape)
        tree.copy(array, target)
        target.flush()
        os.fsync(file.fileno())
