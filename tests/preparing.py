"""What the tests of `prepare` share: a corpus, its tokenizer, the command, and processes that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crystal_jax.data import tasks
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
INPUTS, DOCUMENTS = 6, 40  # documents of each input
HELDOUT = 0.2
POLL_SECONDS = 0.001
DEADLINE = 120


def write_raw(folder: Path, inputs: int = INPUTS, documents: int = DOCUMENTS, chars: int = 2000) -> Path:
    """Files of JSON lines with an empty and a broken text and an id twice in each."""
    folder.mkdir(parents=True)
    rng = random.Random(1)
    for index in range(inputs):
        texts = ["".join(rng.choices("ab \n(é語", k=rng.randint(1, chars))) for _ in range(documents - 2)]
        texts += ["", "lone \ud800x\udc00"]
        lines = [{"text": text, "name": f"{index}/{max(number, 1)}", "meta": {"set": "ab"[number % 2]}}
                 for number, text in enumerate(texts)]  # fmt: skip
        (folder / f"{index:02d}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def write_tokenizer(path: Path) -> Path:
    train_tokenizer(["ab (é語) abba baab (ab) éa " * 50, "<s> lone </s>" * 9, "x\n"], 384).save(str(path))
    return path


def spec(raw: Path, **changed: Any) -> SourceSpec:
    return SourceSpec("jsonl", (str(raw),), **{"id_key": "name", **changed})


def in_parts(raw: Path) -> SourceSpec:
    """The same documents as two stores, A and B."""
    return spec(raw, split_by="meta.set", split_names=(("a", "A"), ("b", "B")))


def make(raw: Path | SourceSpec, tokenizer: Path, output: Path | str, **options: Any) -> Any:
    """Prepares the corpus as output/set/one."""
    source = raw if isinstance(raw, SourceSpec) else spec(raw)
    return prepare(source, "set/one", tokenizer, output, Options(**{"heldout": HELDOUT, **options}))


def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner `local` without its processes, which take a second to start; for tests of something else."""
    from crystal_jax.data import prepare as module

    monkeypatch.setitem(module.RUNNERS, "local", lambda found, _: [tasks.prepare_input(task) for task in found])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Processes


def command(raw: Path, tokenizer: Path, output: Path | str, *more: str) -> list[str]:
    return [sys.executable, "-m", "crystal_jax", "prepare", "--source=jsonl", f"--input={raw}", "--name=set/one",
            "--id_key=name", f"--tokenizer={tokenizer}", f"--output={output}", f"--heldout={HELDOUT}",
            *(more or ("--workers=1",))]  # fmt: skip


class Started:
    """A command in a process group of its own; leaving the context leaves no process of it behind."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        start_new_session=True)  # fmt: skip

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        if self.group():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def wait_until(self, holds: Callable[[], object]) -> None:
        """Returns as soon as it holds; the command must still run then."""
        while not holds():
            assert self.process.poll() is None, f"ended before: {self.process.communicate()}"
            time.sleep(POLL_SECONDS)

    def signal(self, number: int) -> None:
        """To the whole group, as the terminal and a batch system do."""
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, when nothing of the group runs any more."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE)
        end = time.monotonic() + DEADLINE
        while self.group() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        assert not self.group(), "left a process behind"
        return self.process.returncode, stdout, stderr

    def group(self) -> list[int]:
        """Ids of the processes that run in the command's group."""
        if not Path("/proc/self/stat").exists():
            pytest.skip("needs /proc, which Linux has")
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(path.parent.name))
        return found


def records(folder: Path) -> list[str]:
    """Names of the inputs that are recorded in an unfinished store."""
    return sorted(path.stem for path in folder.glob("progress/*.json") if path.stem.isdigit())
