"""A finished store is mended from its inputs; a changed input isn't taken for the one that was prepared."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from preparing import files_of, in_parts, in_process, make, records, spec, write_raw, write_tokenizer

from crystal_jax import files
from crystal_jax.data import prepare as module
from crystal_jax.data import tasks
from crystal_jax.data.store import TokenStore
from crystal_jax.data.verify import verify
from crystal_jax.errors import UserError

INPUTS = 3
FUTURE = 4_000_000_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw", inputs=INPUTS, chars=300)


@pytest.fixture(autouse=True)
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the inputs that were prepared, in order."""
    in_process(monkeypatch)
    names: list[str] = []
    runner = module.RUNNERS["local"]

    def counted(found: list[tasks.Task], options: Any) -> None:
        names.extend(task.item.name for task in found)
        runner(found, options)

    monkeypatch.setitem(module.RUNNERS, "local", counted)
    return names


@pytest.fixture
def one(raw: Path, tokenizer: Path, tmp_path: Path, done: list[str]) -> Path:
    """A finished store."""
    make(raw, tokenizer, tmp_path)
    done.clear()
    return tmp_path / "set" / "one"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path) -> None:
    """Another text of the same size."""
    text = path.read_text()
    assert text.count('"text": "') > 1
    place = text.index('"text": "') + len('"text": "')
    path.write_text(text[:place] + ("a" if text[place] == "b" else "b") + text[place + 1 :])


# Mending


@pytest.mark.parametrize("damage", ["missing", "resized", "folder lost"])
def test_what_a_look_finds_is_mended(damage: str, one: Path, raw: Path, tokenizer: Path, tmp_path: Path,
                                     done: list[str], capsys: Any) -> None:
    before = files_of(one)
    match damage:
        case "missing":
            (one / "train" / "00001.ends").unlink()
        case "resized":
            (one / "train" / "00001.ends").write_bytes(b"")
        case _:
            shutil.rmtree(one / "train")
    with pytest.raises(UserError, match=r"train/0000\d\.\w+: .*the same `prepare` command mends it"):
        TokenStore.open(one)
    make(raw, tokenizer, tmp_path)
    assert files_of(one) == before
    assert done == ([f"{index:02d}.jsonl" for index in range(INPUTS)] if damage == "folder lost" else ["01.jsonl"])
    assert f"preparing {len(done)} of 3 inputs once more" in capsys.readouterr().err
    assert not (one / "progress").exists()


def test_flipped_bits_are_mended_when_asked(one: Path, raw: Path, tokenizer: Path, tmp_path: Path, done: list[str],
                                            run_cli: Any) -> None:
    before = files_of(one)
    for name in ("train/00000.tokens", "heldout/00000.crc32", "train/00002.docs.jsonl.zst"):
        flip(one / name)
    assert len(verify(one)) == 3
    make(raw, tokenizer, tmp_path)
    assert done == [] and len(verify(one)) == 3
    advice = run_cli("verify", one)
    assert advice.returncode == 1 and "3 problems; the same `prepare` command with --repair mends" in advice.stderr
    make(raw, tokenizer, tmp_path, repair=True)
    assert done == ["00.jsonl", "02.jsonl"]
    assert files_of(one) == before and verify(one) == []
    make(raw, tokenizer, tmp_path, repair=True)
    assert len(done) == 2


def test_a_part_is_mended(raw: Path, tokenizer: Path, tmp_path: Path, done: list[str]) -> None:
    make(in_parts(raw), tokenizer, tmp_path)
    before = files_of(tmp_path / "set")
    (tmp_path / "set" / "one" / "B" / "train" / "00002.tokens").unlink()
    done.clear()
    make(in_parts(raw), tokenizer, tmp_path)
    assert files_of(tmp_path / "set") == before and done == ["02.jsonl"]


