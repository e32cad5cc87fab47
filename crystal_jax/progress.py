"""A running training and its surroundings: signals, the clock that judges each step's metrics, the progress bar."""

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from crystal_jax.config import TrainingConfig
from crystal_jax.data.pipeline import hash_text
from crystal_jax.errors import FatalError
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
    each update that was skipped. Time inside `with clock.paused():` isn't training.

    Raises:
      FatalError: too many updates in a row were skipped.
    """

    def __init__(self, config: TrainingConfig, plan: Plan, standing: tuple[Interval, Window],
                 report: Callable[..., None]):
        self.config, self.plan, self.report = config, plan, report
        self.interval, self.window = standing
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.since = time.perf_counter()
        self.untimed = 0
        """Steps of the interval that aren't in its seconds: up to the first here, which waited for the compiler."""
        self.started = False
        self.stop = self.save = False
        """What some process asked for with a step: every process finds it here after the same one."""

    def dispatched(self, done: int, metrics: dict[str, jax.Array]) -> None:
        waiting, self.pending = self.pending, (done, metrics)
        if waiting:
            self._take(*waiting)

    def logs(self, done: int) -> bool:
        """Whether a line is logged after `done` updates."""
        return done % self.config.log_every == 0 or done == self.plan.done(done)[0].end

    def paused(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        if self.pending:
            self._take(*self.pending)
            self.pending = None
        self.interval.seconds += time.perf_counter() - self.since

    def __exit__(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def _take(self, done: int, metrics: dict[str, jax.Array]) -> None:
        found = jax.device_get(metrics)
        self.interval.add(found)
        words = dict(zip(WORDS, found["words"], strict=True))
        self.stop, self.save = self.stop or words["stop"] > 0, self.save or words["save"] > 0
        if not self.started:
            self.started, self.untimed = True, self.interval.steps
            self.interval.seconds, self.since = 0.0, time.perf_counter()
        self._judge(done, found)
        if self.logs(done):
            placed, _ = self.plan.done(done)
            now = time.perf_counter()
            timed, seconds = self.interval.steps - self.untimed, self.interval.seconds + now - self.since
            tokens = placed.phase.global_batch_size * self.plan.sequence_length
            rate = {"step_seconds": seconds / timed, "tokens_per_second": tokens * timed / seconds} if timed else {}
            self.report(done, {"batch_hash": hash_text(found["words"][2:]), **self.interval.record(), **rate})
            self.interval, self.since, self.untimed = Interval(self.interval.sources), now, 0

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
