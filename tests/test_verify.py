"""`verify`: each class of damage is named, and so is each control id that no text can have made."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from stores import BOS, EOS, make_store, ordinary, upload

from crystal_jax import files
from crystal_jax.data import control_ids, store, verify
from crystal_jax.data.control_ids import Scan
from crystal_jax.data.store import ShardWriter
from crystal_jax.data.verify import count_lines
from crystal_jax.errors import UserError

LENGTHS = [[5, 40], [], [200, 2, 9]]
FILES = [f"{split}/0000{index}.{part}" for split in store.SPLITS for index in range(3) for part in store.PARTS]
BLOCK = store.BLOCK


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_store(tmp_path / "made", LENGTHS)
    return tmp_path / "made"


def body(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key != "digest"}


# Files


def test_a_good_store_has_no_problems(made: Path) -> None:
    read: list[int] = []
    assert verify.verify(made, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in made.glob("*/*"))


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(made: Path, name: str) -> None:
    path = made / name
    data = path.read_bytes()
    if data:
        flip(path, len(data) // 2)
        (problem,) = verify.verify(made)
        assert problem.startswith(f"{path}: its contents changed: sha256 ")
        assert ("1 of 1 blocks differ: 0 (bytes 0 to " in problem) == name.endswith(".tokens")
        path.write_bytes(data[:-1])
        assert verify.verify(made) == [f"{path}: {len(data) - 1} bytes, the manifest says {len(data)}"]
    path.write_bytes(data + b"\0")
    assert verify.verify(made) == [f"{path}: {len(data) + 1} bytes, the manifest says {len(data)}"]
    path.unlink()
    assert verify.verify(made) == [f"{path}: can't be read (No such file or directory)"]


def test_a_file_that_cant_be_read_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path):
        if Path(path).name == "00002.ends":
            raise OSError(errno.EIO, "Input/output error")
        return read_blocks(path)

    read_blocks = files.read_blocks
    monkeypatch.setattr(files, "read_blocks", broken)
    problems = verify.verify(made)
    assert [problem.split(": ", 1) for problem in problems] == [
        [str(made / split / "00002.ends"), "can't be read (Input/output error)"] for split in store.SPLITS]


def test_files_that_the_manifest_lacks_are_named(made: Path) -> None:
    more = [made / "heldout" / "00000.tokens.bak", made / "train" / "00003.tokens", made / "train" / "old" / "x"]
    (made / "train" / "old").mkdir()
    (made / "packing").mkdir()
    for path in (*more, made / "README", made / "packing" / "notes"):
        path.write_text("x")
    assert verify.verify(made) == [f"{path}: the manifest has no such file; remove it" for path in more]


def test_a_folder_in_the_place_of_a_file(made: Path) -> None:
    path = made / "train" / "00000.ends"
    path.unlink()
    path.mkdir()
    assert verify.verify(made) == [f"{path}: can't be read (Is a directory)"]
    with pytest.raises(UserError, match=r"00000\.ends: can't be read \(Is a directory\)"):
        store.TokenStore.open(made)


def test_all_damage_is_listed_in_the_order_of_the_store(made: Path) -> None:
    names = ("heldout/00002.ends", "train/00000.crc32", "train/00000.tokens", "train/00002.docs.jsonl.zst")
    for name in names[:-1]:
        flip(made / name, 3)
    (made / names[-1]).unlink()
    found = [problem.split(":")[0] for problem in verify.verify(made)]
    assert found == [str(made / name) for name in (names[2], names[1], names[3], names[0])]


@pytest.mark.parametrize("changed", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_flipped_bits_are_put_down_to_their_blocks(tmp_path: Path, changed: list[int]) -> None:
    make_store(tmp_path, [[70_000]])
    path = tmp_path / "train" / "00000.tokens"
    flip(path, *(block * BLOCK + 100 for block in changed))
    (problem,) = verify.verify(tmp_path)
    named = ", ".join(f"{block} (bytes {block * BLOCK} to {min((block + 1) * BLOCK, 140_000)})" for block in changed)
    assert problem.startswith(f"{path}: its contents changed")
    assert problem.endswith(f"; {len(changed)} of 3 blocks differ: {named}")


def test_many_blocks_are_counted(tmp_path: Path) -> None:
    make_store(tmp_path, [[400_000]])
    (tmp_path / "train" / "00000.tokens").write_bytes(bytes(800_000))
    (problem,) = verify.verify(tmp_path)
    assert "13 of 13 blocks differ: 0 (bytes 0 to 65536), 1 (" in problem and problem.endswith(" and 5 more")


def test_swapped_files_of_one_size_are_found(tmp_path: Path) -> None:
    make_store(tmp_path, [[10], [10]])
    first, second = (tmp_path / "train" / f"0000{index}.tokens" for index in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    store.TokenStore.open(tmp_path)
    problems = verify.verify(tmp_path)
    assert [problem.split("; the two were swapped")[0] for problem in problems] == [
        f"{first}: holds the contents of train/00001.tokens", f"{second}: holds the contents of train/00000.tokens"]


def test_the_manifest_of_another_store_fits_no_file(made: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "other", [[5, 41], [], [200, 3, 9]])
    (made / store.MANIFEST).write_bytes((tmp_path / "other" / store.MANIFEST).read_bytes())
    problems = verify.verify(made)
    assert {problem.split(":")[0] for problem in problems} >= {
        str(made / split / f"0000{index}.tokens") for split in store.SPLITS for index in (0, 2)}


def test_a_missing_or_damaged_manifest_is_the_only_problem(made: Path) -> None:
    path = made / store.MANIFEST
    text = path.read_text()
    for changed in ("{", text.replace('"tokens": 45', '"tokens": 46')):
        path.write_text(changed)
        (problem,) = verify.verify(made)
        assert problem.startswith(f"{path}: ")
    path.unlink()
    (problem,) = verify.verify(made)
    assert problem.startswith(f"{path}: missing, so")


Change = Callable[[dict[str, Any]], None]
CONTRADICTIONS: list[tuple[Change, str]] = [
    (lambda split: split.update(tokens=7), "train has 7 tokens, but its shards have 256"),
    (lambda split: split.update(documents=7), "train has 7 documents, but its shards have 5"),
    (lambda split: split["shards"][0].update(tokens=46), "46 tokens and 2 documents can't have 90 bytes of tokens"),
    (lambda split: split["shards"][0].update(documents=3), "3 documents can't have 16 bytes of ends, but 24"),
    (lambda split: split["shards"][0]["bytes"].update(crc32=8), "can't have 8 bytes of crc32, but 4"),
    (lambda split: split["shards"][0].update(name="00002"), "two shards of train have the same name"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself(made: Path, change: Change, message: str) -> None:
    manifest = store.read_manifest(made)
    change(manifest["splits"]["train"])
    store.write_manifest(made, body(manifest))
    problems = verify.verify(made)
    assert all(problem.startswith(f"{made / store.MANIFEST}: ") for problem in problems)
    assert any(message in problem for problem in problems)


def test_shards_may_share_an_ordinal(made: Path) -> None:
    """SlimPajama's numbers begin anew in each chunk."""
    manifest = store.read_manifest(made)
    manifest["splits"]["train"]["shards"][0]["ordinal"] = 2
    store.write_manifest(made, body(manifest))
    assert verify.verify(made) == []


