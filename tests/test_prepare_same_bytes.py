"""A store has the same bytes whoever prepared its inputs: processes, machines, Beam, on a disk or on gs://."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from preparing import (
    INPUTS,
    ROOT,
    Started,
    command,
    files_of,
    in_parts,
    in_process,
    make,
    records,
    write_raw,
    write_tokenizer,
)

from crystal_jax import files
from crystal_jax.data import prepare as module
from crystal_jax.data import tasks
from crystal_jax.data.store import TokenStore
from crystal_jax.data.verify import verify

Bytes = dict[str, bytes]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "raw")


@pytest.fixture(scope="module")
def prepared(raw: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Bytes:
    output = tmp_path_factory.mktemp("prepared")
    make(raw, tokenizer, output)
    return files_of(output / "set" / "one")


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers(workers: int, prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    make(raw, tokenizer, tmp_path, workers=workers)
    assert files_of(tmp_path / "set" / "one") == prepared


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_any_engine(engine: str, prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    make(raw, tokenizer, tmp_path, engine=engine)
    assert files_of(tmp_path / "set" / "one") == prepared


def test_batches_of_any_size(prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    monkeypatch.setattr(tasks, "BATCH_BYTES", 5000)
    make(raw, tokenizer, tmp_path)
    assert files_of(tmp_path / "set" / "one") == prepared


# Shards


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_shards_in_any_order(order: tuple[int, ...], prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path,
                             monkeypatch: Any, capsys: Any) -> None:
    in_process(monkeypatch)
    folder = tmp_path / "set" / "one"
    for index in order[:2]:
        assert make(raw, tokenizer, tmp_path, shard=(index, 3)) == []
    assert {int(name) % 3 for name in records(folder)} == set(order[:2]) and len(records(folder)) == 2 * INPUTS // 3
    assert not (folder / "manifest.json").exists()
    said = capsys.readouterr().err
    assert f"shard {order[1]}/3 is done; 4 of 6 inputs are there" in said and "the last shard finishes" in said
    (manifest,) = make(raw, tokenizer, tmp_path, shard=(order[2], 3))
    assert files_of(folder) == prepared and manifest == json.loads(prepared["manifest.json"])
    assert make(raw, tokenizer, tmp_path, shard=(order[0], 3)) == [manifest]
    assert files_of(folder) == prepared


def test_shards_of_machines_that_share_nothing(prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path,
                                               monkeypatch: Any) -> None:
    in_process(monkeypatch)
    for index in range(3):
        make(raw, tokenizer, tmp_path / str(index), shard=(index, 3))
    for index in range(3):
        shutil.copytree(tmp_path / str(index), tmp_path / "all", dirs_exist_ok=True)
    monkeypatch.setitem(module.RUNNERS, "local", lambda *_: pytest.fail("reads an input again"))
    make(raw, tokenizer, tmp_path / "all")
    assert files_of(tmp_path / "all" / "set" / "one") == prepared


def test_a_copy_that_forgot_files_is_made_whole(prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path,
                                                monkeypatch: Any) -> None:
    in_process(monkeypatch)
    make(raw, tokenizer, tmp_path, shard=(0, 2))
    folder = tmp_path / "set" / "one"
    (folder / "train" / "00002.ends").unlink()
    (folder / "progress" / "00004.json").write_text('{"input": ')
    make(raw, tokenizer, tmp_path)
    assert files_of(folder) == prepared


def test_shards_at_the_same_time(prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    def started(index: int) -> Started:
        return Started(command(raw, tokenizer, tmp_path, f"--shard={index}/3", "--workers=1"))

    with started(0) as zero, started(1) as one, started(2) as two:
        ends = [each.end() for each in (zero, one, two)]
    assert [code for code, *_ in ends] == [0, 0, 0], ends
    assert any(stdout.startswith("set/one: ") for _, stdout, _ in ends)
    assert files_of(tmp_path / "set" / "one") == prepared


@pytest.mark.parametrize("turns", [30, pytest.param(500, marks=pytest.mark.drill)])
def test_shards_that_begin_and_end_together(turns: int, tmp_path: Path) -> None:
    race = [sys.executable, str(ROOT / "tests" / "shard_race.py"), str(tmp_path), str(turns)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(race, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_shard_begun_with_other_arguments_counts_for_nothing(prepared: Bytes, raw: Path, tokenizer: Path,
                                                               tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    make(raw, tokenizer, tmp_path / "a", shard=(0, 2), heldout=0.5)
    make(raw, tokenizer, tmp_path / "b", shard=(1, 2))
    for name in "ab":
        shutil.copytree(tmp_path / name, tmp_path / "all", dirs_exist_ok=True)
    make(raw, tokenizer, tmp_path / "all")
    assert files_of(tmp_path / "all" / "set" / "one") == prepared


# Beam


def test_beam(prepared: Bytes, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="needs apache-beam: pip install -r requirements/data.txt")
    beam = command(raw, tokenizer, tmp_path, "--runner=beam", "--beam_options=--runner=DirectRunner")
    done = subprocess.run(beam, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set/one: ")
    assert files_of(tmp_path / "set" / "one") == prepared


def test_beam_names_what_is_damaged_and_does_the_rest(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="needs apache-beam: pip install -r requirements/data.txt")
    shutil.copytree(raw, tmp_path / "raw")
    right = {index: (tmp_path / "raw" / f"0{index}.jsonl").read_text() for index in (1, 3)}
    for index in right:
        (tmp_path / "raw" / f"0{index}.jsonl").write_text('{"text": broken}\n')
    beam = command(tmp_path / "raw", tokenizer, tmp_path, "--runner=beam")
    done = subprocess.run(beam, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "01.jsonl:1: not a line of JSON" in last and "(and 1 more input; see *.failed.json in progress/)" in last
    assert records(tmp_path / "set" / "one") == ["00000", "00002", "00004", "00005"]
    for index, text in right.items():
        (tmp_path / "raw" / f"0{index}.jsonl").write_text(text)
    (manifest,) = make(tmp_path / "raw", tokenizer, tmp_path)
    assert manifest["documents"]["dropped"] == {"empty": INPUTS}


# gs://


def remote_files(folder: str) -> Bytes:
    path = files.as_path(folder)
    return {name: (path / name).read_bytes() for name in files.list_files(path)}


def test_gs(gcs: Any, prepared: Bytes, raw: Path, tokenizer: Path) -> None:
    output = gcs.folder()
    make(raw, tokenizer, output, workers=2)
    assert remote_files(f"{output}/set/one") == prepared
    assert not tasks.scratch(f"{output}/set/one").exists()
    assert make(raw, tokenizer, output) == [json.loads(prepared["manifest.json"])]
    assert verify(f"{output}/set/one") == []
    assert TokenStore.open(f"{output}/set/one").view().num_tokens > 0


def test_gs_goes_on_after_a_kill_and_in_shards(gcs: Any, tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    source = in_parts(write_raw(tmp_path / "raw", inputs=2, documents=8))
    make(source, tokenizer, tmp_path)
    output = gcs.folder()
    assert make(source, tokenizer, output, shard=(1, 2)) == []
    leftover = tasks.scratch(f"{output}/set/one") / f"00000{files.PARTIAL}shards" / "train"
    leftover.mkdir(parents=True)
    (leftover / "00000.tokens").write_text("of a run that was killed")
    make(source, tokenizer, output, packing="best_fit", sequence_length=32)
    make(source, tokenizer, tmp_path, packing="best_fit", sequence_length=32)
    assert remote_files(f"{output}/set/one") == files_of(tmp_path / "set" / "one")


def test_gs_without_a_bucket_is_one_line(gcs: Any, raw: Path, tokenizer: Path, run_cli: Any, tmp_path: Path) -> None:
    arguments = command(raw, tokenizer, "gs://no-such-bucket/x", "--workers=1")
    done = run_cli(*arguments[3:], env={**gcs.environment, "TMPDIR": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "gs://no-such-bucket/x/set/one/progress: can't be listed" in done.stderr.splitlines()[-1]


def test_preparing_loads_what_it_needs_only() -> None:
    program = "import sys, crystal_jax.data.prepare; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"apache_beam", "gigatoken", "tensorflow", "pyarrow", "h5py", "jax"} & set(done.stdout.split())
