"""Words: where text may be cut without changing its ids, and a table of the ids of the words met so far.

This file owns the speed of the reference tokenizer, and that time and memory are linear in the text. Its invariant: no
piece of the vocabulary reaches across an end of a word, so no merge does, and the ids of a text are those of its words
in turn, whatever the table holds. A word of any length is encoded exactly, in windows (see `_join_windows`).
"""

import itertools
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

SPACE = "\u2581"
"""What a space looks like inside a piece. Met as itself in a text, it is written as its three bytes: a piece would
decode to a space."""
LOOKUP = 1 << 16
"""Words of a giant document that are looked up at once: it needs no more memory than these."""
WINDOW = 4096
"""Characters per text that the engine is given. It is superlinear: 3.2 MB/s at 8,000 characters, 2.0 at 100,000; 10 MB
without a cut took it 35 s and 1.6 GB."""
OVERLAP = 32
"""Tokens of a window that are encoded again in the next one."""
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

    words: one of WORDS, or UNCUT. literal: ids of SPACE. characters: int [ids], how many each stands for, a byte of a
    character one if it is the first, else none; None where ids aren't those that merges in order of (rank, place) give.
    Threads may share a table.
    """

    def __init__(self, encode: Encode, words: re.Pattern[str], literal: Sequence[int],
                 characters: np.ndarray | None) -> None:
        self._encode = encode
        self._words = words
        self._characters = characters
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
        if len(text) <= LOOKUP:
            return self._lookup(self._words.findall(text))
        words = (found[0] for found in self._words.finditer(text))
        return b"".join([self._lookup(some) for some in iter(lambda: list(itertools.islice(words, LOOKUP)), [])])

    def _lookup(self, words: list[str]) -> bytes:
        try:
            return b"".join(map(self._table.__getitem__, words))
        except KeyError:
            pass  # not here, where an error would go on to show the word
        return b"".join(map(self._learn(words).__getitem__, words))

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
            yield from (ids.tobytes() for ids in self._encode_any(words))
            return
        ids = np.concatenate(self._encode_any(list(_blocks("\n".join(words)))))
        ends = np.append(np.flatnonzero(ids == self._newline), len(ids)) * ids.itemsize
        data, start = ids.tobytes(), 0
        for end in ends.tolist():
            yield data[start:end]
            start = end + ids.itemsize

    def _encode_any(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, of any length."""
        if self._characters is None:
            return [np.array(ids, np.int32) for ids in self._encode(texts)]
        short = iter(self._encode([text for text in texts if len(text) <= 2 * WINDOW]))
        return [np.array(next(short), np.int32) if len(text) <= 2 * WINDOW else
                _join_windows(self._encode, self._characters, text) for text in texts]  # fmt: skip


def _blocks(text: str) -> Iterator[str]:
    """Of WINDOW characters and those up to the next place where a word of any pattern begins."""
    start = 0
    while cut := _CUT.search(text, start + WINDOW):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _join_windows(encode: Encode, characters: np.ndarray, text: str) -> np.ndarray:
    """int32 ids of a text without a place to cut: exactly those of the whole, for any vocabulary and window.

    Each window begins at a token of the ones before, OVERLAP tokens from their end, and replaces all from there on if
    its first token is that one; else it begins earlier, at last with the text. This is exact since the engine always
    merges the pair of least (rank, place). (1) Of the ids of a text, those between two of its tokens' ends are the ids
    of the text between them: no merge crossed these ends, so the merges inside came in the order that they have alone.
    Hence each pair of neighbours has, alone, just these two ids. (2) Tokens whose every pair of neighbours has that are
    the ids of the whole: look at the first merge across an end. All before it stayed inside, so in the two tokens
    beside that end they were those of the pair alone, and the pair alone would make this one next, but it makes none.
    (3) So two sequences may be joined at a token that both have at the same place: each pair of neighbours is from one
    of them.
    """
    ids = array("i")
    end = 0
    while end < len(text):
        stop, overlap = end + WINDOW, OVERLAP
        while True:
            first = max(len(ids) - overlap, 0)
            while first and not characters[ids[first]]:  # inside a character
                first -= 1
            begin = end - int(characters[ids[first:]].sum()) if ids else 0
            (found,) = encode([text[begin:stop]])
            assert characters[found].sum() == len(text[begin:stop]), "the tokens' lengths are those of the text"
            if not first or found[0] == ids[first]:
                break
            overlap *= 2
        ids[first:] = array("i", found)
        end = min(stop, len(text))
    return np.array(ids, np.int32)


def words_of(pieces: Iterable[str]) -> re.Pattern[str]:
    """The finest pattern of words that none of the pieces crosses, with spaces as such; UNCUT when there is none."""
    pieces = list(pieces)
    return next((words for words in WORDS if all(len(words.findall(piece)) == 1 for piece in pieces)), UNCUT)


def _packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
