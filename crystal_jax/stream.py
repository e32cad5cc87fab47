"""A stored tree of arrays, copied to one raw file per array and mapped: for trees that are larger than the memory.

Its invariant: at most IN_FLIGHT bytes are in memory at a time, however large an array or a stored chunk is. Chunks
without compression are read by byte range, which TensorStore's own arrays don't do: they hold a whole chunk.
"""

import errno
import fcntl
import json
import math
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from etils import epath

from crystal_jax import files
from crystal_jax.errors import UserError

IN_FLIGHT = 1 << 24
"""Bytes that have been asked for and not yet copied."""
PIECE = 1 << 18
"""Bytes of one request: the allocator gives out the same memory again, which took half the time of 4 MiB."""
REMOTE_PIECE = 1 << 22
"""The same on gs://, where each takes its time."""
INDEX_BYTES = 1 << 24
"""Of the database's own tree of keys, kept between reads."""
MANIFEST = "manifest.ocdbt"
"""The root of a tree: no two trees have the same."""
LOCK = "lock"
RECORD = "scratch.json"
"""In the folder of raw files: which arrays of which tree are whole, and since which start of the machine."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
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

        self.folder = folder
        self._piece = REMOTE_PIECE if files.is_remote(folder) else PIECE
        self.version = files.sha256(folder / MANIFEST)
        bucket, _, key = os.fspath(folder).removeprefix("gs://").partition("/")
        base = ({"driver": "gcs", "bucket": bucket, "path": f"{key}/"} if files.is_remote(folder) else
                {"driver": "file", "path": f"{os.path.abspath(folder)}/"})
        context = ts.Context({"cache_pool": {"total_bytes_limit": INDEX_BYTES}})
        self._store = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()
        names = [key.decode().removesuffix("/zarr.json") for key in self._store.list().result()
                 if key.endswith(b"/zarr.json")]
        found = {name: self._read(f"{name}/zarr.json") for name in names}
        self.arrays = {name: _parse(name, json.loads(read.result().value)) for name, read in found.items()}

    def _read(self, key: str, first: int | None = None, end: int | None = None) -> Any:
        """Starts to read bytes of a value; without a look at whether the tree has changed, which it doesn't."""
        return self._store.read(key, byte_range=slice(first, end), staleness_bound=0.0)

    def copy(self, array: Array, target: np.ndarray) -> None:
        """Fills `target` with the array's values.

        Raises:
          ValueError: a chunk or a part of one that isn't there.
        """
        for place, values in self._values(array, target):
            place[...] = values

    def holds(self, array: Array, expected: np.ndarray) -> bool:
        """Whether the array is exactly `expected`, bit by bit.

        Raises:
          ValueError: as copy.
        """
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            return False
        return all(place.tobytes() == values.tobytes() for place, values in self._values(array, expected))

    def _values(self, array: Array, target: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(a part of `target`, what is stored of it), piece by piece."""
        pending: deque[tuple[Any, np.ndarray, tuple[int, ...], int]] = deque()
        held = 0
        for key, first, size, view, shape in self._pieces(array, target):
            while pending and held + size > IN_FLIGHT:
                *oldest, freed = pending.popleft()
                yield _received(*oldest)
                held -= freed
            pending.append((self._read(key, first, first + size), view, shape, size))
            held += size
        for *rest, _ in pending:
            yield _received(*rest)

    def _pieces(self, array: Array, target: np.ndarray) -> Iterator[tuple[str, int, int, np.ndarray, tuple[int, ...]]]:
        """(key, first byte, number of bytes, the values' place in `target`, shape) of each request."""
        parts = [range(math.ceil(n / m)) for n, m in zip(array.chunk, array.part, strict=True)]
        grid = [range(math.ceil(n / m)) for n, m in zip(array.shape, array.chunk, strict=True)]
        count = math.prod(map(len, parts))
        tail = -(16 * count + 4)  # where each part begins and its size; a checksum
        keys = {cell: f"{array.name}/c/{'/'.join(map(str, cell))}" for cell in product(*grid)}
        indexes = {cell: self._read(key, tail) for cell, key in keys.items()}
        for cell, key in keys.items():
            found = indexes[cell].result()
            if len(found.value) != -tail:  # empty where the key or its file is missing
                raise ValueError(f"{key} is missing")
            index = np.frombuffer(found.value[:-4], "<u8").reshape(count, 2)
            for (first, size), inner in zip(index.tolist(), product(*parts), strict=True):
                origin = [c * n + i * m for c, n, i, m in zip(cell, array.chunk, inner, array.part, strict=True)]
                place = target[tuple(slice(o, o + m) for o, m in zip(origin, array.part, strict=True))]
                if not place.size:
                    continue  # beyond the array's end
                if size != math.prod(array.part) * array.dtype.itemsize:
                    raise ValueError(f"{key} has {size} bytes in a part of {array.part} {array.dtype.name}")
                for offset, box, shape in boxes(array.part, array.dtype.itemsize, self._piece):
                    if place[box].size:
                        yield key, first + offset, math.prod(shape) * array.dtype.itemsize, place[box], shape


def _received(read: Any, place: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(place, its values); what lies beyond the array's end is left out."""
    values = np.frombuffer(read.result().value, place.dtype)
    if values.size != math.prod(shape):
        raise ValueError(f"{values.nbytes} bytes came of a chunk, for {shape} {place.dtype.name}")
    return place, values.reshape(shape)[tuple(map(slice, place.shape))]


def boxes(shape: tuple[int, ...], itemsize: int, piece: int) -> Iterator[tuple[int, Box, tuple[int, ...]]]:
    """(offset in bytes, box, its shape) of the pieces of a C-ordered array, each of at most `piece` neighbouring bytes.

    piece: at least the bytes of a value.
    """
    axis = next(axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) * itemsize <= piece)
    inner = math.prod(shape[axis + 1 :]) * itemsize
    rows = piece // inner
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


def find_place(output: Path) -> Path:
    """Where a folder is written that is to appear by a rename: `output` without symbolic links.

    Raises:
      UserError: a mount point, which nothing can be renamed to.
    """
    place = Path(os.path.realpath(output))
    if os.path.ismount(place):
        raise UserError(f"{output}: is a mount point, and the folder is renamed to its place; name a folder inside it")
    return place


@contextmanager
def locked(scratch: Path) -> Iterator[None]:
    """Keeps others from the folder, which is made; of what is made for it, nothing stays that is empty in the end.

    Raises:
      UserError: another process has it; it can't be made.
    """
    made = [path for path in (scratch, *scratch.parents) if not path.exists()]
    try:
        with _lock(scratch):
            yield
    finally:
        for path in made:
            try:
                path.rmdir()
            except FileNotFoundError:
                continue
            except OSError:  # it holds something
                break


def _lock(scratch: Path) -> IO[str]:
    """The folder's lock file, which is held until it is closed."""
    while True:
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            file = open(scratch / LOCK, "w")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:  # removed in between
            continue
        except OSError as error:
            raise UserError(f"{scratch.parent}: can't be written: {error.strerror}; name another --output") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(scratch / LOCK)):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise UserError(f"{scratch}: in use by another process; wait for it, or name another --output") from None
        file.close()  # the one who had it has removed it; another file may have its name


def clear(scratch: Path) -> None:
    """Removes a folder that is `locked`; its lock goes last, since whoever comes then may use the folder at once."""
    for path in scratch.iterdir():
        if path.name != LOCK:
            path.unlink()
    (scratch / LOCK).unlink()
    with suppress(OSError):  # another process has it
        scratch.rmdir()


def check_space(place: Path, needed: int, purpose: str) -> None:
    """Refuses what doesn't fit on the disk that a folder lies on.

    Raises:
      UserError: fewer bytes free than `needed`; it says what they are for.
    """
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{place}: {free:,} bytes free, {needed:,} needed for {purpose}; free some space, or choose an "
                        "--output on another disk")


