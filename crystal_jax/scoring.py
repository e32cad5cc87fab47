"""Log-probabilities of continuations, many at a time: contexts are shared, rows packed, shapes few.

Continuations of one context lie behind it in one row, as branches that don't see each other; a continuation of one
token costs nothing, since the context's last position predicts it. Only log-probabilities leave the device.
Invariant: a score doesn't depend on what is asked beside it, beyond rounding.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from crystal_jax import sharding
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, Params

LEAST_ROW = 128
"""Tokens."""
BATCH_TOKENS = 4096
CHUNK = 64
"""Targets of a row whose logits exist at one time."""
OPEN_ROWS = 64
"""Rows that a piece may still be put into."""

Ids = tuple[int, ...]


class Query(NamedTuple):
    context: Ids
    """At least one token; of one that is too long for the model, the end counts."""
    continuation: Ids


class Score(NamedTuple):
    logprob: float
    """Natural, of the whole continuation."""
    greedy: bool
    """Whether each of its tokens is the most probable one."""


@dataclass
class Piece:
    """A context and some of its continuations, as a row holds them."""

    context: Ids
    branches: list[tuple[int, Ids]] = field(default_factory=list)
    """(index of the query, continuation)."""

    @property
    def size(self) -> int:
        return len(self.context) + sum(len(ids) - 1 for _, ids in self.branches)

    @property
    def targets(self) -> int:
        return sum(len(ids) for _, ids in self.branches)


@dataclass
class Row:
    length: int
    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    targets: int = 0

    def takes(self, piece: Piece) -> bool:
        return max(self.size + piece.size, self.targets + piece.targets) <= self.length

    def put(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.size += piece.size
        self.targets += piece.targets


class Scorer:
    """Scores queries with a model whose parameters are given; call it inside `jax.set_mesh` for several devices."""

    def __init__(self, model: Crystal, params: Params, batch_tokens: int = BATCH_TOKENS):
        self.model, self.params, self.batch_tokens = model, params, batch_tokens
        self.computed = 0
        """Positions computed so far, with those that only fill up rows and batches."""
        self.cut = 0
        """Contexts that were too long for the model so far."""

    def __call__(self, queries: Sequence[Query], progress: bool = False) -> list[Score]:
        """The score of each query.

        Raises:
          UserError: an empty context or continuation, or a continuation longer than the model's context.
        """
        logprobs: list[list[np.ndarray]] = [[] for _ in queries]
        greedy = [True] * len(queries)
        rows = pack(self._pieces(queries), self.model.config.max_length)
        with tqdm(total=len(queries), unit="request", disable=None if progress else True) as bar:
            for batch in self._batches(rows):
                found, most_probable = self._run(batch)
                for number, row in enumerate(batch):
                    at = 0
                    for piece in row.pieces:
                        for index, ids in piece.branches:
                            logprobs[index].append(found[number, at : at + len(ids)])
                            greedy[index] &= bool(most_probable[number, at : at + len(ids)].all())
                            at += len(ids)
                        bar.update(len(piece.branches))
        return [Score(math.fsum(np.concatenate(parts).tolist()), best)
                for parts, best in zip(logprobs, greedy, strict=True)]

    def _pieces(self, queries: Sequence[Query]) -> list[Piece]:
        """Each context once, with as many of its continuations as fit the model's context."""
        room = self.model.config.max_length
        by_context: dict[Ids, list[tuple[int, Ids]]] = defaultdict(list)
        for index, (context, continuation) in enumerate(queries):
            if not context or not continuation:
                raise UserError(f"request {index}: its {'context' if not context else 'continuation'} has no token; "
                                "both need one or more")
            left = room - (len(continuation) - 1)
            if left < 1:
                raise UserError(f"request {index}: a continuation of {len(continuation)} tokens doesn't fit the "
                                f"model's context of {room}; shorten it")
            self.cut += len(context) > left
            by_context[tuple(context[-left:])].append((index, tuple(continuation)))
        pieces = []
        for context, branches in by_context.items():
            row = Piece(context)
            for branch in branches:
                if row.branches and max(row.size + len(branch[1]) - 1, row.targets + len(branch[1])) > room:
                    pieces.append(row)
                    row = Piece(context)
                row.branches.append(branch)
            pieces.append(row)
        return pieces

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        by_length: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_length[row.length].append(row)
        for length, same in sorted(by_length.items()):
            count = self._rows_of(length)
            for first in range(0, len(same), count):
                yield same[first : first + count]

    def _rows_of(self, length: int) -> int:
        """Of a batch: a multiple of the ways in which the mesh splits one."""
        ways = sharding.batch_ways()
        return max(self.batch_tokens // length // ways, 1) * ways

    def _run(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """(log-probability, whether it is the greatest) [rows, T] of each target, by pieces, then branches."""
        length = rows[0].length
        batch = np.zeros((6, self._rows_of(length), length), np.int32)
        for number, row in enumerate(rows):
            fill(batch[:, number], row)
        self.computed += batch[0].size
        chunks = -(-max(row.targets for row in rows) // CHUNK)
        layout = sharding.used("batch", "length") or P()
        mesh = jax.sharding.get_mesh()
        placed = [batch[i] if mesh.empty else jax.device_put(batch[i], jax.NamedSharding(mesh, layout))
                  for i in range(6)]
        found = _score(self.model, self.params, placed, np.int32(chunks))
        return jax.device_get(found)


def row_length(tokens: int, longest: int) -> int:
    """The shortest kind of row for so many tokens: LEAST_ROW, then four kinds to each doubling, up to `longest`."""
    if tokens <= LEAST_ROW:
        return min(LEAST_ROW, longest)
    step = (LEAST_ROW << ((tokens - 1) // LEAST_ROW).bit_length() - 1) // 4
    return min(-(-tokens // step) * step, longest)


def pack(pieces: list[Piece], longest: int) -> list[Row]:
    """Pieces in rows, each in the shortest kind of row that holds it: first fit, the largest first."""
    rows: list[Row] = []
    open_rows: dict[int, list[Row]] = defaultdict(list)
    for piece in sorted(pieces, key=lambda piece: -max(piece.size, piece.targets)):
        length = row_length(max(piece.size, piece.targets), longest)
        row = next((row for row in open_rows[length] if row.takes(piece)), None)
        if row is None:
            row = Row(length)
            rows.append(row)
            open_rows[length] = [*open_rows[length][-OPEN_ROWS + 1 :], row]
        row.put(piece)
    return rows


def fill(arrays: np.ndarray, row: Row) -> None:
    """Writes a row into (ids, positions, segment, branch, where each target is predicted, targets), each int32 [T].

    What is left over is of segment 0 and sees itself.
    """
    ids, positions, segments, branches, queries, targets = arrays
    at = target_at = 0
    for segment, piece in enumerate(row.pieces, start=1):
        start, stem = at, len(piece.context)
        ids[at : at + stem], positions[at : at + stem] = piece.context, np.arange(stem)
        at += stem
        for branch, (_, continuation) in enumerate(piece.branches, start=1):
            rest = len(continuation) - 1
            ids[at : at + rest] = continuation[:-1]
            positions[at : at + rest] = stem + np.arange(rest)
            branches[at : at + rest] = branch
            targets[target_at : target_at + rest + 1] = continuation
            queries[target_at : target_at + rest + 1] = [start + stem - 1, *range(at, at + rest)]
            at, target_at = at + rest, target_at + rest + 1
        segments[start:at] = segment


@partial(jax.jit, static_argnums=0)
def _score(model: Crystal, params: Params, batch: list[jax.Array], chunks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability and whether it is the greatest, [B, T] each, of the targets in the first `chunks` chunks."""
    ids_BT, positions_BT, segments_BT, branches_BT, queries_BT, targets_BT = batch
    bound, (B, T) = model.bind(params), ids_BT.shape
    hidden_BTD = bound.hidden(ids_BT, positions_BT, segments_BT, branches_BT)
    layout = sharding.used("batch", "length", "embed")
    size = min(CHUNK, T)

    def chunk(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(number * size, T - size)
        queries_BC = jax.lax.dynamic_slice_in_dim(queries_BT, start, size, axis=1)
        targets_BC = jax.lax.dynamic_slice_in_dim(targets_BT, start, size, axis=1)
        picked_BCD = hidden_BTD.at[jnp.arange(B)[:, None], queries_BC].get(out_sharding=layout)
        logits_BCV = sharding.lay(bound.logits(picked_BCD), "batch", None, None)
        index_V = jnp.arange(logits_BCV.shape[-1])
        target_BC = jnp.sum(jnp.where(index_V[None, None, :] == targets_BC[..., None], logits_BCV, 0), axis=-1)
        logprob_BC = target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        best_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return write(found[0], logprob_BC), write(found[1], best_BC)

    layout_BT = sharding.used("batch", "length")
    wide = jnp.promote_types(model.dtype, jnp.float32)
    nothing = (jnp.zeros((B, T), wide, out_sharding=layout_BT), jnp.zeros((B, T), bool, out_sharding=layout_BT))
    return jax.lax.fori_loop(0, chunks, chunk, nothing)
