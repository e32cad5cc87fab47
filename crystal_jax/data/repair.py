"""Mending finished stores: the inputs of damaged shards are prepared once more.

This file owns what of a store is damaged and how it is put back. Its invariant: a file goes into a finished store only
when it is, by sha256, the one that the manifest says.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from etils import epath
from tqdm import tqdm

from crystal_jax import files
from crystal_jax.data.manifests import Manifest, read_records
from crystal_jax.data.readers import Input
from crystal_jax.data.store import PARTS, SPLITS, Listed, listed, missing_or_resized
from crystal_jax.data.tasks import PROGRESS, Task, input_sha256, place, scratch
from crystal_jax.errors import UserError, counted

FOLDER = "repair"
"""Below a store's folder of progress: where shards are prepared once more."""


def damaged_shards(stores: Sequence[epath.Path], manifests: Sequence[Manifest], whole: bool) -> dict[str, str]:
    """The names of shards that aren't as prepared, each with a problem; found by sha256 if `whole`, else by size."""
    found: dict[str, str] = {}
    for path, manifest in zip(stores, manifests, strict=True):
        total = sum(file.bytes for file in listed(manifest))
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"reading {manifest['name']}", mininterval=1,
                  disable=not whole) as bar:
            for file, problem in _damaged(path, manifest, whole, bar.update):
                found.setdefault(PurePath(file.name).name.partition(".")[0], problem)
    return found


def _damaged(path: epath.Path, manifest: Manifest, whole: bool, progress: Callable[[int], Any]
             ) -> Iterator[tuple[Listed, str]]:
    known = dict(missing_or_resized(path, manifest))
    yield from known.items()
    if not whole:
        return

    def differs(file: Listed) -> bool:
        try:
            return files.sha256(path / file.name, progress) != file.sha256
        except (OSError, UserError):  # a disk that can't read it back
            return True

    rest = [file for file in listed(manifest) if file not in known]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of Python's lock
        for file, wrong in zip(rest, pool.map(differs, rest), strict=True):
            if wrong:
                yield file, f"{path / file.name}: its contents changed"


def mend(tasks: Sequence[Task], stores: dict[str, epath.Path], manifests: Sequence[Manifest],
         run: Callable[[list[Task]], None]) -> None:
    """Prepares the inputs of these tasks once more, elsewhere, and moves their shards into the finished stores.

    Raises:
      UserError: a shard isn't the one that the manifest says; then no file was moved.
    """
    root = files.as_path(tasks[0].folder)
    folder = root / PROGRESS / FOLDER
    if folder.exists():
        folder.rmtree()
    copies = [Task(**{**vars(task), "folder": os.fspath(folder)}) for task in tasks]
    run(copies)
    done = read_records(copies)
    moves = []
    for task in copies:
        for part, manifest in zip(stores, manifests, strict=True):
            for split in SPLITS:
                where = place(part, split)
                wanted = manifest["splits"][split]["shards"][task.index]
                if task.index not in done or done[task.index]["shards"][where]["sha256"] != wanted["sha256"]:
                    raise UserError(f"{root / where}: shard {task.name}, prepared once more from {task.item.name}, "
                                    f"isn't the manifest's; copy the store again, or remove {root} and run the same "
                                    "command")
                moves += [f"{where}/{task.name}.{end}" for end in PARTS]
    local = scratch(os.fspath(folder))
    for name in moves:
        files.publish(_fetched(folder / name, local / PurePath(name).name), root / name)
    shutil.rmtree(local, ignore_errors=True)


def _fetched(path: epath.Path, local: Path) -> Path:
    """The file on this machine, copied to `local` where it lies on another."""
    if not files.is_remote(path):
        return Path(path)
    with open(local, "wb") as copy:
        for block in files.read_blocks(path):
            copy.write(block)
    return local


def check_inputs(items: Sequence[Input], path: epath.Path, manifest: Manifest) -> None:
    """Compares the files that are newer than the manifest of a finished store with their sha256 there.

    Raises:
      UserError: one of them changed.
    """
    written = files.modified(path)
    newer = [(item, about["sha256"]) for item, about in zip(items, manifest["inputs"], strict=True)
             if item.changed is not None and item.changed >= written and "sha256" in about]
    if not newer:
        return
    print(f"{path.parent}: {counted(len(newer), 'newer input')}; comparing sha256", file=sys.stderr)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(input_sha256, [item for item, _ in newer])
        for wanted, now in zip([sha256 for _, sha256 in newer], found, strict=True):
            if other := [name for name, value in now.items() if wanted.get(name) != value]:
                raise UserError(f"{path.parent}: was made from another {other[0]}, of sha256 {wanted.get(other[0])}; "
                                f"it is {now[other[0]]} now: put it back, choose another --name, or remove the folder")
