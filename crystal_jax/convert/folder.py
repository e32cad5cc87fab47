"""Tensors on disk: safetensors files written one tensor at a time, and both published formats read.

Writing holds one block of a tensor in memory, whatever the size of the model; reading gives views of mapped files, so
that no tensor is copied.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from crystal_jax.convert.computed import BLOCK, Computed, rounded
from crystal_jax.errors import UserError, install

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtype to its code in the header (https://github.com/huggingface/safetensors#format)."""

TYPES = {code: np.dtype(name) for name, code in CODES.items()} | {
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}
"""The inverse, with what a folder may hold beside parameters."""

Reader = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Blocks = Callable[[str], Iterable[np.ndarray]]
"""The rows of a tensor by its name, block by block, as they are stored."""


def plan_files(entries: Iterable[Entry], max_shard_size: int) -> dict[str, list[Entry]]:
    """File name to its tensors, in order: one file, or shards of at most `max_shard_size` bytes.

    A tensor that is larger than a shard has one to itself.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_text(files: dict[str, list[Entry]]) -> str:
    """model.safetensors.index.json of a plan with several files."""
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def write_safetensors(path: Path, entries: list[Entry], blocks: Blocks) -> None:
    """Writes one file, fetching each tensor's blocks when their turn comes, and waits until it is on the disk.

    The bits go out as they are in memory: little-endian, like every platform that JAX runs on.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {"dtype": CODES[entry.dtype.name], "shape": entry.shape,
                              "data_offsets": (offset, offset + entry.nbytes)}
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            size = sum(file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                       for block in blocks(entry.name))
            assert size == entry.nbytes, (entry, size)
        file.flush()
        os.fsync(file.fileno())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal bit by bit, looked at some rows at a time: 0.0 differs from -0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    bits, step = np.dtype(f"u{a.dtype.itemsize}"), max(1, BLOCK // max(1, math.prod(a.shape[1:])))
    return all(np.array_equal(a[start : start + step].view(bits), b[start : start + step].view(bits))
               for start in range(0, len(a), step))


@dataclass(frozen=True)
class Safetensors:
    """Tensors as one file or as shards with an index, stored in `dtype`."""

    tensors: dict[str, Computed]
    """In file order."""
    dtype: np.dtype
    max_shard_size: int

    @cached_property
    def plan(self) -> dict[str, list[Entry]]:
        entries = [Entry(name, tensor.shape, self.dtype) for name, tensor in self.tensors.items()]
        return plan_files(entries, self.max_shard_size)

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def files(self) -> list[str]:
        return [*self.plan, INDEX] if len(self.plan) > 1 else list(self.plan)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entries in self.plan.values() for entry in entries)

    def write(self, place: Path) -> None:
        for name, entries in self.plan.items():
            write_safetensors(place / name, entries, self._blocks)
        if len(self.plan) > 1:
            (place / INDEX).write_text(index_text(self.plan))

    def difference(self, place: Path) -> str:
        if len(self.plan) > 1 and (place / INDEX).read_text() != index_text(self.plan):
            return f"its {INDEX} differs"
        readers = open_tensors(place)
        if names := sorted(set(readers) ^ set(self.tensors)):
            return f"its tensors differ from the model's in {names[0]}"
        for name, tensor in self.tensors.items():
            found, start = readers[name](), 0
            if (found.dtype, found.shape) != (self.dtype, tensor.shape):
                return f"its tensor {name} is {found.dtype.name} {found.shape}, not {self.dtype.name} {tensor.shape}"
            for expected in self._blocks(name):
                if not same_bits(found[start : start + len(expected)], expected):
                    return f"its tensor {name} has other values"
                start += len(expected)
        return ""

    def _blocks(self, name: str) -> Iterator[np.ndarray]:
        tensor = self.tensors[name]
        shown = f"{name} (from {tensor.source})" if tensor.source else name
        for start, stop in tensor.ranges:
            yield rounded(shown, tensor.rows(start, stop), self.dtype)


def open_tensors(folder: Path) -> dict[str, Reader]:
    """Tensor name to a function that reads it: .safetensors files if there are any, else .bin shards (needs torch).

    Raises:
      UserError: no weights, a file that the index names and that isn't there, a damaged file, a tensor stored twice.
    """
    for single, opened in ((SINGLE, _open_safetensors), ("pytorch_model.bin", _open_bin)):
        index = folder / f"{single}.index.json"
        if index.exists():
            paths = _indexed_files(index)
        elif (folder / single).exists():
            paths = [folder / single]
        else:
            continue
        readers: dict[str, Reader] = {}
        for path in paths:
            for name, reader in opened(path):
                if name in readers:
                    raise UserError(f"{path}: {name} is also in another file of the folder; one of the two must go")
                readers[name] = reader
        return readers
    raise UserError(f"{folder}: no weights there: neither {SINGLE} nor pytorch_model.bin, nor an index of either")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weights ({error!r}); fetch it again") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} must be the name of a file in the same folder")
        if not (index.parent / name).exists():
            raise UserError(f"{index.parent / name}: missing, though {index.name} names it; fetch it again")
    return [index.parent / name for name in names]


def _open_safetensors(path: Path) -> Iterator[tuple[str, Reader]]:
    try:
        safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read as safetensors ({_line(error)}); fetch it again") from None
    data = np.memmap(path, np.uint8, "r")  # safe_open has compared the header with the file's size
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for name, found in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        if found["dtype"] not in TYPES:
            yield name, partial(_unreadable, path, name, found["dtype"])
            continue
        first, end = found["data_offsets"]
        yield name, partial(_view, data[start + first : start + end], TYPES[found["dtype"]], found["shape"])


def _view(data: np.ndarray, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    return data.view(dtype).reshape(shape)


def _open_bin(path: Path) -> Iterator[tuple[str, Reader]]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading .bin files needs torch, which isn't installed; {install('torch')}") from None
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or unsafe file
        # Torch's advice for what isn't a tensor is to run the code in the file.
        found = "it holds more than tensors, or is damaged" if "weights_only" in str(error) else _line(error)
        raise UserError(f"{path}: can't be read as PyTorch weights ({found}); fetch it again") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not tensors by name; it isn't a file of weights")
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            yield str(name), partial(_to_numpy, path, str(name), tensor)


def _to_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    if tensor.layout != torch.strided:
        _unreadable(path, name, str(tensor.layout).removeprefix("torch."))
    try:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # numpy has no such type: the same bits under another name
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError):  # a type that numpy hasn't, or a tensor without values
        return _unreadable(path, name, str(tensor.dtype).removeprefix("torch."))


def _unreadable(path: Path, name: str, kind: str) -> NoReturn:
    raise UserError(f"{path}: the tensor {name} is {kind}; save it as a dense one in float32, bfloat16 or float16")


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
