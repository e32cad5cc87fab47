"""Held-out loss per domain, on fixed windows, with the loss that any model of unigrams can't beat beside it."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from crystal_jax import sharding
from crystal_jax.model import Crystal, Params

Documents = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class HeldOut:
    """Call it with parameters for {"heldout": {domain: measures(...) | {unigram_entropy}}, "seconds"}.

    With a document mask `documents` gives (segment_ids, positions) of inputs; without it a window is one document.
    """

    def __init__(self, model: Crystal, windows: dict[str, np.ndarray], batch_size: int, mesh: Mesh,
                 byte_lengths_V: np.ndarray, documents: Documents | None = None):
        self.windows, self.mesh, self.documents = windows, mesh, documents
        self.batch_size = sharding.padded(batch_size, sharding.batch_ways(mesh))
        self.byte_lengths_V = byte_lengths_V
        self.entropy = {domain: unigram_entropy(rows[:, 1:]) for domain, rows in windows.items()}

        @jax.jit
        def nll(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
            return model.bind(params).loss(batch["inputs"], batch["targets"], batch["mask"], batch.get("positions"),
                                           batch.get("segment_ids"))[0]

        self._nll = nll

    def __call__(self, params: Params) -> dict[str, Any]:
        began = time.perf_counter()
        result = {
            domain: {**measures(self._nats(params, rows), rows[:, 1:], self.byte_lengths_V),
                     "unigram_entropy": self.entropy[domain]}
            for domain, rows in self.windows.items()
        }
        return {"heldout": result, "seconds": time.perf_counter() - began}

    def _nats(self, params: Params, rows: np.ndarray) -> float:
        total, slots = 0.0, sharding.Part.of(self.mesh).slots(self.batch_size)
        for first in range(0, len(rows), self.batch_size):
            chosen = rows[first : first + self.batch_size]
            # The last batch is filled up with masked copies: one shape, one compilation.
            padded = np.resize(chosen, (self.batch_size, rows.shape[1]))
            mask = np.zeros((self.batch_size, rows.shape[1] - 1), np.float32)
            mask[: len(chosen)] = 1
            batch = {"inputs": padded[:, :-1], "targets": padded[:, 1:], "mask": mask}
            if self.documents is not None:
                batch["segment_ids"], batch["positions"] = self.documents(batch["inputs"])
            mine = {name: values[slots] for name, values in batch.items()}
            total += float(self._nll(params, sharding.put_batch(self.mesh, mine))) * mask.size
        return total


def measures(nats: float, targets: np.ndarray, byte_lengths_V: np.ndarray) -> dict[str, Any]:
    """Loss in nats per token, perplexity, bits per byte of text and the number of tokens, for the sum over targets.

    byte_lengths_V: Tokenizer.byte_lengths. A special token has no bytes, and its loss counts. Where nothing has bytes,
    or a target is no token of the tokenizer, there is no bits_per_byte.
    """
    loss = nats / targets.size
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": int(targets.size)}
    size = int(byte_lengths_V[targets].sum()) if targets.max() < len(byte_lengths_V) else 0
    return found | {"bits_per_byte": nats / math.log(2) / size} if size else found


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the tokens' own frequencies: the least loss of a model that ignores context."""
    share = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(share * np.log(share)).sum())
