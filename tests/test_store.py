"""Token stores: the files of a shard, its documents, and what opening a store refuses, local and on gs://."""

import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from stores import make_store, upload

from crystal_jax import files
from crystal_jax.config import digest
from crystal_jax.data import store, view
from crystal_jax.data.store import ShardWriter, TokenStore
from crystal_jax.errors import UserError

LENGTHS = [[5, 40], [], [3], [200, 2, 9], [], [17, 30]]
"""Of the documents in each shard."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "made"
    make_store(path, LENGTHS)
    return path


@pytest.fixture(scope="module")
def remote(made: Path, gcs) -> str:
    """The store `made`, on gs://."""
    folder = gcs.folder()
    upload(made, folder)
    return folder


def test_what_a_store_says_about_itself(made: Path) -> None:
    opened = TokenStore.open(str(made))
    assert (opened.name, opened.vocab_size, opened.tokenizer_fingerprint) == ("made", 300, "f" * 16)
    assert set(opened.splits) == {"train", "heldout"}
    assert opened.fingerprint == opened.manifest["digest"]


# Documents


@pytest.mark.parametrize("where", ["local", "remote"])
def test_documents_of_a_shard(made: Path, remote: str, where: str) -> None:
    opened = TokenStore.open(made if where == "local" else remote)
    found = opened.documents("train", "00003")
    assert found.ends.dtype == np.int64 and found.ends.tolist() == [200, 202, 211]
    assert [found.identity(index) for index in range(3)] == [(f"3:{index}", "file 3") for index in range(3)]
    assert found.find("3:1") == [1] and found.find("3:") == [] and len(found) == 3
    assert opened.documents("train", "00003") is found
    empty = opened.documents("train", "00001")
    assert (empty.ends.tolist(), empty.ids, empty.find("")) == ([], [], [])


def test_ids_of_any_kind_come_back(tmp_path: Path) -> None:
    names = ["", "a\nb", "naïve 日本", "\ud800", '"', "\u2028", "\\n"]
    with ShardWriter(tmp_path, "00000", "<u2") as writer:
        for name in names:
            writer.add([1, 2], {"id": name, "source": name[::-1]})
        entry = writer.close()
    body = {"name": "x", "digest": "d", "tokenizer": {"fingerprint": "f", "vocab_size": 9}, "splits": {
        "": {"shards": [{"ordinal": 0, **entry}]}}}
    found = TokenStore(files.as_path(tmp_path), body).documents("", "00000")
    assert found.ids == names
    assert [found.find(name) for name in names] == [[index] for index in range(len(names))]


def test_damaged_documents_are_named(tmp_path: Path) -> None:
    make_store(tmp_path, [[5, 6]])
    path = tmp_path / "train" / "00000.docs.jsonl.zst"
    data = path.read_bytes()
    size = len(data)
    for changed in (bytes(size), data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"00000\.docs\.jsonl\.zst: damaged .*`verify"):
            TokenStore.open(tmp_path).documents("train", "00000")
    path.write_bytes(data)
    opened = TokenStore.open(tmp_path)
    opened.splits["train"]["shards"]._rows[0, view.NUMBERS.index("documents")] = 3
    with pytest.raises(UserError, match=r"2 documents, but 2 ends and 3 in the manifest"):
        opened.documents("train", "00000")


# Files


def test_files_of_a_shard(made: Path, tmp_path: Path) -> None:
    ends = np.fromfile(made / "train" / "00003.ends", "<u8")
    assert ends.tolist() == [200, 202, 211]
    assert len(np.fromfile(made / "train" / "00003.tokens", "<u2")) == 211
    data = (made / "train" / "00003.docs.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(data).splitlines()
    assert [json.loads(line) for line in lines] == [{"id": f"3:{n}", "source": "file 3"} for n in range(3)]
    assert (made / "train" / "00001.tokens").stat().st_size == (made / "train" / "00001.crc32").stat().st_size == 0
    make_store(tmp_path, [[70_000]])
    tokens = (tmp_path / "train" / "00000.tokens").read_bytes()
    blocks = [zlib.crc32(tokens[start : start + 65536]) for start in range(0, len(tokens), 65536)]
    assert np.fromfile(tmp_path / "train" / "00000.crc32", "<u4").tolist() == blocks and len(blocks) == 3


def test_a_token_takes_little_more_than_two_bytes(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, [[1000] * 200])
    assert sum(file.bytes for file in store.listed(manifest)) <= 2.05 * 2 * 200_000


@pytest.mark.parametrize("buffer", [view.BLOCK, 1 << 20])
def test_a_shard_is_what_was_added_however_it_is_buffered(
        tmp_path: Path, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BUFFER", buffer)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1 << 16, size) for size in (0, 1, 70_000, 32_768, 5, 1_200_000, 3)]
    with ShardWriter(tmp_path, "s", "<u2") as writer:
        for index, ids in enumerate(documents):
            writer.add(ids if index % 2 else ids.tolist(), {"id": str(index), "source": "x"})
        entry = writer.close()
    tokens = np.concatenate(documents).astype("<u2")
    assert (tmp_path / "s.tokens").read_bytes() == tokens.tobytes()
    assert np.fromfile(tmp_path / "s.ends", "<u8").tolist() == np.cumsum([len(ids) for ids in documents]).tolist()
    data = tokens.tobytes()
    assert np.fromfile(tmp_path / "s.crc32", "<u4").tolist() == [
        zlib.crc32(data[start : start + view.BLOCK]) for start in range(0, len(data), view.BLOCK)]
    assert (entry["name"], entry["tokens"], entry["documents"]) == ("s", len(tokens), len(documents))
    assert entry["bytes"] == {part: (tmp_path / f"s.{part}").stat().st_size for part in store.PARTS}
    assert entry["sha256"] == {part: files.sha256(tmp_path / f"s.{part}") for part in store.PARTS}


@pytest.mark.parametrize("ids", [[70_000], np.array([70_000]), np.array([-1])])
def test_ids_that_dont_fit_are_never_written(tmp_path: Path, ids: Any) -> None:
    with ShardWriter(tmp_path, "00000", "<u2") as writer, pytest.raises((OverflowError, AssertionError)):
        writer.add(ids, {"id": "a", "source": "b"})


def test_an_abandoned_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "00000", "<u2") as writer:
        writer.add([1, 2], {"id": "a", "source": "b"})
        raise RuntimeError
    assert not list(tmp_path.iterdir())


# Opening


FILES = [f"{split}/0000{index}.{part}" for split in store.SPLITS for index in (0, 1) for part in store.PARTS]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_resized_file_is_named(tmp_path: Path, name: str) -> None:
    make_store(tmp_path, [[5, 40], []])
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"{name}: .* bytes, the manifest says .*verify"):
        TokenStore.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: can't be read \(No such file or directory\)"):
        TokenStore.open(tmp_path)


