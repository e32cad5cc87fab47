"""metrics.jsonl, the source of truth about a run, and its copy as TensorBoard events.

Append-only: after a resume, steps that were lost are written again, and the last line of a (kind, step) counts.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np


class MetricsLog:
    """Appends records; each line is flushed, so that a kill loses at most the line being written."""

    def __init__(self, run_dir: Path):
        # Imported here, since it costs 0.2 s and only training writes events.
        from tensorboardX import SummaryWriter

        path = run_dir / "metrics.jsonl"
        _end_last_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._events = SummaryWriter(str(run_dir / "tensorboard"), write_to_disk=True)

    def write(self, kind: str, step: int, **values: Any) -> None:
        record = {"kind": kind, "step": step, **values, "time": time.time()}
        self._file.write(json.dumps(record, allow_nan=True) + "\n")
        self._file.flush()
        for name, value in _scalars(kind, values):
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _end_last_line(path: Path) -> None:
    """Puts the next record on a line of its own after a kill in mid-line."""
    if path.exists() and path.stat().st_size:
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _scalars(prefix: str, values: dict[str, Any]):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value


class Interval:
    """What training did since the last log line: sums over the steps, per source."""

    def __init__(self, sources: list[str]):
        self.sources = sources
        self.steps = self.skipped = 0
        self.seconds = 0.0
        self.loss = self.grad_norm = 0.0
        self.nll = np.zeros(len(sources))
        self.tokens = np.zeros(len(sources))

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        self.steps += 1
        if not metrics["finite"]:
            self.skipped += 1
            return
        self.loss += float(metrics["loss"])
        self.grad_norm += float(metrics["grad_norm"])
        self.nll += metrics["nll_per_source"]
        self.tokens += metrics["tokens_per_source"]

    def record(self) -> dict[str, Any]:
        """Means over the steps that were taken; nats per predicted token for each source that had any."""
        taken = self.steps - self.skipped
        result: dict[str, Any] = {"skipped": self.skipped}
        if taken:
            seen = [i for i, tokens in enumerate(self.tokens) if tokens]
            result |= {
                "loss": self.loss / taken,
                "loss_per_source": {self.sources[i]: float(self.nll[i] / self.tokens[i]) for i in seen},
                "grad_norm": self.grad_norm / taken,
            }
        return result
