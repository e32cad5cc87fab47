"""Token stores: tokenised documents as flat shards with a manifest, and the views that training reads.

This file owns the layout on disk. Its invariant: what is read is what `prepare` wrote (sizes at every open, sha256 by
`verify`), and a view is a pure function of the manifest, so position i is the same token on every machine.

    manifest.json                 written last: a folder without one isn't a store
    train/, heldout/
        NNNNN.tokens              <s> document </s> <s> document </s> ...; little-endian uint16, uint32 above 65536 rows
        NNNNN.ends                uint64: where each document ends (exclusive), in tokens of the shard
        NNNNN.docs.jsonl          {"id", "source"} per document
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from crystal_jax.config import digest
from crystal_jax.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
PARTS = ("tokens", "ends", "docs.jsonl")
ORDINALS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
"""Which shards of a split a view reads; they are in the order of the source's inputs."""
PARTIAL = ".partial-"
"""Between a file's name and the process that still writes it."""
HASH_BYTES = 1 << 22


def tokens_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class TokenStore:
    """A token store whose manifest and file sizes have been checked."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["digest"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.splits: dict[str, Any] = manifest["splits"]

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """The store in a folder, after a look at the size of every file.

        Raises:
          UserError: no store there, another format, a file that is missing or has another size.
        """
        path = Path(path)
        manifest = read_manifest(path)
        problems = (problem for file in _listed(path, manifest) if (problem := _size_problem(*file)))
        if problem := next(problems, None):
            raise UserError(f"{problem}; `verify {path}` lists all damage, `prepare` makes the store again")
        return cls(path, manifest)

    def view(self, split: str = "train", files: str = "all", first: float = 1.0) -> "TokenView":
        """The shards of a split, by ordinal (all, even, odd), cut to the leading share `first` of their tokens.

        Raises:
          UserError: nothing is left to read.
        """
        shards = self.splits[split]["shards"][ORDINALS[files]]
        dtype = np.dtype(tokens_dtype(self.vocab_size))
        folder = self.path / split
        view = TokenView([(folder / f"{shard['name']}.tokens", shard["tokens"]) for shard in shards], dtype, first)
        if view.num_tokens == 0:
            raise UserError(f"{folder}: no tokens in files = {files}, first = {first}; read more of it or prepare more")
        return view


class TokenView:
    """Shards one after the other as one stream of tokens, which may be read anywhere."""

    def __init__(self, shards: list[tuple[Path, int]], dtype: np.dtype[Any], first: float) -> None:
        self._paths = [path for path, _ in shards]
        self._dtype = dtype
        self._maps: dict[int, np.ndarray] = {}
        self._starts = np.concatenate([[0], np.cumsum([tokens for _, tokens in shards], dtype=np.int64)])
        self.num_tokens = int(self._starts[-1] * first)

    def read(self, start: int, length: int) -> np.ndarray:
        """int32 [length]: the tokens from `start` on, across shards where need be."""
        assert start >= 0 and start + length <= self.num_tokens, (start, length, self.num_tokens)
        out = np.empty(length, np.int32)
        done = 0
        shard = int(self._shard_of(start))
        while done < length:
            offset = start + done - self._starts[shard]
            piece = self._tokens(shard)[offset : offset + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int32 [len(starts), length]: the tokens from each start on."""
        starts = np.asarray(starts, np.int64)
        assert len(starts) == 0 or (starts.min() >= 0 and starts.max() + length <= self.num_tokens), self.num_tokens
        out = np.empty((len(starts), length), np.int32)
        shards = self._shard_of(starts)
        whole = starts + length <= self._starts[shards + 1]
        for shard in np.unique(shards[whole]):
            chosen = np.flatnonzero(whole & (shards == shard))
            windows = sliding_window_view(self._tokens(int(shard)), length)
            out[chosen] = windows[starts[chosen] - self._starts[shard]]
        for row in np.flatnonzero(~whole):
            out[row] = self.read(int(starts[row]), length)
        return out

    def _shard_of(self, position: Any) -> Any:
        return np.searchsorted(self._starts, position, side="right") - 1

    def _tokens(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            empty = self._starts[shard] == self._starts[shard + 1]  # an empty file can't be mapped
            mapped = np.empty(0) if empty else np.memmap(self._paths[shard], self._dtype, mode="r")
            self._maps[shard] = np.asarray(mapped)  # memmap's own indexing is slower
        return self._maps[shard]


class ShardWriter:
    """Writes the files of one shard under temporary names; `close` gives them their own.

    Leaving the context without `close` removes what was written.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._name, self._dtype = name, np.dtype(dtype)
        self._targets = {part: folder / f"{name}.{part}" for part in PARTS}
        self._partial = {
            part: path.with_name(f"{path.name}{PARTIAL}{os.getpid()}") for part, path in self._targets.items()
        }
        self._files = {part: open(path, "wb") for part, path in self._partial.items()}  # noqa: SIM115
        self._sha256 = {part: hashlib.sha256() for part in PARTS}
        self._tokens = self._documents = 0

    def add(self, ids: list[int], identity: dict[str, str]) -> None:
        """Appends one document: all its ids, with <s> and </s>, and the line that names it."""
        self._tokens += len(ids)
        self._documents += 1
        self._write("tokens", np.asarray(ids, self._dtype).tobytes())
        self._write("ends", np.asarray(self._tokens, "<u8").tobytes())
        self._write("docs.jsonl", json.dumps(identity).encode() + b"\n")

    def close(self) -> dict[str, Any]:
        """Gives the files their names and returns the shard's entry of the manifest."""
        sizes = {}
        for part, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[part] = file.tell()
            file.close()
            self._partial[part].replace(self._targets[part])
        sha256 = {part: value.hexdigest() for part, value in self._sha256.items()}
        return {"name": self._name, "tokens": self._tokens, "documents": self._documents, "bytes": sizes,
                "sha256": sha256}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for part, file in self._files.items():
            with contextlib.suppress(OSError):  # a full disk once more: what is buffered is given up
                file.close()
            self._partial[part].unlink(missing_ok=True)

    def _write(self, part: str, data: bytes) -> None:
        self._files[part].write(data)
        self._sha256[part].update(data)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, whose own digest has been checked.

    Raises:
      UserError: no manifest, a damaged one, another format.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "digest"}
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing, so {path} is no finished token store; run `prepare` (again)") from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: can't be read ({error}); run `prepare` again") from error
    if manifest.get("digest") != digest(body):
        raise UserError(f"{file}: damaged, its contents don't have the digest it states; run `prepare` again")
    if manifest["format"] != FORMAT:
        raise UserError(f"{file}: format {manifest['format']}; this version reads {FORMAT}; run `prepare` again")
    return manifest


