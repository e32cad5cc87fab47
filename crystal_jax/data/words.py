"""Words: where text may be cut without changing its ids, and a table of the ids of the words met so far.

This file owns the speed of the reference tokenizer. Its invariant: no piece of the vocabulary reaches across an end of
a word, so no merge does, and the ids of a text are those of its words in turn, whatever the table holds.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

SPACE = "\u2581"
"""What a space looks like inside a piece. Met as itself in a text, it is written as its three bytes: a piece would
decode to a space."""
BLOCK = 1 << 17
"""Characters of a document that are looked up at once; a giant one needs no more memory than that."""
CHUNK = 4096
"""Characters per call of the engine, which is superlinear: 3.2 MB/s at 8,000 characters, 2.0 at 100,000."""
ROOM = 1 << 21
"""Characters of the words in the table before it begins anew: about 200,000 words of code, 26 MB."""

Encode = Callable[[Sequence[str]], list[list[int]]]
_FOREIGN = "\x80-\u2580\u2582-\U0010ffff"
"""Outside ASCII; SPACE, between the two ranges, is always a word of its own."""


def _by_class(letters: str) -> str:
    """Runs of ASCII letters, of digits and of other ASCII, with spaces in front; what touches a foreign character stays
    together up to the next space."""
    others = rf"[^{letters}0-9 \n\t{SPACE}{_FOREIGN}]"
    runs = "|".join(rf"{run}++(?![{_FOREIGN}])" for run in (f"[{letters}]", "[0-9]", others))
    return rf"[\n\t{SPACE}]| *+(?:{runs}|[^ \n\t{SPACE}]++)| ++"


WORDS = tuple(
    re.compile(pattern)
    for pattern in (
        _by_class("A-Za-z"),  # LLaMA's pieces: "_" goes with punctuation; 4 times fewer distinct words than by space
        _by_class("A-Za-z_"),  # those of `tokenizer train`
        rf"[\n\t{SPACE}]| *+[^ \n\t{SPACE}]++| ++",
    )
)
"""What a word is, the finest first; a vocabulary takes the first that none of its pieces crosses."""
UNCUT = re.compile(rf"{SPACE}|[^{SPACE}]++")
_CUT = re.compile(r"(?<=[^ ]) |[\n\t]")
"""Where a word of any pattern begins."""


class WordTable:
    """Ids of text by way of its words; `encode` gives those of words that aren't in the table yet.

    words: one of WORDS, or UNCUT. literal: ids of SPACE. Threads may share a table.
    """

    def __init__(self, encode: Encode, words: re.Pattern[str], literal: Sequence[int]) -> None:
        self._encode = encode
        self._words = words
        self.cuts = words is not UNCUT
        self._seeds = {SPACE: _packed(literal)}
        if self.cuts:  # a newline parts the words that are encoded together
            ((self._newline,),) = encode(["\n"])
            self._seeds["\n"] = _packed([self._newline])
        self._table, self._room = dict(self._seeds), ROOM

    def packed_ids(self, text: str) -> bytes:
        """Ids of a text that goes on inside a document (nothing is put in front), each as an int32.

        Raises:
          TypeError: a lone surrogate in the text.
        """
        if len(text) <= BLOCK:
            return self._lookup(text)
        return b"".join([self._lookup(block) for block in self._blocks(text, BLOCK)])

    def _lookup(self, text: str) -> bytes:
        words = self._words.findall(text)
        table = self._table
        try:
            return b"".join(map(table.__getitem__, words))
        except KeyError:
            table = self._learn(words)
        return b"".join(map(table.__getitem__, words))

    def _learn(self, words: list[str]) -> dict[str, bytes]:
        """The table, with all of the words: another one once it is full, so that a thread that reads it isn't hurt."""
        if self._room < 0:
            self._table, self._room = dict(self._seeds), ROOM
        table = self._table
        new = sorted(set(words).difference(table))
        self._room -= sum(map(len, new))
        table.update(zip(new, self._ids_of(new), strict=True))
        return table

    def _ids_of(self, words: list[str]) -> Iterator[bytes]:
        if not self.cuts or len(words) < 2:
            yield from map(_packed, self._encode(words))
            return
        encoded = self._encode(list(self._blocks("\n".join(words), CHUNK)))
        ids = np.array([token for chunk in encoded for token in chunk], np.int32)
        ends = np.append(np.flatnonzero(ids == self._newline), len(ids)) * ids.itemsize
        data, start = ids.tobytes(), 0
        for end in ends.tolist():
            yield data[start:end]
            start = end + ids.itemsize

    def _blocks(self, text: str, size: int) -> Iterator[str]:
        start = 0
        while self.cuts and (cut := _CUT.search(text, start + size)):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]


def words_of(pieces: Iterable[str]) -> re.Pattern[str]:
    """The finest pattern of words that none of the pieces crosses, with spaces as such; UNCUT when there is none."""
    pieces = list(pieces)
    return next((words for words in WORDS if all(len(words.findall(piece)) == 1 for piece in pieces)), UNCUT)


def _packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
