"""The tokenizer: byte-fallback BPE of the family that Crystal uses (LLaMA's pieces, Crystal's control tokens).

This file owns how text becomes ids and back, and which pieces a trained tokenizer may have: none holds whitespace but
leading spaces, a digit stands alone, letters and punctuation never mix. Its invariant: decode(encode_document(x)) == x
and decode_fragment(encode_fragment(x)) == x for every Unicode string x without lone surrogates.
"""

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from crystal_jax import files
from crystal_jax.config import digest
from crystal_jax.data.words import SPACE, UNCUT, WordTable, words_of
from crystal_jax.errors import UserError, counted

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
CONTROL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "filename", "gh_stars", "issue_start", "issue_comment",
        "issue_closed", "jupyter_start", "jupyter_text", "jupyter_code", "jupyter_output", "empty_output",
        "commit_before", "commit_msg", "commit_after", "reponame", "im_start", "im_end", "sys_start", "sys_end",
    )
)  # fmt: skip
"""In the published order: ids 32000 to 32021 of the released tokenizer, the last ids of one trained here."""
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
ALWAYS = frozenset(SPACE + "".join(map(chr, range(0x21, 0x7F))))
"""Characters with a row of their own in every tokenizer: the space and printable ASCII."""
COVERAGE = 0.9995
"""Share of the corpus's characters that have a row of their own; the rest are bytes (sentencepiece's default)."""
FIXED = len(SPECIAL_TOKENS) + len(BYTE_TOKENS) + len(CONTROL_TOKENS)
SMALLEST = FIXED + len(ALWAYS)
TRAINING_WORDS = rf"{SPACE}{SPACE}+|{SPACE}?[\p{{L}}\p{{M}}_]+|{SPACE}?[^\p{{L}}\p{{M}}\p{{N}}_{SPACE}\s]+"
"""What a piece may be part of. An indentation is its own word, so that no row goes to an indented copy of a piece."""
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
_JOINED_BYTES = re.compile(r"(?s:.)<0x[0-9A-F]{2}>|<0x[0-9A-F]{2}>(?s:.)")
WHOLE_TEXT = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
"""Settings of a model that make ids depend on what is encoded in one call; the family has none of them."""


class Tokenizer:
    """A tokenizer.json and the ids of its special tokens.

    `cuts_safely` says that no piece crosses a place where a space follows a non-space, nor one around a newline or a
    tab: text that is cut there has the ids of the whole. `json`: the file's contents.
    """

    def __init__(self, path: epath.Path, text: str, spec: dict[str, Any], engine: tokenizers.Tokenizer) -> None:
        self.path = path
        self.json = text
        self.fingerprint = digest(spec)
        self._engine = engine
        vocab = engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._special = {token["id"]: token["content"] for token in spec["added_tokens"]}
        self.special_ids = sorted(self._special)
        pieces = {piece: token for piece, token in vocab.items() if token not in self._special}
        self._pieces = _piece_table(pieces, self.vocab_size)
        ids = {content: token for token, content in self._special.items()}
        self.unk_id, self.bos_id, self.eos_id = (ids.get("<unk>"), ids["<s>"], ids["</s>"])
        self.fim_prefix_id, self.fim_middle_id, self.fim_suffix_id, self.fim_pad_id = map(ids.get, CONTROL_TOKENS[:4])
        engine.normalizer = tokenizers.normalizers.Replace(" ", SPACE)  # the dummy space is put in front here
        words, characters = UNCUT, None
        if spec.get("pre_tokenizer") is None and not any(spec["model"].get(setting) for setting in WHOLE_TEXT):
            texts = [self._special.get(token, "").encode() or piece for token, piece in enumerate(self._pieces)]
            characters = np.array([sum(not 0x80 <= byte < 0xC0 for byte in text) for text in texts])
            words = words_of(piece.replace(SPACE, " ") for piece in pieces.keys() - set(BYTE_TOKENS))
        literal = [vocab[BYTE_TOKENS[byte]] for byte in SPACE.encode()]
        self._words = WordTable(self._encode, words, literal, characters)
        self.cuts_safely = self._words.cuts

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a tokenizer.json, local or on gs://.

        Raises:
          UserError: no such file, not a tokenizer.json, or not of this family.
        """
        file = files.as_path(path)
        try:
            text = file.read_text(encoding="utf-8")
            spec, engine = json.loads(text), _make_engine(text)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; give a tokenizer.json (`tokenizer train` makes one)"
                            ) from error
        except Exception as error:  # the engine raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json that can be read ({error})") from error
        _check_family(file, spec)
        for token in spec["added_tokens"]:  # the engine numbers them itself
            if engine.token_to_id(token["content"]) != token["id"]:
                raise UserError(f"{path}: {token['content']} has id {token['id']}, where the engine gives it "
                                f"{engine.token_to_id(token['content'])}; number the added tokens after the others")
        return cls(file, text, spec, engine)

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document, with the dummy space in front; "<s>" and the like stay text, nothing is added."""
        return _unpacked(self._document(text))

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each text."""
        return [self.encode_document(text) for text in texts]

    def document_array(self, text: str) -> np.ndarray:
        """`encode_document` as int32, for stores.

        Raises:
          TypeError: a lone surrogate in the text; so do all that encode.
        """
        return np.frombuffer(self._document(text), np.int32)

    def encode_fragment(self, text: str) -> list[int]:
        """Ids of text that goes on inside a document: no dummy space; "<s>" and the like stay text."""
        return _unpacked(self._words.packed_ids(text))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of text in which special tokens are recognised, exactly as the released tokenizer gives them."""
        return self._prompt.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of a document's ids: without the dummy space; bytes that aren't UTF-8 become U+FFFD."""
        return self._text(ids, skip_special).removeprefix(" ")

    def decode_fragment(self, ids: Iterable[int]) -> str:
        """Text of ids from inside a document: a leading space is kept."""
        return self._text(ids, skip_special=False)

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for; none for a special token or an id without a piece."""
        return self._pieces[token] if token < self.vocab_size else b""

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Of each token's piece_bytes, [vocab_size]."""
        return np.array([len(self.piece_bytes(token)) for token in range(self.vocab_size)])

    @functools.cached_property
    def _prompt(self) -> tokenizers.Tokenizer:
        engine = _make_engine(self.json)
        engine.encode_special_tokens = False
        return engine

    def _document(self, text: str) -> bytes:
        return self._words.packed_ids(text if text[:1] in ("", SPACE) else " " + text)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def _text(self, ids: Iterable[int], skip_special: bool) -> str:
        special = {} if skip_special else self._special
        data = b"".join(special[token].encode() if token in special else self.piece_bytes(token) for token in ids)
        return data.decode("utf-8", errors="replace")


