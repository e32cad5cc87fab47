"""From token stores to batches: every batch is a pure function of (recipe, stores, seed, step).

A cursor belongs to a source and the subset of it that is read: it goes on from phase to phase as long as that subset
is the same, and a new subset starts at its beginning. Nothing here has state, so that seeking costs nothing and any
number of hosts, each reading its own rows, sees the same global batch.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import grain
import numpy as np

from crystal_jax.config import DOMAINS, Config, Subset, digest
from crystal_jax.data.fim import Fim
from crystal_jax.data.schedule import Interleave, Permutation
from crystal_jax.data.store import TokenStore, TokenView
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError
from crystal_jax.phases import Plan, make_plan

Batch = dict[str, np.ndarray]
"""inputs, targets int32 [B, T]; mask float32 [B, T]; source int32 [B], an index into the sorted source names."""

EPOCH_TOLERANCE = 1.01
"""Documents split over windows and rounding make a stated number of epochs exact to about a percent."""


@dataclass(frozen=True)
class Reading:
    """A source as one phase reads it."""

    name: str
    index: int
    """Into the sorted source names."""
    view: TokenView
    rows: int
    """Windows of sequence_length + 1 tokens that overlap by one."""
    cursor: int
    """Rows of this source and subset that earlier phases have read."""
    key: tuple[str, ...]
    """Names the source and subset in random keys."""


class Stores:
    """The token stores of a config, opened and checked against its tokenizer.

    Raises:
      UserError: a missing store or tokenizer, or a store that another tokenizer made.
    """

    def __init__(self, config: Config):
        root = Path(config.data.root)
        self.tokenizer = Tokenizer.load(root / config.data.tokenizer)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(f"config.model.vocab_size: {config.model.vocab_size} is less than the "
                            f"{self.tokenizer.vocab_size} ids of {self.tokenizer.path}")
        used = {name for phase in config.phases for name in phase.mix}
        self.by_source: dict[str, TokenStore] = {}
        for name in sorted(used):
            store = TokenStore.open(root / config.sources[name].store)
            if store.tokenizer_fingerprint != self.tokenizer.fingerprint:
                raise UserError(f"{store.path}: made by tokenizer {store.tokenizer_fingerprint}, but "
                                f"{self.tokenizer.path} is {self.tokenizer.fingerprint}; set config.data.tokenizer to "
                                "the one it was made with, or prepare the store again")
            self.by_source[name] = store

    def fingerprints(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.fingerprint,
                **{f"store.{name}": store.fingerprint for name, store in self.by_source.items()}}


class Batches:
    """Random access to the batches of a run: `batches[step]` gives this process's rows of the update at `step`.

    Raises:
      UserError: a subset too short for one sequence, or a phase that would read a source more often than it states.
    """

    def __init__(self, config: Config, stores: Stores, process: int = 0, processes: int = 1):
        self.config, self.plan = config, make_plan(config)
        self.length = config.data.sequence_length
        self.process, self.processes = process, processes
        self.fim = Fim(stores.tokenizer, config.data.fim_mode if _has_fim(config) else "none")
        self.interleaves = [Interleave.make(placed.quotas) for placed in self.plan.phases]
        self.readings = _readings(config, self.plan, stores)

    def __len__(self) -> int:
        return self.plan.total_steps

    def __repr__(self) -> str:
        return f"Batches({self.config.name}, steps={len(self)})"

    def __getitem__(self, step: int) -> Batch:
        placed, phase_step = self.plan.at(step)
        size = placed.phase.global_batch_size
        share = size // self.processes
        first = phase_step * size + self.process * share
        source, ordinal = self.interleaves[placed.index].locate(np.arange(first, first + share))
        tokens = np.empty((share, self.length + 1), np.int32)
        mask = np.ones((share, self.length), np.float32)
        index = np.empty(share, np.int32)
        for i, name in enumerate(self.interleaves[placed.index].names):
            chosen = np.flatnonzero(source == i)
            if not chosen.size:
                continue
            reading = self.readings[placed.index][name]
            epoch, row = self.rows(reading, ordinal[chosen])
            tokens[chosen] = reading.view.rows(row * self.length, self.length + 1)
            index[chosen] = reading.index
            rate = placed.phase.fim_rate.get(name, 0.0)
            if rate and self.config.data.fim_mode != "none":
                for at, e, r in zip(chosen, epoch, row, strict=True):
                    rng = self._generator("fim", *reading.key, int(e), int(r))
                    tokens[at], kept = self.fim.apply(tokens[at], rng, rate, placed.phase.spm_rate)
                    mask[at] = kept[1:]
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, "source": index}

    def rows(self, reading: Reading, ordinal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row of the view) of a phase's ordinals: every row once an epoch, each epoch in its own order."""
        epoch, place = np.divmod(reading.cursor + ordinal, reading.rows)
        row = np.empty_like(place)
        for e in np.unique(epoch):
            inside = epoch == e
            row[inside] = _permutation(reading.rows, (self.config.data.seed, *reading.key, int(e)))(place[inside])
        return epoch, row

    def counts(self, step: int) -> dict[str, int]:
        """Sequences that each source has given to the first `step` updates of the run."""
        total = dict.fromkeys(sorted(self.config.sources), 0)
        for placed, interleave in zip(self.plan.phases, self.interleaves, strict=True):
            done = min(max(step - placed.start, 0), placed.steps) * placed.phase.global_batch_size
            for name, count in interleave.counts(done).items():
                total[name] += count
        return total

    def _generator(self, *key: object) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(int(digest([self.config.data.seed, *map(str, key)]), 16)))

    def iterate(self, start: int) -> Iterator[Batch]:
        """The batches from `start` on, read ahead by grain in a thread."""
        dataset = grain.MapDataset.source(self)[start:]
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


