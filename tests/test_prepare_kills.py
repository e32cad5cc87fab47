"""`prepare` killed at any moment goes on to the same bytes, and never leaves a process behind."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from preparing import ROOT, Started, command, files_of, make, records, write_raw, write_tokenizer

from crystal_jax.data.verify import verify

INPUTS = 30
Moment = Callable[[Path], object]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "raw", inputs=INPUTS, documents=60)


@pytest.fixture(scope="module")
def prepared(raw: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("prepared")
    make(raw, tokenizer, output, workers=2)
    return files_of(output / "set" / "one")


def kill(arguments: list[str], folder: Path, moment: Moment) -> None:
    """SIGKILL to the command and its workers as soon as the moment has come."""
    with Started(arguments) as started:
        started.wait_until(lambda: moment(folder))
        started.signal(signal.SIGKILL)
        code, _, stderr = started.end()
    assert code == -signal.SIGKILL, f"the kill came too late: {stderr}"


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recorded(more: int) -> Moment:
    """When so many more inputs have a record."""
    before: list[int] = []

    def came(folder: Path) -> bool:
        found = len(records(folder))
        before.append(found)
        return found >= before[0] + more

    return came


def writing(folder: Path) -> object:
    return any(folder.glob("progress/*.partial-*/train/*.tokens"))


def publishing(folder: Path) -> object:
    return {path.stem for path in folder.glob("train/*.crc32")} - set(records(folder))


def random_moment(rng: random.Random) -> Moment:
    return rng.choice([writing, publishing, recorded(0), recorded(1), recorded(2)])


def test_killed_again_and_again(prepared: dict[str, bytes], raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "one"
    for workers, moment in ((1, writing), (2, publishing), (2, recorded(2)), (1, recorded(1))):
        kill(command(raw, tokenizer, tmp_path, f"--workers={workers}"), folder, moment)
        assert not (folder / "manifest.json").exists()
    done = records(folder)
    before = {name: (folder / "train" / f"{name}.tokens").stat().st_mtime_ns for name in done}
    assert finish(command(raw, tokenizer, tmp_path, "--workers=2")).startswith("set/one: ")
    assert verify(folder) == []
    assert files_of(folder) == prepared
    again = {name: (folder / "train" / f"{name}.tokens").stat().st_mtime_ns for name in done}
    assert len(done) >= 3 and again == before, "inputs that were done have been read again"


@pytest.mark.drill
def test_killed_twenty_times(prepared: dict[str, bytes], raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "one"
    rng = random.Random()
    for turn in range(20):
        kill(command(raw, tokenizer, tmp_path, f"--workers={1 + turn % 2}"), folder, random_moment(rng))
        if len(records(folder)) > INPUTS // 2:  # so that the next kill finds it running
            finish(command(raw, tokenizer, tmp_path, "--workers=2"))
            assert files_of(folder) == prepared
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    finish(command(raw, tokenizer, tmp_path, "--workers=2"))
    assert files_of(folder) == prepared


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.drill)])
def test_killed_at_its_changes_of_files(step: int, tmp_path: Path) -> None:
    sweep = [sys.executable, str(ROOT / "tests" / "kill_sweep.py"), str(tmp_path), str(step)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(sweep, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = done.stdout.split()
    assert len(names) >= (80 if step == 1 else 15)
    # Before a record, after it and before the next one; before each of the two manifests, and between them.
    assert {"arguments.json", "00000.json", "00001.json", "manifest.json"} <= set(names)
    assert names.count("manifest.json") == 2 and any(name.endswith((".tokens", ".ends", ".crc32")) for name in names)


def test_ctrl_c_goes_on_later(prepared: dict[str, bytes], raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "one"
    with Started(command(raw, tokenizer, tmp_path, "--workers=2")) as started:
        started.wait_until(lambda: len(records(folder)) >= 2)
        started.signal(signal.SIGINT)
        code, stdout, stderr = started.end()
    assert (code, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "crystal-jax prepare: interrupted; the same command goes on where it was"
    assert "Traceback" not in stderr
    finish(command(raw, tokenizer, tmp_path, "--workers=2"))
    assert files_of(folder) == prepared


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_ctrl_c_while_it_starts(processes: int, raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    with Started(command(raw, tokenizer, tmp_path, "--workers=2")) as started:
        started.wait_until(lambda: (tmp_path / "set" / "one" / "progress" / "lock").exists())
        started.wait_until(lambda: len(started.group()) >= processes)
        started.signal(signal.SIGINT)
        code, _, stderr = started.end()
    assert code == 130 and "Traceback" not in stderr, stderr


def test_workers_end_with_their_parent(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    with Started(command(raw, tokenizer, tmp_path, "--workers=2")) as started:
        started.wait_until(lambda: records(tmp_path / "set" / "one"))
        assert len(started.group()) >= 3
        os.kill(started.process.pid, signal.SIGKILL)
        assert started.end()[0] == -signal.SIGKILL


def test_a_killed_worker_is_one_line(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    with Started(command(raw, tokenizer, tmp_path)) as started:
        started.wait_until(lambda: records(tmp_path / "set" / "one"))
        (worker,) = [pid for pid in started.group() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(worker, signal.SIGKILL)
        code, _, stderr = started.end()
    assert code == 1
    assert "one: a worker was killed, perhaps for lack of memory; run the same command again" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
