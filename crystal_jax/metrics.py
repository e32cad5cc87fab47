"""metrics.jsonl, the source of truth about a run, and the copy of a local one as TensorBoard events.

Append-only: after a resume, steps that were lost are written again, and the last line of a (kind, step) counts.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import FileIO
from typing import Any

import numpy as np
from etils import epath

from crystal_jax import files
from crystal_jax.objects import Appender

# Where torch is installed, tensorboardX imports it, for 1.6 s, to accept its tensors; a None in sys.modules hides it.
_HIDE_TORCH = "torch" not in sys.modules
if _HIDE_TORCH:
    sys.modules["torch"] = None  # type: ignore[assignment]
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event  # noqa: E402
from tensorboardX.summary import scalar  # noqa: E402

if _HIDE_TORCH:
    del sys.modules["torch"]

BY_THE_CLOCK = ("time", "seconds", "spent", "step_seconds", "seconds_of_steps", "tokens_per_second",
                "smoothed_tokens_per_second", "tflops_per_device", "mfu")
"""What a line says of how long it took: in equal runs these may differ, and nothing else in lines about results."""
OF_PROCESSES = ("start", "program", "profile", "warning", "end")
"""Kinds of lines that are about a process and not about results."""


class MetricsLog:
    """Appends records; a kill loses at most the line being written, on gs:// those of the last second or two."""

    def __init__(self, run_dir: epath.Path):
        path = run_dir / "metrics.jsonl"
        self._file: Appender | FileIO
        self._events: EventsWriter | None = None
        if files.is_remote(run_dir):
            self._file = Appender(path)
            return
        files.end_last_line(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by close()
        (run_dir / "tensorboard").mkdir(exist_ok=True)
        # The writer without a thread: an error must surface here, and a few scalars need no queue.
        self._events = EventsWriter(str(run_dir / "tensorboard" / "events"))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a record; on gs:// in the background.

        Raises:
          Exception: what went wrong in the background with an earlier one.
        """
        now = time.time()
        self._file.write(json.dumps({"kind": kind, "step": step, **values, "time": now}).encode() + b"\n")
        if self._events is None:
            return
        for name, value in _scalars(kind, values):
            self._events.write_event(Event(wall_time=now, step=step, summary=scalar(name, value)))
        self._events.flush()

    def flush(self) -> None:
        """Waits until all records are in the file: before a state is saved that goes on behind them."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _scalars(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value


@dataclass
class Interval:
    """What training did since the last log line: sums over the steps, per source.

    It goes into the saved state, so that a resumed run logs what an undisturbed one does.
    """

    sources: list[str]
    steps: int = 0
    skipped: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    nll: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nll = self.nll or [0.0] * len(self.sources)
        self.tokens = self.tokens or [0.0] * len(self.sources)

    def of(self, sources: list[str]) -> "Interval":
        """The same sums for these sources: an amended run may have new ones."""
        nll, tokens = (dict(zip(self.sources, values, strict=True)) for values in (self.nll, self.tokens))
        return replace(self, sources=sources, nll=[nll.get(name, 0.0) for name in sources],
                       tokens=[tokens.get(name, 0.0) for name in sources])

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        self.steps += 1
        if not metrics["taken"]:
            self.skipped += 1
            return
        self.loss += float(metrics["loss"])
        self.grad_norm += float(metrics["grad_norm"])
        self.nll = [a + float(b) for a, b in zip(self.nll, metrics["nll_per_source"], strict=True)]
        self.tokens = [a + float(b) for a, b in zip(self.tokens, metrics["tokens_per_source"], strict=True)]

    def record(self) -> dict[str, Any]:
        """Means over the steps that were taken; nats per predicted token for each source that had any."""
        taken = self.steps - self.skipped
        result: dict[str, Any] = {"skipped": self.skipped}
        if taken:
            seen = [i for i, tokens in enumerate(self.tokens) if tokens]
            result |= {
                "loss": self.loss / taken,
                "loss_per_source": {self.sources[i]: self.nll[i] / self.tokens[i] for i in seen},
                "grad_norm": self.grad_norm / taken,
            }
        return result