def test_a_file_that_changes_size_or_goes_after_opening_is_named(tmp_path: Path) -> None:
    make_store(tmp_path, [[50]])
    path = tmp_path / "train" / "00000.tokens"
    opened = TokenStore.open(tmp_path)
    path.write_bytes(b"12")
    with pytest.raises(UserError, match=r"train/00000\.tokens: 2 bytes, the manifest says 100"):
        opened.view().read(0, 1)
    path.unlink()
    with pytest.raises(UserError, match=r"train/00000\.tokens: can't be read \(No such file"):
        opened.view().read(0, 1)


def test_on_gs_a_missing_file_is_named_at_once_a_short_one_when_it_is_read(tmp_path: Path, gcs) -> None:
    make_store(tmp_path, [[50], [60]])
    (tmp_path / "train" / "00001.tokens").write_bytes(b"12")
    folder = gcs.folder()
    upload(tmp_path, folder)
    found = TokenStore.open(folder).view()
    assert found.read(0, 51).shape == (51,)
    with pytest.raises(UserError, match=r"train/00001\.tokens: bytes 0 to 4 can't be read .*shorter"):
        found.read(49, 3)
    files.as_path(f"{folder}/train/00001.tokens").unlink()
    with pytest.raises(UserError, match=r"gs://.*/train/00001\.tokens: missing; `verify"):
        TokenStore.open(folder)


def test_a_damaged_manifest(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, [[5]])
    path = tmp_path / store.MANIFEST
    manifest["splits"]["train"]["shards"][0]["tokens"] += 1
    for text, message in (
        (json.dumps(manifest), "damaged, its contents don't have the digest"),
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ("{}", "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"manifest\.json: {message}"):
            TokenStore.open(tmp_path)
    del manifest["digest"]
    path.write_text(json.dumps({**manifest, "format": 1, "digest": digest({**manifest, "format": 1})}))
    with pytest.raises(UserError, match="format 1; this version reads 2"):
        TokenStore.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"manifest\.json: missing, so .* is no finished token store"):
        TokenStore.open(tmp_path)


def test_a_folder_on_gs_without_a_store(gcs) -> None:
    with pytest.raises(UserError, match=r"gs://.*manifest\.json: missing, so gs://.* is no finished token store"):
        TokenStore.open(gcs.folder())


# Scale


def test_an_open_store_keeps_little_of_a_shard(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, [[5]])
    count = 3000
    for split in manifest["splits"].values():
        entry = split["shards"][0]
        split["shards"] = [{**entry, "name": f"{index:05d}", "ordinal": index} for index in range(count)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        opened = TokenStore(files.as_path(tmp_path), json.loads(json.dumps(manifest)))
        found = opened.view("train")
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert found.num_tokens == count * 5
    assert kept < 500 * count, f"{kept / count} bytes a shard"
    assert "splits" not in opened.manifest and "inputs" not in opened.manifest


def test_shards_are_the_entries_of_the_manifest(tmp_path: Path) -> None:
    entries = make_store(tmp_path, [[5, 40], [], [3]])["splits"]["train"]["shards"]
    shards = view.Shards(entries)
    wanted = [{key: entry[key] for key in ("name", "ordinal", "tokens", "documents", "bytes")} for entry in entries]
    assert list(shards) == wanted and len(shards) == 3
    assert shards.named("00002") == wanted[2] and shards.total("documents") == 3
    assert list(view.Shards([])) == [] and view.Shards([]).total("tokens") == 0


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    make_store(tmp_path, [[5]])
    (tmp_path / "train" / "00000.ends").unlink()
    (tmp_path / "train" / "00000.ends").mkdir()
    with pytest.raises(UserError, match=r"train/00000\.ends: can't be read"):
        TokenStore.open(tmp_path)
