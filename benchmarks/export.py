"""Exporting a checkpoint, streamed beside the naive way, in one run: seconds and anonymous memory.

    python -m benchmarks.export [--folder=DIR] [--rounds=3] [--full] [--to=crystal]

The checkpoint has 893 MiB of float32 in 16 stacked layers. Streamed is `convert export` as it is: it copies, writes,
reads back, compares every bit and checks the logits. Naive restores the whole tree and gives it to safetensors in the
same form, and checks nothing. Each figure is of a fresh process, of the call alone; memory is RssAnon, which leaves out
pages of files. --full exports a 7B checkpoint in bfloat16 (13 GB, as 64 devices write it, its matrices zeros in sparse
files) instead; the disk needs 27 GB. DIR keeps the checkpoints.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.measure import clocked, peak_anonymous
from crystal_jax.config import ModelConfig, to_dict

ROOT = Path(__file__).resolve().parents[1]
SMALL = ModelConfig(embed_dim=1024, num_layers=16, num_heads=8, mlp_dim=2730)
FULL = ModelConfig()
DEVICES = 64
"""That the 7B checkpoint's chunks are of: a matrix is split in its input dim."""


def draw(leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    """A leaf of a trained model's size, float32."""
    rng = np.random.default_rng(len(leaf))
    return (leaf.endswith(".scale") + 0.05 * rng.standard_normal(shape, np.float32)).astype(np.float32)


def build_small(folder: Path) -> None:
    from crystal_jax.checkpoint import save_weights
    from crystal_jax.convert.forms import leaf_shape, leaves, unflatten

    params = unflatten({leaf: draw(leaf, leaf_shape(leaf, SMALL)) for leaf in leaves(SMALL)})
    save_weights(folder, params, SMALL, None, {"name": "benchmark"})


def build_full(folder: Path) -> None:
    """What is drawn: embedding, norms and biases."""
    from crystal_jax import files
    from crystal_jax.checkpoint import FORMAT, INFO, WEIGHTS
    from crystal_jax.convert.forms import leaf_shape, leaves

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dug: set[Path] = set()
    for leaf in leaves(FULL):
        _write_leaf(partial / WEIGHTS, leaf, leaf_shape(leaf, FULL))
        for data in {*(partial / WEIGHTS / "d").iterdir()} - dug:
            subprocess.run(["fallocate", "--dig-holes", str(data)], check=True)
            dug.add(data)
    files.write_json(partial / INFO, {"format": FORMAT, "model": to_dict(FULL), "name": "benchmark"})
    partial.rename(folder)


def _write_leaf(folder: Path, leaf: str, shape: tuple[int, ...]) -> None:
    """As Orbax lays it out."""
    import tensorstore as ts

    zeros = len(shape) > 2 and not leaf.endswith("bias")
    chunk = (shape[0], max(1, shape[1] // DEVICES), *shape[2:]) if zeros else shape
    array = ts.open({
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{leaf}/"},
        "metadata": {
            "shape": shape, "data_type": "bfloat16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "sharding_indexed", "configuration": {
                "chunk_shape": chunk, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]}}],
        },
        "store_data_equal_to_fill_value": True, "create": True,
    }).result()
    if not zeros:
        array.write(draw(leaf, shape).astype(ml_dtypes.bfloat16)).result()
        return
    piece = np.zeros(chunk, ml_dtypes.bfloat16)
    for start in range(0, shape[1], chunk[1]):
        stop = min(start + chunk[1], shape[1])
        array[:, start:stop].write(piece[:, : stop - start]).result()


def streamed(checkpoint: Path, to: str, output: Path) -> None:
    from crystal_jax.convert.calendar import export_checkpoint
    from crystal_jax.convert.made import Options

    export_checkpoint(os.fspath(checkpoint), to, output, Options())


def naive(checkpoint: Path, to: str, output: Path) -> None:
    from safetensors.numpy import save_file

    from crystal_jax.checkpoint import load_weights
    from crystal_jax.convert.forms import FORMS, check_params, read_tensor, tensors

    weights = load_weights(checkpoint)
    params = check_params(weights.params, weights.model, "the checkpoint")
    output.mkdir()
    save_file({tensor.name: read_tensor(params, tensor, weights.model)
               for tensor in tensors(FORMS[to], weights.model)}, output / "model.safetensors")


WAYS: dict[str, Callable[[Path, str, Path], None]] = {"streamed": streamed, "naive": naive}


def measure(way: str, checkpoint: Path, to: str) -> dict[str, float]:
    """Of one export in this process, after its imports."""
    import safetensors.numpy  # noqa: F401

    import crystal_jax.convert.calendar  # noqa: F401

    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as place, peak_anonymous() as peak, clocked() as clock:
        WAYS[way](checkpoint, to, Path(place) / "out")
    return {"seconds": clock.wall, "cpu_seconds": clock.cpu, "before": peak.before, "highest": peak.highest}


def compare(folder: Path, to: str, rounds: int, full: bool) -> dict[str, dict[str, float]]:
    """Way to the median of each figure over the rounds, in which the ways take turns."""
    checkpoint = folder / ("full" if full else "small")
    if not checkpoint.exists():
        (build_full if full else build_small)(checkpoint)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in (["streamed"] if full else WAYS)}
    for _ in range(rounds):
        for way, values in found.items():
            command = [sys.executable, "-m", "benchmarks.export", f"--checkpoint={checkpoint}", f"--way={way}",
                       f"--to={to}"]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            values.append(json.loads(done.stdout.splitlines()[-1]))
    return {way: {key: statistics.median(each[key] for each in values) for key in values[0]}
            for way, values in found.items()}


def render(found: dict[str, dict[str, float]]) -> str:
    lines = ["| way | s (CPU-s) | anonymous memory MiB, highest | above what imports took |", "|---|---|---|---|"]
    lines += [f"| {way} | {value['seconds']:.1f} ({value['cpu_seconds']:.1f}) | {value['highest']:.0f} | "
              f"{value['highest'] - value['before']:.0f} |" for way, value in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="for what is built, and kept; the default is a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", default="crystal", help="form")
    parser.add_argument("--full", action="store_true", help="the 7B checkpoint")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.checkpoint, args.to)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        print(render(compare(Path(args.folder or temporary), args.to, args.rounds, args.full)))


if __name__ == "__main__":
    main()
