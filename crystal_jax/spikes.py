"""Which updates are taken: what a batch's loss and gradient norm are compared with, from the updates before it.

Invariant: the limits of an update depend on updates that were taken, and on those only that every process has surely
seen when it begins; so a run that was stopped and resumed skips what an undisturbed one does.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crystal_jax.config import TrainingConfig

NAMES = ("loss", "grad_norm")
LEAST = 16
"""Updates that a limit is drawn from at least; before, only what isn't finite is skipped. Their median is the level."""
DEVIATION = 1.4826 / math.sqrt(2)
"""Of a normal distribution, its standard deviation over the median difference of two draws. Neighbours are compared,
since a loss that falls from 6 to 3 within the window would make deviations from its median useless."""
FLOORS = np.array([0.025, 0.5])
"""A deviation counts as at least this share of the level. A loss that hardly varies still moves with a new learning
rate; gradient norms have a heavy tail, which clipping takes care of: only what is out of all proportion is meant. With
the factor 10, 1,000 steps of the demo's recipe with 4 sequences each stay below 0.9 of their limits."""


@dataclass
class Window:
    """The latest updates that were taken. It goes into the saved state."""

    taken: list[list[float]] = field(default_factory=list)
    """[updates done, loss, gradient norm] of each, in order."""
    in_a_row: int = 0
    """Updates skipped since the last one that was taken."""

    def limits(self, config: TrainingConfig, step: int, since: int) -> np.ndarray:
        """float32 [2]: the loss and gradient norm above which the update at global `step` is skipped.

        since: global step of the first update that says something about this one (Plan.settled). The update just before
        `step` is still under way when this one begins, so that it never counts.
        """
        seen = [values for done, *values in self.taken if since < done < step][-config.spike_window :]
        if not config.spike_window or len(seen) < min(LEAST, config.spike_window):
            return np.full(len(NAMES), np.inf, np.float32)
        values = np.array(seen)
        level = np.median(values[-LEAST:], axis=0)
        deviation = DEVIATION * np.median(np.abs(np.diff(values, axis=0)), axis=0)
        return (level + config.spike_factor * np.maximum(deviation, FLOORS * level)).astype(np.float32)

    def add(self, config: TrainingConfig, done: int, metrics: dict[str, np.ndarray]) -> None:
        """Takes in what the update said that made `done` of them."""
        if not metrics["taken"]:
            self.in_a_row += 1
            return
        self.in_a_row = 0
        self.taken = [*self.taken, [done, *(float(metrics[name]) for name in NAMES)]][-config.spike_window - 1 :]


def describe(metrics: dict[str, np.ndarray], limits: np.ndarray) -> dict[str, Any]:
    """What a log says of an update that was skipped; null stands for what isn't finite."""
    values = {name: float(metrics[name]) for name in NAMES}
    bounds = {f"{name}_limit": float(limit) for name, limit in zip(NAMES, limits, strict=True)}
    wrong = [f"{name} {value:.4g} {f'above {limit:.4g}' if math.isfinite(value) else 'not finite'}"
             for (name, value), limit in zip(values.items(), bounds.values(), strict=True)
             if not value <= limit or not math.isfinite(value)]
    return {"reason": ", ".join(wrong),
            **{name: value if math.isfinite(value) else None for name, value in {**values, **bounds}.items()}}
