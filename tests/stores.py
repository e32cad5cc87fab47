"""Small token stores with known contents, written as `prepare` writes them; used by several tests."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crystal_jax import files
from crystal_jax.data import store
from crystal_jax.data.store import ShardWriter

BOS, EOS = 1, 2
SPECIAL = (0, BOS, EOS)


def ordinary(count: int, start: int, vocab_size: int) -> list[int]:
    """`count` ids from `start` on, of text: they go round above the special ones."""
    return [len(SPECIAL) + (start + index) % (vocab_size - len(SPECIAL)) for index in range(count)]


def make_store(path: Path, lengths: Sequence[Sequence[int]], vocab_size: int = 300, **changes: Any) -> dict[str, Any]:
    """A store whose two splits have shards with documents of these lengths (2 or more); returns its manifest.

    Shard i has the ordinal i, document j of it the id "i:j". `changes` go into the manifest.
    """
    numbers = itertools.count(step=7)
    splits = {}
    for split in store.SPLITS:
        (path / split).mkdir(parents=True)
        shards = []
        for index, documents in enumerate(lengths):
            with ShardWriter(path / split, f"{index:05d}", store.tokens_dtype(vocab_size)) as writer:
                for number, length in enumerate(documents):
                    ids = [BOS, *ordinary(length - 2, next(numbers), vocab_size), EOS]
                    writer.add(ids, {"id": f"{index}:{number}", "source": f"file {index}"})
                shards.append({"ordinal": index, "input": f"file {index}", **writer.close()})
        splits[split] = {field: sum(shard[field] for shard in shards) for field in ("tokens", "documents")}
        splits[split]["shards"] = shards
    tokenizer = {"fingerprint": "f" * 16, "vocab_size": vocab_size, "file": "tokenizer.json", "bos_id": BOS,
                 "eos_id": EOS, "special_ids": list(SPECIAL)}
    return store.write_manifest(path, {"format": store.FORMAT, "name": path.name, "tokenizer": tokenizer,
                                       "control_ids": [], "splits": splits, **changes})


def upload(local: Path, remote: str) -> None:
    for path in local.rglob("*"):
        if path.is_file():
            files.write_bytes(f"{remote}/{path.relative_to(local).as_posix()}", path.read_bytes())


def tokens_of(path: Path, split: str, names: Sequence[str], dtype: str = "<u2") -> np.ndarray:
    """Of these shards one after the other, as numpy reads them."""
    return np.concatenate([np.fromfile(path / split / f"{name}.tokens", dtype) for name in names])
