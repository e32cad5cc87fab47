"""Tensors on disk: safetensors files written one tensor at a time, and both published formats read.

Writing holds one tensor in memory, whatever the size of the model; reading maps the files and copies a tensor only when
it is asked for.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from crystal_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtype to its code in the header (https://github.com/huggingface/safetensors#format)."""

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


def write_safetensors(path: Path, entries: list[Entry], values: Callable[[str], np.ndarray]) -> None:
    """Writes one file, fetching each tensor by name when its turn comes, and waits until it is on the disk.

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
            array = values(entry.name)
            assert (array.shape, array.dtype) == (entry.shape, entry.dtype), (entry, array.shape, array.dtype)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal bit by bit: 0.0 differs from -0.0."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))


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
        file = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read as safetensors ({_line(error)}); fetch it again") from None
    for name in file.keys():  # noqa: SIM118 (not a dict)
        yield name, partial(file.get_tensor, name)


def _open_bin(path: Path) -> Iterator[tuple[str, Reader]]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading .bin files needs torch, which isn't installed; pip install torch") from None
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or unsafe file
        raise UserError(f"{path}: can't be read as PyTorch weights ({_line(error)})") from None
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            yield name, partial(_to_numpy, tensor, torch.bfloat16, torch.int16)


def _to_numpy(tensor: Any, bfloat16: Any, int16: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == bfloat16:  # numpy has no such type: the same bits under another name
        return tensor.view(int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
