"""Runners: what the pool of processes is given, and the estimate of the time left."""

from pathlib import Path
from typing import Any

import pytest
from preparing import INPUTS, in_process, spec, write_raw, write_tokenizer

from crystal_jax.data import prepare, runners
from crystal_jax.data.readers import Input, SourceSpec
from crystal_jax.data.tasks import Task


class Bar:
    """A tqdm without its output."""

    total = n = 0

    def update(self, more: int) -> None:
        self.n += more

    def set_postfix(self, **shown: Any) -> None:
        self.shown = shown


class Pool:
    """In the place of a pool of processes: a task's bytes are its result, at once unless it waits."""

    def __init__(self) -> None:
        self.running: list[tuple[runners.Future[int], int]] = []
        self.most = 0

    def submit(self, function: Any, task: Task) -> "runners.Future[int]":
        future: runners.Future[int] = runners.Future()
        self.running.append((future, task.index))
        self.most = max(self.most, len(self.running))
        if task.index:
            self.end()
        return future

    def end(self) -> None:
        """Ends the task that came last."""
        future, size = self.running.pop()
        future.set_result(size)


def tasks_of(ending: str, sizes: list[int]) -> list[Task]:
    """Each of an input of 100 bytes; the size of its text is its index."""
    item = Input("i", ((f"a{ending}", f"a{ending}"),), 100)
    return [Task(SourceSpec("jsonl"), item, size, "", "", "auto", 0.0, "", "") for size in sizes]


def test_the_time_left_is_estimated_from_what_is_done() -> None:
    some = tasks_of(".jsonl.zst", [300, 500])
    assert sum(map(runners._expected, some)) == 2 * 100 * runners.EXPANSION[".zst"]
    bar = Bar()
    runners._feed(Pool(), some, 2, [800, 90], bar)  # type: ignore[arg-type]
    assert (bar.n, bar.total) == (800, 800)
    assert bar.shown == {"tokens": "90", "inputs_left": 0, "refresh": False}
    pool, totals = Pool(), []

    class Stopping(Bar):
        def update(self, more: int) -> None:
            totals.append(self.total)
            if pool.running:
                pool.end()

    runners._feed(pool, tasks_of(".jsonl", [0, 50]), 2, [50, 9], Stopping())  # type: ignore[arg-type]
    assert totals == [100, 50]  # 200 bytes of input, of which the first 100 were 50 of text and the others none


def test_the_pool_has_a_few_tasks_per_worker() -> None:
    pool = Pool()
    given: list[int] = []

    class Counting(Bar):
        def update(self, more: int) -> None:
            given.append(len(pool.running))
            for _ in range(min(2, len(pool.running))):
                pool.end()

    bar = Counting()
    runners._feed(pool, tasks_of(".jsonl", [0] * 50), 3, [0, 0], bar)  # type: ignore[arg-type]
    assert pool.most == max(given) == 3 * runners.AHEAD and bar.shown["inputs_left"] == 0


def test_many_inputs_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capfd: pytest.CaptureFixture[str]) -> None:
    raw, tokenizer = write_raw(tmp_path / "raw"), write_tokenizer(tmp_path / "tokenizer.json")
    in_process(monkeypatch)
    for limit in (INPUTS, INPUTS - 1):
        monkeypatch.setattr(prepare, "MANY", limit)
        prepare.prepare(spec(raw), f"set{limit}", tokenizer, tmp_path / "stores")
        warned = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(warned) == (limit < INPUTS)
    assert warned[0].startswith(f"warning: set{limit} has {INPUTS} inputs") and "--files_per_input=64" in warned[0]
