"""Rows: a view of a token store as numbered training sequences of T + 1 tokens, T inputs and the targets after them.

Invariant: over all rows of a view each target token is predicted exactly once (`concat` leaves out the rest after the
last whole window, at most T), and a row is a pure function of the store and its number.
"""

from typing import Protocol

import numpy as np

from crystal_jax.data.packing import BestFitRows
from crystal_jax.data.store import Piece, TokenStore, TokenView
from crystal_jax.errors import UserError

PUBLISHED_ROWS = "crystal-h5"
"""The kind of source whose documents are rows of T + 1 tokens."""


class Rows(Protocol):
    """What a packing makes of a view."""

    num_rows: int

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(tokens int32 [n, T + 1], kept bool [n, T + 1] or None for all) of rows int64 [n].

        A token that isn't kept is no target: it is padding, or nothing of its own document lies before it in the row.
        """

    def pieces(self, row: int) -> list[Piece]:
        """Where the tokens of a row lie in the shards, in the order of the row; padding has no piece."""

    def rows_of(self, shard: str, start: int, end: int) -> np.ndarray:
        """int64, ascending: the rows that hold any of the tokens [start, end) of a shard; none of a shard not read."""


class ConcatRows:
    """Windows over the stream of all documents, as published: row r is tokens [r T, r T + T] of the view."""

    def __init__(self, view: TokenView, length: int) -> None:
        self.view, self.length = view, length
        self.num_rows = max(view.num_tokens - 1, 0) // length

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        return self.view.rows(np.asarray(rows, np.int64) * self.length, self.length + 1), None

    def pieces(self, row: int) -> list[Piece]:
        return self.view.locate(row * self.length, self.length + 1)

    def rows_of(self, shard: str, start: int, end: int) -> np.ndarray:
        for span in self.view.shards:
            if span.name == shard:
                begin, stop = span.start + max(start, 0), span.start + min(end, span.tokens)
                if begin < stop:
                    # A window's last token is the next one's first: both rows hold it.
                    first = max(begin - 1, 0) // self.length
                    return np.arange(first, min((stop - 1) // self.length + 1, self.num_rows))
        return np.empty(0, np.int64)


def make_rows(store: TokenStore, split: str, files: str, first: float, packing: str, length: int) -> Rows:
    """The rows of `length` + 1 tokens that a split's shards `files` (all, even, odd) give, the leading share `first`.

    Raises:
      UserError: nothing is left to read, `best_fit` without a plan for this store and length, or `concat` of published
        rows, which would be cut elsewhere.
    """
    if packing == "concat":
        if store.manifest.get("source") == PUBLISHED_ROWS:
            raise UserError(f"{store.path}: its documents are published rows, which config.data.packing=concat cuts "
                            "elsewhere; run its `prepare` command again with --packing=best_fit "
                            f"--sequence_length={length} and set config.data.packing=best_fit")
        return ConcatRows(store.view(split, files, first), length)
    return BestFitRows(store, split, files, first, length)


def segments(inputs: np.ndarray, bos_id: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(segment_ids, positions), int32 [B, T], of inputs [B, T]: a document begins at <s> and after </s>.

    Both, since a packed row may hold the end of a long document, which has no <s>, after another document's </s>.
    """
    begins = inputs == bos_id
    begins[:, 1:] |= inputs[:, :-1] == eos_id
    begins[:, 0] = True
    index = np.arange(inputs.shape[1], dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return np.cumsum(begins, axis=1, dtype=np.int32) - 1, positions.astype(np.int32)
