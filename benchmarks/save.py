"""Saving and restoring a state beside raw files of the same bytes on the same disk, in alternation in one process.

    python -m benchmarks.save [--folder=DIR] [--mb=768] [--rounds=5]

The state is parameters and two moments of stacked layers, float32, on one CPU device. A save blocks until its arrays
may be donated and is done when it is whole: arrays synced, fingerprints computed and written. Raw is one file per
array, written and synced, or read into new memory, each after its pages were dropped from the cache. Extra memory is
the highest anonymous memory of a save above what was there before. The fingerprint is of the whole state of the
comparison shape (benchmarks/train_step.py) against a hundred of its steps.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from benchmarks import train_step
from benchmarks.measure import clocked, peak_anonymous
from crystal_jax import sharding
from crystal_jax.config import CheckpointConfig, MeshConfig, ModelConfig
from crystal_jax.fingerprint import dispatch
from crystal_jax.model import Crystal, init_params
from crystal_jax.states import RollingStates

LAYERS = 16
CADENCE = 100

GOALS = {
    "blocking ms": ("at most", 80.0),
    "blocking / raw write": ("at most", 0.05),
    "throughput / raw write": ("at least", 0.8),
    "restore / raw read": ("at least", 0.5),
    "extra memory / state": ("at most", 1.1),
    f"fingerprint / {CADENCE} steps": ("at most", 0.02),
}


def make_state(megabytes: int) -> dict[str, Any]:
    """{params, moments}, each of the three trees of four arrays."""
    width = int((megabytes * 2**20 / (3 * 4 * 4 * LAYERS)) ** 0.5)
    layout = sharding.replicated(sharding.make_mesh(MeshConfig()))

    def tree(seed: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        return {name: jax.device_put(rng.standard_normal((LAYERS, width, width), np.float32), layout)
                for name in ("q", "k", "v", "o")}

    return {"params": tree(0), "moments": {"mu": tree(1), "nu": tree(2)}}


def write_raw(folder: Path, arrays: list[np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        with open(folder / str(number), "wb", buffering=0) as file:
            view = memoryview(array).cast("B")
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())


def read_raw(folder: Path) -> list[np.ndarray]:
    return [np.fromfile(path, np.uint8) for path in sorted(folder.iterdir())]


def drop(folder: Path) -> None:
    """A folder's pages from the cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_round(folder: Path, number: int, state: dict[str, Any], states: RollingStates) -> dict[str, float]:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with clocked() as raw_write:
        write_raw(folder / "raw", [np.asarray(leaf) for leaf in jax.tree.leaves(state)])
    with peak_anonymous() as peak, clocked() as whole:
        with clocked() as blocking:
            states.save(number, state, {"step": number})
        states.wait()
    drop(folder)
    with clocked() as raw_read:
        read_raw(folder / "raw")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    with clocked() as restore:
        jax.block_until_ready(states.restore(number, abstract))
    return {
        "raw write MB/s": size / 1e6 / raw_write.wall,
        "save MB/s": size / 1e6 / whole.wall,
        "raw read MB/s": size / 1e6 / raw_read.wall,
        "restore MB/s": size / 1e6 / restore.wall,
        "blocking ms": blocking.wall * 1e3,
        "blocking / raw write": blocking.wall / raw_write.wall,
        "throughput / raw write": raw_write.wall / whole.wall,
        "restore / raw read": raw_read.wall / restore.wall,
        "extra memory / state": (peak.highest - peak.before) * 2**20 / size,
    }


def fingerprint_share(steps: int = 3) -> dict[str, float]:
    """CPU seconds of a state's fingerprint over those of a hundred steps, in the comparison shape."""
    model = ModelConfig(vocab_size=train_step.VOCAB, embed_dim=train_step.DIM, num_layers=train_step.LAYERS,
                        num_heads=train_step.HEADS, mlp_dim=train_step.MLP, max_length=train_step.LENGTH, rotary_dim=8)
    run = train_step.ours("float32", "none", train_step.LAYERS)
    mesh = sharding.make_mesh(MeshConfig())
    state = [init_params(Crystal(model).specs(), seed, mesh) for seed in range(3)]
    shape = (train_step.BATCH, train_step.LENGTH + 1)
    tokens = np.random.default_rng(0).integers(0, train_step.VOCAB, shape).astype(np.int32)

    def seconds(work: Callable[[], Any]) -> float:
        work()  # compiles
        found = []
        for _ in range(steps):
            with clocked() as clock:
                work()
            found.append(clock.cpu)
        return statistics.median(found)

    step, stamp = seconds(lambda: run(tokens)), seconds(lambda: dispatch(state).leaves())
    return {"step CPU-s": step, "fingerprint CPU-s": stamp, f"fingerprint / {CADENCE} steps": stamp / (CADENCE * step)}


def compare(folder: Path, megabytes: int, rounds: int) -> dict[str, float]:
    """The median of each figure; a round before them warms up."""
    state = make_state(megabytes)
    states = RollingStates(folder / "checkpoints", CheckpointConfig(keep_last=1), [])
    found = [one_round(folder, number, state, states) for number in range(rounds + 1)][1:]
    states.close()
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def render(found: dict[str, float]) -> str:
    lines = ["| figure | median | goal |", "|---|---|---|"]
    for name, value in found.items():
        word, goal = GOALS.get(name, ("", None))
        lines.append(f"| {name} | {value:.4g} | {f'{word} {goal:g}' if goal is not None else ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk to measure; the default is a temporary one")
    parser.add_argument("--mb", type=int, default=768, help="of the state")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = compare(Path(folder), args.mb, args.rounds)
    print(render(found | fingerprint_share()))


if __name__ == "__main__":
    main()
