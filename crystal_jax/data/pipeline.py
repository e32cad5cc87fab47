"""From token stores to batches: every batch is a pure function of (recipe, stores, seed, step).

A cursor belongs to a source and the subset of it that is read: it goes on from phase to phase as long as that subset
is the same, and a new subset starts at its beginning. Nothing here has state, so that seeking costs nothing and any
number of hosts, each reading its own rows, sees the same global batch.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from crystal_jax import files
from crystal_jax.config import DOMAINS, Config, Subset, digest
from crystal_jax.data.fim import Fim
from crystal_jax.data.packing import read_plan
from crystal_jax.data.rows import Rows, make_rows, segments
from crystal_jax.data.schedule import Interleave, Permutation, Unshuffled
from crystal_jax.data.store import TokenStore
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError
from crystal_jax.phases import Era, Segment, make_plan

Batch = dict[str, np.ndarray]
"""inputs, targets int32 [B, T]; mask float32 [B, T]; source int32 [B], an index into the sorted source names; with a
document mask also segment_ids and positions, int32 [B, T]."""

EPOCH_TOLERANCE = 1.01
"""Documents split over windows and rounding make a stated number of epochs exact to about a percent."""


@dataclass(frozen=True)
class Reading:
    """A source as one segment of the run reads it."""

    name: str
    index: int
    """Into the sorted source names."""
    key: tuple[str, ...]
    """Names the source and what is read of it in random keys; readings of one key share a cursor."""
    cursor: int
    """Rows that earlier segments have read, and those that were passed over, under this key."""
    dealt: int
    """Rows of the segment's deal that were dealt out before the segment."""
    store: TokenStore | None
    rows: Rows | None
    """None where the store was replaced or removed since: what this segment read is no longer there."""
    subset: Subset


@dataclass(frozen=True)
class Draw:
    """A row of a global batch: where it comes from."""

    slot: int
    """Of the batch."""
    reading: Reading
    epoch: int
    row: int
    """Of reading.rows."""
    fim_rate: float
    spm_rate: float

    @property
    def source(self) -> str:
        return self.reading.name


class Stores:
    """The token stores of a config, opened and checked against its tokenizer; and those that only `eras` have read.

    Raises:
      UserError: a missing store or tokenizer, or a store that another tokenizer made.
    """

    def __init__(self, config: Config, eras: Sequence[Era] = ()):
        self._config = config
        root = files.as_path(config.data.root)
        self.tokenizer = Tokenizer.load(root / config.data.tokenizer)
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(f"config.model.vocab_size: {config.model.vocab_size} is less than the "
                            f"{self.tokenizer.vocab_size} ids of {self.tokenizer.path}")
        self._present = sorted({name for phase in config.phases for name in phase.mix})
        self.by_source: dict[str, TokenStore] = {}
        self._fingerprints: dict[str, str] = {}
        for name in self._present:
            self._open(name, root)
        past = {name for era in eras for phase in era.config.phases for name in phase.mix} & set(config.sources)
        for name in sorted(past - set(self._present)):
            with contextlib.suppress(UserError):  # nothing more is read from it; it may be gone
                self._open(name, root)

    def _open(self, name: str, root: Path) -> None:
        data = self._config.data
        store = TokenStore.open(root / self._config.sources[name].store, data.check_blocks)
        if store.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise UserError(f"{store.path}: made by tokenizer {store.tokenizer_fingerprint}, but {self.tokenizer.path} "
                            f"is {self.tokenizer.fingerprint}; set config.data.tokenizer to the one it was made with, "
                            "or prepare the store again")
        fingerprint = store.fingerprint
        if data.packing == "best_fit":
            fingerprint = digest([fingerprint, read_plan(store, data.sequence_length)["digest"]])
        self.by_source[name], self._fingerprints[name] = store, fingerprint

    def fingerprint(self, name: str) -> str | None:
        """Of all that decides which tokens a row of a source holds; None for a store that isn't there any more."""
        return self._fingerprints.get(name)

    def fingerprints(self) -> dict[str, str]:
        """Of the tokenizer and of each source that the present recipe reads."""
        return {"tokenizer": self.tokenizer.fingerprint,
                **{f"store.{name}": self._fingerprints[name] for name in self._present}}


