"""Which documents a sequence holds, and which sequences hold a document.

Nothing is recorded: a sequence is followed back through schedule, permutation and packing to tokens of a shard, a
document forward. Invariant: both ways name the same sequences, and the parts of a sequence, put together, are all its
tokens but the padding, as training got them. Tokens are counted from 0 and spans exclude their end; steps here are
those of `Batches`, from 0.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from crystal_jax.data.pipeline import Batch, Batches, Draw, Reading, Stores
from crystal_jax.data.store import SPLITS, Documents, Piece, TokenStore
from crystal_jax.errors import UserError

Span = tuple[int, int]


@dataclass(frozen=True)
class FimSpan:
    """A rearranged segment of a sequence."""

    order: str
    """PSM or SPM; with an empty prefix the two are the same tokens, called SPM here."""
    span: Span
    """In the sequence."""


@dataclass(frozen=True)
class Held:
    """What a row holds of one document."""

    document: str
    file: str
    shard: str
    in_shard: Span
    in_document: Span
    length: int
    """Tokens of the whole document."""


@dataclass(frozen=True)
class Part(Held):
    """What a sequence holds of one document, as training gets it."""

    in_sequence: Span
    """After FIM; empty where FIM has pushed the part out of the sequence."""
    predicted: int
    """Its tokens that are targets; the first of a sequence is none."""
    pushed_out: int
    """Bytes that FIM has pushed out of the sequence; <s> and </s> count as one, spaces as none."""
    fim: tuple[FimSpan, ...]
    text: str


@dataclass(frozen=True)
class Sequence:
    """A row of a global batch."""

    slot: int
    source: str
    epoch: int
    row: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Occurrence:
    """A document where it lies in a store."""

    store: TokenStore
    sources: tuple[str, ...]
    """Of the recipe, that read this store."""
    split: str
    shard: str
    file: str
    in_shard: Span


@dataclass(frozen=True)
class Visit:
    """A sequence that held something of a document."""

    step: int
    slot: int
    source: str
    epoch: int
    part: Part


class Provenance:
    """Follows the tokens of a run back to documents and forward to steps."""

    def __init__(self, batches: Batches, stores: Stores) -> None:
        self._batches, self._stores, self._tokenizer = batches, stores, stores.tokenizer
        pieces = [stores.tokenizer.piece_bytes(token) for token in range(stores.tokenizer.vocab_size)]
        # FIM adds and takes away spaces only: what else is missing was pushed out.
        self._bytes = np.array([len(piece.replace(b" ", b"")) for piece in pieces])
        self._bytes[[stores.tokenizer.bos_id, stores.tokenizer.eos_id]] = 1

    def sequences(self, step: int, batch: Batch, slots: list[int], chars: int | None) -> list[Sequence]:
        """Some sequences of the global batch at `step`, each with `chars` characters of every document, None for all.

        Raises:
          UserError: a store that was replaced since, or is damaged.
        """
        draws = self._batches.draws(step)
        draws = [draws[slot] for slot in slots]
        held = _held([(draw.reading, draw.row) for draw in draws])
        before = _before(draws)
        return [self._sequence(draw, held[i], before.get(i), _row(batch, draw.slot), chars)
                for i, draw in enumerate(draws)]

    def occurrences(self, identity: str) -> list[Occurrence]:
        """Every place of a document in the stores: each store, split and shard that has its id.

        Raises:
          UserError: no store has it: the stores that were searched, and an id that is like it.
        """
        stores = {store.path: store for store in self._stores.by_source.values()}
        shards = [(store, split, shard["name"]) for store in stores.values() for split in SPLITS
                  for shard in store.splits[split]["shards"]]
        found = []
        for store, split, shard in tqdm(shards, unit="shard", disable=None, leave=False):
            documents = store.documents(split, shard)
            for index in documents.find(identity):
                span = int(documents.ends[index - 1]) if index else 0, int(documents.ends[index])
                sources = tuple(name for name, other in self._stores.by_source.items() if other.path == store.path)
                found.append(Occurrence(store, sources, split, shard, documents.identity(index)[1], span))
        if not found:
            ids = (store.documents(split, shard).ids for store, split, shard in shards)
            raise UserError(f"--document={identity}: no document of {', '.join(map(str, stores))} has this id; "
                            f"the nearest: {_nearest(identity, ids)}")
        return found

    def is_read(self, found: Occurrence) -> bool:
        """Whether any phase may read from that place: it isn't held out, and in a file and share that is read."""
        return any(len(rows) for _, rows in self._rows_of(found))

    def visits(self, found: Occurrence) -> list[Visit]:
        """Each sequence of the run that holds a token of the document, in order."""
        visits = []
        for reading, rows in self._rows_of(found):
            held = _held([(reading, row) for row in rows.tolist()])
            for row, parts in zip(rows.tolist(), held, strict=True):
                for step, slot, epoch in self._batches.steps_of(reading, row):
                    sequence = self._alone(reading, row, parts, (step, slot, epoch))
                    visits += [Visit(step, slot, reading.name, epoch, part) for part in sequence.parts
                               if part.shard == found.shard and _overlap(part.in_shard, found.in_shard)
                               and part.in_sequence[0] < part.in_sequence[1]]
        return sorted(visits, key=lambda visit: (visit.step, visit.slot))

    def _rows_of(self, found: Occurrence) -> Iterator[tuple[Reading, np.ndarray]]:
        """Of each reading of the store, the rows that hold the document."""
        if found.split == "train":
            readings = {reading.key: reading for segment in self._batches.readings for reading in segment.values()
                        if reading.rows is not None and reading.store is not None
                        and reading.store.path == found.store.path}
            for reading in readings.values():
                assert reading.rows is not None
                yield reading, reading.rows.rows_of(found.shard, *found.in_shard)

    def _alone(self, reading: Reading, row: int, held: list[Held], at: tuple[int, int, int]) -> Sequence:
        """One sequence without the rest of its batch, as a process that trains on nothing else gets it."""
        step, slot, epoch = at
        phase = next(segment.phase for segment in self._batches.plan.segments if segment.start <= step < segment.end)
        process = copy.copy(self._batches)
        process.slots = lambda size: np.array([slot])
        draw = Draw(slot, reading, epoch, row, phase.fim_rate.get(reading.name, 0.0), phase.spm_rate)
        return self._sequence(draw, held, _before([draw]).get(0), _row(process[step], 0), 0)

    def _sequence(self, draw: Draw, held: list[Held], before: np.ndarray | None, got: tuple[np.ndarray, np.ndarray],
                  chars: int | None) -> Sequence:
        """before: int32 [T+1], the row without FIM, None if there is none; got: the row as training gets it."""
        after, targets = got
        before = after if before is None else before
        end = len(after) - _trailing(after, self._tokenizer.fim_pad_id)
        stops = np.cumsum([0] + [part.in_shard[1] - part.in_shard[0] for part in held])
        bounds = self._placed(stops, before, after, end).tolist()
        fim = list(self._fim_spans(before, after, end))
        parts = []
        for part, was, span in zip(held, pairwise(stops.tolist()), pairwise(bounds), strict=True):
            shown = after[slice(*span)]
            lost = int(self._bytes[before[slice(*was)]].sum() - self._bytes[shown].sum())
            # A character takes at most four tokens.
            text = self._tokenizer.decode_fragment(shown[: None if chars is None else 4 * chars].tolist())[:chars]
            inside = tuple(found for found in fim if span[0] <= found.span[0] < span[1])
            parts.append(Part(**vars(part), in_sequence=span, predicted=int(targets[slice(*span)].sum()),
                              pushed_out=max(lost, 0), fim=inside, text=text))
        return Sequence(draw.slot, draw.source, draw.epoch, draw.row, tuple(parts))

    def _marks(self, row: np.ndarray) -> np.ndarray:
        return np.flatnonzero((row == self._tokenizer.bos_id) | (row == self._tokenizer.eos_id))

    def _placed(self, bounds: np.ndarray, before: np.ndarray, after: np.ndarray, end: int) -> np.ndarray:
        """Where bounds of documents lie after FIM: it moves <s> and </s>, but neither adds nor removes one."""
        old, new = self._marks(before), self._marks(after)
        shifts = np.append(0, new - old[: len(new)])
        passed = np.searchsorted(old, bounds)
        placed = bounds + shifts[np.minimum(passed, len(new))]
        return np.where((passed > len(new)) | (bounds == len(before)), end, np.minimum(placed, end))

    def _fim_spans(self, before: np.ndarray, after: np.ndarray, end: int) -> Iterator[FimSpan]:
        old, new = self._marks(before), self._marks(after)
        starts = np.append(0, new + 1).tolist()
        for index, (start, stop) in enumerate(zip(starts, np.append(new, end).tolist(), strict=True)):
            was = int(old[index - 1]) + 1 if index else 0
            rearranged = start < stop and after[start] == self._tokenizer.fim_prefix_id
            if rearranged and before[was] != self._tokenizer.fim_prefix_id:
                spm = start + 1 < stop and after[start + 1] == self._tokenizer.fim_suffix_id
                yield FimSpan("SPM" if spm else "PSM", (start, stop))