def _make_engine(text: str) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer.from_str(text)
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    return engine


def _unpacked(ids: bytes) -> list[int]:
    return memoryview(ids).cast("i").tolist()


def _piece_table(pieces: dict[str, int], size: int) -> list[bytes]:
    byte_of = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}
    table = [b""] * size
    for piece, token in pieces.items():
        table[token] = byte_of.get(piece) or piece.replace(SPACE, " ").encode()
    return table


def _check_family(path: epath.Path, spec: dict[str, Any]) -> None:
    model = spec["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or spec.get("normalizer") != NORMALIZER:
        raise UserError(
            f"{path}: a {model.get('type')} tokenizer of another family; it must be BPE with byte_fallback and the "
            "normalizer Prepend, Replace, as Crystal's and `tokenizer train`'s are"
        )
    plain = [token["content"] for token in spec["added_tokens"] if not token["special"]]
    if plain:
        raise UserError(f"{path}: the added token {plain[0]!r} isn't special, so that no document could hold it as "
                        "text with its spaces; mark it special, or make it a piece of the model")
    joined = [piece for piece in model["vocab"] if "<0x" in piece and _JOINED_BYTES.search(piece)]
    if joined:
        raise UserError(f"{path}: the piece {joined[0]!r} joins bytes, which none of this family does; train another "
                        "with `tokenizer train`")
    contents = {token["content"] for token in spec["added_tokens"]}
    missing = [token for token in ("<s>", "</s>") if token not in contents]
    missing += [token for token in BYTE_TOKENS if token not in model["vocab"]]
    if missing:
        raise UserError(f"{path}: has no {missing[0]} ({counted(len(missing), 'token')} missing in all); documents "
                        "need it")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-fallback BPE tokenizer with exactly `vocab_size` rows: special, bytes, characters, merges, control tokens.

    Raises:
      UserError: vocab_size is below SMALLEST, or more than the texts have pieces for.
    """
    check_vocab_size(vocab_size)
    texts = list(texts)
    room = vocab_size - FIXED
    alphabet = _alphabet(texts, room)
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(SPACE), tokenizers.normalizers.Replace(" ", SPACE)]
    )
    words = tokenizers.Regex(TRAINING_WORDS)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Split(words, behavior="removed", invert=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=room, min_frequency=2, show_progress=False, initial_alphabet=sorted(alphabet)
    )
    engine.train_from_iterator((_without_rare(text, alphabet) for text in texts), trainer)
    model = json.loads(engine.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    if len(pieces) < room:
        raise UserError(
            f"--vocab_size: {vocab_size} is more than the input has pieces for; ask for at most "
            f"{len(pieces) + FIXED}, or give more text"
        )
    return tokenizers.Tokenizer.from_str(json.dumps(_spec(pieces, model["merges"])))


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST:
        raise UserError(f"--vocab_size: {vocab_size} is too small; bytes, ASCII and special tokens need {SMALLEST}")


def _alphabet(texts: list[str], room: int) -> frozenset[str]:
    """Characters with a row of their own: ALWAYS, and the most frequent up to COVERAGE in half of the room left."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    covered, wanted = 0, COVERAGE * counts.total()
    alphabet = set(ALWAYS)
    most = len(ALWAYS) + (room - len(ALWAYS)) // 2
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or len(alphabet) >= most:
            break
        covered += count
        if char.isprintable() and not char.isspace():
            alphabet.add(char)
    return frozenset(alphabet)


def _without_rare(text: str, alphabet: frozenset[str]) -> str:
    """Characters without a row become line ends, which no word crosses."""
    rare = set(text) - alphabet - {" "}
    return text.translate(dict.fromkeys(map(ord, rare), "\n"))


def _spec(pieces: list[str], merges: list[Any]) -> dict[str, Any]:
    rows = [*SPECIAL_TOKENS, *BYTE_TOKENS, *pieces, *CONTROL_TOKENS]
    row_of = {row: index for index, row in enumerate(rows)}
    assert len(row_of) == len(rows), "a learned piece equals a special token"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": row_of[content], "content": content, **flags} for content in (*SPECIAL_TOKENS, *CONTROL_TOKENS)
        ],
        "normalizer": NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": POST_PROCESSOR,
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {row: row_of[row] for row in rows[: -len(CONTROL_TOKENS)]},
            "merges": merges,
        },
    }
