"""The tokenizer: byte-fallback BPE of the family that Crystal uses (LLaMA's pieces, Crystal's control tokens).

This file owns how text becomes ids and back, and which pieces a trained tokenizer may have: none holds whitespace but
leading spaces, a digit stands alone, letters and punctuation never mix. Its invariant: decode(encode_document(x)) == x
and decode_fragment(encode_fragment(x)) == x for every Unicode string x without lone surrogates.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from crystal_jax.config import digest
from crystal_jax.errors import UserError

SPACE = "\u2581"
"""What a space looks like inside a piece. Met as itself in a text, it is written as its three bytes: a piece would
decode to a space."""
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
CHUNK = 4096
"""Characters per call of the engine, which is superlinear: 3.2 MB/s at 8,000 characters, 2.0 at 100,000."""
_SAFE_CUT = re.compile(r"(?<=[^ ]) |[\n\t]")


class Tokenizer:
    """A tokenizer.json and the ids of its special tokens.

    `cuts_safely` says that no piece crosses a place where a space follows a non-space, nor one around a newline or a
    tab: text that is cut there has the ids of the whole.
    """

    def __init__(self, path: Path, spec: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint = digest(spec)
        self._spec = spec
        self._document = self._engine(spec)
        replace_only = {**NORMALIZER, "normalizers": NORMALIZER["normalizers"][1:]}
        self._fragment = self._engine({**spec, "normalizer": replace_only})
        vocab = self._document.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._special = {token["id"]: token["content"] for token in spec["added_tokens"] if token["special"]}
        self._pieces = _piece_table(vocab, self._special, self.vocab_size)
        self._literal = [vocab[BYTE_TOKENS[byte]] for byte in SPACE.encode()]
        ids = {content: token for token, content in self._special.items()}
        self.unk_id, self.bos_id, self.eos_id = (ids.get("<unk>"), ids["<s>"], ids["</s>"])
        self.fim_prefix_id, self.fim_middle_id, self.fim_suffix_id, self.fim_pad_id = map(ids.get, CONTROL_TOKENS[:4])
        pieces = (piece for token, piece in enumerate(self._pieces) if token not in self._special)
        self.cuts_safely = spec.get("pre_tokenizer") is None and all(map(_within_one_word, pieces))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a tokenizer.json.

        Raises:
          UserError: no such file, not a tokenizer.json, or not of this family.
        """
        path = Path(path)
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a tokenizer.json (`tokenizer train` makes one)") from error
        except Exception as error:  # the engine raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json that can be read ({error})") from error
        _check_family(path, spec)
        for token in spec["added_tokens"]:  # the engine numbers them itself
            if engine.token_to_id(token["content"]) != token["id"]:
                raise UserError(f"{path}: {token['content']} has id {token['id']}, where the engine gives it "
                                f"{engine.token_to_id(token['content'])}; number the added tokens after the others")
        return cls(path, spec)

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document, with the dummy space in front; "<s>" and the like stay text, nothing is added."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_document` of each text, in one call of the engine."""
        parts = [self._parts(text) for text in texts]
        heads = _encode(self._document, [part[0] for part in parts])
        rest = iter(self._encode_fragments([fragment for part in parts for fragment in part[1:]]))
        for ids, part in zip(heads, parts, strict=True):
            for _ in part[1:]:
                ids.extend(next(rest))
        return heads

    def encode_fragment(self, text: str) -> list[int]:
        """Ids of text that goes on inside a document: no dummy space; "<s>" and the like stay text."""
        if len(text) <= CHUNK and SPACE not in text:
            return self._fragment.encode(text, add_special_tokens=False).ids
        return [token for ids in self._encode_fragments(self._parts(text)) for token in ids]

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
    def _prompt(self) -> tokenizers.Tokenizer:
        engine = self._engine(self._spec)
        engine.encode_special_tokens = False
        return engine

    @staticmethod
    def _engine(spec: dict[str, Any]) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = True
        return engine

    def _parts(self, text: str) -> list[str]:
        """The text cut where that doesn't change the ids; a literal SPACE is a part of its own, never the first."""
        if SPACE not in text:
            return list(self._chunks(text))
        parts = [part for run in re.split(f"({SPACE})", text) for part in (self._chunks(run) if run else ())]
        return ["", *parts] if parts[0] == SPACE else parts

    def _chunks(self, text: str) -> Iterator[str]:
        start = 0
        while self.cuts_safely and (cut := _SAFE_CUT.search(text, start + CHUNK)):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    def _encode_fragments(self, parts: list[str]) -> list[list[int]]:
        encoded = iter(_encode(self._fragment, [part for part in parts if part != SPACE]))
        return [self._literal if part == SPACE else next(encoded) for part in parts]

    def _text(self, ids: Iterable[int], skip_special: bool) -> str:
        special = {} if skip_special else self._special
        data = b"".join(special[token].encode() if token in special else self.piece_bytes(token) for token in ids)
        return data.decode("utf-8", errors="replace")


def _encode(engine: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]


def _piece_table(vocab: dict[str, int], special: dict[int, str], size: int) -> list[bytes]:
    byte_of = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}
    table = [b""] * size
    for piece, token in vocab.items():
        if token not in special:
            table[token] = byte_of.get(piece) or piece.replace(SPACE, " ").encode()
    return table


def _within_one_word(piece: bytes) -> bool:
    return b" " not in piece.lstrip(b" ") and (len(piece) == 1 or not (b"\n" in piece or b"\t" in piece))


def _check_family(path: Path, spec: dict[str, Any]) -> None:
    model = spec["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or spec.get("normalizer") != NORMALIZER:
        raise UserError(
            f"{path}: a {model.get('type')} tokenizer of another family; it must be BPE with byte_fallback and the "
            "normalizer Prepend, Replace, as Crystal's and `tokenizer train`'s are"
        )
    contents = {token["content"] for token in spec["added_tokens"] if token["special"]}
    missing = [token for token in ("<s>", "</s>") if token not in contents]
    missing += [token for token in BYTE_TOKENS if token not in model["vocab"]]
    if missing:
        raise UserError(f"{path}: has no {missing[0]} ({len(missing)} tokens missing in all); documents need it")


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
