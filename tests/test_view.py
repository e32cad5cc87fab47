"""Views of token stores: what any read gives, local and on gs://, in how much memory, and blocks that were changed."""

import shutil
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store, tokens_of, upload

from crystal_jax.data import store, view
from crystal_jax.data.store import Piece, ShardSpan, TokenStore
from crystal_jax.errors import FatalError, UserError

LENGTHS = [[5, 40], [], [3], [200, 2, 9], [], [17, 30]]
"""Of the documents in each shard."""
NAMES = [f"{index:05d}" for index in range(len(LENGTHS))]
CHOSEN = {"all": NAMES, "even": NAMES[::2], "odd": NAMES[1::2]}
LONG = [[70_000, 2], [50_000], [40_000, 40_000]]
"""Several blocks a shard."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "made"
    make_store(path, LENGTHS)
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "long"
    make_store(path, LONG)
    return path


@pytest.fixture(scope="module")
def remote(made: Path, gcs) -> str:
    """The store `made`, on gs://."""
    folder = gcs.folder()
    upload(made, folder)
    return folder


# Views


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("first", [1.0, 0.5, 0.1])
def test_a_view_is_its_shards_one_after_the_other(made: Path, remote: str, chosen: str, first: float) -> None:
    whole = tokens_of(made, "train", CHOSEN[chosen])
    for place in (made, remote):
        found = TokenStore.open(place).view("train", chosen, first)
        assert found.num_tokens == int(len(whole) * first)
        out = found.read(0, found.num_tokens)
        assert out.dtype == np.int32
        np.testing.assert_array_equal(out, whole[: found.num_tokens])


@given(data=st.data())
def test_reads_anywhere_give_what_the_stream_has_there(made: Path, data: st.DataObject) -> None:
    check_reads(made, made, data)


@settings(max_examples=10)
@given(data=st.data())
def test_on_gs_too(made: Path, remote: str, data: st.DataObject) -> None:
    check_reads(made, remote, data)


