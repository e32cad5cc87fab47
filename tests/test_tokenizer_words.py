"""Cutting text into words: the ids are those of Hugging Face's engine on the whole text, whatever the table holds."""

import itertools
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from crystal_jax.data import readers, words
from crystal_jax.data.tokenizer import Tokenizer, train_tokenizer
from crystal_jax.data.words import SPACE, UNCUT, WORDS, words_of

# As whole texts are compared with an engine that takes SPACE for a space.
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE))
code = st.text(st.sampled_from(" \n\t\rabZ_019.,()\"'=-é²語🙂\u0301\u00a0\x00"), max_size=80)
with_space = st.text(st.sampled_from(f" \n\tab_1.(é語{SPACE}"), max_size=30)


def library(kind: str) -> Iterator[str]:
    source = readers.SourceSpec(kind)
    for item in readers.list_inputs(source):
        yield from (one.text for one in readers.read_input(source, item) if isinstance(one, readers.Document))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(itertools.islice(library("pystd-code"), 25), 1200).save(str(path))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def released(reference: Path) -> Tokenizer:
    return Tokenizer.load(reference / "crystalcoder_hf" / "tokenizer.json")


class Whole:
    """Ids of whole documents by the engine that others would use."""

    def __init__(self, one: Tokenizer) -> None:
        self.engine = tokenizers.Tokenizer.from_file(str(one.path))
        self.engine.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        return self.engine.encode(text, add_special_tokens=False).ids


Change = Callable[..., tuple[Tokenizer, Whole]]