def test_what_an_interrupted_mending_left_is_removed(one: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    before = files_of(one)
    (one / "train" / "00001.ends").unlink()
    make(raw, tokenizer, tmp_path / "other", shard=(1, 3))
    shutil.copytree(tmp_path / "other" / "set" / "one", one / "progress" / "repair")
    (one / "progress" / "repair" / "train" / "00001.tokens").write_bytes(b"half")
    make(raw, tokenizer, tmp_path)
    assert files_of(one) == before


def test_a_shard_of_several_is_not_mended(one: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    (one / "train" / "00001.ends").unlink()
    with pytest.raises(UserError, match="shard 00001 is damaged; run the same command without --shard to mend it"):
        make(raw, tokenizer, tmp_path, shard=(0, 2))


def test_only_what_the_manifest_says_is_put_back(one: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    (one / "train" / "00001.ends").unlink()
    edit(raw / "01.jsonl")
    os.utime(one / "manifest.json", (FUTURE, FUTURE))  # a clock that is wrong hides the change
    before = {name: data for name, data in files_of(one).items() if not name.startswith("progress/")}
    with pytest.raises(UserError, match=r"shard 00001, prepared once more from 01\.jsonl, isn't the manifest's; copy"):
        make(raw, tokenizer, tmp_path)
    assert {name: data for name, data in files_of(one).items() if not name.startswith("progress/")} == before


def test_on_gs(raw: Path, tokenizer: Path, gcs: Any) -> None:
    output = gcs.folder()
    make(raw, tokenizer, output)
    folder = files.as_path(output) / "set" / "one"
    before = {name: files.read_bytes(folder / name) for name in files.list_files(folder)}
    (folder / "train" / "00001.ends").unlink()
    files.write_bytes(folder / "train" / "00002.tokens", b"\0" * len(before["train/00002.tokens"]))
    make(raw, tokenizer, output, repair=True)
    assert {name: files.read_bytes(folder / name) for name in files.list_files(folder)} == before


# Inputs


def test_the_manifest_has_the_sha256_of_each_file(one: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    inputs = json.loads((one / "manifest.json").read_text())["inputs"]
    assert [item["sha256"] for item in inputs] == [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest()} for path in sorted(raw.iterdir())]
    make(spec(raw, files_per_input=2), tokenizer, tmp_path / "grouped")
    inputs = json.loads((tmp_path / "grouped/set/one/manifest.json").read_text())["inputs"]
    assert [list(item["sha256"]) for item in inputs] == [["00.jsonl", "02.jsonl"], ["01.jsonl"]]


def test_a_finished_store_notices_a_changed_file(one: Path, raw: Path, tokenizer: Path, tmp_path: Path, capsys: Any,
                                                 done: list[str]) -> None:
    before = files_of(one)
    text = (raw / "01.jsonl").read_text()
    edit(raw / "01.jsonl")
    with pytest.raises(UserError, match=r"one: was made from another 01\.jsonl, of sha256 \w{64}; it is \w{64} now"):
        make(raw, tokenizer, tmp_path)
    (raw / "01.jsonl").write_text(text)
    make(raw, tokenizer, tmp_path)
    assert "1 newer input; comparing sha256" in capsys.readouterr().err
    shutil.copytree(raw, tmp_path / "copy")
    make(tmp_path / "copy", tokenizer, tmp_path)
    assert files_of(one) == before and done == []
    make(tmp_path / "copy", tokenizer, tmp_path / "again")
    assert files_of(tmp_path / "again" / "set" / "one") == before


def test_an_unfinished_store_notices_a_changed_file(raw: Path, tokenizer: Path, tmp_path: Path,
                                                    done: list[str]) -> None:
    make(raw, tokenizer, tmp_path, shard=(0, 2))
    folder = tmp_path / "set" / "one"
    assert records(folder) == ["00000", "00002"]
    edit(raw / "02.jsonl")
    (raw / "00.jsonl").touch()
    done.clear()
    make(raw, tokenizer, tmp_path, shard=(0, 2))
    assert done == ["02.jsonl"]
    shutil.move(raw, tmp_path / "moved")
    make(tmp_path / "moved", tokenizer, tmp_path)
    assert done == ["02.jsonl", "01.jsonl"]
    make(tmp_path / "moved", tokenizer, tmp_path / "other")
    assert files_of(folder) == files_of(tmp_path / "other" / "set" / "one")


@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_a_record_says_what_tokenised(engine: str, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    make(raw, tokenizer, tmp_path, shard=(0, 3), engine=engine)
    found = json.loads((tmp_path / "set" / "one" / "progress" / "00000.json").read_text())
    name, version = found["engine"].split()
    assert name in (("tokenizers",) if engine == "reference" else ("tokenizers", "gigatoken")) and version[0].isdigit()
    assert found["changed"] == files.changed(os.stat(raw / "00.jsonl"))
