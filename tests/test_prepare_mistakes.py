"""`prepare`: each mistake and each bad input is one line, and nothing stands in the way of the corrected command."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard
from preparing import DOCUMENTS, files_of, in_parts, in_process, make, records, spec, write_raw, write_tokenizer

from crystal_jax import cli
from crystal_jax.data import prepare as module
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.data.store import TokenStore
from crystal_jax.data.tokenizer import SMALLEST, train_tokenizer
from crystal_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "raw", inputs=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)


@pytest.fixture
def one(raw: Path, tokenizer: Path, tmp_path: Path) -> Path:
    """A finished store."""
    make(raw, tokenizer, tmp_path)
    return tmp_path / "set" / "one"


# Arguments


def test_wrong_options_leave_nothing_behind(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    for name in ("", "/abs", "../up", "a//b", ".", "a/..", "my set", "a.b", "a/", "a:b"):
        with pytest.raises(UserError, match=r"--name: .* must be a path below --output of letters, digits, - and _"):
            prepare(spec(raw), name, tokenizer, output)
    for name in ("train", "a/heldout", "packing/b", "progress"):
        with pytest.raises(UserError, match=r"--name: .* which is a folder of stores; choose another"):
            prepare(spec(raw), name, tokenizer, output)
    with pytest.raises(UserError, match="--split_names: 'progress' can't be a store's name"):
        make(spec(raw, split_by="meta.set", split_names=(("a", "A"), ("b", "progress"))), tokenizer, output)
    for changed, message in (
        ({"heldout": 1.0}, "--heldout: 1.0 must be a share"),
        ({"heldout": float("nan")}, "--heldout: nan must be a share"),
        ({"workers": 0}, "--workers: 0 must be 1 or more"),
        ({"shard": (3, 3)}, "--shard: 3/3 must be I/N with I from 0 to N-1"),
        ({"shard": (0, 0)}, "--shard: 0/0 must be I/N"),
        ({"runner": "beem"}, "--runner: 'beem' must be one of local, beam; did you mean beam"),
        ({"engine": "slow"}, "--engine: 'slow' must be one of auto, reference, fast"),
        ({"packing": "bestfit"}, "--packing: 'bestfit' must be one of concat, best_fit; did you mean best_fit"),
        ({"packing": "best_fit", "sequence_length": 0}, "--sequence_length: 0 must be 1 or more"),
        ({"beam_options": "--x"}, "--beam_options: --x must be left out without --runner=beam"),
    ):
        with pytest.raises(UserError, match=message):
            make(raw, tokenizer, output, **changed)
    for source, message in (
        (SourceSpec("jsonl", ("gone.jsonl",)), r"gone\.jsonl"),
        (SourceSpec("jsnl", (str(raw),)), "--source: 'jsnl' must be one of .*jsonl"),
        (SourceSpec("jsonl", (str(raw), str(raw / "00.jsonl"))), "listed twice"),
    ):
        with pytest.raises(UserError, match=message):
            make(source, tokenizer, output)
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        make(raw, tmp_path / "none.json", output)
    assert not output.exists()


def test_a_store_has_no_store_inside(one: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    for name in ("set/one/more", "set/one/a/b"):
        with pytest.raises(UserError, match=rf"--name: '{name}' lies in {one}, which is a token store itself"):
            prepare(spec(raw), name, tokenizer, tmp_path)
    assert files_of(tmp_path) == before


def test_a_path_with_a_comma(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    for path in (folder / "1,2.jsonl", tmp_path / "c.jsonl"):
        path.write_text('{"text": "x"}\n')
    same = ["prepare", "--source=jsonl", f"--tokenizer={tokenizer}", f"--output={tmp_path}"]
    for index, inputs in enumerate(([f"{folder}", f"{tmp_path / 'c.jsonl'}"], [f"{folder / '1,2.jsonl'}"],
                                    [f"{tmp_path / 'c.jsonl'},{raw / '00.jsonl'}"])):
        assert cli.main([*same, f"--name={index}", *(f"--input={item}" for item in inputs)]) == 0
        manifest = json.loads((tmp_path / str(index) / "manifest.json").read_text())
        assert len(manifest["inputs"]) == (2, 1, 2)[index]


def test_arguments_of_the_command(raw: Path, tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    same = ["prepare", f"--input={raw}", f"--tokenizer={tokenizer}", f"--output={tmp_path}", "--name=x"]
    for wrong, message in (
        (["--source=jsonl", "--shard=1"], "--shard: '1' must be I/N with I from 0 to N-1, such as 0/4"),
        (["--source=jsonl", "--shard=a/b"], "--shard: 'a/b' must be I/N"),
        (["--source=jsonl", "--shard=-1/2"], "--shard: '-1/2' must be I/N"),
        (["--source=jsonl", "--split_names=a"], "--split_names: 'a' must be VALUE=STORE"),
        (["--source=jsonl", "--workers=two"], "argument --workers: invalid int value: 'two'"),
        (["--source=jsonl", "--languages=python"], "--languages: ('python',): --source=jsonl has no such option"),
        ([], "the following arguments are required: --source"),
    ):
        assert cli.main([*same, *wrong]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"crystal-jax prepare: {message}") and len(error.splitlines()) == 1


def test_the_command_takes_parts(raw: Path, tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["prepare", "--source=jsonl", f"--input={raw}", f"--tokenizer={tokenizer}", f"--output={tmp_path}",
                     "--name=x", "--split_by=meta.set", "--split_names=a=A,b=B", "--id_key=name"]) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["x/A", "x/B"]
    assert TokenStore.open(tmp_path / "x" / "A").splits["train"]["tokens"] > 0


def test_a_folder_of_something_else_is_refused(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "one").mkdir(parents=True)
    (tmp_path / "set" / "one" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"one: holds thesis\.tex but is no token store; choose another --name"):
        make(raw, tokenizer, tmp_path)
    assert [path.name for path in (tmp_path / "set" / "one").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output: .*file/set/one/progress can't be made \(Not a directory\)"):
        make(raw, tokenizer, tmp_path / "file")


@pytest.mark.parametrize("parts", [False, True])
def test_a_store_of_the_first_format_is_refused(parts: bool, one: Path, raw: Path, tokenizer: Path,
                                                tmp_path: Path) -> None:
    manifest = json.loads((one / "manifest.json").read_text())
    (one / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    before = files_of(one)
    with pytest.raises(UserError, match=r"one: a token store of format 1; this version writes format 2: remove the "):
        make(in_parts(raw) if parts else raw, tokenizer, tmp_path)
    assert files_of(one) == before


def test_one_prepare_at_a_time(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    progress = tmp_path / "set" / "one" / "progress"
    progress.mkdir(parents=True)
    with open(progress / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for shard in ((0, 1), (0, 2)):
            with pytest.raises(UserError, match="another `prepare` is writing it; wait for it, or give each its own"):
                make(raw, tokenizer, tmp_path, shard=shard)
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="another `prepare` is writing it"):
            make(raw, tokenizer, tmp_path)
        with open(progress / "shard-0-of-2", "w") as same:
            fcntl.flock(same, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="another `prepare` is writing it"):
                make(raw, tokenizer, tmp_path, shard=(0, 2))
            make(raw, tokenizer, tmp_path, shard=(1, 2))
    assert records(tmp_path / "set" / "one") == ["00001"]


def change_cases(raw: Path, tmp_path: Path) -> list[tuple[dict[str, Any], str]]:
    other = tmp_path / "tokenizer.json"
    train_tokenizer(["ab"], SMALLEST).save(str(other))
    grown = tmp_path / "grown"
    grown.mkdir()
    for path in raw.iterdir():
        more = b'\n{"text": "x", "name": "y"}' if path.name == "02.jsonl" else b""
        (grown / path.name).write_bytes(path.read_bytes() + more)
    return [
        ({"heldout": 0.1}, "heldout is 0.1, but the store there was made with 0.2"),
        ({"tokenizer": other}, r"tokenizer is fingerprint \w+, file tokenizer.json, but .* made with fingerprint"),
        ({"raw": SourceSpec("jsonl", (str(raw / "00.jsonl"),), id_key="name")}, "inputs is 1 input, .* with 3 inputs"),
        ({"raw": grown}, r"inputs is name 02.jsonl, .* made with name 02.jsonl"),
        ({"raw": spec(raw, text_key="body")}, "text_key is body, .* with text"),
        ({"raw": spec(raw, id_key=None)}, "id_key is None, .* with name"),
        ({"raw": SourceSpec("text", (str(raw),))}, "source is text, .* made with jsonl.*choose another --name"),
    ]


def test_other_arguments_are_refused(one: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    before = files_of(one)
    begun = tmp_path / "begun" / "set" / "one"
    make(raw, tokenizer, tmp_path / "begun", shard=(0, 3))
    for changed, message in change_cases(raw, tmp_path):
        arguments = {"raw": raw, "tokenizer": tokenizer, "output": tmp_path, **changed}
        with pytest.raises(UserError, match=message):
            make(**arguments)
        if "02.jsonl" not in message:  # which may change until it is done
            with pytest.raises(UserError, match=message):
                make(**{**arguments, "output": tmp_path / "begun"})
    assert files_of(one) == before
    assert records(begun) == ["00000"]


def test_a_finished_store_is_left_alone(one: Path, raw: Path, tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    copy = tmp_path / "other-name.json"
    copy.write_bytes(tokenizer.read_bytes())
    (one / "progress").mkdir()
    (one / ".manifest.json.partial-1").write_text("of a run that was killed")
    (manifest,) = make(raw, copy, tmp_path)
    assert manifest == json.loads((one / "manifest.json").read_text())
    assert "one: done already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*")} == before


def test_a_plan_may_be_asked_for_later(one: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    before = files_of(one)
    make(raw, tokenizer, tmp_path, packing="best_fit", sequence_length=16)
    after = files_of(one)
    assert {name: data for name, data in after.items() if not name.startswith("packing/")} == before
    assert any(name.startswith("packing/best_fit-16/") for name in after)


@pytest.mark.parametrize(("damage", "message"), [
    ("manifest", r"manifest\.json: damaged.*copy the store again, or remove its folder and run the same `prepare`"),
    ("list", "a token store of format None.*remove the folder and run the same command again"),
    ("no manifest", r"holds heldout but is no token store; choose another --name or remove it"),
])
def test_a_damaged_manifest_is_reported(damage: str, message: str, one: Path, raw: Path, tokenizer: Path,
                                        tmp_path: Path) -> None:
    manifest = one / "manifest.json"
    match damage:
        case "manifest":
            manifest.write_text(manifest.read_text().replace('"kept": ', '"kept": 1'))
        case "list":
            manifest.write_text("[]")
        case _:
            manifest.unlink()
    with pytest.raises(UserError, match=message) as error:
        make(raw, tokenizer, tmp_path)
    assert "\n" not in str(error.value)


# Inputs


BAD = {
    "not JSON": (b'{"text": "x"}\n{"text": broken}\n', r"bad\.jsonl:2: not a line of JSON"),
    "no end": (b'{"text": "x"}\n{"text": "y', r"bad\.jsonl:2: not a line of JSON"),
    "a list": (b'["x"]\n', r"bad\.jsonl:1: a JSON list"),
    "no such key": (b'{"body": "x"}\n', r"bad\.jsonl:1: no key 'text'; it has body"),
    "a number": (b'{"text": 1}\n', r"bad\.jsonl:1: 'text' holds int"),
    "truncated": (zstandard.compress(b'{"text": "x"}\n' * 999)[:-5], r"bad\.jsonl\.zst: truncated"),
    "a flipped bit": (b"\x28\xb5\x2f\xfd" + bytes(range(9, 80)), r"bad\.jsonl\.zst: damaged compressed data"),
    "nothing in it": (b'{"text": ""}\n', "1 document read, none kept; look at --input and --text_key"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_line(name: str, tokenizer: Path, tmp_path: Path) -> None:
    data, message = BAD[name]
    bad = tmp_path / ("bad.jsonl.zst" if ".zst" in message else "bad.jsonl")
    bad.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        prepare(SourceSpec("jsonl", (str(bad),)), "x", tokenizer, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x" / "manifest.json").exists()
    assert not list((tmp_path / "x").rglob("*.partial*"))
    bad.unlink()
    (tmp_path / "bad.jsonl").write_text('{"text": "mended"}\n')
    (manifest,) = prepare(SourceSpec("jsonl", (str(tmp_path / "bad.jsonl"),)), "x", tokenizer, tmp_path)
    assert manifest["documents"]["kept"] == 1


def test_arguments_that_led_nowhere_leave_nothing_and_may_be_corrected(raw: Path, tokenizer: Path,
                                                                       tmp_path: Path) -> None:
    nulls = tmp_path / "nulls.jsonl"
    nulls.write_text('{"text": "x", "content": null}\n')
    for source, message in ((spec(raw, text_key="content"), "content"),
                            (SourceSpec("jsonl", (str(nulls),), text_key="content"), "1 document read, none kept")):
        with pytest.raises(UserError, match=message):
            make(source, tokenizer, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["nulls.jsonl"]
    make(raw, tokenizer, tmp_path)
    assert TokenStore.open(tmp_path / "set" / "one").splits["train"]["tokens"] > 0


def test_a_run_that_fails_leaves_other_stores_alone(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare(spec(raw), "set/other", tokenizer, tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="no key 'content'"):
        make(spec(raw, text_key="content"), tokenizer, tmp_path)
    assert files_of(tmp_path) == before and not (tmp_path / "set" / "one").exists()


def test_a_folder_of_something_else_is_left_alone(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    mine = tmp_path / "set" / "one" / "train" / "corpus.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="holds train but is no token store"):
        make(spec(raw, text_key="content"), tokenizer, tmp_path)
    assert files_of(tmp_path) == {"set/one/train/corpus.jsonl": b"mine"}


def test_only_flags_that_the_source_has_are_named(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"set/one: 1 document read, none kept; look at --input$"):
        make(SourceSpec("text", (str(tmp_path / "a.txt"),)), tokenizer, tmp_path)


def test_a_damaged_or_changed_input_is_read_again(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    mine = [tmp_path / "raw" / f"{index}.jsonl" for index in range(3)]
    mine[0].parent.mkdir()
    mine[0].write_bytes((raw / "00.jsonl").read_bytes())
    mine[1].write_text('{"text": "x"}\n')
    mine[2].write_text('{"text": "x"}\n{"text": broken}\n')
    source = SourceSpec("jsonl", (str(tmp_path / "raw"),))
    with pytest.raises(UserError, match=r"2\.jsonl:2: not a line of JSON"):
        prepare(source, "x", tokenizer, tmp_path)
    assert records(tmp_path / "x") == ["00000", "00001"]
    mine[1].write_text('{"text": "x"}\n{"text": "y"}\n')
    mine[2].write_text('{"text": "x"}\n{"text": "mended"}\n')
    (done,) = prepare(source, "x", tokenizer, tmp_path)
    assert done["documents"]["kept"] == DOCUMENTS - 1 + 4
    assert [item["bytes"] for item in done["inputs"]] == [path.stat().st_size for path in mine]


def test_a_tokenizer_that_changes_meanwhile_is_found(raw: Path, tokenizer: Path, tmp_path: Path,
                                                     monkeypatch: Any) -> None:
    mine = tmp_path / "tokenizer.json"
    mine.write_bytes(tokenizer.read_bytes())
    runner = module.RUNNERS["local"]

    def changed(*arguments: Any) -> None:
        train_tokenizer(["ab"], SMALLEST).save(str(mine))
        runner(*arguments)

    monkeypatch.setitem(module.RUNNERS, "local", changed)
    with pytest.raises(UserError, match=r"tokenizer\.json: was changed while `prepare` ran; run it again"):
        make(raw, mine, tmp_path)


@pytest.mark.parametrize("moment", ["shards", "record", "manifest"])
def test_a_full_disk_is_one_line(moment: str, raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: Any,
                                 capsys: Any) -> None:
    arguments = ["prepare", "--source=jsonl", f"--input={raw}", f"--tokenizer={tokenizer}", f"--output={tmp_path}",
                 "--name=x"]  # fmt: skip
    calls = {"shards": 2, "record": 10, "manifest": 29}
    real, left = os.fsync, calls[moment]

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "no space left" in error and "give the same command again" in error
    assert not (tmp_path / "x" / "manifest.json").exists()
    assert len(records(tmp_path / "x")) == {"shards": 0, "record": 0, "manifest": 3}[moment]
    assert cli.main(arguments) == 0


# Other machines


def test_beam_that_is_not_installed_is_named(raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"--runner: beam needs the package apache-beam; pip install .*data.txt"):
        make(raw, tokenizer, tmp_path, runner="beam")
    assert not list(tmp_path.iterdir())


def test_lost_records_are_named(raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(module.RUNNERS, "local", lambda *_: None)
    with pytest.raises(UserError, match=r"one: 3 inputs prepared but not there, the first 00\.jsonl"):
        make(raw, tokenizer, tmp_path)
    assert Options().shard == (0, 1)
