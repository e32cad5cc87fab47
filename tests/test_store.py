"""Token stores: views against a plain concatenation, and every kind of damage found by name."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.config import digest
from crystal_jax.data import store
from crystal_jax.data.store import ShardWriter, TokenStore, verify
from crystal_jax.errors import UserError

LENGTHS = [[5, 40], [], [3], [200, 1, 9], [], [17, 30]]
"""Of the documents in each shard of split train."""


def make_store(path: Path, lengths: list[list[int]] = LENGTHS, vocab_size: int = 300) -> dict[str, Any]:
    """A store of documents of ascending ids (modulo the vocabulary); returns its manifest."""
    numbers = itertools.count()
    splits = {}
    for split in store.SPLITS:
        (path / split).mkdir(parents=True)
        shards = []
        for index, documents in enumerate(lengths):
            with ShardWriter(path / split, f"{index:05d}", store.tokens_dtype(vocab_size)) as writer:
                for number, length in enumerate(documents):
                    ids = [next(numbers) % vocab_size for _ in range(length)]
                    writer.add(ids, {"id": f"{index}:{number}", "source": f"file {index}"})
                shards.append({"input": f"file {index}", **writer.close()})
        splits[split] = {"shards": shards, "tokens": sum(shard["tokens"] for shard in shards)}
    manifest = {
        "format": store.FORMAT,
        "name": path.name,
        "tokenizer": {"fingerprint": "f" * 16, "vocab_size": vocab_size},
        "splits": splits,
    }
    manifest["digest"] = digest(manifest)
    (path / store.MANIFEST).write_text(json.dumps(manifest))
    return manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "made"
    make_store(path)
    return path


def stream(lengths: list[list[int]], chosen: slice) -> np.ndarray:
    """The tokens that a view of the chosen shards must give."""
    sizes = [sum(documents) for documents in lengths]
    ends = np.cumsum(sizes)
    pieces = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *pieces[chosen]]) % 300


# Views


@pytest.mark.parametrize("files", store.ORDINALS)
@pytest.mark.parametrize("first", [1.0, 0.5, 0.1])
def test_a_view_is_its_shards_one_after_the_other(made: Path, files: str, first: float) -> None:
    view = TokenStore.open(made).view("train", files, first)
    whole = stream(LENGTHS, store.ORDINALS[files])
    assert view.num_tokens == int(len(whole) * first)
    out = view.read(0, view.num_tokens)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, whole[: view.num_tokens])


@given(data=st.data())
def test_reads_and_rows_anywhere(made: Path, data: st.DataObject) -> None:
    view = TokenStore.open(made).view("train", data.draw(st.sampled_from(list(store.ORDINALS))))
    whole = view.read(0, view.num_tokens)
    length = data.draw(st.integers(1, view.num_tokens))
    starts = np.array(data.draw(st.lists(st.integers(0, view.num_tokens - length), max_size=20)), np.int64)
    rows = view.rows(starts, length)
    assert rows.shape == (len(starts), length) and rows.dtype == np.int32
    for start, row in zip(starts, rows, strict=True):
        np.testing.assert_array_equal(row, whole[start : start + length])
        np.testing.assert_array_equal(view.read(int(start), length), row)


def test_reads_outside_are_refused(made: Path) -> None:
    view = TokenStore.open(made).view("train", first=0.5)
    for start, length in ((-1, 2), (view.num_tokens - 1, 2)):
        with pytest.raises(AssertionError):
            view.read(start, length)
        with pytest.raises(AssertionError):
            view.rows(np.array([0, start]), length)
    assert view.read(view.num_tokens, 0).shape == (0,)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert store.tokens_dtype(65536) == "<u2" and store.tokens_dtype(65537) == "<u4"
    make_store(tmp_path / "wide", [[70000]], vocab_size=70000)
    opened = TokenStore.open(tmp_path / "wide")
    np.testing.assert_array_equal(opened.view().read(65000, 5000), np.arange(65000, 70000))


def test_a_view_without_tokens_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "small", [[5], []])
    opened = TokenStore.open(tmp_path / "small")
    with pytest.raises(UserError, match=r"no tokens in files = odd, first = 1.0"):
        opened.view("train", "odd")
    with pytest.raises(UserError, match=r"no tokens in files = all, first = 0.1"):
        opened.view("train", first=0.1)


def test_what_a_store_says_about_itself(made: Path) -> None:
    opened = TokenStore.open(str(made))
    assert (opened.name, opened.vocab_size, opened.tokenizer_fingerprint) == ("made", 300, "f" * 16)
    assert set(opened.splits) == {"train", "heldout"}
    assert opened.fingerprint == opened.manifest["digest"]


# Files


def test_files_of_a_shard(made: Path) -> None:
    ends = np.fromfile(made / "train" / "00003.ends", "<u8")
    assert ends.tolist() == [200, 201, 210]
    tokens = np.fromfile(made / "train" / "00003.tokens", "<u2")
    assert len(tokens) == 210
    lines = (made / "train" / "00003.docs.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["3:0", "3:1", "3:2"]
    assert (made / "train" / "00001.tokens").stat().st_size == 0
    assert not list(made.glob(f"**/*{store.PARTIAL}*"))


def test_an_abandoned_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "00000", "<u2") as writer:
        writer.add([1, 2], {"id": "a", "source": "b"})
        raise RuntimeError
    assert not list(tmp_path.iterdir())


# Damage


FILES = [f"{split}/0000{index}.{part}" for split in store.SPLITS for index in range(6) for part in store.PARTS]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_good_store_has_no_problems(made: Path) -> None:
    read: list[int] = []
    assert verify(made, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in made.glob("*/*"))


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    make_store(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    if data:
        path.write_bytes(flip(data))
        (problem,) = verify(tmp_path)
        assert problem.startswith(f"{path}: its contents changed")
        path.write_bytes(data[:-1])
        assert verify(tmp_path) == [f"{path}: {len(data) - 1} bytes, the manifest says {len(data)}"]
    path.write_bytes(data + b"\0")
    (problem,) = verify(tmp_path)
    assert problem.startswith(f"{path}: {len(data) + 1} bytes")
    with pytest.raises(UserError, match=rf"{name}: .* bytes, the manifest says .*verify"):
        TokenStore.open(tmp_path)
    path.unlink()
    assert verify(tmp_path) == [f"{path}: can't be read (No such file or directory)"]
    with pytest.raises(UserError, match=rf"{name}: can't be read"):
        TokenStore.open(tmp_path)


def test_all_damage_is_listed(tmp_path: Path) -> None:
    make_store(tmp_path)
    first, second = (tmp_path / "train" / f"0000{index}.tokens" for index in (0, 3))
    swapped = first.read_bytes()
    first.write_bytes(flip(swapped))
    second.unlink()
    assert [problem.split(":")[0] for problem in verify(tmp_path)] == [str(first), str(second)]


def test_swapped_files_of_one_size_are_found(tmp_path: Path) -> None:
    make_store(tmp_path, [[10], [10]])
    first, second = (tmp_path / "train" / f"0000{index}.tokens" for index in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    TokenStore.open(tmp_path)
    assert len(verify(tmp_path)) == 2


def test_a_damaged_manifest(tmp_path: Path) -> None:
    manifest = make_store(tmp_path)
    path = tmp_path / store.MANIFEST
    manifest["splits"]["train"]["shards"][0]["tokens"] += 1
    for text, message in (
        (json.dumps(manifest), "damaged, its contents don't have the digest"),
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ("{}", "damaged"),
    ):
        path.write_text(text)
        assert message in verify(tmp_path)[0]
        with pytest.raises(UserError, match=rf"manifest\.json: {message}"):
            TokenStore.open(tmp_path)
    del manifest["digest"]
    path.write_text(json.dumps({**manifest, "format": 2, "digest": digest({**manifest, "format": 2})}))
    with pytest.raises(UserError, match="format 2; this version reads 1"):
        TokenStore.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"manifest\.json: missing, so .* is no finished token store"):
        TokenStore.open(tmp_path)


def test_the_command(run_cli, tmp_path: Path) -> None:
    make_store(tmp_path)
    done = run_cli("verify", tmp_path)
    assert done.returncode == 0 and "as prepared" in done.stdout
    damaged = tmp_path / "heldout" / "00000.ends"
    damaged.write_bytes(flip(damaged.read_bytes()))
    done = run_cli("verify", tmp_path)
    assert done.returncode == 1 and str(damaged) in done.stdout and "1 damaged" in done.stderr
