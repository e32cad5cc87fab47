"""The command `verify`: re-reads a token store against its manifest.

Its invariant: a store without a problem holds, bit for bit, what `prepare` wrote, and no document holds the id of a
special token that `prepare` didn't write on purpose: text can't have injected one.
"""

import argparse
import hashlib
import itertools
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zstandard
from etils import epath
from tqdm import tqdm

from crystal_jax import files
from crystal_jax.data.control_ids import Scan
from crystal_jax.data.packing import plan_problems
from crystal_jax.data.store import (
    BLOCK,
    MANIFEST,
    PARTS,
    Listed,
    TokenStore,
    listed,
    read_manifest,
    size_problem,
    tokens_dtype,
)
from crystal_jax.errors import UserError, counted, reason

NAMED = 8
"""Blocks or tokens of a file that are named; the others are counted."""
Progress = Callable[[int], Any]
Shard = dict[str, Any]


def verify(path: files.Location, progress: Progress = lambda read: None) -> list[str]:
    """A line per problem of a token store, local or on gs://; an empty list for a good store.

    Found are: files that are missing, of another size, changed (of tokens: in which blocks) or swapped; files beside
    them that the manifest doesn't have; a manifest that is missing, damaged or contradicts itself; ends and documents
    that don't fit the tokens; control ids in documents; damaged packing plans.
    `progress` is called with the number of bytes read, now and then.
    """
    folder = files.as_path(path)
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    if problems := [f"{folder / MANIFEST}: {problem}" for problem in _contradictions(manifest)]:
        return problems
    checker = _Checker(folder, manifest, progress)
    shards = [(split, shard) for split, contents in manifest["splits"].items() for shard in contents["shards"]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and comparing let go of Python's lock
        problems = list(itertools.chain.from_iterable(pool.map(lambda found: list(checker.check(*found)), shards)))
    return [*problems, *_unlisted(folder, manifest), *plan_problems(TokenStore(folder, manifest), progress)]


def _unlisted(folder: epath.Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Files among the shards that are none of the store's: whoever takes all that lie there would read them too."""
    known = {file.name for file in listed(manifest)}
    for name in sorted(files.list_files(folder) - known):
        if name.partition("/")[0] in manifest["splits"]:
            yield f"{folder / name}: the manifest has no such file; remove it"


def _contradictions(manifest: dict[str, Any]) -> Iterator[str]:
    """Numbers of a manifest that can't all be right."""
    itemsize = np.dtype(tokens_dtype(manifest["tokenizer"]["vocab_size"])).itemsize
    for split, contents in manifest["splits"].items():
        shards = contents["shards"]
        for shard in shards:
            size = shard["bytes"]
            wanted = {"tokens": shard["tokens"] * itemsize, "ends": shard["documents"] * 8,
                      "crc32": -(-size["tokens"] // BLOCK) * 4}
            for part in (part for part, value in wanted.items() if size[part] != value):
                yield (f"{split}/{shard['name']} of {shard['tokens']} tokens and {shard['documents']} documents can't "
                       f"have {size[part]} bytes of {part}, but {wanted[part]}")
        for field in ("tokens", "documents"):
            if (total := sum(shard[field] for shard in shards)) != contents[field]:
                yield f"{split} has {contents[field]} {field}, but its shards have {total}"
        if len({shard["name"] for shard in shards}) < len(shards):
            yield f"two shards of {split} have the same name"


class _Checker:
    """Checks shards, several at a time."""

    def __init__(self, folder: epath.Path, manifest: dict[str, Any], progress: Progress) -> None:
        self._folder, self._manifest, self._progress = folder, manifest, progress
        self._store = TokenStore(folder, manifest)
        self._files = {file.name: file for file in listed(manifest)}
        self._owner = {file.sha256: file.name for file in self._files.values()}
        self._dtype = tokens_dtype(self._store.vocab_size)
        self._lock = threading.Lock()

    def check(self, split: str, shard: Shard) -> Iterator[str]:
        """The problems of a shard; what its files say is looked at once they are as prepared."""
        tokens, *others = (self._files[f"{split}/{shard['name']}.{part}"] for part in PARTS)
        scan = Scan(self._manifest["tokenizer"], self._manifest["control_ids"], self._dtype)
        problems = [self._problem(tokens, scan.feed), *(self._problem(file) for file in others)]
        if not any(problems):
            yield from self._contents(split, shard, scan)
        elif problems[0] and not problems[-1]:
            problems[0] += self._changed_blocks(tokens, others[-1])
        yield from filter(None, problems)

    def _problem(self, file: Listed, feed: Callable[[memoryview], None] = lambda block: None) -> str | None:
        """How a file differs from what was prepared; `feed` is given what it holds."""
        if problem := size_problem(self._folder, file):
            return problem
        value = hashlib.sha256()
        try:
            for block in files.read_blocks(self._folder / file.name):
                value.update(block)
                feed(block)
                with self._lock:
                    self._progress(len(block))
        except (OSError, UserError) as error:
            return f"{self._folder / file.name}: can't be read ({reason(error)})"
        sha256 = value.hexdigest()
        if sha256 == file.sha256:
            return None
        if owner := self._owner.get(sha256):
            return f"{self._folder / file.name}: holds the contents of {owner}; the two were swapped, or one copied"
        return f"{self._folder / file.name}: its contents changed: sha256 {sha256} isn't the manifest's {file.sha256}"

    def _changed_blocks(self, tokens: Listed, checksums: Listed) -> str:
        """Which blocks of a tokens file of the right size differ from their checksums."""
        if size_problem(self._folder, tokens):
            return ""
        wanted = np.frombuffer(files.read_bytes(self._folder / checksums.name), "<u4").tolist()
        blocks = (read[start : start + BLOCK] for read in files.read_blocks(self._folder / tokens.name)
                  for start in range(0, len(read), BLOCK))
        different = [index for index, (block, crc32) in enumerate(zip(blocks, wanted, strict=True))
                     if zlib.crc32(block) != crc32]
        named = ", ".join(f"{index} (bytes {index * BLOCK} to {min((index + 1) * BLOCK, tokens.bytes)})"
                          for index in different[:NAMED])
        return f"; {len(different)} of {len(wanted)} blocks differ: {named}{_others(len(different))}"

    def _contents(self, split: str, shard: Shard, scan: Scan) -> Iterator[str]:
        """What a shard's files say that can't be so, though they are as prepared."""
        tokens, ends_file, names, _ = (self._folder / split / f"{shard['name']}.{part}" for part in PARTS)
        lines = count_lines(files.read_bytes(names))
        if lines != shard["documents"]:
            yield f"{names}: names {lines} documents, the manifest has {shard['documents']}"
        ends = np.frombuffer(files.read_bytes(ends_file), "<u8").astype(np.int64)
        wrong = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
        last = ends[-1] if len(ends) else 0
        if len(wrong) or last != shard["tokens"]:
            what = f"document {wrong[0]} ends where it begins, or before" if len(wrong) else f"the last end is {last}"
            yield f"{ends_file}: {what}, in a shard of {shard['tokens']} tokens"
        elif found := list(scan.finish(ends)):
            documents = self._store.documents(split, shard["name"])
            for document, offset, problem in found[:NAMED]:
                start = int(ends[document - 1]) if document else 0
                name, _ = documents.identity(document)
                yield f"{tokens}: document {name}, token {offset - start} (token {offset} of the file): {problem}"
            if len(found) > NAMED:
                yield f"{tokens}:{_others(len(found))} of this kind"


def count_lines(data: bytes) -> int:
    """Of a compressed file, in as little memory as its largest block."""
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        return sum(block.count(b"\n") for block in iter(lambda: reader.read(1 << 20), b""))


def _others(count: int) -> str:
    return f" and {count - NAMED} more" if count > NAMED else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the folder that holds the store's manifest.json, local or gs://")


def main(args: argparse.Namespace) -> int:
    total = sum(file.bytes for file in listed(read_manifest(args.store)))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", mininterval=1) as bar:
        problems = verify(args.store, bar.update)
    if problems:
        print("\n".join(problems))
        raise UserError(f"{args.store}: {counted(len(problems), 'problem')}; the same `prepare` command with --repair "
                        "mends its shards, or copy the store again")
    print(f"{args.store}: every file is as prepared")
    return 0