class Batches:
    """Random access to the batches of a run: `batches[step]` gives this process's rows of the update at `step`.

    These are `slots(B)` of a global batch of B. `eras` are the recipes that the run followed before this config, if it
    was amended.

    Raises:
      UserError: a subset too short for one sequence, or a phase that would read a source more often than it states.
    """

    def __init__(self, config: Config, stores: Stores, slots: Callable[[int], np.ndarray] = np.arange,
                 eras: Sequence[Era] = ()):
        self.config, self.plan = config, make_plan(config, eras)
        self.length = config.data.sequence_length
        self.slots = slots
        self._tokenizer = stores.tokenizer
        recipes = [*(era.config for era in eras), config]
        self._document_mask = [recipe.data.document_mask for recipe in recipes]
        self._fim = [Fim(stores.tokenizer, recipe.data.fim_mode if _has_fim(recipe) else "none") for recipe in recipes]
        self._interleaves = [Interleave.make(segment.quotas) for segment in self.plan.segments]
        names = sorted({name for recipe in recipes for name in recipe.sources})
        if names != sorted(config.sources):
            lost = sorted(set(names) - set(config.sources))
            raise UserError(f"config.sources.{lost[0]}: left out, but the run has read from it; leave it there")
        self.readings = _readings(recipes, self.plan.segments, stores, eras)

    def __len__(self) -> int:
        return self.plan.total_steps

    def __repr__(self) -> str:
        return f"Batches({self.config.name}, steps={len(self)})"

    def __getitem__(self, step: int) -> Batch:
        _, segment = self._segment(step)
        slots = self.slots(segment.phase.global_batch_size)
        tokens = np.empty((slots.size, self.length + 1), np.int32)
        mask = np.ones((slots.size, self.length), np.float32)
        source = np.empty(slots.size, np.int32)
        for reading, chosen, epoch, row in self._groups(step, slots):
            tokens[chosen], kept = self._rows(reading, step).read(row)
            rate = segment.phase.fim_rate.get(reading.name, 0.0)
            if rate:
                kept = np.ones((len(row), self.length + 1), bool) if kept is None else kept
                for i, at in enumerate(chosen):
                    rng = self._generator("fim", *reading.key, int(epoch[i]), int(row[i]))
                    tokens[at], kept[i] = self._fim[segment.era].apply(
                        tokens[at], rng, rate, segment.phase.spm_rate, kept[i])
            if kept is not None:
                mask[chosen] = kept[:, 1:]
            source[chosen] = reading.index
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, "source": source}
        if self._document_mask[segment.era]:
            ids = self._tokenizer
            batch["segment_ids"], batch["positions"] = segments(batch["inputs"], ids.bos_id, ids.eos_id)
        return batch

    def draws(self, step: int) -> list[Draw]:
        """Where each row of the global batch at `step` comes from, in the order of its slots."""
        _, segment = self._segment(step)
        phase = segment.phase
        found = [Draw(int(slot), reading, int(epoch), int(row), phase.fim_rate.get(reading.name, 0.0), phase.spm_rate)
                 for reading, slots, epochs, rows in self._groups(step, np.arange(phase.global_batch_size))
                 for slot, epoch, row in zip(slots, epochs, rows, strict=True)]
        return sorted(found, key=lambda draw: draw.slot)

    def steps_of(self, reading: Reading, row: int) -> list[tuple[int, int, int]]:
        """(step, slot, epoch) of each time that the run reads a row of a reading's key, in order."""
        found = []
        for segment, interleave, readings in zip(self.plan.segments, self._interleaves, self.readings, strict=True):
            own = readings.get(reading.name)
            if own is None or own.key != reading.key or own.rows is None:
                continue
            end = own.cursor + segment.given(segment.end)[own.name]
            size = own.rows.num_rows
            for epoch in range(own.cursor // size, -(-end // size)):
                place = epoch * size + int(self._permutation(own, epoch).inverse(np.array([row]))[0])
                if own.cursor <= place < end:
                    step, slot = divmod(interleave.position(own.name, place - own.cursor + own.dealt),
                                        segment.phase.global_batch_size)
                    found.append((segment.start + step - segment.begun, slot, epoch))
        return found

    def counts(self, step: int) -> dict[str, int]:
        """Sequences that each source has given to the first `step` updates of the run."""
        return {**dict.fromkeys(sorted(self.config.sources), 0), **self.plan.counts(step)}

    def iterate(self, start: int) -> Iterator[Batch]:
        """The batches from `start` on, read ahead by grain in a thread."""
        import grain  # with JAX behind it, half a second that `inspect` needn't wait for

        dataset = grain.MapDataset.source(self)[start:]
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def _segment(self, step: int) -> tuple[int, Segment]:
        return next((number, segment) for number, segment in enumerate(self.plan.segments)
                    if segment.start <= step < segment.end)

    def _groups(self, step: int, slots: np.ndarray) -> Iterator[tuple[Reading, np.ndarray, np.ndarray, np.ndarray]]:
        """(reading, indices into `slots`, epochs, rows) of each source that the batch at `step` has rows of."""
        number, segment = self._segment(step)
        interleave = self._interleaves[number]
        source, ordinal = interleave.locate(
            (segment.begun + step - segment.start) * segment.phase.global_batch_size + slots)
        for i, name in enumerate(interleave.names):
            chosen = np.flatnonzero(source == i)
            if chosen.size:
                reading = self.readings[number][name]
                yield reading, chosen, *self._places(reading, ordinal[chosen] - reading.dealt, step)

    def _places(self, reading: Reading, ordinal: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row) of a segment's ordinals: every row once an epoch, each epoch in its own order."""
        epoch, place = np.divmod(reading.cursor + ordinal, self._rows(reading, step).num_rows)
        row = np.empty_like(place)
        for e in np.unique(epoch):
            inside = epoch == e
            row[inside] = self._permutation(reading, int(e))(place[inside])
        return epoch, row

    def _permutation(self, reading: Reading, epoch: int) -> Permutation | Unshuffled:
        assert reading.rows is not None
        if not self.config.data.shuffle:
            return Unshuffled()
        return _permutation(reading.rows.num_rows, (self.config.data.seed, *reading.key, epoch))

    def _rows(self, reading: Reading, step: int) -> Rows:
        if reading.rows is None:
            raise UserError(f"step {step}: read {reading.name} as it was before the run was amended; its store was "
                            "replaced or removed since")
        return reading.rows

    def _generator(self, *key: object) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(int(digest([self.config.data.seed, *map(str, key)]), 16)))


