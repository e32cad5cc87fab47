"""Rows: each target once, documents whole where they fit, and every token found again."""

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_jax.data.packing import best_fit, cut, plan_shard, write_plan
from crystal_jax.data.rows import Rows, make_rows, segments
from crystal_jax.data.store import FORMAT, SPLITS, ShardWriter, TokenStore, tokens_dtype, write_manifest

BOS, EOS = 1, 2
VOCAB = 1 << 20
LENGTHS = [[5, 40, 12, 3, 3, 9], [2, 7], [31], [16, 17, 18, 4, 4, 4, 90], [64, 2], [17, 30, 8]]
"""Of the documents in each shard."""
T = 16
PACKINGS = ("concat", "best_fit")


def make_store(path: Path, shards: Sequence[Sequence[int]] = LENGTHS, heldout: Sequence[Sequence[int]] = ((20, 6),),
               name: str = "made") -> TokenStore:
    """A store of documents of these lengths: <s>, then numbers that no other place has, then </s>."""
    number = EOS
    splits = {}
    for split, lengths in zip(SPLITS, (shards, heldout), strict=True):
        (path / split).mkdir(parents=True)
        entries = []
        for index, documents in enumerate(lengths):
            with ShardWriter(path / split, f"{index:05d}", tokens_dtype(VOCAB)) as writer:
                for size in documents:
                    ids = np.arange(number, number + size)
                    ids[0], ids[-1] = BOS, EOS
                    number += size
                    writer.add(ids, {"id": f"{index}:{number}", "source": f"file {index}"})
                entries.append({"ordinal": index, **writer.close()})
        splits[split] = {"shards": entries, **{field: sum(entry[field] for entry in entries)
                                               for field in ("tokens", "documents")}}
    write_manifest(path, {"format": FORMAT, "name": name, "splits": splits, "control_ids": [], "tokenizer": {
        "fingerprint": "f" * 16, "vocab_size": VOCAB, "bos_id": BOS, "eos_id": EOS, "special_ids": [0, BOS, EOS]}})
    return TokenStore.open(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """With a plan for T."""
    store = make_store(tmp_path_factory.mktemp("packing") / "made")
    write_plan(store.path, T)
    return store


def spread(rows: Rows, row: int) -> list[tuple[str, int]]:
    """(shard, token in it) of each token of a row but padding."""
    return [(piece.shard, at) for piece in rows.pieces(row) for at in range(piece.start, piece.start + piece.length)]


def predicted(rows: Rows) -> dict[tuple[str, int], int]:
    """How often an epoch of these rows predicts each token."""
    _, kept = rows.read(np.arange(rows.num_rows))
    times: dict[tuple[str, int], int] = {}
    for row in range(rows.num_rows):
        for place, token in enumerate(spread(rows, row)):
            if place > 0 and (kept is None or kept[row, place]):
                times[token] = times.get(token, 0) + 1
    return times


# The plan of a shard


def fullest_with_room(lengths: list[int], capacity: int) -> list[int]:
    """Free space of each row, ascending, by best-fit-decreasing as it is defined."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        row = min((row for row in range(len(free)) if free[row] >= length), key=lambda row: free[row], default=None)
        if row is None:
            row = len(free)
            free.append(capacity)
        free[row] -= length
    return sorted(free)


@given(capacity=st.integers(2, 50), data=st.data())
def test_best_fit_is_best_fit_decreasing(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    row = best_fit(np.array(lengths, np.int64), capacity)
    used = np.bincount(row, weights=lengths).astype(int)
    assert len(row) == len(lengths) and (used > 0).all()
    assert sorted((capacity - used).tolist()) == fullest_with_room(lengths, capacity)


@given(sizes=st.lists(st.integers(0, 60), max_size=40), length=st.integers(1, 40))
def test_pieces_overlap_by_one_and_cut_only_what_is_too_long(sizes: list[int], length: int) -> None:
    ends = np.cumsum(sizes, dtype=np.int64).astype(np.uint64)
    starts, lengths = cut(ends, length)
    expected = []
    for end, size in zip(ends.astype(int).tolist(), sizes, strict=True):
        begin = end - size
        while size and end - begin > length + 1:
            expected.append((begin, length + 1))
            begin += length
        if size:
            expected.append((begin, end - begin))
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == expected


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=60), length=st.integers(1, 40))
def test_rows_are_in_the_order_of_their_longest_pieces(sizes: list[int], length: int) -> None:
    """So that any run of rows is a fair sample; inside a row pieces are in the order of the shard."""
    counts, pieces = plan_shard(np.cumsum(sizes), length)
    assert pieces[:, 1].sum() == cut(np.cumsum(sizes), length)[1].sum() and counts.min() > 0
    rows = np.split(pieces, np.cumsum(counts)[:-1])
    assert all((np.diff(row[:, 0]) > 0).all() and row[:, 1].sum() <= length + 1 for row in rows)
    longest = [row[row[:, 1].argmax(), 0] for row in rows]  # of equals the first, which was placed first
    assert (np.diff(longest) > 0).all()


def test_real_lengths_are_packed_almost_without_padding() -> None:
    """The standard library's files at 3 characters a token."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [os.path.getsize(path) for package in (".", "asyncio", "email", "encodings", "json", "unittest", "xml/dom")
             for path in sorted((folder / package).glob("*.py"))]
    sizes = np.array(found) // 3 + 2
    counts, pieces = plan_shard(np.cumsum(sizes), 2048)
    padding = 1 - pieces[:, 1].sum() / (len(counts) * 2049)
    assert 0 <= padding <= 0.01
    whole = sizes[sizes <= 2049].sum()
    assert pieces[:, 1].sum() >= whole and len(counts) <= 1.01 * (sizes.sum() - 1) / 2048 + 1


