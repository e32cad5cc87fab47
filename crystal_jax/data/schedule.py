"""Which sequence of which source stands at which position: exact, in closed form, without state.

A phase of steps * batch positions is dealt out by quotas: at every prefix each source has given its share, of up to
11 sources to within two sequences, and at the phase's end its quota exactly. Position -> (source, ordinal), its inverse
and the counts are all O(sources). Each epoch of a source is read in an order of its own, by a permutation that is
computed, not stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crystal_jax.config import digest
from crystal_jax.phases import dealing_order, dealt, share


@dataclass(frozen=True)
class Interleave:
    """The order of sources within a phase.

    The largest source is spread evenly over all positions, the next over the positions that are left, and so on: a
    chain of rounded shares. With the largest first, rounding errors shrink along the chain: with n sources they stay
    within (1 + 1 + 1/2 + ... + 1/(n-1)) / 2 sequences.
    """

    names: tuple[str, ...]
    quotas: tuple[int, ...]
    """In descending order."""

    @classmethod
    def make(cls, quotas: dict[str, int]) -> "Interleave":
        names = dealing_order(quotas)
        return cls(tuple(names), tuple(quotas[name] for name in names))

    @property
    def length(self) -> int:
        return sum(self.quotas)

    def counts(self, position: int) -> dict[str, int]:
        """Sequences that each source has given before `position`."""
        return dealt(dict(zip(self.names, self.quotas, strict=True)), position)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into `names`, ordinal within the source's quota), int64, for positions [n] of the phase."""
        left = np.asarray(positions, np.int64)
        assert left.size == 0 or (0 <= left.min() and left.max() < self.length), "positions lie inside the phase"
        source, ordinal = np.full(left.shape, -1), np.zeros(left.shape, np.int64)
        total = self.length
        for index, quota in enumerate(self.quotas):
            before = share(left, quota, total)
            chosen = (source < 0) & (share(left + 1, quota, total) > before)
            source[chosen], ordinal[chosen] = index, before[chosen]
            left, total = left - before, total - quota
        return source, ordinal

    def position(self, name: str, ordinal: int) -> int:
        """The inverse of `locate`."""
        index = self.names.index(name)
        assert 0 <= ordinal < self.quotas[index], "the ordinal lies within the source's quota"
        totals = [sum(self.quotas[i:]) for i in range(index + 1)]
        place = _nth(ordinal, self.quotas[index], totals[index])
        for i in reversed(range(index)):
            # The place-th position that is left over is the one before which `place` are left over.
            place = _nth(place, totals[i] - self.quotas[i], totals[i], rounded_up=False)
        return place


def _nth(ordinal: int, quota: int, total: int, rounded_up: bool = True) -> int:
    """The place at which the quota's `ordinal`-th (or, of the rest, the rest's) sequence stands."""
    half = total // 2 if rounded_up else (total - 1) - total // 2
    # The smallest k with (k * quota + half) // total == ordinal + 1, less one.
    return -((half - (ordinal + 1) * total) // quota) - 1


class Permutation:
    """A pseudo-random bijection of range(n), its own for every key: a Feistel network that walks its cycles.

    Time and memory don't depend on n, and the inverse is as cheap: `inspect` finds the step that saw a document.
    """

    ROUNDS = 6

    def __init__(self, n: int, key: Sequence[object]):
        assert n > 0
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << self._half) - 1)
        seed = int(digest(["permutation", *map(str, key)]), 16)
        self._keys = np.random.Generator(np.random.Philox(seed)).integers(0, 1 << 64, self.ROUNDS, np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """int64 [m] in range(n) to their images."""
        return self._walk(index, self._keys, self._encrypt)

    def inverse(self, image: np.ndarray) -> np.ndarray:
        return self._walk(image, self._keys[::-1], self._decrypt)

    def _walk(self, index: np.ndarray, keys: np.ndarray, step) -> np.ndarray:
        value = step(np.asarray(index).astype(np.uint64), keys)
        # The network permutes a power of four below 4n: on average fewer than four turns lead back into range.
        while (outside := np.flatnonzero(value >= self.n)).size:
            value[outside] = step(value[outside], keys)
        return value.astype(np.int64)

    def _encrypt(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        left, right = value >> half, value & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << half) | right

    def _decrypt(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        left, right = value >> half, value & self._mask
        for key in keys:
            left, right = right ^ (_mix(left + key) & self._mask), left
        return (left << half) | right


class Unshuffled:
    """The permutation that leaves all where it is."""

    def __call__(self, index: np.ndarray) -> np.ndarray:
        return np.asarray(index, np.int64)

    inverse = __call__


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