def hash_words(batch: Batch, slots: np.ndarray) -> np.ndarray:
    """uint32 [2]: the wrapping sum over rows of 8 bytes of BLAKE2b of a row and its slot in the global batch.

    What the processes find for their rows adds up to what one finds for all.
    """
    total = np.zeros(2, np.uint32)
    for i, slot in enumerate(slots):
        value = hashlib.blake2b(int(slot).to_bytes(8, "little"), digest_size=8)
        for name in ("inputs", "targets", "mask"):
            value.update(np.ascontiguousarray(batch[name][i]).data)
        total += np.frombuffer(value.digest(), ">u4").astype(np.uint32)
    return total


def hash_text(words: np.ndarray) -> str:
    """16 hex digits for what hash_words gives."""
    return "".join(f"{int(word):08x}" for word in words)


def batch_hash(batch: Batch) -> str:
    """16 hex digits that stand for the rows of a whole batch, in their order."""
    return hash_text(hash_words(batch, np.arange(len(batch["inputs"]))))


@lru_cache(maxsize=256)
def _permutation(rows: int, key: tuple[object, ...]) -> Permutation:
    return Permutation(rows, key)


def _has_fim(config: Config) -> bool:
    return any(rate > 0 for phase in config.phases for rate in phase.fim_rate.values())


def _readings(recipes: list[Config], segments: Sequence[Segment], stores: Stores,
              eras: Sequence[Era]) -> list[dict[str, Reading]]:
    """Per segment, each of its sources with the cursor that the segments before it have left."""
    cursors: dict[tuple[object, ...], int] = {}
    names = sorted(recipes[-1].sources)
    result = []
    for segment in segments:
        readings = {}
        config = recipes[segment.era]
        for name, given in segment.given(segment.end).items():
            subset = segment.phase.subset.get(name, Subset())
            key = (name, subset.files, str(subset.first), *([segment.phase.name] if subset.cursor == "fresh" else []))
            store, now = stores.by_source.get(name), stores.fingerprint(name)
            then = eras[segment.era].fingerprints[f"store.{name}"] if segment.era < len(eras) else now
            rows = _open_rows(config, segment, name, store) if store is not None and then == now else None
            cursor = cursors.get((key, then), 0) + segment.passed.get(name, 0)
            dealt = segment.stretch(-segment.begun, 0)[name]
            readings[name] = Reading(name, names.index(name), key, cursor, dealt, store, rows, subset)
            cursors[key, then] = cursor + given
        result.append(readings)
    return result


def _open_rows(config: Config, segment: Segment, name: str, store: TokenStore) -> Rows:
    subset = segment.phase.subset.get(name, Subset())
    path, length = f"config.phases[{segment.index}]", config.data.sequence_length
    try:
        rows = make_rows(store, "train", subset.files, subset.first, config.data.packing, length)
    except UserError as error:
        raise UserError(f"{path}.subset.{name}: {error}") from error
    if rows.num_rows < 1:
        raise UserError(f"{path}.subset.{name}: {store.path} has less than one sequence of {length} tokens there; read "
                        "more of it")
    stated, quota = segment.phase.epochs.get(name), segment.quotas[name]
    if stated is not None and quota > stated * rows.num_rows * EPOCH_TOLERANCE:
        raise UserError(f"{path}.epochs.{name}: the mix reads {quota / rows.num_rows:.3g} epochs of {store.path}, more "
                        f"than the {stated:g} stated; lower its share, shorten the phase, or state more epochs")
    return rows


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
