"""What packing costs and saves on real lengths, and how fast rows are planned and read.

    python -m benchmarks.packing [--length=2048] [--tokenizer=FILE] [--folder=DIR]

Lengths are those of the standard library's code and prose in tokens of FILE, or else of a tokenizer of 8192 ids trained
on some of it. Cut: the share of the documents of at most T + 1 tokens that don't lie in one row. Planning is timed on
these lengths drawn again, one shard and many; reading on batches of 132 rows in random order. All in CPU seconds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import synthetic
from crystal_jax.data.packing import cut, plan_shard, write_plan
from crystal_jax.data.readers import Document, SourceSpec, list_inputs, read_input
from crystal_jax.data.rows import make_rows
from crystal_jax.data.store import TokenStore
from crystal_jax.data.tokenizer import Tokenizer

KINDS = ("pystd-code", "pystd-text")
BATCH, STORE_TOKENS, STORE_SHARDS = 132, 20_000_000, 8
PLANNED = {"1 shard of 1,000,000 documents": (1, 1_000_000), "100 shards of 10,000": (100, 10_000)}


def lengths_of(kind: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of each document, with <s> and </s>."""
    source = SourceSpec(kind, ())
    found = [document.text for item in list_inputs(source) for document in read_input(source, item)
             if isinstance(document, Document)]
    return np.array([len(ids) + 2 for text in found for ids in tokenizer.encode_documents([text])])


def cpu_seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def cut_by_concat(lengths: np.ndarray, length: int) -> float:
    """The share of the documents that would fit a row and lie in no one."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # Row r holds the tokens from r T to r T + T: the last one that begins at or before a document must hold its end.
    fits = lengths <= length + 1
    return float((starts // length * length + length < ends - 1)[fits].mean())


def report(kind: str, lengths: np.ndarray, length: int) -> Iterator[str]:
    ends = np.cumsum(lengths)
    counts, pieces = plan_shard(ends, length)
    tokens, size = int(lengths.sum()), length + 1
    padding = len(counts) * size - int(pieces[:, 1].sum())
    rows = (tokens - 1) // length
    long = int((lengths > size).sum())
    whole = set(map(tuple, pieces.tolist()))
    documents = [(end - n, n) for end, n in zip(ends.tolist(), lengths.tolist(), strict=True) if n <= size]
    severed = sum(document not in whole for document in documents) / len(documents)
    yield (f"{kind}: {len(lengths):,} documents, {tokens:,} tokens, {np.median(lengths):,.0f} in the median, "
           f"{long / len(lengths):.1%} longer than a row")
    yield f"  concat    {rows:8,} rows             padding 0        cut {cut_by_concat(lengths, length):6.1%}"
    yield (f"  best_fit  {len(counts):8,} rows ({len(counts) / rows - 1:+.2%})   "
           f"padding {padding / len(counts) / size:.3%}   cut {severed:6.1%}")


def planning(lengths: np.ndarray, length: int) -> Iterator[str]:
    for name, (shards, documents) in PLANNED.items():
        drawn = np.random.default_rng(0).choice(lengths, (shards, documents))
        ends = np.cumsum(drawn, axis=1)
        pieces = sum(len(cut(shard, length)[0]) for shard in ends)
        seconds = cpu_seconds(lambda ends=ends: [plan_shard(shard, length) for shard in ends])
        yield f"  {name}: {pieces / seconds:,.0f} pieces/s"


def reading(root: Path, length: int) -> Iterator[str]:
    path = synthetic.write_repeated(root, "rows", synthetic.make_tokenizer(root), STORE_SHARDS, STORE_TOKENS)
    write_plan(path, length)
    store = TokenStore.open(path)
    for packing in ("concat", "best_fit"):
        rows = make_rows(store, "train", "all", 1.0, packing, length)
        order = np.random.default_rng(0).permutation(rows.num_rows)
        batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
        for _ in range(2):  # the second time, with every page in memory
            seconds = cpu_seconds(lambda rows=rows, batches=batches: [rows.read(batch) for batch in batches])
        yield f"  {packing}: {rows.num_rows / seconds:,.0f} rows/s"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--folder", type=Path, help="keeps what was built")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        tokenizer = Tokenizer.load(args.tokenizer or synthetic.make_tokenizer(root / "lengths", 8192))
        found = {kind: lengths_of(kind, tokenizer) for kind in KINDS}
        for kind, lengths in found.items():
            print(*report(kind, lengths, args.length), sep="\n")
        print("planning", *planning(found["pystd-code"], args.length), sep="\n")
        print("reading", *reading(root, args.length), sep="\n")


if __name__ == "__main__":
    main()