def map_arrays(tree: Tree, scratch: Path) -> dict[str, np.ndarray]:
    """Array name to its values, mapped from a raw file in `scratch`; those that an earlier call finished stay.

    Raises:
      UserError: too little space.
    """
    # The copies aren't synced, which would take as long as the rest: a machine that went down may have lost them.
    boot = BOOT.read_text().strip() if BOOT.exists() else secrets.token_hex(8)
    record, source, done = scratch / RECORD, {"version": tree.version, "boot": boot}, []
    if record.exists() and (kept := files.read_json(record)).get("source") == source:
        done = kept["arrays"]
    for name, array in tree.arrays.items():
        if name not in done:
            _copy(tree, array, scratch / name)
            done.append(name)
            files.write_json(record, {"source": source, "arrays": done})
    return {name: np.memmap(scratch / name, array.dtype, "r", shape=array.shape)
            for name, array in tree.arrays.items()}


def new_file(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A map of a new file that has its whole space on the disk.

    Raises:
      UserError: too little space.
    """
    size = math.prod(shape) * dtype.itemsize
    with open(path, "wb+") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, a crash in a map
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{path}: no space left for {size:,} bytes; free some space, or choose an --output on "
                            "another disk") from None
        return np.memmap(file, dtype, "r+", shape=shape)


def _copy(tree: Tree, array: Array, path: Path) -> None:
    tree.copy(array, new_file(path, array.shape, array.dtype))