@pytest.fixture(scope="module")
def changed(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Change:
    """The trained tokenizer with a piece put in the place of another, or with other settings of the file or model."""
    folder = tmp_path_factory.mktemp("changed")
    made: dict[str, tuple[Tokenizer, Whole]] = {}

    def change(piece: str = "", top: dict | None = None, model: dict | None = None) -> tuple[Tokenizer, Whole]:
        key = repr((piece, top, model))
        if key in made:
            return made[key]
        spec = json.loads(trained.path.read_text()) | (top or {})
        spec["model"] |= model or {}
        if piece:
            vocab = spec["model"]["vocab"]
            vocab[piece] = vocab.pop(next(old for old, index in vocab.items() if index == 1000))
            halves = [[piece[:cut], piece[cut:]] for cut in range(1, len(piece))]
            spec["model"]["merges"] = [half for half in halves if set(half) <= set(vocab)][:1]
        path = folder / f"{len(made)}.json"
        path.write_text(json.dumps(spec))
        one = Tokenizer.load(path)
        return made.setdefault(key, (one, Whole(one)))

    return change


@pytest.fixture(scope="module")
def whole(trained: Tokenizer) -> Whole:
    return Whole(trained)


@pytest.fixture(scope="module")
def released_whole(released: Tokenizer) -> Whole:
    return Whole(released)


# The ids are those of the whole


@given(text=anything | code)
@example("")
@example("a<s>b</s><|fim_pad|><0x0A>")
@example("x" * 5000)
@example(" " * 5000 + "\n\t" * 500)
def test_ids_are_the_engines(trained: Tokenizer, whole: Whole, text: str) -> None:
    assert trained.encode_document(text) == whole(text)
    assert not text or trained.encode_fragment(" " + text) == whole(text)


@given(text=anything | code)
def test_released_ids_are_the_engines(released: Tokenizer, released_whole: Whole, text: str) -> None:
    assert released.encode_document(text) == released_whole(text)


def test_ids_of_the_library_are_the_engines(released: Tokenizer, released_whole: Whole) -> None:
    rng = random.Random(1)
    documents = []
    for text in [*library("pystd-code"), *library("pystd-text")]:
        cut = rng.randint(0, len(text))  # so that documents begin and end anywhere
        documents += [part for part in (text[:cut], text[cut:]) if SPACE not in part]
    assert len(documents) > 2000
    encoded = released_whole.engine.encode_batch_fast(documents, add_special_tokens=False)
    for text, expected in zip(documents, encoded, strict=True):
        assert released.encode_document(text) == expected.ids, text[:80]


@given(parts=st.lists(code, min_size=2, max_size=4))
def test_a_literal_space_mark_parts_the_text(trained: Tokenizer, parts: list[str]) -> None:
    ids = [trained.encode_fragment(part) for part in parts]
    mark = [3 + byte for byte in SPACE.encode()]
    expected = ids[0] + [token for rest in ids[1:] for token in (*mark, *rest)]
    assert trained.encode_fragment(SPACE.join(parts)) == expected


# What a word is


def test_the_finest_words_that_fit(trained: Tokenizer, released: Tokenizer) -> None:
    assert trained._words._words is WORDS[1] and released._words._words is WORDS[0]
    assert words_of(["ab", " ab", "__", "._", "123", "  ", "\n", "é.", " x²", "x².", "é.a"]) is WORDS[0]
    for piece in ("a_", "_a"):
        assert words_of([piece, "ab"]) is WORDS[1]
    for piece in ("a.", ".a", "a1", "1.", "a.é", " (a"):
        assert words_of([piece, "ab"]) is WORDS[2], piece
    for piece in ("a b", "  a ", " \n", "\n\n", "a\t", "\r\n", ""):
        assert words_of([piece, "ab"]) is UNCUT, piece


@given(text=with_space, pattern=st.sampled_from([*WORDS, UNCUT]))
def test_words_are_the_text(text: str, pattern: re.Pattern[str]) -> None:
    assert "".join(pattern.findall(text)) == text


@given(text=with_space, pattern=st.sampled_from(WORDS))
def test_a_piece_that_a_cut_could_part_is_seen_on_its_own(text: str, pattern: re.Pattern[str]) -> None:
    """Wherever a text is cut, each stretch across the cut is itself more than one word: so no piece can be that."""
    cuts = itertools.accumulate(map(len, pattern.findall(text)[:-1]))
    for cut in cuts:
        for start, end in itertools.product(range(max(cut - 4, 0), cut), range(cut + 1, min(cut + 5, len(text) + 1))):
            assert len(pattern.findall(text[start:end])) > 1, (text[start:cut], text[cut:end])


@pytest.mark.parametrize("change", [
    {"piece": f"a{SPACE}b"}, {"piece": "b."}, {"model": {"ignore_merges": True}},
    {"top": {"pre_tokenizer": {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}}},
], ids=["crosses a space", "mixes classes", "ignores merges", "cuts words itself"])  # fmt: skip
@given(text=code | st.just("the a b.c re  e(e)\n a b."))
def test_other_vocabularies_have_the_engines_ids_too(changed: Change, change: dict, text: str) -> None:
    one, engine = changed(**change)
    assert one.encode_document(text) == engine(text)
    assert one.cuts_safely == (change == {"piece": "b."})


# The table


def texts() -> list[str]:
    found = [text for text in itertools.islice(library("pystd-code"), 12) if SPACE not in text]
    return [*found, "a" * 500, " \n\t" * 100, "語 \n é\t" * 100, "", "x"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_sizes_of_blocks_and_chunks_change_nothing(trained: Tokenizer, whole: Whole, monkeypatch: pytest.MonkeyPatch,
                                                   size: int) -> None:
    expected = [whole(text[:5000]) for text in texts()]
    monkeypatch.setattr(words, "LOOKUP", size)
    monkeypatch.setattr(words, "WINDOW", size)
    one = Tokenizer.load(trained.path)
    assert [one.encode_document(text[:5000]) for text in texts()] == expected


def test_a_full_table_begins_anew(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained.encode_documents(texts())
    monkeypatch.setattr(words, "ROOM", 2000)
    monkeypatch.setattr(words, "LOOKUP", 1000)
    one = Tokenizer.load(trained.path)
    sizes = []
    for _ in range(2):
        assert one.encode_documents(texts()) == expected
        sizes.append(sum(map(len, one._words._table)))
    many = [f"word{index}" for index in range(3000)]
    for word in many:
        one.encode_fragment(word)
        sizes.append(sum(map(len, one._words._table)))
    assert max(sizes) <= 2000 + 1000 + 10


def test_what_came_before_changes_nothing(trained: Tokenizer) -> None:
    expected = dict(zip(texts(), trained.encode_documents(texts()), strict=True))
    shuffled = list(expected)
    random.Random(1).shuffle(shuffled)
    one = Tokenizer.load(trained.path)
    assert [one.encode_document(text) for text in shuffled] == [expected[text] for text in shuffled]


def test_threads_share_a_table(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "ROOM", 500)
    monkeypatch.setattr(words, "LOOKUP", 300)
    documents = texts()
    expected = trained.encode_documents(documents)
    one = Tokenizer.load(trained.path)
    wrong: list[str] = []

    def encode(seed: int) -> None:
        for index in random.Random(seed).sample(range(len(expected)), len(expected)):
            try:
                if one.encode_document(documents[index]) != expected[index]:
                    wrong.append(documents[index][:50])
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=encode, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_lone_surrogate_is_refused_and_harms_nothing(trained: Tokenizer) -> None:
    one = Tokenizer.load(trained.path)
    for encode in (one.encode_document, one.encode_fragment, one.document_array):
        with pytest.raises(TypeError):
            encode("before \ud800 after")
    assert one.encode_document("before after") == trained.encode_document("before after")


# Giant documents


def repeated(unit: str, characters: int) -> str:
    return unit * (characters // len(unit) + 1)


def test_a_giant_document_is_its_lines(trained: Tokenizer, whole: Whole) -> None:
    unit = texts()[0].rstrip("\n") + "\n"
    text = repeated(unit, 8_000_000)
    ids = trained.document_array(text)
    first, rest = trained.encode_document(unit), trained.encode_fragment(unit)
    assert first == whole(unit)
    assert ids.tolist() == first + rest * (len(text) // len(unit) - 1)


def test_giant_lines_have_the_engines_ids(trained: Tokenizer, whole: Whole) -> None:
    rng = random.Random(1)
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEF0123456789+/", k=300_000))
    for text in (letters, "ab" * 100_000, " " * 100_000, "語" * 100_000):
        assert trained.encode_document(text) == whole(text)


@pytest.mark.drill
def test_giant_documents_have_the_released_ids(released: Tokenizer, released_whole: Whole) -> None:
    source = "".join(text for text in library("pystd-code") if SPACE not in text)
    for text in (source[:8_000_000], "a" * 8_000_000):
        assert released.encode_document(text) == released_whole(text)
