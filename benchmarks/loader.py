"""The loader beside others, on the same tokens in one run: rows of 2048 per CPU second, start, seeks, memory.

    python -m benchmarks.loader [--folder=DIR] [--rounds=3] [--levanter=PYTHON] [--only=NAME]

Each figure is of a fresh process on a store of 100 shards (of the standard library's text, repeated): three sources
60 : 30 : 10, shuffled, batches of 132 rows (what one of 16 hosts takes of Crystal's 2112). CPU seconds are of all
threads; first batch is wall time after imports, seek the CPU time of any one batch; memory is the peak above what the
imports left resident. DIR keeps what was built. PYTHON is the interpreter of an environment with Levanter.
"""

import argparse
import atexit
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Loader, measure_loader
from crystal_jax.config import Config, Phase, Source
from crystal_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LENGTH, BATCH, STEPS = 2048, 132, 20_000
SHARDS, TOKENS, BIG_TOKENS = 100, 100_000_000, 4_000_000_000
WEIGHTS = {"a": 0.6, "b": 0.3, "c": 0.1}


def build(folder: Path) -> None:
    """What the contenders read: three stores (`big` is sparse), one flat file, an ArrayRecord file."""
    from benchmarks import synthetic
    from crystal_jax.data.packing import write_plan
    from crystal_jax.data.store import TokenStore
    from crystal_jax.data.tokenizer import Tokenizer

    tokenizer = synthetic.make_tokenizer(folder, 4096)
    store = synthetic.write_repeated(folder, "rows", tokenizer, SHARDS, TOKENS)
    synthetic.write_repeated(folder, "small", tokenizer, 4, TOKENS // 20)
    if not (folder / "big").exists():
        each = BIG_TOKENS // SHARDS
        synthetic.write_sparse(folder, "big", Tokenizer.load(tokenizer), dict.fromkeys(range(SHARDS), each))
    if not (store / "packing").exists():
        write_plan(store, LENGTH)
    if not (folder / "flat.tokens").exists():
        with open(folder / "flat.tokens", "wb") as file:
            for path in sorted((store / "train").glob("*.tokens")):
                file.write(path.read_bytes())
    if not (folder / "rows.array_record").exists():
        _write_array_record(folder, TokenStore.open(store).view("train"))


def _write_array_record(folder: Path, view: Any) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "rows.array_record.partial"), "group_size:1")
    for row in range((view.num_tokens - 1) // LENGTH):
        writer.write(view.read(row * LENGTH, LENGTH + 1).astype("<u2").tobytes())
    writer.close()
    (folder / "rows.array_record.partial").rename(folder / "rows.array_record")


def ours(root: Path | str, store: str = "rows", fim: bool = False, packing: str = "concat") -> Callable[[], Loader]:
    import grain  # noqa: F401  its import is put off by the pipeline, and isn't what is timed

    from crystal_jax.data.pipeline import Batches, Stores

    config = Config(
        sources={name: Source(store, "code") for name in WEIGHTS},
        phases=[Phase(steps=STEPS, global_batch_size=BATCH, mix=WEIGHTS, fim_rate=dict.fromkeys(WEIGHTS, 0.9 * fim))],
    )
    config.data.root, config.data.packing = str(root), packing

    def open_loader() -> Loader:
        batches = Batches(config, Stores(config))
        return Loader(batches.__getitem__, batches.iterate)

    return open_loader


def remote(folder: Path) -> Callable[[], Loader]:
    """Ours on gs://, where an emulator in another process answers: its time isn't counted."""
    from crystal_jax.files import as_path
    from tests.gcs import emulator

    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    root = as_path(stack.enter_context(emulator(Path(stack.enter_context(tempfile.TemporaryDirectory())))).folder())
    for file in [folder / "tokenizer.json", *(folder / "small").rglob("*")]:
        if file.is_file():
            (root / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
    return ours(str(root), store="small")


def memmap(folder: Path) -> Callable[[], Loader]:
    """The limit: no mixture, no order, one flat file."""

    def open_loader() -> Loader:
        flat = np.asarray(np.memmap(folder / "flat.tokens", "<u2", mode="r"))
        windows = np.lib.stride_tricks.sliding_window_view(flat, LENGTH + 1)

        def get(step: int) -> np.ndarray:
            rows = np.random.default_rng(step).integers(0, len(flat) // LENGTH - 1, BATCH)
            return windows[rows * LENGTH].astype(np.int32)

        return Loader(get, lambda step: map(get, itertools.count(step)))

    return open_loader


def grain_mix(folder: Path) -> Callable[[], Loader]:
    """`grain.MapDataset.mix` over ArrayRecord, read ahead by one thread as ours is."""
    import grain
    from grain.sources import ArrayRecordDataSource

    def open_loader() -> Loader:
        path = str(folder / "rows.array_record")
        sources = [grain.MapDataset.source(ArrayRecordDataSource(path)).shuffle(seed).repeat() for seed in range(3)]
        mixed = grain.MapDataset.mix(sources, list(WEIGHTS.values()))
        batches = mixed.map(lambda record: np.frombuffer(record, "<u2").astype(np.int32)).batch(BATCH)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return Loader(batches.__getitem__, lambda step: iter(batches[step:].to_iter_dataset(options)))

    return open_loader


CONTENDERS: dict[str, Callable[[Path], Callable[[], Loader]]] = {
    "ours": ours,
    "ours, local FIM at 0.9": lambda folder: ours(folder, fim=True),
    "ours, best_fit": lambda folder: ours(folder, packing="best_fit"),
    "ours, 8 GB store": lambda folder: ours(folder, store="big"),
    "ours, gs:// emulator": remote,
    "grain mix, ArrayRecord": grain_mix,
    "numpy memmap": memmap,
}


def run(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, rounds: int, levanter: str | None, only: str | None) -> dict[str, dict[str, float]]:
    """Contender to the median of each figure over the rounds, in which the contenders take turns."""
    commands = {name: [sys.executable, "-m", "benchmarks.loader", f"--folder={folder}", f"--contender={name}"]
                for name in CONTENDERS}
    if levanter:
        commands["Levanter cache and mixture"] = [levanter, "-m", "benchmarks.levanter_rows", str(folder), str(BATCH)]
    commands = {name: command for name, command in commands.items() if only in (None, name)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(run(command))
    return {name: {key: statistics.median(each[key] for each in values) for key in values[0]}
            for name, values in found.items()}


def render(found: dict[str, dict[str, float]]) -> str:
    base = found.get("ours", next(iter(found.values())))["rows_per_cpu_s"]
    lines = ["| loader | rows of 2048 per CPU-s | ours is × | first batch s (CPU-s) | seek CPU-ms, worst | memory MB |",
             "|---|---|---|---|---|---|"]
    for name, value in found.items():
        lines.append(
            f"| {name} | {value['rows_per_cpu_s']:,.0f} | {base / value['rows_per_cpu_s']:.2f} | "
            f"{value['first_batch_s']:.2f} ({value['first_batch_cpu_s']:.2f}) | {value['seek_ms']:.1f}, "
            f"{value['worst_seek_ms']:.1f} | {value['memory_mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="for what is built, and kept; the default is a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levanter", help="the Python of an environment with Levanter")
    parser.add_argument("--only", help="one contender")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        open_loader = CONTENDERS[args.contender](Path(args.folder))
        print(json.dumps(measure_loader(open_loader, BATCH, STEPS)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        build(folder)
        print(render(compare(folder, args.rounds, args.levanter, args.only)))


if __name__ == "__main__":
    main()
