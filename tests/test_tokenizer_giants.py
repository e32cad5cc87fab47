"""Giant words: text without a place to cut has the ids of Hugging Face's engine on the whole, in linear memory."""

import base64
import random
import sysconfig
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpora import library
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_jax.data import words
from crystal_jax.data.tokenizer import Tokenizer, train_tokenizer
from crystal_jax.data.words import SPACE, UNCUT, WordTable, _join_windows

RNG = random.Random(7)


def drawn(letters: str) -> Callable[[int], str]:
    return lambda size: "".join(RNG.choices(letters, k=size))


def repeated(unit: str) -> Callable[[int], str]:
    return lambda size: (unit * (size // len(unit) + 1))[:size]


def minified(size: int) -> str:
    """Code as a minifier leaves it: a line without spaces."""
    names = ["function", "return", "var", "this", "prototype", "null", "t", "e", "n", "r", "0", "document", "length"]
    return "".join(RNG.choice(names) + RNG.choice("(){}[];,.=+&|!?:\"'_") for _ in range(size // 4))[:size]


def mixed(size: int) -> str:
    kinds = [make(RNG.randint(1, 3000)) for name, make in KINDS.items() if name != "mixed" for _ in range(3)]
    RNG.shuffle(kinds)
    return "".join(kinds)[:size]


KINDS: dict[str, Callable[[int], str]] = {
    "one letter": repeated("a"), "another": repeated("z"), "spaces": repeated(" "), "line": repeated("=-"),
    "underscores": repeated("_"), "dots": repeated("."), "zeros": repeated("0"), "word": repeated("theword"),
    "odd period": repeated("abcabca"), "base64": lambda size: base64.b64encode(RNG.randbytes(size)).decode()[:size],
    "dna": drawn("ACGT"), "two letters": drawn("ab"), "digits": drawn("0123456789"), "hex": drawn("0123456789abcdef"),
    "letters": drawn("abcdefghijklmnopqrstuvwxyz"), "english": drawn("eeeeettttaaaooiinnsshhrrdlu"),
    "punctuation": drawn("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~\\"), "cjk": drawn("语言模型编码日本中国的一是不"),
    "rare": drawn("\u0f00\u1234\ufeff\U0001f642é\u0301ß"), "emoji": repeated("🙂"), "cyrillic": drawn("абвгдеопрст"),
    "minified": minified, "controls": drawn("\x00\x01\x7f\r"), "specials": repeated("<s></s><|fim_pad|>"),
    "mixed": mixed,
}  # fmt: skip
Whole = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    root = Path(sysconfig.get_paths()["stdlib"])
    train_tokenizer([(root / file).read_text() for file in library()[:25]], 1200).save(str(path))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def released(reference: Path) -> Tokenizer:
    return Tokenizer.load(reference / "crystalcoder_hf" / "tokenizer.json")


def engine(one: Tokenizer) -> Whole:
    """Ids of whole documents by the engine that others would use."""
    found = tokenizers.Tokenizer.from_file(str(one.path))
    found.encode_special_tokens = True
    return lambda text: found.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("size", [10_000, 100_003])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["trained", "released"])
def test_ids_are_those_of_the_whole(request: pytest.FixtureRequest, which: str, kind: str, size: int) -> None:
    one = request.getfixturevalue(which)
    text = KINDS[kind](size)
    assert one.encode_document(text) == engine(one)(text)


@pytest.mark.parametrize("which", ["trained", "released"])
@pytest.mark.parametrize(("window", "overlap"), [(1, 1), (5, 1), (7, 3), (40, 2)])
def test_windows_of_any_size_give_the_ids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, which: str,
                                          window: int, overlap: int) -> None:
    one = request.getfixturevalue(which)
    monkeypatch.setattr(words, "WINDOW", window)
    monkeypatch.setattr(words, "OVERLAP", overlap)
    whole = engine(one)
    for kind, make in KINDS.items():
        text = make(300)
        assert _join_windows(one._encode, one._words._characters, " " + text).tolist() == whole(text), kind


@st.composite
def vocabularies(draw: st.DrawFn) -> tokenizers.Tokenizer:
    """Merges in any order, as no corpus would give them."""
    pieces = ["a", "b", "c"]
    merges = []
    for _ in range(draw(st.integers(1, 14))):
        pair = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if pair not in merges:
            merges.append(pair)
            pieces += [] if "".join(pair) in pieces else ["".join(pair)]
    order = draw(st.permutations(merges))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=order))


