"""The fast engine proves itself: one that lies or breaks anywhere is replaced by the reference, with one warning."""

import importlib.machinery
import importlib.util
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data import fast_tokenizer, readers
from crystal_jax.data.fast_tokenizer import CANARIES, Encoder, make_encoder
from crystal_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer, train_tokenizer
from crystal_jax.data.words import SPACE
from crystal_jax.errors import UserError

RARE = "qzjx wvkq"
anything = st.text(st.characters(exclude_categories=["Cs"]))
spaced = st.text(st.sampled_from(f" \n\tab1_.(<s>é語🙂{SPACE}"), max_size=60)


def library(kind: str, inputs: int) -> Iterator[str]:
    source = readers.SourceSpec(kind)
    for item in readers.list_inputs(source)[:inputs]:
        yield from (one.text for one in readers.read_input(source, item) if isinstance(one, readers.Document))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(itertools.islice(library("pystd-code", 3), 20), 1000).save(str(path))
    return Tokenizer.load(path)


class Panic(BaseException):
    """As Rust's panics arrive: not an Exception."""


class Stand:
    """In the place of the package gigatoken: Hugging Face's engine, and `lie(text, ids)` on top of it."""

    def __init__(self) -> None:
        self.made = 0
        self.lie: Callable[[str, list[int]], list[int]] = lambda text, ids: ids

    def from_json(self, data: str) -> "Stand":
        self.made += 1
        self.engine = tokenizers.Tokenizer.from_str(data)
        assert not json.loads(data)["added_tokens"]
        return self

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.lie(text, self.engine.encode(text, add_special_tokens=False).ids), np.uint32)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    found = Stand()
    module = types.ModuleType("gigatoken")
    module.__spec__ = importlib.machinery.ModuleSpec("gigatoken", None)
    module.Tokenizer = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    return found


def same(encoder: Encoder, tokenizer: Tokenizer, texts: list[str]) -> bool:
    found = encoder.encode_documents(texts)
    assert all(ids.dtype == np.int32 and ids.ndim == 1 for ids in found)
    return [ids.tolist() for ids in found] == tokenizer.encode_documents(texts)


TEXTS = ["def f(x):\n    return x", "", RARE, f"a{SPACE}b", "<s>x</s>", *CANARIES]


# Which engine


def test_the_reference_alone(trained: Tokenizer, stand: Stand) -> None:
    encoder = make_encoder(trained, "reference")
    assert encoder.engine == "reference" and same(encoder, trained, TEXTS)
    encoder.prove(TEXTS)
    assert stand.made == 0


@pytest.mark.parametrize("engine", ["auto", "fast"])
def test_an_honest_engine_is_used(trained: Tokenizer, stand: Stand, engine: str, capfd: pytest.CaptureFixture) -> None:
    encoder = make_encoder(trained, engine)
    encoder.prove(TEXTS)
    assert encoder.engine == "fast" and same(encoder, trained, TEXTS)
    assert stand.made == 1 and capfd.readouterr().err == ""


def test_without_the_package(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    encoder = make_encoder(trained, "auto")
    assert encoder.engine == "reference" and same(encoder, trained, TEXTS)
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match=r"--engine: fast needs the package gigatoken; pip install"):
        make_encoder(trained, "fast")


def test_an_engine_that_cannot_be_imported(trained: Tokenizer, stand: Stand, monkeypatch: pytest.MonkeyPatch,
                                           capfd: pytest.CaptureFixture) -> None:
    monkeypatch.delattr(sys.modules["gigatoken"], "Tokenizer")
    encoder = make_encoder(trained, "fast")
    assert encoder.engine == "reference" and same(encoder, trained, TEXTS)
    assert "warning: gigatoken raises AttributeError" in capfd.readouterr().err


def test_unknown_engines_are_named(trained: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"--engine: 'fats' must be one of auto, reference, fast.*fast"):
        make_encoder(trained, "fats")


# Lies


def special_ids(text: str, ids: list[int]) -> list[int]:
    """As an engine that takes literal special tokens for the real ones."""
    return [1, *ids] if "<s>" in text else ids


def raises(error: BaseException) -> Callable[[str, list[int]], list[int]]:
    def lie(text: str, ids: list[int]) -> list[int]:
        if "🙂" in text:
            raise error
        return ids

    return lie


