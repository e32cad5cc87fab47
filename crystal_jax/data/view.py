"""Views: the shards of a token store as one stream of tokens that may be read anywhere.

Its invariant: a view is a pure function of the manifest, so position i is the same token on every machine; and what it
holds in memory doesn't grow with the store: maps of local files are bounded in number and in resident pages, and files
on gs:// are read by byte ranges.
"""

import mmap
import os
import sys
import threading
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from crystal_jax import files
from crystal_jax.errors import FatalError, UserError

BLOCK = 1 << 16
"""Bytes of tokens that share a checksum in the part crc32."""
NUMBERS = ("ordinal", "tokens", "documents")
"""Fields of a shard's entry in the manifest that are numbers."""
OPEN_MAPS = 256
"""A map keeps a file open, and a process may often open only 1024."""
RESIDENT = 96 << 20
"""Bytes that may have been paged in before the maps give their pages back (benchmarks/loader.py weighs it)."""
READ_AROUND = 3 << 16
"""Bytes that the kernel maps around a short read, by measurement: a row's pages lie in one or two windows of 64 KiB."""


class Shards(Sequence[dict[str, Any]]):
    """The shards of a split as columns, about 130 bytes each: a store may have tens of thousands.

    An item is a shard's entry of the manifest, without its input and its sha256.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        entries = list(entries)
        self._names = [sys.intern(entry["name"]) for entry in entries]  # the same in other splits and views
        self._parts = list(entries[0]["bytes"]) if entries else []
        rows = [[*map(entry.get, NUMBERS), *map(entry["bytes"].get, self._parts)] for entry in entries]
        self._rows = np.array(rows, np.int64).reshape(len(rows), len(NUMBERS) + len(self._parts))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        numbers = self._rows[index].tolist()
        return {"name": self._names[index], **dict(zip(NUMBERS, numbers, strict=False)),
                "bytes": dict(zip(self._parts, numbers[len(NUMBERS) :], strict=True))}

    def named(self, name: str) -> dict[str, Any]:
        """The entry of the shard of this name."""
        entry: dict[str, Any] = self[self._names.index(name)]
        return entry

    def total(self, field: str) -> int:
        return int(self._rows[:, NUMBERS.index(field)].sum())


@dataclass(frozen=True, slots=True)
class ShardSpan:
    """A shard in a view."""

    name: str
    ordinal: int
    start: int
    """Of its first token, in tokens of the view."""
    tokens: int
    """That the view reads: all of the shard, but of the last shard perhaps only the leading ones."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length) of a shard."""

    shard: str
    start: int
    length: int


class Maps:
    """The memory maps that all views of the process share."""

    def __init__(self) -> None:
        self._maps: OrderedDict[tuple[object, int], tuple[mmap.mmap, np.ndarray]] = OrderedDict()
        self._touched = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[object, int], path: str, size: int, touching: int) -> np.ndarray:
        """uint8 [size]: the contents of a file, of which `touching` bytes are about to be read.

        Raises:
          UserError: the file is missing, or of another size.
        """
        with self._lock:
            found = self._maps.get(key)
            if found is None:
                mapped = _map(path, size)
                found = self._maps[key] = mapped, np.frombuffer(mapped, np.uint8)
                if len(self._maps) > OPEN_MAPS:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(key)
            self._touched += touching + READ_AROUND
            if self._touched > RESIDENT:
                self._touched = 0
                for mapped, _ in self._maps.values():
                    mapped.madvise(mmap.MADV_DONTNEED)  # clean pages of a file: they stay in the kernel's cache
            return found[1]


_MAPS = Maps()


def _map(path: str, size: int) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found == size:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); put back the file") from error
    raise UserError(f"{path}: {found} bytes, the manifest says {size}; put the file back from a copy")


