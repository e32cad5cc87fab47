"""`crystal-jax` with batches that are poisoned on purpose: POISON={"step": factor} scales the mask of that update.

The mask is a factor of the loss: NaN makes a NaN batch, 1e4 one with ten thousand times the loss and the gradient.
"""

import json
import os
import sys

from crystal_jax import cli
from crystal_jax.data.pipeline import Batch, Batches

POISON = {int(step): float(factor) for step, factor in json.loads(os.environ["POISON"]).items()}
read = Batches.__getitem__


def poisoned(self: Batches, step: int) -> Batch:
    batch = read(self, step)
    return {**batch, "mask": batch["mask"] * POISON[step + 1]} if step + 1 in POISON else batch


if __name__ == "__main__":
    Batches.__getitem__ = poisoned  # type: ignore[method-assign]
    sys.exit(cli.main())