@pytest.mark.parametrize("lie", [
    special_ids,
    lambda text, ids: ids[:-1] if "🙂" in text else ids,
    lambda text, ids: [*ids, 3] if not text else ids,
    lambda text, ids: ids[::-1] if "\r\n" in text else ids,
    lambda text, ids: ids[1:] if text.startswith("  ") else ids,
    lambda text, ids: [*ids, ids[-1]] if len(text) > 2500 else ids,
    lambda text, ids: ids + ids if "\u0301" in text else ids,
    lambda text, ids: [700 if token == 701 else token for token in ids],  # one piece of the vocabulary
    raises(ValueError("odd")), raises(Panic("at src/lib.rs")),
], ids=["special", "emoji", "empty", "line ends", "spaces", "long", "marks", "piece", "raises", "panics"])  # fmt: skip
def test_a_lie_on_the_canaries(trained: Tokenizer, stand: Stand, lie: Callable, capfd: pytest.CaptureFixture) -> None:
    stand.lie = lie
    encoder = make_encoder(trained, "auto")
    encoder.prove(TEXTS)
    assert encoder.engine == "reference" and same(encoder, trained, TEXTS)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: gigatoken ") and "the reference engine goes on" in line and "--engine" not in line


def test_a_lie_on_the_first_documents(trained: Tokenizer, stand: Stand, capfd: pytest.CaptureFixture) -> None:
    stand.lie = lambda text, ids: [*ids[:-2], 5, 6] if RARE in text else ids
    encoder = make_encoder(trained, "fast")
    encoder.encode_documents(["one", "two"])
    assert encoder.engine == "fast" and not same(encoder, trained, [RARE])
    encoder.prove(["fine", f"def {RARE}", RARE])
    encoder.prove([RARE])
    assert encoder.engine == "reference" and same(encoder, trained, [RARE, *TEXTS])
    (line,) = capfd.readouterr().err.splitlines()
    assert "gives other ids than tokenizers does, at token" in line and "wvkq'" in line
    assert "the 3 texts that this process has encoded" in line and "--engine=reference" in line


def test_a_fault_later_is_mended(trained: Tokenizer, stand: Stand, capfd: pytest.CaptureFixture) -> None:
    def lie(text: str, ids: list[int]) -> list[int]:
        if RARE in text:
            raise Panic("index out of bounds")
        return ids

    stand.lie = lie
    encoder = make_encoder(trained)
    assert same(encoder, trained, ["x", RARE, "y"]) and encoder.engine == "reference"
    (line,) = capfd.readouterr().err.splitlines()
    assert "raises Panic: index out of bounds" in line


def test_ctrl_c_is_no_fault_of_the_engine(trained: Tokenizer, stand: Stand, capfd: pytest.CaptureFixture) -> None:
    encoder = make_encoder(trained)
    stand.lie = raises(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encoder.encode_documents(["🙂"])
    assert encoder.engine == "fast" and capfd.readouterr().err == ""


def test_a_lone_surrogate_is_the_callers_fault(trained: Tokenizer, stand: Stand) -> None:
    for encoder in (make_encoder(trained, "reference"), make_encoder(trained, "auto")):
        engine = encoder.engine
        with pytest.raises(TypeError):
            encoder.encode_documents(["fine", "a\ud800b"])
        assert encoder.engine == engine


def test_the_engine_is_renewed(trained: Tokenizer, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(trained)
    monkeypatch.setattr(fast_tokenizer, "RENEW", 100)
    encoder._fast._left = 100  # type: ignore[union-attr]
    assert same(encoder, trained, ["word " * 10] * 9)
    assert stand.made == 1 + 4


def test_canaries_cover_their_classes() -> None:
    together = "\x00".join(CANARIES)
    assert "" in CANARIES and SPACE in together and "\r\n" in together and "<0x0A>" in together
    assert all(token in together for token in ("<s>", "</s>", "<unk>", *CONTROL_TOKENS))
    assert {character for character in map(chr, range(128)) if character.isprintable()} <= set(together)
    assert any(len(text) > 2000 for text in CANARIES) and len(CANARIES) == len(set(CANARIES))
    assert not any(0xD800 <= ord(character) < 0xE000 for character in together)


# The real one


@pytest.fixture(scope="module")
def fast(trained: Tokenizer) -> Encoder:
    pytest.importorskip("gigatoken", reason="needs the extra `fast`")
    return make_encoder(trained, "fast")


@given(texts=st.lists(anything | spaced, max_size=4))
def test_gigatoken_has_the_ids(fast: Encoder, trained: Tokenizer, texts: list[str]) -> None:
    assert same(fast, trained, texts)
    assert fast.engine == "fast"


def test_gigatoken_has_the_released_ids(reference: Path) -> None:
    pytest.importorskip("gigatoken", reason="needs the extra `fast`")
    released = Tokenizer.load(reference / "crystalcoder_hf" / "tokenizer.json")
    encoder = make_encoder(released, "fast")
    texts = list(library("pystd-code", 10**6))
    encoder.prove(texts)
    assert encoder.engine == "fast"
    giant = "\n".join(texts)[:8_000_000]
    assert np.array_equal(encoder.encode_documents([giant])[0], released.document_array(giant))
