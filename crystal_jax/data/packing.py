"""Best-fit packing: which pieces of documents share a row, planned once from their lengths, and the rows that follow.

A document of at most T + 1 tokens is never cut; a longer one is cut into pieces of T + 1 that overlap by one, so that
each target is predicted once. Invariant: a plan is a pure function of a store and T, whoever writes it, and is read
with that store only. Shards are planned one by one: a row holds pieces of one shard.

    packing/best_fit-T/           below the store
        manifest.json             written last: a folder without one isn't a plan
        train.rows, heldout.rows  uint64 [rows + 1]: row r has pieces [rows[r], rows[r + 1]); in order of the shards
        train.pieces, ...         uint64 [pieces, 2]: first token in the shard, number of tokens
"""

import contextlib
import fcntl
import hashlib
import mmap
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from etils import epath

from crystal_jax import files
from crystal_jax.config import digest
from crystal_jax.data.store import MANIFEST, SPLITS, Piece, TokenStore, read_digested
from crystal_jax.errors import UserError, reason

PARTS = ("rows", "pieces")


def cut(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths), int64 [pieces], of the pieces of documents that end at `ends`, none longer than length + 1."""
    ends = ends.astype(np.int64)
    sizes = np.diff(ends, prepend=0)
    counts = np.where(sizes > 0, np.maximum(-(-(sizes - 1) // length), 1), 0)
    document = np.repeat(np.arange(len(ends)), counts)
    starts = (ends - sizes)[document] + _counting(counts) * length
    return starts, np.minimum(ends[document] - starts, length + 1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [pieces]: the row of each piece, by descending length into the fullest row that has room.

    Rows are numbered by their longest pieces, in the order of the pieces: any run of rows is a fair sample of them.

    Pieces of one length are placed together, and rows are told apart by their free space alone: near linear.
    """
    order = np.argsort(capacity - lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    spaces: dict[int, list[list[int]]] = {}  # free space to lists of rows
    free = 0  # bit s is set where spaces[s] has rows
    row_of: list[int] = []
    rows = 0
    for size, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = free >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                found = spaces[space].pop()
                if not spaces[space]:
                    free ^= 1 << space
            else:
                space = capacity
                found = list(range(rows, rows - (-left // (capacity // size))))
                rows += len(found)
            # What is left in a row after its share is too small for this size: it can't become the fullest with room.
            share = space // size
            full, rest = divmod(left, share)
            full = min(full, len(found))
            rest = rest if full < len(found) else 0
            row_of += found[:full] if share == 1 else [row for row in found[:full] for _ in range(share)]
            row_of += found[full : full + 1] * rest
            left -= full * share + rest
            partly = full + (rest > 0)
            for again, some in ((space - share * size, found[:full]), (space - rest * size, found[full:partly]),
                                (space, found[partly:])):
                if again and some:
                    spaces.setdefault(again, []).append(some)
                    free |= 1 << again
    return _by_longest(np.array(row_of, np.int64), order, rows)


def _by_longest(placed: np.ndarray, order: np.ndarray, rows: int) -> np.ndarray:
    """int64 [pieces]: `placed`, the row of the pieces in `order`, with the rows numbered by their longest pieces."""
    longest = np.empty(rows, np.int64)
    longest[placed[::-1]] = order[::-1]  # the last one written is the first one placed
    number = np.empty(rows, np.int64)
    number[np.argsort(longest)] = np.arange(rows)
    result = np.empty(len(order), np.int64)
    result[order] = number[placed]
    return result


def plan_shard(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces in each row, int64 [rows]; pieces int64 [n, 2] of those rows: start and number of tokens) of a shard."""
    starts, lengths = cut(ends, length)
    row = best_fit(lengths, length + 1)
    order = np.argsort(row, kind="stable")
    return np.bincount(row), np.stack([starts[order], lengths[order]], axis=1)


def write_plan(store_path: str | Path, length: int, workers: int = 1,
               progress: Callable[[int], Any] = lambda documents: None) -> dict[str, Any]:
    """Plans the rows of length + 1 tokens of a store with `workers` processes and returns the plan's manifest.

    Does nothing where the plan is there already; a damaged one or another store's in its place is written anew.
    `progress` is told the number of documents of each shard. Nothing has its name before it is whole.

    Raises:
      UserError: no store there, a length below 1, a folder that can't be written.
    """
    if length < 1:
        raise UserError(f"--sequence_length: {length} must be 1 or more")
    store = TokenStore.open(store_path)
    folder = plan_folder(store, length)
    try:
        with _alone(folder.parent):
            with contextlib.suppress(UserError):
                return read_plan(store, length)
            return _write(store, folder, length, workers, progress)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error}); mend that and run the same command "
                        "again") from error


@contextlib.contextmanager
def _alone(parent: epath.Path) -> Iterator[None]:
    """Waits for other processes that plan in this folder, if it is local, and removes what a killed one left."""
    if files.is_remote(parent):
        yield
        return
    parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for leftover in Path(parent).glob(f"{files.PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _write(store: TokenStore, folder: epath.Path, length: int, workers: int,
           progress: Callable[[int], Any]) -> dict[str, Any]:
    with TemporaryDirectory(prefix=files.PARTIAL, dir=None if files.is_remote(folder) else folder.parent) as name:
        splits = {split: _write_split(store, split, length, workers, progress, Path(name)) for split in SPLITS}
        (folder / MANIFEST).unlink(missing_ok=True)  # no moment with another store's manifest and our files
        for split in SPLITS:
            for part in PARTS:
                files.publish(Path(name) / f"{split}.{part}", folder / f"{split}.{part}")
    manifest: dict[str, Any] = {"packing": "best_fit", "sequence_length": length, "store": store.fingerprint,
                                "splits": splits}
    manifest["digest"] = digest(manifest)
    files.write_json(folder / MANIFEST, manifest)
    return manifest


def _write_split(store: TokenStore, split: str, length: int, workers: int, progress: Callable[[int], Any],
                 folder: Path) -> dict[str, Any]:
    """Writes a split's files into a local folder and returns its part of the manifest."""
    rows, pieces, tokens = [], 0, 0
    entries = store.splits[split]["shards"]
    names = [entry["name"] for entry in entries]
    with ExitStack() as stack:
        writers = {part: stack.enter_context(open(folder / f"{split}.{part}", "wb")) for part in PARTS}
        sha256 = {part: hashlib.sha256() for part in PARTS}

        def write(part: str, numbers: np.ndarray) -> None:
            data = numbers.astype("<u8").tobytes()
            writers[part].write(data)
            sha256[part].update(data)

        write("rows", np.zeros(1))
        plan = partial(_plan_named, store.path, split, length)
        for entry, (counts, found) in zip(entries, _mapped(plan, names, workers, stack), strict=True):
            write("rows", pieces + np.cumsum(counts))
            write("pieces", found)
            rows.append(len(counts))
            pieces, tokens = pieces + len(found), tokens + int(found[:, 1].sum())
            progress(entry["documents"])
        for file in writers.values():
            file.flush()
            os.fsync(file.fileno())
    padding = sum(rows) * (length + 1) - tokens
    return {"rows": sum(rows), "pieces": pieces, "padding": padding,
            "padding_share": padding / max(sum(rows) * (length + 1), 1), "rows_per_shard": rows,
            "sha256": {part: value.hexdigest() for part, value in sha256.items()}}


def _mapped(function: Callable[[str], Any], names: list[str], workers: int, stack: ExitStack) -> Iterator[Any]:
    """`function` of each name, in order, by several processes if that pays."""
    if min(workers, len(names)) <= 1:
        return map(function, names)
    pool = ProcessPoolExecutor(min(workers, len(names)), multiprocessing.get_context("spawn"))
    return stack.enter_context(pool).map(function, names, chunksize=-(-len(names) // (16 * workers)))


def _plan_named(path: epath.Path, split: str, length: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the ends alone: a plan needs no names of documents."""
    return plan_shard(np.frombuffer(files.read_bytes(path / split / f"{name}.ends"), "<u8"), length)


def plan_folder(store: TokenStore, length: int) -> epath.Path:
    return files.as_path(store.path) / "packing" / f"best_fit-{length}"


def read_plan(store: TokenStore, length: int) -> dict[str, Any]:
    """The manifest of a store's plan for rows of length + 1 tokens, after a look at the sizes of its files.

    Raises:
      UserError: no plan, a damaged one, or another store's.
    """
    folder = plan_folder(store, length)
    way_out = (f"run this store's `prepare` command again with --packing=best_fit --sequence_length={length}, which "
               "only adds the plan")
    manifest = read_digested(folder / MANIFEST, f"{folder}: no plan of best_fit packing; {way_out}", way_out)
    if manifest["store"] != store.fingerprint:
        raise UserError(f"{folder}: planned for store {manifest['store']}, but {store.path} is {store.fingerprint}; "
                        f"{way_out}")
    for name, size in _sizes(manifest).items():
        try:
            found = files.file_size(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name}: can't be read ({reason(error)}); {way_out}") from error
        if found != size:
            raise UserError(f"{folder / name}: {found} bytes, the manifest says {size}; {way_out}")
    return manifest


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of every file of a plan, by name."""
    return {f"{split}.{part}": 8 * numbers for split, found in manifest["splits"].items()
            for part, numbers in (("rows", found["rows"] + 1), ("pieces", 2 * found["pieces"]))}


def plan_problems(store: TokenStore, progress: Callable[[int], Any] = lambda read: None) -> list[str]:
    """A line per damaged file of a store's plans, which are read whole; `progress` is told the bytes of each block."""
    problems = []
    names = {name.split("/")[0] for name in files.list_files(files.as_path(store.path) / "packing")}
    for length in sorted(int(found[1]) for name in names if (found := re.fullmatch(r"best_fit-(\d+)", name))):
        try:
            plan, folder = read_plan(store, length), plan_folder(store, length)
        except UserError as error:
            problems.append(str(error))
            continue
        for file, sha256 in ((folder / f"{split}.{part}", found["sha256"][part])
                             for split, found in plan["splits"].items() for part in PARTS):
            if (now := files.sha256(file, progress)) != sha256:
                problems.append(f"{file}: its contents changed: sha256 {now} isn't the manifest's {sha256}; remove "
                                f"{folder} and run `prepare` again with --packing=best_fit --sequence_length={length}")
    return problems


class BestFitRows:
    """The rows of a plan (see `Rows`): the leading share `first` of those of a split's shards `files`.

    Padding is `</s>` and never kept.

    Raises:
      UserError: no tokens in these shards, or no plan for this store and length.
    """

    def __init__(self, store: TokenStore, split: str, files: str, first: float, length: int) -> None:
        plan = read_plan(store, length)
        self.view, self.length = store.view(split, files), length
        self._eos_id: int = store.manifest["tokenizer"]["eos_id"]
        self._rows, self._pieces = (_Numbers(plan_folder(store, length) / f"{split}.{part}") for part in PARTS)
        spans, planned, row = self.view.shards, {}, 0
        for shard, rows in zip(store.splits[split]["shards"], plan["splits"][split]["rows_per_shard"], strict=True):
            planned[shard["name"]] = row, rows
            row += rows
        # Of each shard in the view: its first token there, its first row in the plan, and its first row in the view.
        self._tokens_before = np.array([span.start for span in spans])
        self._planned_before = np.array([planned[span.name][0] for span in spans])
        self._before = np.cumsum([0] + [planned[span.name][1] for span in spans])
        self.num_rows = int(self._before[-1] * first)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(rows, np.int64)
        shard, counts, starts, lengths = self._find(rows)
        totals = np.add.reduceat(lengths, np.cumsum(counts) - counts) if len(rows) else counts
        within = np.arange(self.length + 1) < totals[:, None]
        tokens = np.full(within.shape, self._eos_id, np.int32)
        tokens[within] = self.view.ragged(starts + np.repeat(self._tokens_before[shard], counts), lengths)
        row = np.repeat(np.arange(len(rows)), counts)
        within[row, np.cumsum(lengths) - lengths - (np.cumsum(totals) - totals)[row]] = False
        return tokens, within

    def pieces(self, row: int) -> list[Piece]:
        shard, _, starts, lengths = self._find(np.array([row]))
        name = self.view.shards[shard[0]].name
        return [Piece(name, start, length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]

    def rows_of(self, shard: str, start: int, end: int) -> np.ndarray:
        for index, span in enumerate(self.view.shards):
            if span.name == shard:
                rows = np.arange(self._before[index], self._before[index + 1])
                _, counts, starts, lengths = self._find(rows)
                holds = np.maximum(starts, start) < np.minimum(starts + lengths, end)
                found = np.unique(np.repeat(rows, counts)[holds])
                return found[found < self.num_rows]
        return np.empty(0, np.int64)

    def _find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(shard [n], pieces in the row [n], starts in the shard [pieces], lengths [pieces]) of rows [n]."""
        shard = np.searchsorted(self._before, rows, side="right") - 1
        planned = rows - self._before[shard] + self._planned_before[shard]
        bounds = self._rows.read(planned, np.full(len(rows), 2)).reshape(-1, 2)
        counts = bounds[:, 1] - bounds[:, 0]
        pieces = self._pieces.read(2 * bounds[:, 0], 2 * counts).reshape(-1, 2)
        return shard, counts, pieces[:, 0], pieces[:, 1]


class _Numbers:
    """A file of little-endian uint64, read where asked: mapped if it is local, else by byte ranges."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None
        if not files.is_remote(path):
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_RANDOM)  # a touch pages in 4 KiB, not the 64 KiB around it

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64 [sum(lengths)]: the numbers [start, start + length) of each pair."""
        if self._map is None:
            found = files.read_ranges(self._path, (8 * starts).tolist(), (8 * lengths).tolist())
            return np.frombuffer(b"".join(found), "<i8")
        numbers = np.frombuffer(self._map, "<i8")[np.repeat(starts, lengths) + _counting(lengths)]
        self._map.madvise(mmap.MADV_DONTNEED)  # memory doesn't grow with the plan; the kernel's cache keeps it
        return numbers


def _counting(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