@lru_cache(maxsize=256)
def _permutation(rows: int, key: tuple[object, ...]) -> Permutation:
    return Permutation(rows, key)


def _has_fim(config: Config) -> bool:
    return any(rate > 0 for phase in config.phases for rate in phase.fim_rate.values())


def _readings(config: Config, plan: Plan, stores: Stores) -> list[dict[str, Reading]]:
    cursors: dict[tuple[str, ...], int] = {}
    names = sorted(config.sources)
    result = []
    for placed in plan.phases:
        readings = {}
        for name, quota in placed.quotas.items():
            subset = placed.phase.subset.get(name, Subset())
            key = (name, *map(str, dataclasses.astuple(subset)))
            path = f"config.phases[{placed.index}]"
            try:
                view = stores.by_source[name].view("train", subset.files, subset.first)
            except UserError as error:
                raise UserError(f"{path}.subset.{name}: {error} (a store has a file per input: one made from a single "
                                "file has no odd one)") from error
            rows = (view.num_tokens - 1) // config.data.sequence_length
            if rows < 1:
                raise UserError(f"{path}.subset.{name}: {view.num_tokens} tokens of {stores.by_source[name].path} are "
                                f"less than one sequence of {config.data.sequence_length}; read more of it")
            stated = placed.phase.epochs.get(name)
            if stated is not None and quota > stated * rows * EPOCH_TOLERANCE:
                raise UserError(f"{path}.epochs.{name}: the mix reads {quota / rows:.3g} epochs of "
                                f"{stores.by_source[name].path}, more than the {stated:g} stated; lower its share, "
                                "shorten the phase, or state more epochs")
            readings[name] = Reading(name, names.index(name), view, rows, cursors.get(key, 0), key)
            cursors[key] = cursors.get(key, 0) + quota
        result.append(readings)
    return result


def heldout(config: Config, stores: Stores) -> dict[str, np.ndarray]:
    """Domain to int32 [n, T + 1] held-out windows, n <= eval_sequences, spread evenly over the domain's stores."""
    length, result = config.data.sequence_length, {}
    for domain in DOMAINS:
        found = {store.path: store for name, store in stores.by_source.items() if config.sources[name].domain == domain}
        views = [store.view("heldout") for _, store in sorted(found.items()) if store.splits["heldout"]["tokens"]]
        counts = [max(view.num_tokens - 1, 0) // length for view in views]
        total = sum(counts)
        if not total:
            continue
        chosen = np.unique(np.linspace(0, total - 1, min(total, config.training.eval_sequences)).astype(np.int64))
        first, rows = 0, []
        for view, count in zip(views, counts, strict=True):
            inside = chosen[(chosen >= first) & (chosen < first + count)] - first
            if inside.size:
                rows.append(view.rows(inside * length, length + 1))
            first += count
        result[domain] = np.concatenate(rows)
    return result
