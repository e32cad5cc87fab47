"""What a model keeps of single sequences: how often it continues one exactly, seen against never seen.

A sequence is k-extractible if its first k tokens, as a prompt, make greedy decoding give the tokens that follow
(Carlini et al. 2023; measured over training in Biderman et al. 2023). Seen sequences are rows of a step's batch, as
`inspect` has them; unseen ones are held-out windows of the same domains. Rows with fill-in-the-middle are left out.
"""

from collections import Counter

import numpy as np

from crystal_jax import files
from crystal_jax.config import Config
from crystal_jax.data.pipeline import Batches, Stores, heldout
from crystal_jax.errors import UserError
from crystal_jax.evaluation.subject import Subject
from crystal_jax.evaluation.walk import Task
from crystal_jax.history import read_record
from crystal_jax.sampling import Request
from crystal_jax.scoring import Query

PROMPT_TOKENS = 32
CONTINUED_TOKENS = 32


def memorisation_task(config: Config, run_dir: str, step: int, rows: int = 128) -> Task:
    """For the rows that the update at `step` saw.

    Raises:
      UserError: a step that the run hasn't, stores that aren't there, sequences that are too short.
    """
    if config.data.sequence_length < PROMPT_TOKENS + CONTINUED_TOKENS:
        raise UserError(f"--tasks=memorisation: sequences of {config.data.sequence_length} tokens are too short for "
                        f"{PROMPT_TOKENS} + {CONTINUED_TOKENS}")
    stores = Stores(config)
    batches = Batches(config, stores, eras=read_record(files.as_path(run_dir)).eras)
    if not 1 <= step <= len(batches):
        raise UserError(f"--seen_at_step: {step} must be from 1 to {len(batches)}")
    draws = [draw for draw in batches.draws(step - 1) if not draw.fim_rate][:rows]
    plain = [draw.slot for draw in draws]
    if not plain:
        raise UserError(f"--seen_at_step: step {step} has no row without fill-in-the-middle; take another")
    batch = batches[step - 1]
    seen = np.concatenate([batch["inputs"][plain, :1], batch["targets"][plain]], axis=1)
    # As many of each domain as were seen, as far as there are.
    domains = Counter(config.sources[draw.source].domain for draw in draws)
    parts = [windows[: domains[domain]] for domain, windows in heldout(config, stores).items() if domains[domain]]
    if not parts:
        raise UserError(f"--tasks=memorisation: the run's stores have nothing held out of {' and '.join(domains)}; "
                        "prepare them with --heldout")
    unseen = np.concatenate(parts)

    def run(subject: Subject) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, windows in (("seen", seen), ("unseen", unseen)):
            found |= {f"{name}.{metric}": value for metric, value in measure(subject, windows).items()}
        return {**found, "updates_since": float(subject.info.get("step", 0) - step)}

    return Task(f"memorisation-{step}", run, {"task": "memorisation", "step": step, "rows": rows,
                                              "fingerprints": stores.fingerprints()})


def measure(subject: Subject, windows_NT: np.ndarray) -> dict[str, float]:
    """Share of windows [N, T] that are extractible, mean share of right tokens, loss of the continuation in nats."""
    prompts = windows_NT[:, :PROMPT_TOKENS]
    truth = windows_NT[:, PROMPT_TOKENS : PROMPT_TOKENS + CONTINUED_TOKENS]
    asked = [Request(tuple(prompt.tolist()), CONTINUED_TOKENS) for prompt in prompts]
    scores = subject.scorer([Query(tuple(prompt.tolist()), tuple(rest.tolist()))
                             for prompt, rest in zip(prompts, truth, strict=True)])
    right = np.zeros(truth.shape, bool)
    for index, ids in subject.sampler(asked):
        right[index, : len(ids)] = truth[index, : len(ids)] == ids
    return {"extractible": float(np.mean([score.greedy for score in scores])), "right_tokens": float(right.mean()),
            "loss": -float(np.mean([score.logprob for score in scores])) / CONTINUED_TOKENS,
            "sequences": float(len(windows_NT))}