def _nearest(wanted: str, shards: Iterable[list[str]]) -> str:
    """Of many ids, one that contains the wanted one, else its neighbours in alphabetical order."""
    below, above = [], []
    for ids in shards:
        if containing := next((one for one in ids if wanted in one), None):
            return containing
        below.append(max((one for one in ids if one < wanted), default=""))
        above.append(min((one for one in ids if one > wanted), default=""))
    return ", ".join(name for name in (max(below), min(filter(None, above), default="")) if name)


def _held(rows: list[tuple[Reading, int]]) -> list[list[Held]]:
    """For each row of a reading, what it holds, in order; each shard's list of documents is read once."""
    by_shard: dict[tuple[Any, str], list[tuple[TokenStore, int, int, Piece]]] = defaultdict(list)
    for number, (reading, row) in enumerate(rows):
        assert reading.rows is not None and reading.store is not None
        for place, piece in enumerate(reading.rows.pieces(row)):
            by_shard[reading.store.path, piece.shard].append((reading.store, number, place, piece))
    found: dict[tuple[int, int], list[Held]] = {}
    for wanted in by_shard.values():
        store, _, _, first = wanted[0]
        documents = store.documents("train", first.shard)
        for _, number, place, piece in wanted:
            found[number, place] = list(_documents_of(documents, piece))
    result: list[list[Held]] = [[] for _ in rows]
    for (number, _), held in sorted(found.items()):
        result[number] += held
    return result


