"""Tensors that are computed when they are asked for, some rows at a time: no more than a block is ever in memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from crystal_jax.errors import UserError

BLOCK = 2**19
"""Values at a time, 4 MiB in float64: with 2**21 the memory was fetched anew each time, writing took half longer."""


@dataclass(frozen=True)
class Computed:
    """A tensor by the function that makes its rows."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]
    """Its rows from start to stop: in float64, or in the parameters' dtype where they are only moved."""
    source: str = ""
    """The leaves that it is moved from, for messages."""

    @property
    def ranges(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of one block of rows after the other."""
        return self.split(0, self.shape[0])

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The same for a part of the rows."""
        step = max(1, BLOCK // math.prod(self.shape[1:]))
        return ((first, min(first + step, stop)) for first in range(start, stop, step))


@dataclass(frozen=True)
class Unrounded:
    """What slices like the tensor in its rows, in float32 whatever it is to be stored in."""

    tensor: Computed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if not isinstance(rows, slice):
            return np.concatenate([self[row : row + 1] for row in rows.tolist()])
        start, stop, _ = rows.indices(self.shape[0])
        found = np.empty((stop - start, *self.shape[1:]), np.float32)
        for first, last in self.tensor.split(start, stop):
            found[first - start : last - start] = self.tensor.rows(first, last)
        return found


def rounded(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Computed values as they are to be stored.

    Raises:
      UserError: a value that isn't finite, or not in `dtype`.
    """
    with np.errstate(over="ignore"):  # checked below
        cast = values.astype(dtype, copy=False)
    bad = cast.size - np.count_nonzero(np.isfinite(cast))
    if bad:
        beyond = f"beyond the range of {dtype.name}; use --dtype=bfloat16"
        why = beyond if np.isfinite(values).all() else "NaN or inf"
        raise UserError(f"{name}: {bad} of {cast.size} values are {why}")
    return cast
