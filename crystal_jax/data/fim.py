"""Fill-in-the-middle: rows of tokens in which document segments are cut at two characters and put in another order.

This file owns the FIM layouts. Its invariant in mode `local`: the ids of prefix, middle and suffix are those of their
texts tokenised whole, though only the words at the two cuts are tokenised again; no character is ever split.

    PSM   <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle
    SPM   <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError

MODES = ("local", "crystal", "none")
FIM_TOKENS = ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad")


class Parts(NamedTuple):
    """Ids, int32."""

    prefix: np.ndarray
    middle: np.ndarray
    suffix: np.ndarray


class Word(NamedTuple):
    """Where a cut falls: text that may be tokenised on its own, ids[left:right] of a segment, and the cut inside it."""

    left: int
    right: int
    text: str
    offset: int
    """In characters."""


class Fim:
    """Draws fill-in-the-middle for rows of tokens; its tables are made once per tokenizer.

    Modes: `local` cuts at characters, exactly; `crystal` tokenises the three parts anew with a dummy space in front of
    each, as the published data were made; `none` changes nothing.

    Raises:
      UserError: an unknown mode, a tokenizer without the FIM tokens.
    """

    def __init__(self, tokenizer: Tokenizer, mode: str = "local") -> None:
        if mode not in MODES:
            raise UserError(f"fim_mode: {mode!r} must be one of {', '.join(MODES)}")
        self._tokenizer = tokenizer
        splits: dict[str, Callable[[np.ndarray, bool, np.ndarray], Parts | None] | None] = {
            "local": self._split_local,
            "crystal": self._split_crystal,
            "none": None,
        }
        self._split = splits[mode]
        if mode == "none":
            return
        self._prefix, self._middle, self._suffix, self._pad = _fim_ids(tokenizer)
        self._pieces = pieces = [tokenizer.piece_bytes(token) for token in range(tokenizer.vocab_size)]
        # A control token counts as one character, which is never split: repository and file name move with the text.
        # Those of FIM don't: a segment that has them, in data published with FIM, stays as it is.
        control = set(tokenizer.special_ids) - set(_fim_ids(tokenizer))
        self._control = np.isin(np.arange(len(pieces)), list(control))
        self._chars = np.array([_characters(piece) for piece in pieces]) + self._control
        self._textless = np.array([not piece for piece in pieces]) & ~self._control
        self._spaced = np.array([piece.startswith(b" ") for piece in pieces])
        self._ends_spaced = np.array([piece.endswith(b" ") for piece in pieces])
        self._breaks = np.array([piece in (b"\n", b"\t") for piece in pieces])

    def apply(
        self, row: np.ndarray, rng: np.random.Generator, rate: float, spm_rate: float, kept: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The row with FIM in a share `rate` of its segments, `spm_rate` of those in SPM order, and its loss mask.

        row: int32 [T+1]; a segment lies between <s>, </s> and the ends of the row. kept: bool [T+1], the row's targets
        (None: all). Returns int32 [T+1], cut or filled with <|fim_pad|> to the length of the row, and bool [T+1]: what
        was kept of tokens that stay, True in a rearranged segment, False on that filling.
        """
        kept = np.ones(len(row), bool) if kept is None else kept
        if self._split is None or rate == 0:
            return row, kept
        out: list[np.ndarray] = []
        mask: list[np.ndarray] = []
        done = 0
        segments = self._segments(row)
        for (start, end), (chosen, order, *cuts) in zip(segments, rng.random((len(segments), 4)), strict=True):
            if chosen >= rate:
                continue
            dummy = start > 0 and row[start - 1] == self._tokenizer.bos_id
            parts = self._split(row[start:end], dummy, np.sort(cuts))
            if parts is not None:
                ordered = self._ordered(parts, spm=order < spm_rate)
                targets = np.ones(len(ordered), bool)
                # Where nothing lies before the segment, nothing predicts what it begins with now.
                targets[0] = kept[start]
                out += [row[done:start], ordered]
                mask += [kept[done:start], targets]
                done = end
        if not out:
            return row, kept
        tokens, targets = np.concatenate([*out, row[done:]]), np.concatenate([*mask, kept[done:]])
        missing = max(0, len(row) - len(tokens))
        if missing:
            tokens, targets = np.append(tokens, [self._pad] * missing), np.append(targets, [False] * missing)
        return tokens[: len(row)].astype(row.dtype, copy=False), targets[: len(row)]

    def _segments(self, row: np.ndarray) -> list[tuple[int, int]]:
        marks = np.flatnonzero((row == self._tokenizer.bos_id) | (row == self._tokenizer.eos_id))
        starts, ends = np.append(0, marks + 1), np.append(marks, len(row))
        return [(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True) if start < end]

    def _ordered(self, parts: Parts, spm: bool) -> np.ndarray:
        prefix, middle, suffix = parts
        if spm:
            return _joined([self._prefix, self._suffix], suffix, [self._middle], prefix, middle)
        return _joined([self._prefix], prefix, [self._suffix], suffix, [self._middle], middle)

    def _split_local(self, ids: np.ndarray, dummy: bool, cuts: np.ndarray) -> Parts | None:
        """A segment cut at two character positions, given in [0, 1) of its length; None leaves it as it is.

        The dummy space is no character of the document: a cut in front of the first character leaves no prefix. Bytes
        of a character that the window has cut stay at the ends of the segment.
        """
        head, tail = self._stray(ids)
        before, ids, after = ids[:head], ids[head : len(ids) - tail], ids[len(ids) - tail :]
        if len(ids) == 0 or self._textless[ids].any():
            return None
        skipped = int(dummy and self._spaced[ids[0]])
        ends = np.cumsum(self._chars[ids])
        first, second = (skipped + cuts * (ends[-1] - skipped + 1)).astype(int).tolist()
        safe = self._safe_boundaries(ids)
        try:
            one, two = self._word(ids, ends, safe, first), self._word(ids, ends, safe, second)
        except UnicodeDecodeError:  # ids that don't come from text
            return None
        encode = self._tokenizer.encode_fragment
        prefix = _joined(ids[: one.left], encode(one.text[: one.offset])) if first > skipped else _joined()
        suffix = _joined(encode(two.text[two.offset :]), ids[two.right :], after)
        if one.right <= two.left:
            inner = ids[one.right : two.left]
            middle = _joined(encode(one.text[one.offset :]), inner, encode(two.text[: two.offset]))
        else:  # both cuts in one word
            middle = _joined(encode(one.text[one.offset : two.offset]))
        return Parts(_joined(before, prefix), middle, suffix)

    def _split_crystal(self, ids: np.ndarray, dummy: bool, cuts: np.ndarray) -> Parts | None:
        """The same as published: through text, each part with a dummy space, stray bytes lost."""
        text = self._tokenizer.decode(ids.tolist())
        first, second = (cuts * (len(text) + 1)).astype(int).tolist()
        return Parts(*map(_joined, self._tokenizer.encode_documents([text[:first], text[first:second], text[second:]])))

    def _stray(self, ids: np.ndarray) -> tuple[int, int]:
        """How many ids at the start and at the end of a segment are parts of a character that isn't there whole."""
        whole = np.flatnonzero(self._chars[ids])
        if len(whole) == 0:
            return len(ids), 0
        last = int(whole[-1])  # the last character starts in this token
        try:
            self._text(ids[last:])
        except UnicodeDecodeError:
            return int(whole[0]), len(ids) - last
        return int(whole[0]), 0

    def _safe_boundaries(self, ids: np.ndarray) -> np.ndarray:
        """Positions in [0, len(ids)] before which the text may be cut without changing the ids on either side."""
        after, before = ids[1:], ids[:-1]
        safe = self._control[after] | self._control[before]
        if self._tokenizer.cuts_safely:
            safe |= self._breaks[after] | self._breaks[before] | (self._spaced[after] & ~self._ends_spaced[before])
        return np.concatenate([[0], np.flatnonzero(safe) + 1, [len(ids)]])

    def _word(self, ids: np.ndarray, ends: np.ndarray, safe: np.ndarray, cut: int) -> Word:
        """The word around the cut before character number `cut`; no text where the cut is at a safe boundary.

        ends: where each id ends, in characters.
        """
        token = int(np.searchsorted(ends, cut, side="right"))  # the one that holds the character after the cut
        index = int(np.searchsorted(safe, token, side="right")) - 1
        left = int(safe[index])
        begin = int(ends[left - 1]) if left > 0 else 0
        if begin == cut:
            return Word(left, left, "", 0)
        right = int(safe[index + 1])
        return Word(left, right, self._text(ids[left:right]), cut - begin)

    def _text(self, ids: np.ndarray) -> str:
        return b"".join([self._pieces[token] for token in ids.tolist()]).decode()


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Ids that ask for the text between `prefix` and `suffix`, in PSM order and with <s>, as training shows them.

    Raises:
      UserError: a tokenizer without the FIM tokens.
    """
    before, middle, after, _ = _fim_ids(tokenizer)
    return [
        tokenizer.bos_id, before, *tokenizer.encode_document(prefix), after, *tokenizer.encode_fragment(suffix), middle
    ]  # fmt: skip


def _fim_ids(tokenizer: Tokenizer) -> list[int]:
    ids = [getattr(tokenizer, f"{name}_id") for name in FIM_TOKENS]
    if None in ids:
        raise UserError(
            f"{tokenizer.path}: has no <|{FIM_TOKENS[ids.index(None)]}|>, which fill-in-the-middle needs; take a "
            "tokenizer of `tokenizer train`, or data.fim_mode=none"
        )
    return ids


def _joined(*ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """int32."""
    return np.concatenate([np.asarray(part, np.int32) for part in ids]) if ids else np.empty(0, np.int32)


def _characters(piece: bytes) -> int:
    """Characters that start in a piece."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)
