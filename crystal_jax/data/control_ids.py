"""The scan of tokens for ids that no text can make: special tokens, and ids beyond the vocabulary.

Its invariant: each document is <s> ... </s>, and between them stands no special token but those that preparation wrote
on purpose. A store whose documents are written as they came may hold <s> and </s> anywhere: they are among its allowed
ids then, and where documents begin and end isn't looked at.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

LIMIT = 1 << 20
"""Misplaced tokens of a shard after which others are no longer collected: a zeroed file would fill the memory."""


class Found(NamedTuple):
    """A token that shouldn't be where it is."""

    document: int
    """In the shard."""
    offset: int
    """In tokens of the shard."""
    problem: str


class Scan:
    """Takes the tokens of a shard block by block, then its ends.

    tokenizer: the manifest's entry. allowed: ids that preparation wrote on purpose.
    """

    def __init__(self, tokenizer: dict[str, Any], allowed: Sequence[int], dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._bos, self._eos = tokenizer["bos_id"], tokenizer["eos_id"]
        self._framed = not {self._bos, self._eos} & set(allowed)
        self._vocab_size = tokenizer["vocab_size"]
        self._reported = np.zeros(self._vocab_size + 1, bool)  # the last stands for all ids beyond the vocabulary
        self._reported[[*tokenizer["special_ids"], self._vocab_size]] = True
        self._reported[list(allowed)] = False
        # Most ids lie in one run without special tokens: two operations that a processor does for many at once.
        bounds = np.concatenate([[-1], np.flatnonzero(self._reported)])
        widest = np.argmax(np.diff(bounds))
        self._low = np.array(bounds[widest] + 1, self._dtype)
        self._width = np.array(bounds[widest + 1] - bounds[widest] - 1, self._dtype)
        self._positions: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._size = self._misplaced = 0

    def feed(self, data: memoryview) -> None:
        """The next bytes of the shard: whole tokens."""
        tokens = np.frombuffer(data, self._dtype)
        suspects = np.flatnonzero(tokens - self._low >= self._width)  # unsigned: what is below wraps to above
        chosen = tokens[suspects].astype(np.int64)
        reported = self._reported[np.minimum(chosen, self._vocab_size)]
        inside = reported & (chosen != self._bos) & (chosen != self._eos)
        if self._misplaced > LIMIT:
            reported &= ~inside
        self._misplaced += int(inside.sum())
        self._positions.append(suspects[reported] + self._size)
        self._tokens.append(chosen[reported])
        self._size += len(tokens)

    def finish(self, ends: np.ndarray) -> Iterator[Found]:
        """What is wrong with the documents that end at `ends` (int64, ascending, exclusive)."""
        positions, tokens = (np.concatenate([np.empty(0, np.int64), *found])
                             for found in (self._positions, self._tokens))
        inside = np.ones(len(positions), bool)
        if self._framed:
            starts = np.concatenate([[0], ends])[:-1]
            for places, token, problem in ((starts, self._bos, "begins without <s>"),
                                           (ends - 1, self._eos, "ends without </s>")):
                index = np.searchsorted(positions, places)
                right = (np.append(positions, -1)[index] == places) & (np.append(tokens, -1)[index] == token)
                inside[index[right]] = False
                for document in np.flatnonzero(~right).tolist():
                    yield Found(document, int(places[document]), problem)
        for at in np.flatnonzero(inside).tolist():
            document, token = int(np.searchsorted(ends, positions[at], side="right")), int(tokens[at])
            known = f"holds the control id {token}"
            unknown = f"holds the id {token}, beyond the vocabulary of {self._vocab_size}"
            yield Found(document, int(positions[at]), known if token < self._vocab_size else unknown)
