"""`prepare`: every document accounted for, the same bytes after any kill and with any number of workers."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_jax.data import prepare as module
from crystal_jax.data import readers, store
from crystal_jax.data.prepare import held_out, prepare, summary
from crystal_jax.data.readers import SourceSpec
from crystal_jax.data.store import TokenStore, verify
from crystal_jax.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from crystal_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
INPUTS, DOCUMENTS = 6, 60  # documents of each input


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    source = SourceSpec("pystd-code")
    texts = [document.text for document in readers.read_input(source, readers.list_inputs(source)[3])]
    train_tokenizer(texts[:10], 600).save(str(path))
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of JSON lines with an empty and a broken text in each."""
    folder = tmp_path_factory.mktemp("raw")
    words = random.Random(1)
    for index in range(INPUTS):
        texts = ["".join(words.choices("ab \n(é語", k=words.randint(1, 3000))) for _ in range(DOCUMENTS - 2)]
        lines = [json.dumps({"text": text}) for text in [*texts, "", "lone \ud800x\udc00"]]
        (folder / f"{index}.jsonl").write_text("\n".join(lines))
    return folder


def spec(raw: Path) -> SourceSpec:
    return SourceSpec("jsonl", (str(raw),))


@pytest.fixture(scope="module")
def prepared(raw: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    prepare(spec(raw), "set/one", tokenizer, output, workers=1, heldout=0.2)
    return output / "set" / "one"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_again(folder: Path, raw: Path, vocabulary: Path, **changed: Any) -> dict[str, Any]:
    same = {"source": spec(raw), "tokenizer": vocabulary, "heldout": 0.2}
    return prepare(**{**same, "name": "set/one", "output": folder.parents[1], **changed})


# What is in a store


def test_every_document_is_accounted_for(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    documents = manifest["documents"]
    assert documents["read"] == INPUTS * DOCUMENTS
    assert documents["dropped"] == {"empty": INPUTS}
    assert documents["kept"] == documents["read"] - INPUTS
    assert documents["replaced_surrogates"] == 2 * INPUTS
    splits = manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == documents["kept"]
    for split in splits.values():
        assert [shard["input"] for shard in split["shards"]] == [f"{index}.jsonl" for index in range(INPUTS)]
        assert split["tokens"] == sum(shard["tokens"] for shard in split["shards"]) > 0
    assert (manifest["name"], manifest["source"], manifest["packing"]) == ("set/one", "jsonl", "concat")
    assert summary(manifest).startswith(f"set/one: {INPUTS * (DOCUMENTS - 1)} documents, ")
    assert summary(manifest).endswith("bytes/token, dropped 6 (6 empty)")
    assert verify(prepared) == []
    assert sorted(path.name for path in prepared.iterdir()) == ["heldout", "manifest.json", "train"]


def test_documents_come_back_in_order(prepared: Path, raw: Path, tokenizer: Path) -> None:
    loaded = Tokenizer.load(tokenizer)
    source = spec(raw)
    expected: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    for item in readers.list_inputs(source):
        for document in readers.read_input(source, item):
            if document.text:
                text = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in document.text)
                expected["heldout" if held_out(document.id, 0.2) else "train"].append((document.id, text))
    opened = TokenStore.open(prepared)
    for split, wanted in expected.items():
        view = opened.view(split)
        found, start = [], 0
        for shard in opened.splits[split]["shards"]:
            path = prepared / split / shard["name"]
            names = [json.loads(line) for line in Path(f"{path}.docs.jsonl").read_text().splitlines()]
            base = start
            for name, end in zip(names, np.fromfile(f"{path}.ends", "<u8").tolist(), strict=True):
                first, *ids, last = view.read(start, base + end - start).tolist()
                assert (first, last) == (loaded.bos_id, loaded.eos_id)
                assert name["source"] == shard["input"]
                found.append((name["id"], loaded.decode(ids)))
                start = base + end
        assert found == wanted
        assert start == view.num_tokens


def test_held_out_share_is_a_hash() -> None:
    names = [f"document {index}" for index in range(5000)]
    chosen = {name for name in names if held_out(name, 0.1)}
    assert 400 < len(chosen) < 600
    assert chosen <= {name for name in names if held_out(name, 0.2)}
    assert not any(held_out(name, 0.0) for name in names)


def test_docstrings_of_held_out_code_are_held_out(tokenizer: Path, tmp_path: Path, monkeypatch) -> None:
    split_of: dict[str, dict[str, str]] = {}
    for kind in ("pystd-code", "pystd-text"):
        item, fingerprint = readers.list_inputs(SourceSpec(kind))[3], Tokenizer.load(tokenizer).fingerprint
        task = module.Task(SourceSpec(kind), item, 0, tokenizer, fingerprint, 0.3, tmp_path / kind)
        for folder in ("train", "heldout", "progress"):
            (tmp_path / kind / folder).mkdir(parents=True)
        module.prepare_input(task)
        split_of[kind] = {
            json.loads(line)["id"]: split
            for split in store.SPLITS
            for line in (tmp_path / kind / split / "00000.docs.jsonl").read_text().splitlines()
        }
    code, text = split_of.values()
    assert len(text) > 20 and set(code.values()) == set(store.SPLITS)
    assert all(code[name] == split for name, split in text.items())


@settings(max_examples=25)
@given(texts=st.lists(st.text(max_size=30), max_size=12), chars=st.integers(1, 40))
def test_batches_keep_every_document(texts: list[str], chars: int) -> None:
    found = [readers.Document(str(index), text, "s", "g") for index, text in enumerate(texts)]
    found.insert(len(found) // 2, readers.Dropped("x", "not_utf8"))
    counts: module.Counter[str] = module.Counter()
    task = module.Task(SourceSpec("jsonl"), readers.Input("i", (), 0), 0, Path(), "", 0.0, Path())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "read_input", lambda *_: iter(found))
        patch.setattr(module, "BATCH_CHARS", chars)
        batches = list(module._batches(task, counts))
    kept = [document.id for batch in batches for document in batch]
    assert kept == [document.id for document in found if getattr(document, "text", "")]
    assert counts["read"] == len(texts) + 1 == counts["kept"] + counts["dropped:empty"] + counts["dropped:not_utf8"]


# Again


def test_two_workers_write_the_same_bytes(prepared: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    run_again(tmp_path / "set" / "one", raw, tokenizer, workers=2)
    assert files_of(tmp_path / "set" / "one") == files_of(prepared)


def test_a_finished_store_is_left_alone(prepared: Path, raw: Path, tokenizer: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    copy = tokenizer.with_name("other-name.json")
    copy.write_bytes(tokenizer.read_bytes())
    (prepared / "progress").mkdir()
    manifest = run_again(prepared, raw, copy)
    assert manifest == json.loads((prepared / "manifest.json").read_text())
    assert "done already" in capsys.readouterr().err
    assert not (prepared / "progress").exists()
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def change_cases(raw: Path, tmp_path: Path) -> list[tuple[dict[str, Any], str]]:
    other = tmp_path / "tokenizer.json"
    train_tokenizer(["ab"], SMALLEST).save(str(other))
    one = SourceSpec("jsonl", (str(raw / "0.jsonl"),))
    grown = tmp_path / "grown"
    grown.mkdir()
    for path in raw.iterdir():
        (grown / path.name).write_bytes(path.read_bytes() + (b'\n{"text": "x"}' if path.name == "2.jsonl" else b""))
    return [
        ({"heldout": 0.1}, "heldout is 0.1, but the store there was made with 0.2"),
        ({"tokenizer": other}, "tokenizer is fingerprint .* made with fingerprint"),
        ({"source": one}, "inputs is 1 inputs, .* made with 6 inputs"),
        ({"source": SourceSpec("jsonl", (str(grown),))}, r"inputs is name 2.jsonl, .* made with name 2.jsonl"),
        ({"source": SourceSpec("jsonl", (str(raw),), text_key="body")}, "text_key is body, .* with text"),
        ({"source": SourceSpec("text", (str(raw),))}, "source is text, .* made with jsonl.*choose another --name"),
    ]


def test_other_arguments_are_refused(prepared: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    before = files_of(prepared)
    started = tmp_path / "data" / "set" / "one"
    (started / "progress").mkdir(parents=True)
    manifest = json.loads(before["manifest.json"])
    manifest |= {"inputs": [item["name"] for item in manifest["inputs"]]}
    for name, text in (("arguments.json", json.dumps(manifest)), ("00000.json", "{}")):  # one input is done
        (started / "progress" / name).write_text(text)
    for changed, message in change_cases(raw, tmp_path):
        with pytest.raises(UserError, match=message):
            run_again(prepared, raw, tokenizer, **changed)
        if "2.jsonl" not in message:
            with pytest.raises(UserError, match=message):
                run_again(started, raw, tokenizer, **changed)
    assert (files_of(prepared), [path.name for path in started.iterdir()]) == (before, ["progress"])


def test_damage_of_a_finished_store_is_reported(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "one"
    run_again(folder, raw, tokenizer, source=SourceSpec("jsonl", (str(raw / "0.jsonl"),)))
    (folder / "train" / "00000.ends").unlink()
    with pytest.raises(UserError, match=r"train/00000\.ends: can't be read"):
        run_again(folder, raw, tokenizer, source=SourceSpec("jsonl", (str(raw / "0.jsonl"),)))


def test_mistakes_leave_nothing_behind(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    for name in ("", "/abs", "../up", "a//b", "."):
        with pytest.raises(UserError, match="--name"):
            prepare(spec(raw), name, tokenizer, output)
    for changed, message in (
        ({"heldout": 1.0}, "--heldout: 1.0"),
        ({"workers": 0}, "--workers: 0"),
        ({"tokenizer": tmp_path / "none.json"}, r"none\.json: No such file"),
        ({"source": SourceSpec("jsonl", ("gone.jsonl",))}, r"gone\.jsonl: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(**{"source": spec(raw), "name": "x", "tokenizer": tokenizer, "output": output, **changed})
    assert not output.exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex but is no token store"):
        prepare(spec(raw), "taken", tokenizer, tmp_path)


def test_one_prepare_at_a_time(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    handle = os.open(tmp_path / "x", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another `prepare` is writing"):
        prepare(spec(raw), "x", tokenizer, tmp_path)
    os.close(handle)


def test_a_damaged_or_changed_input_is_read_again(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    files = [tmp_path / "raw" / f"{index}.jsonl" for index in range(3)]
    files[0].parent.mkdir()
    files[0].write_bytes((raw / "0.jsonl").read_bytes())
    files[1].write_text('{"text": "x"}\n')
    files[2].write_text('{"text": "x"}\n{"text": broken}\n')
    with pytest.raises(UserError, match=r"2\.jsonl:2: not a line of JSON"):
        prepare(spec(files[0].parent), "x", tokenizer, tmp_path)
    assert sorted(path.name for path in (tmp_path / "x" / "progress").glob("0*")) == ["00000.json", "00001.json"]
    assert not (tmp_path / "x" / "manifest.json").exists() and not list((tmp_path / "x").rglob("*.partial*"))
    files[1].write_text('{"text": "x"}\n{"text": "y"}\n')
    files[2].write_text('{"text": "x"}\n{"text": "mended"}\n')
    done = prepare(spec(files[0].parent), "x", tokenizer, tmp_path)
    assert done["documents"]["kept"] == DOCUMENTS - 1 + 4
    assert [item["bytes"] for item in done["inputs"]] == [path.stat().st_size for path in files]


def test_a_full_disk_is_one_line(raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x: the disk is full; free some space and run the same command again"):
        prepare(spec(raw), "x", tokenizer, tmp_path)
    with pytest.raises(OSError, match="other"), module._disk_errors(tmp_path):
        raise OSError(errno.EIO, "other")


# Kills


def command(raw: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    return [sys.executable, "-m", "crystal_jax", "prepare", "--source=jsonl", f"--input={raw}", "--name=set/one",
            f"--tokenizer={tokenizer}", f"--output={output}", "--heldout=0.2", f"--workers={workers}"]  # fmt: skip


def killed(arguments: list[str], folder: Path, when: Any) -> bool:
    """Starts the command and kills it with SIGKILL once `when(folder)` holds; whether it was still running."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not when(folder):
        time.sleep(0.002)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def records(count: int) -> Any:
    return lambda folder: len(list(folder.glob("progress/0*.json"))) >= count


def exists(name: str) -> Any:
    return lambda folder: (folder / name).exists()


def some_time() -> Any:
    """A random moment of the second that the command takes."""
    seconds, started = random.uniform(0.1, 1.0), []

    def passed(_: Path) -> bool:
        started.append(time.monotonic())
        return started[-1] - started[0] > seconds

    return passed


MOMENTS = {
    "random": [some_time() for _ in range(4)],
    "writing": [lambda folder: list(folder.glob("train/*.partial-*"))],
    "recorded": [records(1), records(3), records(INPUTS)],
    "first and last": [exists("progress"), exists("manifest.json")],
}


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_at_any_moment(prepared: Path, raw: Path, tokenizer: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set" / "one"
    kills = [killed(command(raw, tokenizer, tmp_path, workers=1 + index % 2), folder, moment)
             for index, moment in enumerate(MOMENTS[name])]  # fmt: skip
    assert any(kills)
    done = subprocess.run(command(raw, tokenizer, tmp_path, workers=2), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set/one: ")
    assert verify(folder) == []
    assert files_of(folder) == files_of(prepared)


def test_finished_inputs_are_not_read_again(prepared: Path, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "one"
    assert killed(command(raw, tokenizer, tmp_path, workers=1), folder, records(2))
    done = sorted(path.stem for path in folder.glob("progress/0*.json"))
    before = {name: (folder / "train" / f"{name}.tokens").stat().st_mtime_ns for name in done}
    run_again(folder, raw, tokenizer)
    assert done and before == {name: (folder / "train" / f"{name}.tokens").stat().st_mtime_ns for name in done}
    assert files_of(folder) == files_of(prepared)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the pool's workers, once there are any."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc/PID/task/PID/children, which Linux has")
    while process.poll() is None:
        found = [int(pid) for pid in children.read_text().split()
                 if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("the command ended before it started a worker")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def long_run(tokenizer: Path, tmp_path: Path) -> Any:
    """`prepare` of the standard library, which takes seconds."""
    arguments = [sys.executable, "-m", "crystal_jax", "prepare", "--source=pystd-code", "--name=x", "--workers=1",
                 f"--tokenizer={tokenizer}", f"--output={tmp_path}"]  # fmt: skip
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_workers_end_with_their_parent(long_run: subprocess.Popen[bytes]) -> None:
    workers = workers_of(long_run)
    long_run.kill()
    long_run.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, workers))


def test_a_killed_worker_is_one_line(long_run: subprocess.Popen[bytes]) -> None:
    (worker,) = workers_of(long_run)
    os.kill(worker, signal.SIGKILL)
    assert long_run.stderr is not None
    last = long_run.stderr.read().decode().splitlines()[-1]
    assert long_run.wait() == 1
    assert "x: a worker was killed, perhaps for lack of memory; run the same command again, with fewer" in last
