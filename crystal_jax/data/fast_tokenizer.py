"""The engine of preparation: the reference tokenizer, or the optional fast one (gigatoken) where it gives the same ids.

This file owns the proof. Its invariant: the fast engine is used only as long as its ids were the reference's on the
canaries, on every piece of the vocabulary and on the documents that it was proven on; after one difference, never.
"""

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence

import numpy as np

from crystal_jax.config import nearest
from crystal_jax.data.tokenizer import BYTE_TOKENS, CONTROL_TOKENS, SPECIAL_TOKENS, Tokenizer
from crystal_jax.data.words import SPACE
from crystal_jax.errors import UserError, install

ENGINES = ("auto", "reference", "fast")
RENEW = 1 << 25
"""Characters after which the fast engine is made anew (0.07 s): it remembers each word it meets, in about 100 bytes."""
CANARIES = (
    "", " ", "  ", "   x", "x ", "x  ", "\n", "\r\n", "\r", "\t", " \n \t\n", "\n  \n\n    x", "\x00", "a\x00b\x7f",
    "\x0b\x0c", "a b", "def f(self, x: int = 0) -> str:\n\treturn f'{x:>8}'  # why\r\n\r\n",
    "if (a[i]!=b->c && ~d) { /* */ }", "3.14159e-10 0xDEADBEEF 1_000_000 2026-11-23T10:02:28Z",
    "https://example.org/a_b?c=d&e=%20#f", "__init__ _x x_ a__b", "CamelCase snake_case SCREAMING_CASE kebab-case",
    "\\n \\u2581 \\\\", "<html><s>old</s><br/></html>", "[INST] </s><s>", "".join(map(chr, range(0x21, 0x7F))),
    "".join(map(chr, range(0x80, 0x250))), " ".join(map(chr, range(0x370, 0x600))),
    "café cafe\u0301 naïve ﬁ Å A\u030a", "\u0301", "a\u0301\u0302\u0303", " \u0301x", "“quoted” — ‘so’ … «là»",
    "m² 10⁻³ ½ Ⅷ ①", "语言模型，编码。", "日本語のテキスト と English", "한국어 텍스트", "Привет, мир!",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0645\u0631\u062d\u0628\u0627", "नमस्ते दुनिया", "ไทย",
    "🙂", "🙂🙂 a🙂b", "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇫🇷", "\ufeffx", "a\u00a0b\u3000c\u2003d",
    "\u200b\u200d\u2028\u2029\x85", "\ufffd\ufffe\U0010ffff\ue000", "１２３ ａｂｃ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "x" * 3000, " " * 3000,
    "\n" * 3000, "\t" * 300, "é" * 500, "🙂" * 300, "0" * 500, "=" * 500, "-_" * 300, "ab" * 1500, "abc " * 800,
    "( " * 300, "\n    " * 300, "word" + " " * 200 + "word", " ".join(SPECIAL_TOKENS + CONTROL_TOKENS),
    "".join(SPECIAL_TOKENS + CONTROL_TOKENS), "a<s>b</s>c<unk>d<|fim_pad|>", "".join(BYTE_TOKENS), "<0x0A>\n<0x",
    f"{SPACE}", f"a{SPACE}b {SPACE} c", f"{SPACE}{SPACE}x ",
)  # fmt: skip
"""One of each class that engines differ in: spaces, line ends, literal special and byte tokens, long runs, scripts."""


class Encoder:
    """Encodes documents as `Tokenizer.document_array` does; `engine` says by which means: "fast" or "reference"."""

    def __init__(self, tokenizer: Tokenizer, fast: "Gigatoken | None") -> None:
        self._tokenizer = tokenizer
        self._fast = fast
        self._documents = 0

    @property
    def engine(self) -> str:
        return "reference" if self._fast is None else "fast"

    @property
    def package(self) -> str:
        """What does it, with its version."""
        name = "tokenizers" if self._fast is None else "gigatoken"
        return f"{name} {importlib.metadata.version(name)}"

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text.

        Raises:
          TypeError: a lone surrogate in a text.
        """
        self._documents += len(texts)
        return [self._encode(text) for text in texts]

    def prove(self, texts: Sequence[str]) -> None:
        """Compares the fast engine with the reference on these texts; a difference ends its use, with one warning."""
        for text in texts:
            if self._fast is None:
                return
            found, right = self._encode(text), self._tokenizer.document_array(text)
            if not np.array_equal(found, right):
                self._distrust(_difference(self._tokenizer, found, right))

    def _encode(self, text: str) -> np.ndarray:
        if self._fast is None or SPACE in text:  # which only the reference keeps apart from a space
            return self._tokenizer.document_array(text)
        try:
            ids = self._fast.encode(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            ids = self._tokenizer.document_array(text)
            self._distrust(f"raises {type(error).__name__}: {error}")
        return ids

    def _distrust(self, reason: str) -> None:
        self._fast = None
        before = (f"; to be sure of the {self._documents} texts that this process has encoded so far, prepare "
                  "them again with --engine=reference" if self._documents else "")
        print(f"warning: gigatoken {reason}; the reference engine goes on, slower{before}", file=sys.stderr)


class Gigatoken:
    """The fast engine on a tokenizer's pieces, with special tokens as text; 40 MB/s, 120 where it knows the words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._spec = json.dumps({**json.loads(tokenizer.json), "added_tokens": []})
        self._left = 0

    def encode(self, text: str) -> np.ndarray:
        if self._left <= 0:
            import gigatoken

            self._engine, self._left = gigatoken.Tokenizer.from_json(self._spec), RENEW
        self._left -= len(text)
        return self._engine.encode(text).view(np.int32)


def make_encoder(tokenizer: Tokenizer, engine: str = "auto") -> Encoder:
    """An encoder by `engine`: "reference", "fast", or "auto" (fast where it is installed); fast only once proven.

    Raises:
      UserError: an unknown engine, or "fast" without the package.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine: {engine!r} must be one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    installed = importlib.util.find_spec("gigatoken") is not None
    if engine == "fast" and not installed:
        raise UserError(f"--engine: fast needs the package gigatoken; {install('data')}")
    if engine == "reference" or not installed:
        return Encoder(tokenizer, None)
    encoder = Encoder(tokenizer, Gigatoken(tokenizer))
    pieces = map(tokenizer.piece_bytes, range(tokenizer.vocab_size))
    encoder.prove([*CANARIES, b"\n".join(pieces).decode(errors="replace")])
    return encoder


def _difference(tokenizer: Tokenizer, found: np.ndarray, right: np.ndarray) -> str:
    """Where two encodings of a text part."""
    size = min(len(found), len(right))
    index = next(iter(np.flatnonzero(found[:size] != right[:size]).tolist()), size)
    text = tokenizer.decode_fragment(right[max(index - 4, 0) : index + 4].tolist())
    return f"gives other ids than tokenizers does, at token {index} of a text, about {text!r}"
