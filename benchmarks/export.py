"""Exporting a checkpoint, streamed beside the naive way, in one run: seconds and anonymous memory.

    python -m benchmarks.export [--folder=DIR] [--rounds=3] [--full [--layers=32]] [--to=crystal]

The checkpoint has 893 MiB of float32 in 16 stacked layers. Streamed is `convert export` as it is: it copies, writes,
reads back, compares every bit and checks the logits. Naive restores the whole tree and gives it to safetensors in the
same form, and checks nothing. Each figure is of a fresh process, of the call alone; memory is RssAnon, which leaves out
pages of files. --full exports a 7B checkpoint in bfloat16 (13 GB, as 64 devices write it, its matrices zeros in sparse
files) instead, or one of its shape with fewer layers; the disk needs 27 GB for 32. DIR keeps the checkpoints.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.measure import compare, measure_way, render
from crystal_jax.config import ModelConfig, to_dict

SMALL = ModelConfig(embed_dim=1024, num_layers=16, num_heads=8, mlp_dim=2730)
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


def build_full(folder: Path, layers: int) -> None:
    """What is drawn: embedding, norms and biases."""
    from crystal_jax import files
    from crystal_jax.convert.forms import leaf_shape, leaves
    from crystal_jax.exports import INFO, WEIGHTS
    from crystal_jax.states import FORMAT

    model = replace(ModelConfig(), num_layers=layers)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dug: set[Path] = set()
    found: dict[str, str] = {}
    for leaf in leaves(model):
        found |= _write_leaf(partial / WEIGHTS, leaf, leaf_shape(leaf, model))
        for data in {*(partial / WEIGHTS / "d").iterdir()} - dug:
            subprocess.run(["fallocate", "--dig-holes", str(data)], check=True)
            dug.add(data)
    files.write_json(partial / INFO, {"format": FORMAT, "model": to_dict(model), "name": "benchmark",
                                      "fingerprint": found})
    partial.rename(folder)


def _write_leaf(folder: Path, leaf: str, shape: tuple[int, ...]) -> dict[str, str]:
    """As Orbax lays it out; returns its fingerprint."""
    import tensorstore as ts

    from crystal_jax.fingerprint import fingerprint

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
        values = draw(leaf, shape).astype(ml_dtypes.bfloat16)
        array.write(values).result()
        return fingerprint({leaf: values})
    piece = np.zeros(chunk, ml_dtypes.bfloat16)
    for start in range(0, shape[1], chunk[1]):
        stop = min(start + chunk[1], shape[1])
        array[:, start:stop].write(piece[:, : stop - start]).result()
    return fingerprint({leaf: np.zeros(shape, ml_dtypes.bfloat16)})  # which takes no memory until it is written


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

    return measure_way(WAYS[way], checkpoint, to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="for what is built, and kept; the default is a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", default="crystal", help="form")
    parser.add_argument("--full", action="store_true", help="a checkpoint of 7B's shape")
    parser.add_argument("--layers", type=int, default=32, help="of that")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.checkpoint, args.to)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        checkpoint = folder / (f"full-{args.layers}" if args.full else "small")
        if not checkpoint.exists():
            build_full(checkpoint, args.layers) if args.full else build_small(checkpoint)
        ways = ["streamed"] if args.full else list(WAYS)
        print(render(compare("benchmarks.export", ways, args.rounds,
                             [f"--checkpoint={checkpoint}", f"--to={args.to}"])))


if __name__ == "__main__":
    main()
