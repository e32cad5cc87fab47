"""Token stores: tokenised documents as flat shards with a manifest.

This file owns the layout on disk. Its invariant: what is read is what `prepare` wrote (files and sizes at every open,
blocks at their first touch where asked, everything by `verify`).

    manifest.json                 written last: a folder without one isn't a store; its "control_ids" are the ids of
                                  special tokens that documents may hold besides their <s> and </s>
    train/, heldout/
        NNNNN.tokens              <s> document </s> <s> document </s> ...; little-endian uint16, uint32 above 65536 rows
        NNNNN.ends                uint64: where each document ends (exclusive), in tokens of the shard
        NNNNN.docs.jsonl.zst      {"id", "source"} per document
        NNNNN.crc32               uint32: zlib.crc32 of each 64 KiB of NNNNN.tokens, the last may be shorter
    packing/                      plans of packed rows, where they were asked for
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from etils import epath

from crystal_jax import files
from crystal_jax.config import digest
from crystal_jax.data.view import BLOCK, Piece, Shards, ShardSpan, TokenView
from crystal_jax.errors import UserError, counted, reason
from crystal_jax.files import Location

__all__ = ["BLOCK", "FORMAT", "MANIFEST", "ORDINALS", "PARTS", "SPLITS", "Documents", "Listed", "Piece",
           "ShardSpan", "ShardWriter", "TokenStore", "TokenView", "describe_tokenizer", "listed",
           "missing_or_resized", "read_digested", "read_manifest", "size_problem", "tokens_dtype", "write_manifest"]

FORMAT = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
PARTS = ("tokens", "ends", "docs.jsonl.zst", "crc32")
ORDINALS = {"all": (0, 1), "even": (0,), "odd": (1,)}
"""Which shards of a split a view reads: those whose ordinal leaves one of these when divided by two."""
MADE_AGAIN = "copy the store again, or remove its folder and run the same `prepare` command"
"""The way out where the manifest itself is no use: no other file says how the store was made."""
BUFFER = 1 << 20
"""Bytes that a writer collects before it hashes and writes them; a multiple of BLOCK."""
CACHED_DOCUMENTS = 4
"""Shards whose list of documents a store keeps in memory."""


def tokens_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The manifest's entry "tokenizer" for a `Tokenizer`: `verify` scans for ids of special tokens by it."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "file": tokenizer.path.name,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "special_ids": sorted(tokenizer.special_ids),
    }


class Documents:
    """The documents of a shard, in order; a line about one is parsed when it is asked for."""

    def __init__(self, ends: np.ndarray, lines: list[bytes]) -> None:
        self.ends = ends
        """int64: exclusive, in tokens of the shard."""
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def identity(self, index: int) -> tuple[str, str]:
        """(id, source file) of a document."""
        line = json.loads(self._lines[index])
        return line["id"], line["source"]

    @property
    def ids(self) -> list[str]:
        return [self.identity(index)[0] for index in range(len(self))]

    def find(self, identity: str) -> list[int]:
        """Indices of the documents with this id."""
        begin = json.dumps({"id": identity}).encode()[:-1] + b","
        return [index for index, line in enumerate(self._lines) if line.startswith(begin)]


class TokenStore:
    """A token store whose manifest and files have been looked at."""

    def __init__(self, path: epath.Path, manifest: dict[str, Any], check_blocks: bool = False) -> None:
        self.path = path
        self.manifest = {key: value for key, value in manifest.items() if key not in ("inputs", "splits")}
        """What it says about the store as a whole."""
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["digest"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.splits: dict[str, Any] = {split: {**contents, "shards": Shards(contents["shards"])}
                                       for split, contents in manifest["splits"].items()}
        self._check_blocks = check_blocks
        self._documents = lru_cache(CACHED_DOCUMENTS)(self._read_documents)

    @classmethod
    def open(cls, path: Location, check_blocks: bool = False) -> "TokenStore":
        """The store in a folder, after a look at its files: the size of each, on gs:// only that it is there.

        With check_blocks its views compare each block with its checksum when they first read it.

        Raises:
          UserError: no store there, another format, a file that is missing or has another size.
        """
        folder = files.as_path(path)
        manifest = read_manifest(folder)
        if problem := next(missing_or_resized(folder, manifest), None):
            raise UserError(f"{problem[1]}; `verify {path}` lists all damage, the same `prepare` command mends it")
        return cls(folder, manifest, check_blocks)

    def view(self, split: str = "train", files: str = "all", first: float = 1.0) -> TokenView:
        """The shards of a split, by ordinal (all, even, odd), cut to the leading share `first` of their tokens.

        Raises:
          UserError: nothing is left to read.
        """
        shards = self.splits[split]["shards"]
        folder, total = self.path / split, len(shards)
        if files != "all":
            shards = Shards(shard for shard in shards if shard["ordinal"] % 2 in ORDINALS[files])
        if not len(shards):
            raise UserError(f"{self.path}: has {counted(total, 'input')}, and none for files = {files}; give `prepare` "
                            "several files, or read files = all")
        view = TokenView(folder, shards, tokens_dtype(self.vocab_size), first, self._check_blocks)
        if view.num_tokens == 0:
            raise UserError(f"{folder}: no tokens in files = {files}, first = {first}; read more of it or prepare more")
        return view

    def documents(self, split: str, shard: str) -> Documents:
        """The documents of a shard, by its name; the last few that were asked for are kept in memory.

        Raises:
          UserError: a damaged file.
        """
        return self._documents(split, shard)

    def _read_documents(self, split: str, shard: str) -> Documents:
        entry = self.splits[split]["shards"].named(shard)
        ends, lines = (self.path / split / f"{shard}.{part}" for part in ("ends", "docs.jsonl.zst"))
        data = files.read_many([(ends, 0, entry["bytes"]["ends"]), (lines, 0, entry["bytes"]["docs.jsonl.zst"])])
        try:
            text = zstandard.ZstdDecompressor().decompressobj().decompress(data[1])
        except zstandard.ZstdError as error:
            raise UserError(f"{lines}: damaged ({error}); `verify {self.path}` lists all damage") from error
        found = Documents(np.frombuffer(data[0], "<u8").astype(np.int64), text.splitlines())
        if not len(found.ends) == len(found) == entry["documents"]:
            raise UserError(f"{lines}: {len(found)} documents, but {len(found.ends)} ends and {entry['documents']} in "
                            f"the manifest; `verify {self.path}` lists all damage")
        return found


class ShardWriter:
    """Writes the files of one shard into a local folder; they are whole when `close` returns.

    Leaving the context without `close` removes them.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._name, self._dtype = name, np.dtype(dtype)
        self._paths = {part: folder / f"{name}.{part}" for part in PARTS}
        self._files = {part: open(path, "wb") for part, path in self._paths.items()}  # noqa: SIM115
        self._sha256 = {part: hashlib.sha256() for part in PARTS}
        # One thread: with more the frame is cut elsewhere, and the same documents would give other bytes.
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        self._buffers = {part: bytearray() for part in PARTS}
        self._tokens = self._documents = 0
        self._closed = False

    def add(self, ids: Any, identity: dict[str, str]) -> None:
        """Appends one document: all its ids (list or array), with <s> and </s>, and the line that names it."""
        narrow = np.asarray(ids, self._dtype)
        assert not isinstance(ids, np.ndarray) or np.array_equal(narrow, ids), "an array's ids wrap, a list's raise"
        self._tokens += narrow.size
        self._documents += 1
        self._write("tokens", narrow.tobytes())
        self._write("ends", self._tokens.to_bytes(8, "little"))
        self._write("docs.jsonl.zst", json.dumps(identity).encode() + b"\n")

    def close(self) -> dict[str, Any]:
        """Completes the files and returns the shard's entry of the manifest, but for its ordinal."""
        sizes = {}
        for part, file in self._files.items():
            self._flush(part, len(self._buffers[part]))
            if part == "docs.jsonl.zst":
                self._out(part, self._compressor.flush())
            file.flush()
            os.fsync(file.fileno())
            sizes[part] = file.tell()
            file.close()
        self._closed = True
        sha256 = {part: value.hexdigest() for part, value in self._sha256.items()}
        return {"name": self._name, "tokens": self._tokens, "documents": self._documents, "bytes": sizes,
                "sha256": sha256}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._closed:
            return
        for part, file in self._files.items():
            with contextlib.suppress(OSError):  # a full disk once more: what is buffered is given up
                file.close()
            self._paths[part].unlink(missing_ok=True)

    def _write(self, part: str, data: bytes) -> None:
        self._buffers[part] += data
        if len(self._buffers[part]) >= BUFFER:
            self._flush(part, len(self._buffers[part]) // BLOCK * BLOCK)

    def _flush(self, part: str, size: int) -> None:
        """Hashes and writes the first `size` bytes that are collected; of tokens, whole blocks until the last."""
        buffer = self._buffers[part]
        data = bytes(memoryview(buffer)[:size])
        del buffer[:size]
        if part == "tokens":
            blocks = (zlib.crc32(data[start : start + BLOCK]) for start in range(0, size, BLOCK))
            self._write("crc32", b"".join(crc32.to_bytes(4, "little") for crc32 in blocks))
        self._out(part, self._compressor.compress(data) if part == "docs.jsonl.zst" else data)

    def _out(self, part: str, data: bytes) -> None:
        self._files[part].write(data)
        self._sha256[part].update(data)


def read_manifest(path: Location) -> dict[str, Any]:
    """The manifest of a store, whose own digest has been checked.

    Raises:
      UserError: no manifest, a damaged one, another format.
    """
    file = files.as_path(path) / MANIFEST
    missing = f"{file}: missing, so {path} is no finished token store; run `prepare` (again)"
    manifest = read_digested(file, missing, MADE_AGAIN)
    if manifest["format"] != FORMAT:
        raise UserError(f"{file}: format {manifest['format']}; this version reads {FORMAT}; {MADE_AGAIN}")
    return manifest


def read_digested(file: epath.Path, missing: str, way_out: str) -> dict[str, Any]:
    """A manifest that states its own digest, which has been checked.

    Raises:
      UserError: no such file (the line `missing`), or a damaged one.
    """
    try:
        manifest = json.loads(files.read_bytes(file))
        body = {key: value for key, value in manifest.items() if key != "digest"}
    except FileNotFoundError as error:
        raise UserError(missing) from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: can't be read ({reason(error)}); {way_out}") from error
    if manifest.get("digest") != digest(body):
        raise UserError(f"{file}: damaged, its contents don't have the digest it states; {way_out}")
    return manifest


def write_manifest(path: Location, manifest: dict[str, Any]) -> dict[str, Any]:
    """Completes a store: the manifest with its own digest, which is also returned."""
    manifest = {**manifest, "digest": digest(manifest)}
    files.write_json(files.as_path(path) / MANIFEST, manifest)
    return manifest


class Listed(NamedTuple):
    """A file of a store, as its manifest has it."""

    name: str
    """Relative to the store's folder."""
    bytes: int
    sha256: str


def listed(manifest: dict[str, Any]) -> Iterator[Listed]:
    """Every file of a store but the manifest."""
    for split, contents in manifest["splits"].items():
        for shard in contents["shards"]:
            for part in PARTS:
                yield Listed(f"{split}/{shard['name']}.{part}", shard["bytes"][part], shard["sha256"][part])


def missing_or_resized(path: epath.Path, manifest: dict[str, Any]) -> Iterator[tuple[Listed, str]]:
    """Files that a look at the store finds damaged, each with what is wrong; on gs:// only those that aren't there."""
    if files.is_remote(path):
        there = files.list_files(path)
        yield from ((file, f"{path / file.name}: missing") for file in listed(manifest) if file.name not in there)
        return
    sizes = {f"{split}/{name}": size for split in manifest["splits"] for name, size in _sizes(path / split)}
    yield from ((file, problem) for file in listed(manifest)
                if sizes.get(file.name) != file.bytes and (problem := size_problem(path, file)))


def _sizes(folder: epath.Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the files in a local folder: a third of the time of looking at each by its path."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                yield entry.name, entry.stat().st_size


def size_problem(path: epath.Path, file: Listed) -> str | None:
    """What a look at a file finds wrong, without reading it."""
    try:
        found = files.file_size(path / file.name)
    except OSError as error:
        return f"{path / file.name}: can't be read ({error.strerror or error})"
    return None if found == file.bytes else f"{path / file.name}: {found} bytes, the manifest says {file.bytes}"
