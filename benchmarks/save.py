"""Saving and restoring a state beside raw files of the same bytes on the same disk, in alternation in one process.

    python -m benchmarks.save [--folder=DIR] [--mb=768] [--rounds=5]

The state is parameters and two moments of stacked layers, float32, on one CPU device. A save blocks until its arrays
may be donated; it is done when it is whole (arrays on the disk, as TensorStore calls fsync on each of its files;
fingerprints computed and written) and the state before it is removed. A raw write is one file per array through the
page cache in one thread, fsync on each, in a new folder, and the folder before it is removed. A restore reads all
arrays, computes their fingerprints and compares them; a raw read is of the raw files into new memory; both after the
files' pages were dropped from the cache. Raw and ours take turns in being first, and before each as much memory is
touched and freed as either takes: a virtual machine's host takes free pages back, and whoever comes first would wait
for them, which took up to five times the CPU time of the copy itself. Extra memory is the highest anonymous
memory of a save above what was there before. The fingerprint is of the whole state of the comparison shape
(benchmarks/train_step.py) against a hundred of its steps. Medians of rounds, after one that warms up.
"""

import argparse
import os
import shutil
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


def touch(size: int) -> None:
    """Lets the machine have this many bytes of free pages that its host needn't find first."""
    np.ones(size, np.uint8)


class Bench:
    """A state, its saves and the raw files beside them."""

    def __init__(self, folder: Path, megabytes: int):
        self.folder, self.state = folder, make_state(megabytes)
        self.size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.states = RollingStates(folder / "checkpoints", CheckpointConfig(keep_last=1), [])

    def write_raw(self, number: int) -> dict[str, float]:
        with clocked() as clock:
            write_raw(self.folder / f"raw{number}", [np.asarray(leaf) for leaf in jax.tree.leaves(self.state)])
            shutil.rmtree(self.folder / f"raw{number - 1}", ignore_errors=True)
        return {"raw write s": clock.wall, "raw write CPU-s": clock.cpu}

    def save(self, number: int) -> dict[str, float]:
        with peak_anonymous() as peak, clocked() as whole:
            with clocked() as blocking:
                self.states.save(number, self.state, {"step": number})
            self.states.wait()
        extra = (peak.highest - peak.before) * 2**20 / self.size
        return {"save s": whole.wall, "save CPU-s": whole.cpu, "blocking ms": blocking.wall * 1e3,
                "extra memory / state": extra}

    def read_raw(self, number: int) -> dict[str, float]:
        with clocked() as clock:
            read_raw(self.folder / f"raw{number}")
        return {"raw read s": clock.wall, "raw read CPU-s": clock.cpu}

    def restore(self, number: int) -> dict[str, float]:
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                                self.state)
        with clocked() as clock:
            jax.block_until_ready(self.states.restore(number, abstract))
        return {"restore s": clock.wall, "restore CPU-s": clock.cpu}

    def round(self, number: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for pair in ((self.write_raw, self.save), (self.read_raw, self.restore)):
            for work in pair if number % 2 else reversed(pair):
                touch(2 * self.size)  # the copy in memory and that in the cache
                found |= work(number)
            drop(self.folder)
        return found | {"blocking / raw write": found["blocking ms"] / 1e3 / found["raw write s"],
                        "throughput / raw write": found["raw write s"] / found["save s"],
                        "restore / raw read": found["raw read s"] / found["restore s"]}


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
    bench = Bench(folder, megabytes)
    found = [bench.round(number) for number in range(rounds + 1)][1:]
    bench.states.close()
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def render(found: dict[str, float]) -> str:
    lines = ["| figure | median | goal |", "|---|---|---|"]
    for name, value in found.items():
        word, goal = GOALS.get(name, ("", None))
        lines.append(f"| {name} | {value:.4g} | {f'{word} {goal:g}' if goal is not None else ''} |")
    return "\n".join([*lines, f"load average of the last minute: {os.getloadavg()[0]:.1f}"])


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