# Contents that are as prepared, but wrong


def replace(path: Path, part: str, data: bytes) -> None:
    """Puts data into the first shard of train, and into its manifest."""
    file = path / "train" / f"00000.{part}"
    file.write_bytes(data)
    manifest = body(store.read_manifest(path))
    entry = manifest["splits"]["train"]["shards"][0]
    entry["bytes"][part], entry["sha256"][part] = len(data), files.sha256(file)
    store.write_manifest(path, manifest)


@pytest.mark.parametrize(("ends", "message"), [
    ([5, 44], "the last end is 44, in a shard of 45 tokens"),
    ([45, 5], "document 1 ends where it begins, or before"),
    ([0, 45], "document 0 ends where it begins"),
    ([45, 45], "document 1 ends where it begins"),
])
def test_ends_that_dont_fit(made: Path, ends: list[int], message: str) -> None:
    replace(made, "ends", np.array(ends, "<u8").tobytes())
    (problem,) = verify.verify(made)
    assert problem.startswith(f"{made / 'train' / '00000.ends'}: {message}")


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_documents_that_dont_fit(made: Path, lines: int) -> None:
    line = json.dumps({"id": "0:0", "source": "x"}).encode() + b"\n"
    replace(made, "docs.jsonl.zst", zstandard.ZstdCompressor().compress(line * lines))
    (problem,) = verify.verify(made)
    assert problem == f"{made / 'train' / '00000.docs.jsonl.zst'}: names {lines} documents, the manifest has 2"


