"""The documents of a token store in their order, for whoever wants documents instead of rows.

Invariant: the ids of a span's documents, one after the other, are the tokens that the view has of that shard; a
document is cut only where the view itself ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crystal_jax.data.store import ShardSpan, TokenStore, TokenView

BLOCK_TOKENS = 1 << 20
"""Tokens that are read at once: documents of a store on gs:// come by the megabyte, not one by one."""


@dataclass(frozen=True)
class StoredDocument:
    id: str
    source: str
    """The file that it came from."""
    ids: np.ndarray
    """int32 [n], as stored: with <s> and </s>."""


def count_documents(store: TokenStore, split: str, span: ShardSpan) -> int:
    """Documents that a view has of a shard, with the one that it cuts."""
    shard = store.splits[split]["shards"].named(span.name)
    if shard["tokens"] == span.tokens:
        return shard["documents"]
    return int(np.searchsorted(store.documents(split, span.name).ends, span.tokens)) + 1


def read_documents(store: TokenStore, view: TokenView, split: str, span: ShardSpan) -> Iterator[StoredDocument]:
    """The documents of one shard of a view (an entry of `view.shards`)."""
    found = store.documents(split, span.name)
    ends = np.minimum(found.ends[: count_documents(store, split, span)], span.tokens)
    starts = np.concatenate([[0], ends[:-1]])
    first = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + BLOCK_TOKENS, side="right")))
        block = view.read(int(span.start + starts[first]), int(ends[last - 1] - starts[first]))
        offset = starts[first]
        for index in range(first, last):
            ids = block[starts[index] - offset : ends[index] - offset]
            yield StoredDocument(*found.identity(index), ids)
        first = last
