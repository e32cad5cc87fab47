"""Held-out loss, perplexity and bits per byte of each domain, on the windows that training itself looks at."""

import itertools
import math

import numpy as np

from crystal_jax.config import Config
from crystal_jax.data.pipeline import Stores, heldout
from crystal_jax.data.rows import segments
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.evaluate import measures
from crystal_jax.evaluation.subject import Subject
from crystal_jax.evaluation.walk import Task
from crystal_jax.scoring import Query, Scorer


def losses_task(config: Config) -> Task:
    """Of all domains of a recipe.

    Raises:
      UserError: its stores aren't there.
    """
    stores = Stores(config)
    windows = heldout(config, stores)

    def run(subject: Subject) -> dict[str, float]:
        found: dict[str, float] = {}
        for domain, rows in windows.items():
            found |= {f"{domain}.{name}": value for name, value in
                      measure(subject.scorer, rows, subject.tokenizer, config.data.document_mask).items()}
        return found

    return Task("losses", run, {"task": "losses", "fingerprints": stores.fingerprints(),
                                "sequences": config.training.eval_sequences, "length": config.data.sequence_length,
                                "document_mask": config.data.document_mask})


def measure(scorer: Scorer, rows_NT: np.ndarray, tokenizer: Tokenizer, document_mask: bool) -> dict[str, float]:
    """evaluate.measures of windows [N, T + 1]."""
    total = -math.fsum(score.logprob for score in scorer(_queries(rows_NT, tokenizer, document_mask), progress=True))
    return measures(total, rows_NT[:, 1:], tokenizer.byte_lengths)


def _queries(rows_NT: np.ndarray, tokenizer: Tokenizer, document_mask: bool) -> list[Query]:
    """A window as one text; or, as training with a document mask sees it, each document of it by itself."""
    found = []
    for row in rows_NT:
        cuts = [0, len(row) - 1]
        if document_mask:
            ids = segments(row[None, :-1], tokenizer.bos_id, tokenizer.eos_id)[0][0]
            cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(row) - 1]
        for start, end in itertools.pairwise(cuts):
            found.append(Query((int(row[start]),), tuple(row[start + 1 : end + 1].tolist())))
    return found