@settings(max_examples=300)
@given(one=vocabularies(), unit=st.text("abc", min_size=1, max_size=12), times=st.integers(1, 20),
       tail=st.text("abc", max_size=30), window=st.integers(1, 9), overlap=st.integers(1, 3))
def test_any_vocabulary_is_joined_exactly(one: tokenizers.Tokenizer, unit: str, times: int, tail: str, window: int,
                                          overlap: int) -> None:
    text = unit * times + tail
    characters = np.array([len(one.id_to_token(index)) for index in range(one.get_vocab_size())])

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [one.encode(text).ids for text in texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "WINDOW", window)
        patch.setattr(words, "OVERLAP", overlap)
        assert _join_windows(encode, characters, text).tolist() == one.encode(text).ids


def test_a_window_begins_earlier_where_the_overlap_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here an x takes up to four letters before it."""
    vocab = {"a": 0, "x": 1, "ax": 2, "aax": 3, "aaax": 4, "aaaax": 5}
    merges = [("a", "x"), ("a", "ax"), ("a", "aax"), ("a", "aaax")]
    one = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    monkeypatch.setattr(words, "WINDOW", 10)
    monkeypatch.setattr(words, "OVERLAP", 1)
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        asked.extend(texts)
        return [one.encode(text).ids for text in texts]

    text = "a" * 10 + "x" + "a" * 9
    found = _join_windows(encode, np.array([1, 1, 2, 3, 4, 5]), text)
    assert found.tolist() == one.encode(text).ids == [0] * 6 + [5] + [0] * 9
    # The last `a` of the first window became part of aaaax, and so did those before; the fourth try agrees.
    assert asked == ["a" * 10, "a" + "x" + "a" * 9, "aa" + "x" + "a" * 9, "aaaax" + "a" * 9, "aaaaaaaax" + "a" * 9]


def test_vocabularies_that_cut_nowhere_have_windows_too(trained: Tokenizer) -> None:
    table = WordTable(trained._encode, UNCUT, [1, 2, 3], trained._words._characters)
    asked: list[int] = []
    encode = table._encode
    table._encode = lambda texts: asked.extend(map(len, texts)) or encode(texts)
    text = "def f(x): return x\n" * 3000
    assert np.frombuffer(table.packed_ids(text), np.int32).tolist() == trained.encode_fragment(text)
    assert max(asked) <= 2 * words.WINDOW


def test_ids_that_depend_on_the_whole_are_asked_for_at_once(trained: Tokenizer) -> None:
    asked: list[int] = []
    table = WordTable(lambda texts: asked.extend(map(len, texts)) or [[5]] * len(texts), UNCUT, [1, 2, 3], None)
    assert np.frombuffer(table.packed_ids("a" * 50_000), np.int32).tolist() == [5]
    assert asked == [50_000]


def test_each_character_counts_once(trained: Tokenizer) -> None:
    text = " aé語🙂\u0301<s>\x00word"
    assert SPACE not in text
    assert trained._words._characters[trained.encode_fragment(text)].sum() == len(text)


@pytest.mark.parametrize("kind", ["one letter", "base64", "dna"])
def test_memory_is_that_of_the_ids(trained: Tokenizer, kind: str) -> None:
    text = KINDS[kind](3_000_000)
    one = Tokenizer.load(trained.path)
    tracemalloc.start()
    try:
        ids = one.document_array(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * ids.nbytes + 4 * len(text) + (40 << 20), f"{peak >> 20} MiB for {ids.nbytes >> 20} MiB of ids"