def check_reads(made: Path, place: Path | str, data: st.DataObject) -> None:
    chosen = data.draw(st.sampled_from(list(CHOSEN)))
    found = TokenStore.open(place, data.draw(st.booleans())).view("train", chosen)
    whole = tokens_of(made, "train", CHOSEN[chosen])
    length = data.draw(st.integers(1, found.num_tokens))
    starts = data.draw(st.lists(st.integers(0, found.num_tokens - length), max_size=20))
    rows = found.rows(np.array(starts, np.int64), length)
    assert rows.shape == (len(starts), length) and rows.dtype == np.int32
    for start, row in zip(starts, rows, strict=True):
        np.testing.assert_array_equal(row, whole[start : start + length])
    lengths = [data.draw(st.integers(0, found.num_tokens - start)) for start in starts]
    ragged = found.ragged(starts, lengths)
    assert ragged.dtype == np.int32
    expected = [whole[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    np.testing.assert_array_equal(ragged, np.concatenate([np.empty(0), *expected]))


@given(data=st.data())
def test_pieces_lie_where_locate_says(made: Path, data: st.DataObject) -> None:
    found = TokenStore.open(made).view("heldout", data.draw(st.sampled_from(list(CHOSEN))), data.draw(
        st.sampled_from([1.0, 0.7])))
    start = data.draw(st.integers(0, found.num_tokens))
    length = data.draw(st.integers(0, found.num_tokens - start))
    pieces = found.locate(start, length)
    assert all(piece.length > 0 for piece in pieces)
    there = [tokens_of(made, "heldout", [piece.shard])[piece.start :][: piece.length] for piece in pieces]
    np.testing.assert_array_equal(np.concatenate([np.empty(0), *there]), found.read(start, length))


def test_the_spans_of_a_view(made: Path) -> None:
    opened = TokenStore.open(made)
    assert opened.view().shards == [ShardSpan("00000", 0, 0, 45), ShardSpan("00002", 2, 45, 3),
                                    ShardSpan("00003", 3, 48, 211), ShardSpan("00005", 5, 259, 47)]
    assert opened.view("train", "odd", 0.5).shards == [ShardSpan("00003", 3, 0, 129)]
    assert opened.view().locate(46, 10) == [Piece("00002", 1, 2), Piece("00003", 0, 8)]


def test_halves_go_by_ordinal_not_by_place(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, [[4], [5], [6]])
    for shard, ordinal in zip(manifest["splits"]["train"]["shards"], (3, 8, 10), strict=True):
        shard["ordinal"] = ordinal
    store.write_manifest(tmp_path, {key: value for key, value in manifest.items() if key != "digest"})
    opened = TokenStore.open(tmp_path)
    assert [shard.tokens for shard in opened.view("train", "even").shards] == [5, 6]
    assert [shard.tokens for shard in opened.view("train", "odd").shards] == [4]


def test_reads_outside_are_refused(made: Path) -> None:
    found = TokenStore.open(made).view("train", first=0.5)
    for start, length in ((-1, 2), (found.num_tokens - 1, 2)):
        with pytest.raises(AssertionError):
            found.read(start, length)
        with pytest.raises(AssertionError):
            found.rows(np.array([0, start]), length)
        with pytest.raises(AssertionError):
            found.locate(start, length)
    assert found.read(found.num_tokens, 0).shape == (0,)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert store.tokens_dtype(65536) == "<u2" and store.tokens_dtype(65537) == "<u4"
    make_store(tmp_path / "wide", [[70000]], vocab_size=70000)
    found = TokenStore.open(tmp_path / "wide", check_blocks=True).view()
    np.testing.assert_array_equal(found.read(65000, 4998), np.arange(65002, 70000))


def test_a_view_without_tokens_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "small", [[5], []])
    make_store(tmp_path / "one", [[5]])
    opened = TokenStore.open(tmp_path / "small")
    with pytest.raises(UserError, match=r"no tokens in files = odd, first = 1.0"):
        opened.view("train", "odd")
    with pytest.raises(UserError, match="one: has 1 input, and none for files = odd; give `prepare` several"):
        TokenStore.open(tmp_path / "one").view("train", "odd")
    with pytest.raises(UserError, match=r"no tokens in files = all, first = 0.1"):
        opened.view("train", first=0.1)


# Memory


def test_maps_are_bounded_in_number_and_pages(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "OPEN_MAPS", 2)
    monkeypatch.setattr(view, "RESIDENT", 3 * view.READ_AROUND)
    monkeypatch.setattr(view, "_MAPS", view.Maps())
    found = TokenStore.open(made).view()
    whole = found.read(0, found.num_tokens)
    for start in range(0, found.num_tokens - 60, 7):
        np.testing.assert_array_equal(found.read(start, 60), whole[start : start + 60])
        assert len(view._MAPS._maps) == 2


def test_a_thread_beside_reads_the_same(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "OPEN_MAPS", 1)
    monkeypatch.setattr(view, "RESIDENT", 0)
    found = TokenStore.open(made).view()
    whole = found.read(0, found.num_tokens)
    wrong: list[int] = []

    def read(step: int) -> None:
        for start in range(0, found.num_tokens - 30, step):
            if not np.array_equal(found.read(start, 30), whole[start : start + 30]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(step,)) for step in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_store_made_anew_isnt_read_through_the_old_maps(tmp_path: Path) -> None:
    for length in (50, 40):
        path = tmp_path / "store"
        make_store(path, [[length, 30]])
        found = TokenStore.open(path).view()
        np.testing.assert_array_equal(found.read(0, found.num_tokens), tokens_of(path, "train", NAMES[:1]))
        shutil.rmtree(path)


# Blocks


@pytest.mark.parametrize("byte", [0, 65_535, 65_536, 140_003])
@pytest.mark.parametrize("where", ["local", "gs"])
def test_a_changed_block_is_found_when_it_is_first_read(tmp_path: Path, gcs, byte: int, where: str) -> None:
    make_store(tmp_path, LONG)
    path = tmp_path / "train" / "00000.tokens"
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)
    place = str(tmp_path)
    if where == "gs":
        place = gcs.folder()
        upload(tmp_path, place)
    block = byte // view.BLOCK
    found = TokenStore.open(place, check_blocks=True).view()
    others = [start for start in (0, 32_768, 65_536) if start // 32_768 != block]
    found.rows(np.array(others), 4000)
    end = min((block + 1) * view.BLOCK, len(data))
    message = rf"train/00000\.tokens: block {block} \(bytes {block * view.BLOCK} to {end}\) isn't what was prepared"
    for start in (block * 32_768 + 7, max(block * 32_768 - 5, 0)):
        with pytest.raises(FatalError, match=message):
            found.read(start, 10)
    assert TokenStore.open(place).view().read(block * 32_768, 10).shape == (10,)


def test_each_block_is_compared_once(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def crc32(data: bytes) -> int:
        compared.append(len(data))
        return zlib.crc32(data)

    monkeypatch.setattr(view, "zlib", type("zlib", (), {"crc32": staticmethod(crc32)}))
    found = TokenStore.open(long, check_blocks=True).view()
    for _ in range(2):
        for start in range(0, found.num_tokens - 2049, 500):
            found.read(start, 2049)
    found.read(0, found.num_tokens)
    assert sum(compared) == 2 * found.num_tokens


def test_a_changed_checksum_is_found_too(tmp_path: Path) -> None:
    make_store(tmp_path, [[100]])
    (tmp_path / "train" / "00000.crc32").write_bytes(b"1234")
    with pytest.raises(FatalError, match="block 0"):
        TokenStore.open(tmp_path, check_blocks=True).view().read(0, 1)