def test_lines_are_counted_across_blocks() -> None:
    assert count_lines(zstandard.ZstdCompressor().compress(b"line\n" * 1_000_000)) == 1_000_000


# Control ids


def write(path: Path, documents: list[list[int]], allowed: tuple[int, ...] = ()) -> None:
    """A store of one shard, of a vocabulary of 300 ids: 0, 1, 2 and 290 to 299 are special."""
    make_store(path, [[5]])
    with ShardWriter(path / "train", "00000", "<u2") as writer:
        for number, ids in enumerate(documents):
            writer.add(ids, {"id": f"doc {number}", "source": "x"})
        entry = {"ordinal": 0, "input": "x", **writer.close()}
    manifest = body(store.read_manifest(path))
    manifest["tokenizer"]["special_ids"] = [0, 1, 2, *range(290, 300)]
    manifest["splits"]["train"] = {"shards": [entry], "tokens": entry["tokens"], "documents": entry["documents"]}
    store.write_manifest(path, {**manifest, "control_ids": list(allowed)})


GOOD = [BOS, 10, 11, EOS]


@pytest.mark.parametrize(("document", "message"), [
    ([BOS, 10, 295, 11, EOS], "token 2 (token 6 of the file): holds the control id 295"),
    ([BOS, 0, EOS], "token 1 (token 5 of the file): holds the control id 0"),
    ([BOS, BOS, 10, EOS], "token 1 (token 5 of the file): holds the control id 1"),
    ([BOS, 10, EOS, EOS], "token 2 (token 6 of the file): holds the control id 2"),
    ([BOS, 10, 300, EOS], "token 2 (token 6 of the file): holds the id 300, beyond the vocabulary of 300"),
    ([BOS, 10, 65535, EOS], "token 2 (token 6 of the file): holds the id 65535, beyond the vocabulary of 300"),
    ([10, 11, EOS], "token 0 (token 4 of the file): begins without <s>"),
    ([BOS, 10, 11], "token 2 (token 6 of the file): ends without </s>"),
])
def test_a_control_id_is_named_with_its_document_and_place(tmp_path: Path, document: list[int], message: str) -> None:
    write(tmp_path, [GOOD, document, GOOD])
    (problem,) = verify.verify(tmp_path)
    assert problem == f"{tmp_path / 'train' / '00000.tokens'}: document doc 1, {message}"


def test_ids_written_on_purpose_are_allowed(tmp_path: Path) -> None:
    documents = [GOOD, [BOS, 295, 10, 296, EOS], [BOS, 295, EOS]]
    write(tmp_path / "a", documents, (295, 296))
    assert verify.verify(tmp_path / "a") == []
    write(tmp_path / "b", documents, (295,))
    (problem,) = verify.verify(tmp_path / "b")
    assert problem.endswith("document doc 1, token 3 (token 7 of the file): holds the control id 296")


def test_documents_written_as_they_came_need_no_frame(tmp_path: Path) -> None:
    write(tmp_path, [[10, EOS, BOS, 11], [12]], (BOS, EOS))
    assert verify.verify(tmp_path) == []


