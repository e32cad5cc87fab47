"""Documents to ids: control ids only where tags are, and the text between them as if nothing had been cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import write_tokenizer

from crystal_jax.data import encoding
from crystal_jax.data.encoding import DocumentEncoder
from crystal_jax.data.readers import Document, Tokens
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError

ALPHABET = "ab \n\té(語_1<>|s/▁"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module", params=["reference", "auto"])
def encoder(path: Path, request: Any) -> DocumentEncoder:
    return DocumentEncoder(Tokenizer.load(path), request.param)


def document(*pieces: str) -> Document:
    """Text and, at odd places, the names of tags."""
    text, tags = "", []
    for index, piece in enumerate(pieces):
        if index % 2:
            tags.append((len(text), len(text) + len(piece) + 2, piece))
            piece = f"<{piece}>"
        text += piece
    return Document("id", text, "file", "group", tags=tuple(tags))


def control(tokenizer: Tokenizer, name: str) -> int:
    (token,) = (token for token in tokenizer.special_ids if tokenizer.decode([token]) == f"<|{name}|>")
    return token


texts = st.text(ALPHABET, max_size=12)
names = st.sampled_from(["reponame", "filename", "gh_stars", "jupyter_code"])
documents = st.tuples(texts, st.lists(st.tuples(names, texts), max_size=3)).map(
    lambda drawn: document(drawn[0], *(piece for pair in drawn[1] for piece in pair)))


@settings(max_examples=100)
@given(batch=st.lists(documents, max_size=4))
def test_ids_are_those_of_the_pieces(encoder: DocumentEncoder, batch: list[Document]) -> None:
    tokenizer = encoder.tokenizer
    for found, ids in zip(batch, encoder.encode(batch), strict=True):
        expected, done = [tokenizer.bos_id], 0
        for start, end, name in (*found.tags, (len(found.text),) * 2 + ("",)):
            if text := found.text[done:start]:
                expected += tokenizer.encode_fragment(text) if done else tokenizer.encode_document(text)
            expected += [control(tokenizer, name)] if name else []
            done = end
        assert ids.tolist() == [*expected, tokenizer.eos_id] and ids.dtype == np.int32


def test_a_batch_is_its_documents(encoder: DocumentEncoder) -> None:
    batch = [document("a b"), document("", "reponame", "b/a", "filename", "a.b\nab"), document("b\n  a"),
             Tokens("t", np.array([3, 1, 2], np.int32), "f", "g")]  # fmt: skip
    together = encoder.encode(batch)
    assert all(np.array_equal(ids, encoder.encode([one])[0]) for one, ids in zip(batch, together, strict=True))
    assert encoder.encode([]) == []


def test_controls_are_counted(encoder: DocumentEncoder) -> None:
    tokenizer = encoder.tokenizer
    repository = control(tokenizer, "reponame")
    assert encoder.controls(document("<reponame>")) == {}
    assert encoder.controls(document("", "reponame", "a", "reponame", "b")) == {repository: 2}
    tokens = Tokens("t", np.array([repository, 5, tokenizer.eos_id, repository], np.int32), "f", "g")
    assert dict(encoder.controls(tokens)) == {tokenizer.bos_id: 0, tokenizer.eos_id: 1, repository: 2}


def test_a_tag_without_a_token_is_an_error(encoder: DocumentEncoder) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: has no <\|nothing\|>, which file needs; give a tokenizer"):
        encoder.encode([document("", "nothing", "x")])


@pytest.mark.parametrize("wrong", [-1, 384, 1 << 30])
def test_an_id_beyond_the_vocabulary_is_an_error(encoder: DocumentEncoder, wrong: int) -> None:
    with pytest.raises(UserError, match=rf"f\.h5: row 7 holds id {wrong}, but .*tokenizer\.json has 0 to 383"):
        encoder.encode([Tokens("row 7", np.array([5, wrong, 6], np.int32), "f.h5", "g")])


def test_only_the_first_documents_are_proven(path: Path, monkeypatch: Any) -> None:
    encoder = DocumentEncoder(Tokenizer.load(path), "auto")
    seen: list[str] = []
    monkeypatch.setattr(encoder._engine, "prove", seen.extend)
    encoder.prove([Tokens("t", np.array([3], np.int32), "f", "g"), *(document(str(index)) for index in range(20))])
    assert seen == [str(index) for index in range(encoding.PROVED - 1)]


def test_a_tokenizer_whose_cuts_show_goes_the_slow_way(encoder: DocumentEncoder, monkeypatch: Any) -> None:
    batch = [document("a", "reponame", " b\na ab", "filename", "")]
    expected = encoder.encode(batch)[0]
    monkeypatch.setattr(encoder.tokenizer, "cuts_safely", False)
    monkeypatch.setattr(encoding, "LEAD", "not used")
    assert np.array_equal(encoder.encode(batch)[0], expected)


def test_an_unknown_engine_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="--engine: 'quick' must be one of"):
        DocumentEncoder(Tokenizer.load(path), "quick")
