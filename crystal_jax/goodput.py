"""Where a run's time goes: kept by each process while it trains, read back from metrics.jsonl over all of them.

Invariant: at each moment a process does exactly one of ACTIVITIES, by a clock that never jumps, so that their seconds
sum to its whole life. What it says in the log is cumulative: a killed process is known up to its last line.
"""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

ACTIVITIES = {
    "initialising": "start of the process, imports, opening the data, drawing the first weights",
    "restoring": "reading a saved state",
    "compiling": "tracing, lowering and compiling, or reading programs from the compilation cache",
    "stepping": "updates",
    "data": "waiting for the next batch",
    "evaluating": "held-out losses",
    "saving": "what training waits for while states, permanent checkpoints and fingerprints are taken",
    "profiling": "starting and writing a trace",
}
MADE_AGAIN = ("stepping", "data", "evaluating", "saving", "profiling")
"""What a process does a second time that goes on from before it."""
LOST = {
    "lost": "all that was done behind the state that a later process went on from",
    "down": "from a process's last word to the beginning of the next",
}
COMPILING = tuple(f"/jax/core/compile/{what}_duration" for what in ("jaxpr_trace", "jaxpr_to_mlir_module",
                                                                    "backend_compile"))
CACHE = {"/jax/compilation_cache/cache_hits": "hit", "/jax/compilation_cache/cache_misses": "miss"}
IMPORTED = time.perf_counter()


def process_age() -> float:
    """Seconds since this process began; where there is no /proc to ask, since this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return time.perf_counter() - IMPORTED


@dataclass
class Program:
    """What it took to have a jitted function as a program."""

    seconds: float = 0.0
    cache: str = "off"
    """hit, miss (compiled, and kept), or off: without a cache, or compiled too quickly to be kept."""


class Ledger:
    """The seconds of this process by activity, for its main thread. In a `with`, it hears of each compilation."""

    def __init__(self, before: float = 0.0):
        """before: seconds that it has lived already."""
        self._spent = dict.fromkeys(ACTIVITIES, 0.0)
        self._spent["initialising"] = before
        self._doing, self._since = "initialising", time.perf_counter()
        self._thread = threading.get_ident()
        self._compiling: list[tuple[Program, float, Any]] = []
        self.programs: defaultdict[str, Program] = defaultdict(Program)
        """By the function's name; what was traced inside another one counts there too."""

    def spent(self) -> dict[str, float]:
        """Seconds so far of each activity."""
        now = time.perf_counter()
        self._spent[self._doing] += now - self._since
        self._since = now
        return dict(self._spent)

    def rounded(self) -> dict[str, float]:
        """`spent` in milliseconds' precision, without what never was: for a log."""
        return {name: round(seconds, 3) for name, seconds in self.spent().items() if seconds}

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """All that this thread does inside is of this activity, but for an inner one."""
        self.spent()
        before, self._doing = self._doing, activity
        try:
            yield
        finally:
            self.spent()
            self._doing = before

    def __enter__(self) -> "Ledger":
        jax.monitoring.register_scalar_listener(self._begins)
        jax.monitoring.register_event_duration_secs_listener(self._ends)
        jax.monitoring.register_event_listener(self._happens)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_scalar_listener(self._begins)
        jax.monitoring.unregister_event_duration_listener(self._ends)
        jax.monitoring.unregister_event_listener(self._happens)

    def _begins(self, event: str, value: float, **about: Any) -> None:
        """Tracing, lowering or compiling begins, perhaps inside another. JAX's own durations follow a clock that may
        jump."""
        if event not in COMPILING or threading.get_ident() != self._thread:
            return
        block = self.doing("compiling")
        block.__enter__()
        program = self.programs[str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")]
        self._compiling.append((program, self._since, block))

    def _ends(self, event: str, duration_secs: float, **about: Any) -> None:
        if event not in COMPILING or threading.get_ident() != self._thread or not self._compiling:
            return
        program, since, block = self._compiling.pop()
        block.__exit__(None, None, None)
        program.seconds += self._since - since

    def _happens(self, event: str, **about: Any) -> None:
        if event in CACHE and threading.get_ident() == self._thread and self._compiling:
            self._compiling[-1][0].cache = CACHE[event]


class Rates:
    """How fast updates are, pauses and compilation left out: each one, and smoothed over some fifty."""

    KEPT = 0.98
    """Of what the smoothed rate knows, with each further update: half of it is of the latest 34."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._since: float | None = None
        self._steps: list[float] = []
        self._tokens = 0
        self._smooth_tokens = self._smooth_seconds = 0.0

    def took(self, tokens: int) -> None:
        """An update of so many tokens is done. The first isn't counted, for what a first time costs."""
        spent = self._ledger.spent()
        before, self._since = self._since, spent["stepping"] + spent["data"]
        if before is None:
            return
        self._steps.append(self._since - before)
        self._tokens += tokens
        self._smooth_tokens = self.KEPT * self._smooth_tokens + tokens
        self._smooth_seconds = self.KEPT * self._smooth_seconds + self._steps[-1]

    def record(self) -> dict[str, Any]:
        """The rates since it was asked last, if an update was counted."""
        steps, tokens = self._steps, self._tokens
        self._steps, self._tokens = [], 0
        seconds = sum(steps)
        if not seconds:
            return {}
        return {"step_seconds": seconds / len(steps), "seconds_of_steps": [round(step, 6) for step in steps],
                "tokens_per_second": tokens / seconds,
                "smoothed_tokens_per_second": self._smooth_tokens / self._smooth_seconds}


@dataclass(frozen=True)
class Account:
    """Where the time of a run went, up to the last line of its log."""

    seconds: dict[str, float]
    """By ACTIVITIES and LOST."""
    wall: float
    """From the beginning of the first process to the last line, by the calendar."""
    processes: int

    @property
    def total(self) -> float:
        """The sum of them: the wall time, but for what the calendar's clock has jumped or drifted."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time in which updates were made that count."""
        return self.seconds["stepping"] / self.total if self.total else 0.0


def account(lines: Sequence[dict[str, Any]]) -> Account | None:
    """The account of all lines of a metrics.jsonl, those included that a later process took back.

    None without a process that kept a ledger.
    """
    processes = _processes(lines)
    if not processes:
        return None
    seconds = dict.fromkeys([*ACTIVITIES, *LOST], 0.0)
    for index, process in enumerate(processes):
        last = process[-1]["spent"]
        gone_back = min((later[0]["step"] for later in processes[index + 1 :]), default=process[-1]["step"])
        for name, spent in last.items():
            lost = spent - _at(process, gone_back, name) if name in MADE_AGAIN else 0.0
            seconds[name] += spent - lost
            seconds["lost"] += lost
        if index:
            seconds["down"] += max(0.0, _began(process) - processes[index - 1][-1]["time"])
    return Account(seconds, processes[-1][-1]["time"] - _began(processes[0]), len(processes))


def _processes(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines of each process that say what was spent, its "start" first."""
    found: list[list[dict[str, Any]]] = []
    knows = False
    for line in lines:
        if line["kind"] == "start":
            knows = "spent" in line
            found += [[]] * knows
        if knows and "spent" in line:
            found[-1] = [*found[-1], line]
    return found


def _began(process: list[dict[str, Any]]) -> float:
    return process[0]["time"] - sum(process[0]["spent"].values())


def _at(process: list[dict[str, Any]], step: int, activity: str) -> float:
    """Seconds that an activity had taken after `step` updates: linear between two lines."""
    known = {line["step"]: line["spent"].get(activity, 0.0) for line in process}
    return float(np.interp(step, sorted(known), [known[at] for at in sorted(known)]))