def test_many_control_ids_are_counted(tmp_path: Path) -> None:
    write(tmp_path, [[BOS, *[295] * 100, EOS]])
    problems = verify.verify(tmp_path)
    assert len(problems) == verify.NAMED + 1
    assert problems[-1] == f"{tmp_path / 'train' / '00000.tokens'}: and 92 more of this kind"


def test_a_file_of_nothing_else_doesnt_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_ids, "LIMIT", 100)
    scan = Scan({"bos_id": 1, "eos_id": 2, "special_ids": [0, 1, 2], "vocab_size": 300}, [], "<u2")
    for _ in range(50):
        scan.feed(memoryview(bytes(160)))
    assert len(list(scan.finish(np.array([4000])))) <= 100 + 80 + 2


@given(data=st.data())
def test_the_scan_finds_what_a_loop_finds(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["<u2", "<u4"]))
    special = sorted(data.draw(st.sets(st.integers(3, 19), max_size=6)) | {0, 1, 2})
    allowed = data.draw(st.lists(st.sampled_from([id_ for id_ in special if id_ not in (1, 2)]), unique=True))
    ids = st.lists(st.integers(0, 22), max_size=8)
    documents = data.draw(st.lists(ids.map(lambda inside: [1, *inside, 2]) | ids.filter(len), min_size=1, max_size=6))
    scan = Scan({"bos_id": 1, "eos_id": 2, "special_ids": special, "vocab_size": 20}, allowed, dtype)
    stream = np.concatenate(documents).astype(dtype)
    cut = data.draw(st.integers(0, len(stream)))
    scan.feed(memoryview(stream[:cut].tobytes()))
    scan.feed(memoryview(stream[cut:].tobytes()))
    ends = np.cumsum([len(document) for document in documents])
    found = {(item.document, item.offset - int(ends[item.document]) + len(documents[item.document]))
             for item in scan.finish(ends)}
    expected = set()
    for number, document in enumerate(documents):
        last = len(document) - 1
        wrong_frame = {place for place, token in ((0, 1), (last, 2)) if document[place] != token}
        right_frame = {place for place, token in ((0, 1), (last, 2)) if document[place] == token}
        inside = {place for place, token in enumerate(document)
                  if token not in allowed and (token in special or token >= 20) and place not in right_frame}
        expected |= {(number, place) for place in wrong_frame | inside}
    assert found == expected


def test_ordinary_ids_are_no_control_ids() -> None:
    assert min(ordinary(1000, 5, 300)) > EOS and max(ordinary(1000, 5, 300)) < 300


# gs:// and the command


def test_on_gs(made: Path, gcs) -> None:
    folder = gcs.folder()
    upload(made, folder)
    assert verify.verify(folder) == []
    flip(made / "train" / "00002.tokens", 8)
    files.write_bytes(f"{folder}/train/00002.tokens", (made / "train" / "00002.tokens").read_bytes())
    files.as_path(f"{folder}/heldout/00001.ends").unlink()
    changed, missing = verify.verify(folder)
    assert changed.startswith(f"{folder}/train/00002.tokens: its contents changed")
    assert changed.endswith("1 of 1 blocks differ: 0 (bytes 0 to 422)")
    assert missing.startswith(f"{folder}/heldout/00001.ends: can't be read")


def test_the_command(run_cli, made: Path) -> None:
    done = run_cli("verify", made)
    assert done.returncode == 0 and "as prepared" in done.stdout
    damaged = made / "heldout" / "00000.ends"
    flip(damaged, 2)
    done = run_cli("verify", made)
    assert done.returncode == 1 and str(damaged) in done.stdout
    assert "1 problem; the same `prepare` command with --repair" in done.stderr
    (made / store.MANIFEST).unlink()
    done = run_cli("verify", made)
    assert done.returncode == 1 and "manifest.json: missing" in done.stderr and "Traceback" not in done.stderr


def test_the_command_on_gs(run_cli, made: Path, gcs) -> None:
    folder = gcs.folder()
    upload(made, folder)
    done = run_cli("verify", folder, env=gcs.environment)
    assert done.returncode == 0 and f"{folder}: every file is as prepared" in done.stdout, done.stderr
