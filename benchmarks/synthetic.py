"""Token stores for benchmarks: of real text repeated, and of sparse files as large as the published corpora.

Owns their making; nothing here is timed. Both kinds have a manifest whose sizes and counts are true, so that they are
opened by the same code as prepared ones. A sparse file's holes read as <unk>; `write_at` fills chosen spans with text.
"""

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crystal_jax.data import store
from crystal_jax.data.store import BLOCK, ShardWriter, describe_tokenizer, tokens_dtype, write_manifest
from crystal_jax.data.tokenizer import Tokenizer, train_tokenizer
from crystal_jax.errors import UserError

DOCUMENT_TOKENS = 1000
"""Of a document in a sparse store, for the sizes of its other files."""
DOCUMENT_BYTES = 24
"""Of its compressed line."""


def make_tokenizer(root: Path, vocab_size: int = 2048) -> Path:
    """root/tokenizer.json, trained on some of Python's standard library."""
    path = root / "tokenizer.json"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        train_tokenizer([text for _, text in _modules(40)], vocab_size).save(str(path))
    return path


def make_documents(tokenizer: Path, modules: int = 160) -> list[tuple[str, np.ndarray]]:
    """(id, ids with <s> and </s>) of the first modules of Python's standard library, about 5 MB of text in all."""
    loaded = Tokenizer.load(tokenizer)
    names, texts = zip(*_modules(modules), strict=True)
    return [(name, np.array([loaded.bos_id, *ids, loaded.eos_id], np.int32))
            for name, ids in zip(names, loaded.encode_documents(texts), strict=True)]


def _modules(count: int) -> list[tuple[str, str]]:
    """(name, text)."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:count]
    return [(path.name, text) for path in paths if (text := path.read_text(encoding="utf-8"))]


def write_repeated(root: Path, name: str, tokenizer: Path, shards: int, tokens: int) -> Path:
    """The store root/name of `shards` shards that hold about `tokens` tokens together, the documents in turn."""
    path = root / name
    if (path / store.MANIFEST).exists():
        return path
    loaded = Tokenizer.load(tokenizer)
    documents = make_documents(tokenizer)
    (path / "train").mkdir(parents=True)
    entries, turn = [], 0
    for ordinal in range(shards):
        written = 0
        with ShardWriter(path / "train", f"{ordinal:05d}", tokens_dtype(loaded.vocab_size)) as shard:
            while written * shards < tokens:
                document, ids = documents[turn % len(documents)]
                shard.add(ids, {"id": f"{document}#{turn // len(documents)}", "source": document})
                written, turn = written + len(ids), turn + 1
            entries.append({**shard.close(), "ordinal": ordinal, "input": f"{ordinal:05d}"})
    _write_manifest(path, name, loaded, entries)
    return path


def write_sparse(root: Path, name: str, tokenizer: Tokenizer, sizes: Mapping[int, int]) -> int:
    """The store root/name of one sparse shard per ordinal, sizes in tokens; returns the bytes its files claim.

    Raises:
      UserError: a file system without sparse files.
    """
    path = root / name
    width = np.dtype(tokens_dtype(tokenizer.vocab_size)).itemsize
    (path / "train").mkdir(parents=True)
    entries, claimed = [], 0
    for ordinal, tokens in sorted(sizes.items()):
        documents = max(1, tokens // DOCUMENT_TOKENS)
        bytes_of = {"tokens": tokens * width, "ends": documents * 8, "docs.jsonl.zst": documents * DOCUMENT_BYTES,
                    "crc32": -(-tokens * width // BLOCK) * 4}
        for part, size in bytes_of.items():
            with open(path / "train" / f"{ordinal:05d}.{part}", "wb") as file:
                file.truncate(size)
        entries.append({"name": f"{ordinal:05d}", "ordinal": ordinal, "input": f"{ordinal:05d}", "tokens": tokens,
                        "documents": documents, "bytes": bytes_of, "sha256": dict.fromkeys(bytes_of, "")})
        claimed += sum(bytes_of.values())
    first = path / "train" / f"{entries[0]['name']}.tokens"
    if (held := first.stat().st_blocks * 512) > BLOCK:
        raise UserError(f"{root}: holds no sparse files ({first.name} takes {held:,} bytes); choose a folder on ext4")
    _write_manifest(path, name, tokenizer, entries)
    return claimed


def _write_manifest(path: Path, name: str, tokenizer: Tokenizer, entries: list[dict]) -> None:
    totals = {field: sum(entry[field] for entry in entries) for field in ("tokens", "documents")}
    write_manifest(path, {
        "format": store.FORMAT, "name": name, "source": "synthetic", "control_ids": [], "heldout": 0.0,
        "inputs": [{"name": entry["input"], "files": 1, "bytes": 0} for entry in entries],
        "tokenizer": describe_tokenizer(tokenizer), "dtype": tokens_dtype(tokenizer.vocab_size),
        "documents": {"read": totals["documents"], "kept": totals["documents"], "dropped": {}},
        "splits": {"train": {**totals, "shards": entries}, "heldout": {"tokens": 0, "documents": 0, "shards": []}},
    })  # fmt: skip


def text_at(text: np.ndarray, shard: str, start: int, length: int) -> np.ndarray:
    """The ids that `write_at` puts there: a function of the place alone, so that overlapping rows agree."""
    return text[(int(shard) * 7919 + np.arange(start, start + length)) % len(text)]


def write_at(path: Path, tokenizer: Tokenizer, text: np.ndarray, shard: str, start: int, length: int) -> None:
    """Fills tokens [start, start + length) of a sparse shard."""
    dtype = np.dtype(tokens_dtype(tokenizer.vocab_size))
    with open(path / "train" / f"{shard}.tokens", "r+b") as file:
        os.pwrite(file.fileno(), text_at(text, shard, start, length).astype(dtype).tobytes(), start * dtype.itemsize)