def verify(path: str | Path, progress: Any = lambda read: None) -> list[str]:
    """A line per damaged file of a store (missing, another size, another sha256); an empty list for a good store.

    `progress` is called with the number of bytes read, now and then.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return [str(error)]
    problems = []
    for file, size, sha256 in _listed(path, manifest):
        problem = _size_problem(file, size, sha256)
        if problem is None and hash_file(file, progress) != sha256:
            problem = f"{file}: its contents changed: sha256 {hash_file(file)} isn't the manifest's {sha256}"
        if problem:
            problems.append(problem)
    return problems


def hash_file(path: Path, progress: Any = lambda read: None) -> str:
    """sha256 of a file, in hex."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BYTES):
            value.update(block)
            progress(len(block))
    return value.hexdigest()


def _listed(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, int, str]]:
    """(file, size, sha256) of every file of a store."""
    for split, contents in manifest["splits"].items():
        for shard in contents["shards"]:
            for part in PARTS:
                yield path / split / f"{shard['name']}.{part}", shard["bytes"][part], shard["sha256"][part]


def _size_problem(file: Path, size: int, _: str) -> str | None:
    try:
        found = os.stat(file).st_size
    except OSError as error:
        return f"{file}: can't be read ({error.strerror})"
    return None if found == size else f"{file}: {found} bytes, the manifest says {size}"