# Rows


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("files", ["all", "even", "odd"])
def test_an_epoch_predicts_each_target_once(made: TokenStore, packing: str, files: str) -> None:
    rows = make_rows(made, "train", files, 1.0, packing, T)
    times = predicted(rows)
    names = [f"{index:05d}" for index in range(len(LENGTHS)) if files == "all" or index % 2 == (files == "odd")]
    every = [(name, at) for name in names for at in range(sum(LENGTHS[int(name)]))]
    if packing == "concat":  # the stream, but for its first token and the rest after the last whole window
        every = every[1 : rows.num_rows * T + 1]
    else:  # what a document begins with follows from nothing
        firsts = {(name, sum(LENGTHS[int(name)][:n])) for name in names for n in range(len(LENGTHS[int(name)]))}
        every = [token for token in every if token not in firsts]
    assert times == dict.fromkeys(every, 1)


@given(shards=st.lists(st.lists(st.integers(2, 50), max_size=12), min_size=1, max_size=4), length=st.integers(1, 30),
       first=st.sampled_from([1.0, 0.7, 0.1]), packing=st.sampled_from(PACKINGS))
@settings(max_examples=25)
def test_pieces_tokens_and_rows_of_agree(tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]],
                                         length: int, first: float, packing: str) -> None:
    shards = [*shards, [10, 2 * length]]  # a tenth of them is at least one token
    store = make_store(tmp_path_factory.mktemp("drawn") / "store", shards)
    write_plan(store.path, length)
    rows = make_rows(store, "train", "all", first, packing, length)
    tokens, kept = rows.read(np.arange(rows.num_rows))
    assert tokens.shape == (rows.num_rows, length + 1) and tokens.dtype == np.int32
    where: dict[tuple[str, int], set[int]] = {}
    view = store.view()
    starts = {span.name: span.start for span in view.shards}
    for row in range(rows.num_rows):
        assert min(piece.length for piece in rows.pieces(row)) > 0
        places = spread(rows, row)
        assert [int(view.read(starts[shard] + at, 1)[0]) for shard, at in places] == tokens[row, : len(places)].tolist()
        assert (tokens[row, len(places) :] == EOS).all()
        assert kept is None or not kept[row, len(places) :].any()
        for place in places:
            where.setdefault(place, set()).add(row)
    for index, documents in enumerate(shards):
        name = f"{index:05d}"
        for at in range(sum(documents)):
            assert set(rows.rows_of(name, at, at + 1).tolist()) == where.get((name, at), set())
        found = rows.rows_of(name, 0, sum(documents))
        assert found.dtype == np.int64 and (np.diff(found) > 0).all()
        assert set(found.tolist()) == {row for (shard, _), those in where.items() if shard == name for row in those}


