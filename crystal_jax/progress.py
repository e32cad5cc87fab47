"""A running training and its surroundings: signals, the clock that judges each step's metrics, progress, traces."""

import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from crystal_jax import files
from crystal_jax.config import TrainingConfig
from crystal_jax.data.pipeline import hash_text
from crystal_jax.errors import FatalError, UserError
from crystal_jax.goodput import Ledger, Rates
from crystal_jax.metrics import Interval
from crystal_jax.phases import Plan
from crystal_jax.spikes import Window, describe


class Signals:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "Signals":
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        print(f"\n{self.received}: saving after this step; once more to stop at once", file=sys.stderr, flush=True)


class Timer:
    """Says once that so many minutes have gone by since the last save."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes or float("inf")
        self.saved()

    def saved(self) -> None:
        self.since, self.asked = time.monotonic(), False

    def due(self) -> bool:
        if self.asked or time.monotonic() - self.since < self.seconds:
            return False
        self.asked = True
        return True


WORDS = ("stop", "save", "hash_high", "hash_low")
"""What the processes tell each other with each step, as a sum over them: a signal came, a save is due, batch hash."""


class Clock:
    """Takes in the metrics of step N-1 after step N is dispatched, so that the device never waits for the host.

    `report` is called with (updates done, record) at every log interval, and with (updates done, record, "skip") for
    each update that was skipped. How fast updates are it takes from the ledger.

    Raises:
      FatalError: too many updates in a row were skipped.
    """

    def __init__(self, config: TrainingConfig, plan: Plan, standing: tuple[Interval, Window],
                 report: Callable[..., None], ledger: Ledger):
        self.config, self.plan, self.report = config, plan, report
        self.interval, self.window = standing
        self.rates = Rates(ledger)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.stop = self.save = False
        """What some process asked for with a step: every process finds it here after the same one."""

    def dispatched(self, done: int, metrics: dict[str, jax.Array]) -> None:
        waiting, self.pending = self.pending, (done, metrics)
        if waiting:
            self._take(*waiting)

    def settle(self) -> None:
        """Waits for the update that was dispatched last, and takes in its metrics."""
        waiting, self.pending = self.pending, None
        if waiting:
            self._take(*waiting)

    def logs(self, done: int) -> bool:
        """Whether a line is logged after `done` updates."""
        return done % self.config.log_every == 0 or done == self.plan.done(done)[0].end

    def _take(self, done: int, metrics: dict[str, jax.Array]) -> None:
        found = jax.device_get(metrics)
        self.rates.took(self.plan.done(done)[0].phase.global_batch_size * self.plan.sequence_length)
        self.interval.add(found)
        words = dict(zip(WORDS, found["words"], strict=True))
        self.stop |= bool(words["stop"])
        self.save |= bool(words["save"])
        self._judge(done, found)
        if self.logs(done):
            self.report(done, {"batch_hash": hash_text(found["words"][2:]), **self.interval.record(),
                               **self.rates.record()})
            self.interval = Interval(self.interval.sources)

    def limits(self, step: int) -> np.ndarray:
        """float32 [2], what the update at global `step` is compared with."""
        return self.window.limits(self.config, step, self.plan.settled(step))

    def _judge(self, done: int, found: dict[str, np.ndarray]) -> None:
        """Takes note of an update that was skipped; it was judged on the devices."""
        if not found["taken"]:
            record = describe(found, self.limits(done - 1))
            self.report(done, record, "skip")
        self.window.add(self.config, done, found)
        row = self.window.in_a_row
        if row > self.config.skips_in_a_row:
            raise FatalError(f"step {done}: {record['reason']}: {row} updates in a row were skipped "
                             f"(config.training.skips_in_a_row = {self.config.skips_in_a_row}); pass over their data "
                             f"with --config.data.skip=[[{done - row + 1},STEPS]] and --amend_from=STATE, lower the "
                             "learning rate, or raise config.training.spike_factor")


def parse_profile(text: str, total: int) -> tuple[int | None, int]:
    """What --profile asks for of a run of `total` updates: (first, last) or (None, number).

    Raises:
      UserError: it is neither, or behind the run's end.
    """
    match = re.fullmatch(r"(?:([0-9]+):)?([0-9]+)", text)
    first, last = (int(match[1]) if match[1] else None, int(match[2])) if match else (None, 0)
    if not (first or 0) < last <= total:
        raise UserError(f"--profile={text}: is a number of updates, such as 5, or FIRST:LAST, such as 20:25 for the "
                        f"five after update 20; the run has {total:,}")
    return first, last


class Profile:
    """The trace of some updates, written to RUN/profile for `tensorboard --logdir` and xprof."""

    def __init__(self, run_dir: epath.Path, asked: tuple[int | None, int], start: int, ledger: Ledger):
        """asked: as `parse_profile` gives it. A number begins with the second update of this process, which no
        compilation is part of; a range that `start` lies behind gives none.
        """
        first, last = asked
        self.first, self.last = (start + 1, start + 1 + last) if first is None else (first, last)
        self.run_dir, self._ledger = run_dir, ledger
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def under_way(self) -> bool:
        return self._folder is not None

    def due(self, done: int) -> bool:
        """Whether `turn` has something to do after `done` updates."""
        return (self.first <= done < self.last) is not self.under_way

    def turn(self, done: int) -> str | None:
        """Begins the trace; or ends it, and returns the folder below the run's that has it now. Nothing is under way
        on the devices."""
        with self._ledger.doing("profiling"):
            if self._folder is None:
                self.first, self._folder = done, tempfile.TemporaryDirectory()
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # each call of Python would be in it, and little else be found
                jax.profiler.start_trace(self._folder.name, profiler_options=options)
                return None
            jax.profiler.stop_trace()
            with self._folder as folder:
                self._folder, self.last = None, done
                # Where TensorBoard looks for runs; the profiler names them by the time.
                name = f"profile/plugins/profile/steps_{self.first + 1}-{done}"
                for path in Path(folder).glob("plugins/profile/*/*"):
                    files.write_bytes(self.run_dir / name / path.name, path.read_bytes())
            return name


class Progress:
    """A bar on a terminal, a line at each log interval elsewhere; both on stderr."""

    def __init__(self, plan: Plan, start: int):
        self.plan = plan
        self.bar = tqdm(total=plan.total_steps, initial=start, unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty(), file=sys.stderr)
        self.began, self.start = time.perf_counter(), start

    def show(self, done: int, record: dict[str, Any]) -> None:
        placed, phase_step = self.plan.done(done)
        numbers = f"loss {record.get('loss', float('nan')):.3f}"
        if "tokens_per_second" in record:
            numbers += f", {record['tokens_per_second']:,.0f} tok/s"
        if "mfu" in record:
            numbers += f", MFU {record['mfu']:.1%}"
        if not self.bar.disable:
            self.bar.set_description(placed.phase.name, refresh=False)
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        left = (time.perf_counter() - self.began) / (done - self.start) * (self.plan.total_steps - done)
        print(f"{placed.phase.name} {phase_step}/{placed.steps}, step {done}/{self.plan.total_steps}, {numbers}, "
              f"{_duration(left)} left", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that doesn't break the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
