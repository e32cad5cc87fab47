"""What benchmarks read of their own process: memory, and time by both clocks; and ways compared in fresh processes."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STATUS = Path("/proc/self/status")
WALL_SECONDS = 20.0
"""After which a loader that waits for others is stopped."""


def memory_mb(field: str = "VmRSS") -> float:
    """Resident memory now (VmRSS), at its peak (VmHWM), or what isn't backed by files (RssAnon); Linux only."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Lets VmHWM begin anew at what is resident now."""
    STATUS.with_name("clear_refs").write_text("5")


@dataclass
class Clock:
    wall: float = 0.0
    """Seconds."""
    cpu: float = 0.0
    """Seconds of all threads."""


@contextlib.contextmanager
def clocked() -> Iterator[Clock]:
    """Times its block."""
    clock, wall, cpu = Clock(), time.perf_counter(), time.process_time()
    yield clock
    clock.wall, clock.cpu = time.perf_counter() - wall, time.process_time() - cpu


@dataclass
class Peak:
    before: float = 0.0
    """MiB."""
    highest: float = 0.0
    """MiB."""


@contextlib.contextmanager
def peak_anonymous(seconds: float = 0.005) -> Iterator[Peak]:
    """The highest anonymous memory in its block, looked at every so many seconds: the kernel keeps no such peak."""
    peak, done = Peak(memory_mb("RssAnon"), memory_mb("RssAnon")), threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            peak.highest = max(peak.highest, memory_mb("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def measure_way(way: Callable[[Path, str, Path], None], source: Path, form: str) -> dict[str, float]:
    """Of one way(source, form, output) in this process, which has imported all it needs."""
    with tempfile.TemporaryDirectory(dir=source.parent) as place, peak_anonymous() as peak, clocked() as clock:
        way(source, form, Path(place) / "out")
    return {"seconds": clock.wall, "cpu_seconds": clock.cpu, "before": peak.before, "highest": peak.highest}


def compare(module: str, ways: list[str], rounds: int, arguments: list[str]) -> dict[str, dict[str, float]]:
    """Way to the median of each figure that `python -m MODULE --way=WAY ARGUMENTS` gives as JSON in its last line.

    The ways take turns, each time in a fresh process.
    """
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, values in found.items():
            done = subprocess.run([sys.executable, "-m", module, f"--way={way}", *arguments], cwd=ROOT,
                                  stdout=subprocess.PIPE, text=True, check=True)
            values.append(json.loads(done.stdout.splitlines()[-1]))
    return {way: {key: statistics.median(each[key] for each in values) for key in values[0]}
            for way, values in found.items()}


def render(found: dict[str, dict[str, float]]) -> str:
    """The table of `compare` over `measure_way`, and the machine's load, which says whether the seconds mean much."""
    lines = ["| way | s (CPU-s) | anonymous memory MiB, highest | above what imports took |", "|---|---|---|---|"]
    lines += [f"| {way} | {value['seconds']:.1f} ({value['cpu_seconds']:.1f}) | {value['highest']:.0f} | "
              f"{value['highest'] - value['before']:.0f} |" for way, value in found.items()]
    return "\n".join([*lines, f"load average of the last minute: {os.getloadavg()[0]:.1f}"])


@dataclass
class Loader:
    """An opened loader."""

    get: Callable[[int], Any]
    """The batch of any step."""
    iterate: Callable[[int], Iterator[Any]]
    """The batches from a step on, read ahead if that is its way."""


def measure_loader(open_loader: Callable[[], Loader], rows: int, steps: int, cpu_seconds: float = 4.0,
                   seeks: int = 30) -> dict[str, float]:
    """Start, seeks, speed and memory of a loader in this process, which has imported all it needs.

    rows: of a batch. steps: that a seek may go to.
    """
    reset_peak()
    before = memory_mb()
    with clocked() as first:
        loader = open_loader()
        next(loader.iterate(0))
    times, end = [], time.monotonic() + WALL_SECONDS
    for number in range(seeks):
        if times and time.monotonic() > end:
            break
        with clocked() as seek:
            loader.get(number * 7919 % steps)
        times.append(seek.cpu * 1e3)
    batches, done = loader.iterate(1), 0
    next(batches)
    began, end = time.process_time(), time.monotonic() + WALL_SECONDS
    while time.process_time() - began < cpu_seconds and time.monotonic() < end:
        next(batches)
        done += 1
    return {"rows_per_cpu_s": done * rows / (time.process_time() - began), "first_batch_s": first.wall,
            "first_batch_cpu_s": first.cpu, "seek_ms": sorted(times)[len(times) // 2], "worst_seek_ms": max(times),
            "memory_mb": memory_mb("VmHWM") - before}