def test_documents_that_fit_are_never_cut(made: TokenStore) -> None:
    rows = make_rows(made, "train", "all", 1.0, "best_fit", T)
    pieces = [piece for row in range(rows.num_rows) for piece in rows.pieces(row)]
    for index, documents in enumerate(LENGTHS):
        ends = np.cumsum(documents).tolist()
        for end, size in zip(ends, documents, strict=True):
            own = [piece for piece in pieces if piece.shard == f"{index:05d}" and end - size <= piece.start < end]
            assert len(own) == (1 if size <= T + 1 else -(-(size - 1) // T))
            assert sorted(piece.length for piece in own)[1:] == [T + 1] * (len(own) - 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_may_be_read_in_any_order_and_repeated(made: TokenStore, packing: str) -> None:
    rows = make_rows(made, "train", "odd", 1.0, packing, T)
    every, kept = rows.read(np.arange(rows.num_rows))
    order = np.random.default_rng(0).integers(0, rows.num_rows, 50)
    some, those = rows.read(order)
    np.testing.assert_array_equal(some, every[order])
    assert (kept is None and those is None) or np.array_equal(those, kept[order])
    none, nothing = rows.read(np.empty(0, np.int64))
    assert none.shape == (0, T + 1) and (nothing is None or nothing.shape == (0, T + 1))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_share_is_the_leading_rows_and_halves_have_all(made: TokenStore, packing: str) -> None:
    whole = make_rows(made, "train", "all", 1.0, packing, T)
    tenth = make_rows(made, "train", "all", 0.1, packing, T)
    np.testing.assert_array_equal(tenth.read(np.arange(tenth.num_rows))[0],
                                  whole.read(np.arange(tenth.num_rows))[0])
    if packing == "best_fit":
        assert tenth.num_rows == int(whole.num_rows * 0.1)
        halves = [make_rows(made, "train", files, 1.0, packing, T) for files in ("even", "odd")]
        assert sum(half.num_rows for half in halves) == whole.num_rows
        ours = [tuple(row) for half in halves for row in half.read(np.arange(half.num_rows))[0].tolist()]
        assert sorted(ours) == sorted(map(tuple, whole.read(np.arange(whole.num_rows))[0].tolist()))


def test_a_shard_that_is_not_read_has_no_rows(made: TokenStore) -> None:
    for rows in (make_rows(made, "train", "odd", 1.0, name, T) for name in PACKINGS):
        assert not rows.rows_of("00000", 0, 10).size and not rows.rows_of("other", 0, 10).size
        assert not rows.rows_of("00001", 5, 5).size


def test_a_view_shorter_than_a_row_has_none(tmp_path: Path) -> None:
    store = make_store(tmp_path / "short", [[3], [5]])
    rows = make_rows(store, "train", "all", 1.0, "concat", T)
    assert rows.num_rows == 0 and not rows.rows_of("00000", 0, 3).size


def test_held_out_documents_are_planned_too(made: TokenStore) -> None:
    rows = make_rows(made, "heldout", "all", 1.0, "best_fit", T)
    assert rows.num_rows == 2 and predicted(rows) == dict.fromkeys(
        [("00000", at) for at in range(26) if at not in (0, 20)], 1)


# Documents inside a row


@given(data=st.data(), length=st.integers(1, 20))
def test_segments_begin_at_a_beginning_and_after_an_end(data: st.DataObject, length: int) -> None:
    inputs = np.array(data.draw(st.lists(st.lists(st.sampled_from([BOS, EOS, 7, 8]), min_size=length, max_size=length),
                                         min_size=1, max_size=3)), np.int32)
    before = inputs.copy()
    ids, positions = segments(inputs, BOS, EOS)
    assert np.array_equal(inputs, before) and ids.dtype == positions.dtype == np.int32
    for row, (tokens, of, at) in enumerate(zip(inputs.tolist(), ids.tolist(), positions.tolist(), strict=True)):
        number, place = -1, 0
        for index, token in enumerate(tokens):
            begins = index == 0 or token == BOS or tokens[index - 1] == EOS
            number, place = (number + 1, 0) if begins else (number, place + 1)
            assert (of[index], at[index]) == (number, place), (row, index)


def test_segments_are_the_pieces_of_a_packed_row(made: TokenStore) -> None:
    """Also where the end of a long document, which has no <s>, stands behind another document."""
    rows = make_rows(made, "train", "all", 1.0, "best_fit", T)
    tokens, kept = rows.read(np.arange(rows.num_rows))
    assert kept is not None
    ids, positions = segments(tokens, BOS, EOS)
    behind = 0
    for row in range(rows.num_rows):
        done = 0
        for number, piece in enumerate(rows.pieces(row)):
            inside = slice(done, done + piece.length)
            assert (ids[row, inside] == number).all() and positions[row, inside].tolist() == list(range(piece.length))
            assert kept[row, inside].tolist() == [False] + [True] * (piece.length - 1)
            behind += number > 0 and tokens[row, done] != BOS
            done += piece.length
    assert behind, "the test has such a row"