class TokenView:
    """Shards one after the other as one stream of tokens.

    folder: of the split. shards: those of the view. first: the leading share of their tokens that is read.
    """

    def __init__(self, folder: epath.Path, shards: Shards, dtype: str, first: float = 1.0,
                 check_blocks: bool = False) -> None:
        self.num_tokens = int(shards.total("tokens") * first)
        self.shards: list[ShardSpan] = []
        self._sizes = array("q")  # in bytes, of the whole shard
        start = 0
        for shard in shards:
            if tokens := min(shard["tokens"], self.num_tokens - start):
                self.shards.append(ShardSpan(shard["name"], shard["ordinal"], start, tokens))
                self._sizes.append(shard["bytes"]["tokens"])
                start += tokens
        self._dtype = np.dtype(dtype)
        self._folder = os.fspath(folder)
        self._remote = files.is_remote(folder)
        self._starts = [*(shard.start for shard in self.shards), self.num_tokens]
        self._owner = object()
        self._checked = _CheckedBlocks(self._path, self._sizes) if check_blocks else None

    def read(self, start: int, length: int) -> np.ndarray:
        """int32 [length]: the tokens from `start` on, across shards where need be."""
        return self.ragged([start], [length])

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int32 [len(starts), length]: the tokens from each start on."""
        return self.ragged(starts, np.full(len(starts), length)).reshape(len(starts), length)

    def ragged(self, starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [sum(lengths)]: the tokens [start, start + length) for each pair, one after the other.

        On gs:// all of them are under way at once.

        Raises:
          UserError: a file is missing, or of another size.
          FatalError: with check_blocks, a block that isn't what was prepared.
        """
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        assert not len(starts) or (starts.min() >= 0 and lengths.min() >= 0 and
                                   (starts + lengths).max() <= self.num_tokens), (starts, lengths, self.num_tokens)
        pieces = [piece for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
                  for piece in self._split(start, length)]
        if self._checked:
            self._checked.check(pieces, self._dtype.itemsize)
        out = np.empty(int(lengths.sum()), np.int32)
        done = 0
        for tokens in self._read_remote(pieces) if self._remote else self._read_local(pieces):
            out[done : done + len(tokens)] = tokens
            done += len(tokens)
        return out

    def locate(self, start: int, length: int) -> list[Piece]:
        """Where the tokens [start, start + length) lie in their shards."""
        assert start >= 0 and length >= 0 and start + length <= self.num_tokens, (start, length, self.num_tokens)
        return [Piece(self.shards[shard].name, begin, count) for shard, begin, count in self._split(start, length)]

    def _split(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first token in it, number of tokens) of each piece."""
        shard = bisect_right(self._starts, start) - 1
        while length > 0:
            count = min(length, self._starts[shard + 1] - start)
            yield shard, start - self._starts[shard], count
            start, length, shard = start + count, length - count, shard + 1

    def _path(self, shard: int) -> str:
        """Of its tokens; made when it is asked for, since a path takes more memory than all else about a shard."""
        return f"{self._folder}/{self.shards[shard].name}.tokens"

    def _read_local(self, pieces: Iterable[tuple[int, int, int]]) -> Iterator[np.ndarray]:
        size = self._dtype.itemsize
        for shard, start, count in pieces:
            data = _MAPS.get((self._owner, shard), self._path(shard), self._sizes[shard], count * size)
            yield data[start * size : (start + count) * size].view(self._dtype)

    def _read_remote(self, pieces: Iterable[tuple[int, int, int]]) -> Iterator[np.ndarray]:
        size = self._dtype.itemsize
        found = files.read_many((self._path(shard), start * size, count * size) for shard, start, count in pieces)
        for data in found:
            yield np.frombuffer(data, self._dtype)


class _CheckedBlocks:
    """Which blocks have been compared with their checksum: each is, when it is first read."""

    def __init__(self, path: Callable[[int], str], sizes: Sequence[int]) -> None:
        self._path, self._sizes = path, sizes
        self._first = np.concatenate([[0], np.cumsum([-(-size // BLOCK) for size in sizes])])
        self._checked = np.zeros(self._first[-1], bool)

    def check(self, pieces: Iterable[tuple[int, int, int]], itemsize: int) -> None:
        """Raises FatalError on the first block of the pieces that differs."""
        todo = {}
        for shard, start, count in pieces:
            for block in range(start * itemsize // BLOCK, ((start + count) * itemsize - 1) // BLOCK + 1):
                if not self._checked[self._first[shard] + block]:
                    todo[shard, block] = min(BLOCK, self._sizes[shard] - block * BLOCK)
        if not todo:
            return
        blocks = files.read_many((self._path(shard), block * BLOCK, size) for (shard, block), size in todo.items())
        wanted = files.read_many((f"{self._path(shard).removesuffix('.tokens')}.crc32", 4 * block, 4)
                                 for shard, block in todo)
        for (shard, block), data, crc32 in zip(todo, blocks, wanted, strict=True):
            if zlib.crc32(data) != int.from_bytes(crc32, "little"):
                raise FatalError(f"{self._path(shard)}: block {block} (bytes {block * BLOCK} to "
                                 f"{block * BLOCK + len(data)}) isn't what was prepared; `verify` lists all damage, "
                                 "put the file back from a copy or run the same `prepare` command with --repair")
            self._checked[self._first[shard] + block] = True