def _documents_of(documents: Documents, piece: Piece) -> Iterator[Held]:
    """The documents that a piece of a shard holds tokens of."""
    ends = documents.ends
    start, stop = piece.start, piece.start + piece.length
    index = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin, end = int(ends[index - 1]) if index else 0, int(ends[index])
        until = min(end, stop)
        yield Held(*documents.identity(index), piece.shard, (start, until),
                   (start - begin, until - begin), end - begin)
        start, index = until, index + 1


def _before(draws: list[Draw]) -> dict[int, np.ndarray]:
    """The rows, int32 [T+1], of those draws that FIM may have changed, by their index."""
    by_reading: dict[int, list[int]] = defaultdict(list)
    for index, draw in enumerate(draws):
        if draw.fim_rate:
            by_reading[id(draw.reading)].append(index)
    result: dict[int, np.ndarray] = {}
    for indices in by_reading.values():
        rows = draws[indices[0]].reading.rows
        assert rows is not None
        result.update(zip(indices, rows.read(np.array([draws[index].row for index in indices]))[0], strict=True))
    return result


def _row(batch: Batch, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [T+1], targets bool [T+1]) of a batch's row."""
    tokens = np.append(batch["inputs"][index, :1], batch["targets"][index])
    return tokens, np.append(False, batch["mask"][index] > 0)


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _trailing(row: np.ndarray, token: int | None) -> int:
    """How often `token` stands at the end of a row."""
    others = np.flatnonzero(row != token) if token is not None else np.array([len(row) - 1])
    return len(row) - 1 - int(others[-1]) if len(others) else len(row)
