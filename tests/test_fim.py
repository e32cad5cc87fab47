"""Fill-in-the-middle against its definition: the complete parts of each segment tokenised anew."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data import readers
from crystal_jax.data.fim import Fim, fim_prompt
from crystal_jax.data.tokenizer import SPACE, Tokenizer, train_tokenizer
from crystal_jax.errors import UserError

FOREIGN = [
    "naïve café, 語言 🙂🙂 end\n\tдлинный  текст",
    "🙂" * 300,
    f"a{SPACE}b {SPACE} c",
    "    \n\n\t \t  x",
    "a",
    " ",
    "é",
    "no_spaces_at_all." * 40,
    "語 " * 200,
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    source = readers.SourceSpec("pystd-code")
    return [document.text for document in readers.read_input(source, readers.list_inputs(source)[3])]


@pytest.fixture(scope="module")
def trained(library: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(library[:20], 1500).save(str(path))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def released(reference: Path) -> Tokenizer:
    return Tokenizer.load(reference / "crystalcoder_hf" / "tokenizer.json")


def stream(one: Tokenizer, texts: list[str]) -> np.ndarray:
    ids = [token for text in one.encode_documents(texts) for token in (one.bos_id, *text, one.eos_id)]
    return np.array(ids, np.int32)


def text_bytes(one: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(one.piece_bytes, ids))


def segments_of(one: Tokenizer, row: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """(whether it follows <s>, ids) of each run between <s> and </s>, empty ones too."""
    ids: list[int] = []
    after_bos = False
    for token in row:
        if token in (one.bos_id, one.eos_id):
            yield after_bos, ids
            ids, after_bos = [], token == one.bos_id
        else:
            ids.append(token)
    yield after_bos, ids


@dataclasses.dataclass
class Layout:
    """One segment after FIM, taken apart."""

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    spm: bool


def taken_apart(one: Tokenizer, ids: list[int]) -> Layout | None:
    """None for a segment without FIM. In SPM order the prefix and the middle are given as the middle."""
    if not ids or ids[0] != one.fim_prefix_id:
        return None
    suffix, middle = ids.index(one.fim_suffix_id), ids.index(one.fim_middle_id)
    assert 0 < suffix < middle
    assert not {one.fim_prefix_id, one.fim_suffix_id, one.fim_middle_id} & set(ids[middle + 1 :])
    return Layout(ids[1:suffix], ids[middle + 1 :], ids[suffix + 1 : middle], spm=suffix == 1)


def whole_characters(data: bytes) -> tuple[bytes, str, bytes]:
    """Bytes of a cut character in front, the text, those of one at the end."""
    start = next((index for index, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
    for end in range(len(data), max(len(data) - 4, start - 1), -1):
        try:
            return data[:start], data[start:end].decode(), data[end:]
        except UnicodeDecodeError:
            continue
    raise AssertionError(data)


def full(one: Tokenizer, ids: list[int], after_bos: bool, cuts: tuple[int, int]) -> tuple[list[int], ...]:
    """The definition: prefix, middle and suffix of a segment, each tokenised whole."""
    front, text, back = whole_characters(text_bytes(one, ids))
    stray = [token for token in ids if token]
    dummy = after_bos and text.startswith(" ")
    first, second = (cut + dummy for cut in cuts)
    prefix = one.encode_fragment(text[:first]) if cuts[0] else []
    return (
        stray[: len(front)] + prefix,
        one.encode_fragment(text[first:second]),
        one.encode_fragment(text[second:]) + stray[len(stray) - len(back) :],
    )


def check_against_definition(one: Tokenizer, row: np.ndarray, seed: int, spm_rate: float = 0.0) -> int:
    """Compares every segment of a row at rate 1; returns how many had FIM."""
    fim = Fim(one)
    padded = np.concatenate([row, np.full(3 * len(row) + 100, one.eos_id, row.dtype)])  # so that nothing is cut off
    out, mask = fim.apply(padded, np.random.default_rng(seed), 1.0, spm_rate)
    assert mask.all()
    draws = np.random.default_rng(seed).random((count_segments(one, padded), 4))
    changed = 0
    new = [ids for _, ids in segments_of(one, out.tolist())]
    old = list(segments_of(one, padded.tolist()))
    numbers = iter(draws)
    for (after_bos, before), after in zip(old, new, strict=False):
        if not before:
            assert not after
            continue
        _, order, *places = next(numbers)
        layout = taken_apart(one, after)
        _, text, _ = whole_characters(text_bytes(one, before))
        length = len(text) - (after_bos and text.startswith(" "))
        if layout is None:
            assert after == before and not text
            continue
        changed += 1
        first, second = sorted(int(place * (length + 1)) for place in places)
        prefix, middle, suffix = full(one, before, after_bos, (first, second))
        assert layout.suffix == suffix
        assert layout.spm == (order < spm_rate) or not prefix
        if order < spm_rate:
            assert layout.prefix == [] and layout.middle == prefix + middle
        else:
            assert (layout.prefix, layout.middle) == (prefix, middle)
    return changed


def count_segments(one: Tokenizer, row: np.ndarray) -> int:
    return sum(bool(ids) for _, ids in segments_of(one, row.tolist()))


# Mode local is its definition


def check_real_chunks(one: Tokenizer, library: list[str], chunks: int) -> None:
    ids = stream(one, [*library[:15], *FOREIGN, *library[15:]])
    rng = np.random.default_rng(5)
    foreign = len(stream(one, library[:15]))
    changed = 0
    for seed in range(chunks):
        length = int(rng.integers(1, 400))
        low, high = (foreign - 200, foreign + 3000) if seed % 2 else (0, len(ids) - length)
        start = int(rng.integers(low, min(high, len(ids) - length)))
        changed += check_against_definition(one, ids[start : start + length], seed, spm_rate=0.5)
    assert changed > chunks / 2


def test_real_chunks(trained: Tokenizer, library: list[str]) -> None:
    check_real_chunks(trained, library, 2000)


def test_real_chunks_with_the_released_tokenizer(released: Tokenizer, library: list[str]) -> None:
    ids = stream(released, [*library[:5], *FOREIGN])
    fim = Fim(released)
    assert fim.apply(ids[:2049], np.random.default_rng(0), 0.9, 0.5)[0].shape == (2049,)
    for seed in range(40):
        start = int(np.random.default_rng(seed).integers(len(ids) - 300))
        check_against_definition(released, ids[start : start + 300], seed, spm_rate=0.5)


@given(texts=st.lists(st.text(st.sampled_from(f"ab  \n\té語🙂_(1{SPACE}"), max_size=40), max_size=4),
       skip=st.integers(0, 30), seed=st.integers(0, 2**32))  # fmt: skip
def test_odd_texts(trained: Tokenizer, texts: list[str], skip: int, seed: int) -> None:
    check_against_definition(trained, stream(trained, texts)[skip:], seed)


def test_tokenizers_with_pieces_across_words(trained: Tokenizer, library: list[str], tmp_path: Path) -> None:
    data = json.loads(trained.path.read_text())
    pieces, merges = data["model"]["vocab"], data["model"]["merges"]
    for left in ",:(":  # after all other merges: a cut right after the space is what makes such a piece
        pieces[left + SPACE] = len(pieces)
        merges.append([left, SPACE])
    controls = [token for token in data["added_tokens"] if token["id"] > 2]
    for number, token in enumerate(controls):
        token["id"] = len(pieces) + number
    (tmp_path / "crossing.json").write_text(json.dumps(data))
    crossing = Tokenizer.load(tmp_path / "crossing.json")
    assert not crossing.cuts_safely and len(crossing.encode_fragment(", ")) == 1
    ids = stream(crossing, library[:4])
    for seed in range(300):
        start = int(np.random.default_rng(seed).integers(len(ids) - 200))
        check_against_definition(crossing, ids[start : start + 200], seed, spm_rate=0.5)


def test_stray_bytes_stay_at_the_ends(trained: Tokenizer) -> None:
    (*emoji,) = trained.encode_fragment("🙂")
    assert len(emoji) == 4
    inside = trained.encode_fragment("ab cd")
    row = np.array([*emoji[2:], *inside, *emoji[:3]], np.int32)
    for seed in range(50):
        check_against_definition(trained, row, seed, spm_rate=0.5)
        out, _ = Fim(trained).apply(np.append(row, [trained.eos_id] * 9), np.random.default_rng(seed), 1.0, 0.0)
        layout = taken_apart(trained, next(segments_of(trained, out.tolist()))[1])
        assert layout is not None and layout.prefix[:2] == emoji[2:] and layout.suffix[-3:] == emoji[:3]
    only = np.array(emoji[1:], np.int32)
    out, mask = Fim(trained).apply(only, np.random.default_rng(0), 1.0, 0.5)
    assert out.tolist() == only.tolist() and mask.all()


@given(ids=st.lists(st.integers(0, 1499), min_size=1, max_size=60), seed=st.integers(0, 2**32),
       rate=st.floats(0, 1), mode=st.sampled_from(["local", "crystal"]))  # fmt: skip
def test_ids_that_are_no_text_do_no_harm(
    trained: Tokenizer, ids: list[int], seed: int, rate: float, mode: str
) -> None:
    row = np.array(ids, np.int32)
    out, mask = Fim(trained, mode).apply(row, np.random.default_rng(seed), rate, 0.5)
    assert out.shape == mask.shape == row.shape and out.dtype == row.dtype and mask.dtype == bool
    assert (out[~mask] == trained.fim_pad_id).all()


# Rows


@pytest.fixture(scope="module")
def rows(trained: Tokenizer, library: list[str]) -> np.ndarray:
    ids = stream(trained, [*library, *FOREIGN])
    return ids[: len(ids) // 513 * 513].reshape(-1, 513)


@pytest.mark.parametrize("mode", ["local", "crystal", "none"])
def test_rate_zero_changes_nothing(trained: Tokenizer, rows: np.ndarray, mode: str) -> None:
    fim = Fim(trained, mode)
    for row in rows[:20]:
        out, mask = fim.apply(row, np.random.default_rng(1), 0.0, 0.5)
        np.testing.assert_array_equal(out, row)
        assert mask.all() and mask.dtype == bool
    out, mask = Fim(trained, "none").apply(rows[0], np.random.default_rng(1), 1.0, 0.5)
    assert out.tolist() == rows[0].tolist() and mask.all()


def test_rows_are_a_function_of_the_generator(trained: Tokenizer, rows: np.ndarray) -> None:
    def apply(seed: int) -> np.ndarray:
        return Fim(trained).apply(rows[3], np.random.default_rng(seed), 0.9, 0.5)[0]

    np.testing.assert_array_equal(apply(1), apply(1))
    assert any((apply(1) != apply(seed)).any() for seed in range(2, 5))


def test_rates(trained: Tokenizer, rows: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    fim = Fim(trained)
    row = stream(trained, ["some words to cut", "and others"] * 500)
    out, _ = fim.apply(row, rng, 0.3, 0.25)
    whole = [ids for _, ids in segments_of(trained, out.tolist()) if ids][:-1]  # the row's end cuts the last one
    layouts = [taken_apart(trained, ids) for ids in whole]
    chosen = [layout for layout in layouts if layout is not None]
    assert 0.25 < len(chosen) / len(layouts) < 0.35
    assert 0.2 < sum(layout.spm for layout in chosen) / len(chosen) < 0.36  # an empty PSM prefix counts as well


def test_a_longer_row_is_cut_at_its_end(trained: Tokenizer, rows: np.ndarray) -> None:
    fim = Fim(trained)
    for seed, row in enumerate(rows[:50]):
        long = np.concatenate([row, np.full(500, trained.eos_id, row.dtype)])
        short_out, short_mask = fim.apply(row, np.random.default_rng(seed), 1.0, 0.5)
        long_out, _ = fim.apply(long, np.random.default_rng(seed), 1.0, 0.5)
        kept = int(short_mask.sum())
        np.testing.assert_array_equal(short_out[:kept], long_out[:kept])


def test_a_shorter_row_is_filled_and_the_filling_masked(trained: Tokenizer) -> None:
    """One character per token where a piece would do: tokenising it again makes the row shorter."""
    letters = [trained.encode_fragment(letter)[0] for letter in "return"]
    row = np.array(letters * 20, np.int32)
    out, mask = Fim(trained).apply(row, np.random.default_rng(1), 1.0, 0.0)
    kept = int(mask.sum())
    assert kept < len(row) and mask[:kept].all()
    assert (out[kept:] == trained.fim_pad_id).all() and trained.fim_pad_id not in out[:kept]
    layout = taken_apart(trained, out[:kept].tolist())
    assert layout is not None
    assert text_bytes(trained, layout.prefix + layout.middle + layout.suffix) == b"return" * 20


def test_no_text_is_lost_or_added(trained: Tokenizer) -> None:
    texts = ["def f(x):\n    return x + 1\n", "naïve 語言 🙂", " leading", "\n"]
    row = np.append(stream(trained, texts), [trained.eos_id] * 100)
    for seed in range(200):
        out, _ = Fim(trained).apply(row, np.random.default_rng(seed), 1.0, 0.0)
        layouts = [taken_apart(trained, ids) for _, ids in segments_of(trained, out.tolist()) if ids]
        for text, layout in zip(texts, layouts, strict=True):
            assert layout is not None
            prefix = trained.decode(layout.prefix)
            assert prefix + trained.decode_fragment(layout.middle) + trained.decode_fragment(layout.suffix) == text


# Mode crystal, prompts, mistakes


def test_crystal_puts_a_dummy_space_before_each_part(trained: Tokenizer) -> None:
    text = "some words to cut in three parts"
    row = np.append(stream(trained, [text]), [trained.eos_id] * 60)
    for seed in range(30):
        out, _ = Fim(trained, "crystal").apply(row, np.random.default_rng(seed), 1.0, 0.0)
        layout = taken_apart(trained, next(ids for _, ids in segments_of(trained, out.tolist()) if ids))
        assert layout is not None
        parts = [trained.decode(ids) for ids in (layout.prefix, layout.middle, layout.suffix)]
        assert "".join(parts) == text
        encoded = [trained.encode_document(part) for part in parts]
        assert encoded == [layout.prefix, layout.middle, layout.suffix]


def test_a_prompt_is_what_training_shows(trained: Tokenizer) -> None:
    text = "def double(x):\n    return 2 * x\n"
    row = np.append(stream(trained, [text]), [trained.eos_id] * 60)
    for seed in range(50):
        out, _ = Fim(trained).apply(row, np.random.default_rng(seed), 1.0, 0.0)
        ids = out[: out.tolist().index(trained.eos_id)].tolist()
        layout = taken_apart(trained, ids[1:])
        assert layout is not None
        prefix, suffix = trained.decode(layout.prefix), trained.decode_fragment(layout.suffix)
        assert fim_prompt(trained, prefix, suffix) + layout.middle == ids


def test_mistakes(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fim_mode: 'locl' must be one of local, crystal, none"):
        Fim(trained, "locl")
    data = json.loads(trained.path.read_text())
    (pad,) = (token for token in data["added_tokens"] if token["content"] == "<|fim_pad|>")
    pad["content"] = "<|other|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    without = Tokenizer.load(tmp_path / "tokenizer.json")
    for use in (lambda: Fim(without), lambda: fim_prompt(without, "a", "b")):
        with pytest.raises(UserError, match=r"has no <\|fim_pad\|>, which fill-in-the-middle needs"):
            use()
    Fim(without, "none")
