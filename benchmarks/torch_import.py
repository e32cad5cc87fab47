"""Importing a published folder, streamed beside the naive way, in one run: seconds and anonymous memory.

    python -m benchmarks.torch_import [--folder=DIR] [--rounds=3] [--form=llm360]

The folder has 893 MiB of float32 in 16 layers, as `benchmarks.export` has them. Streamed is `convert import` as it is:
it maps the files, fills mapped arrays, writes the checkpoint and reads it back bit by bit. Naive loads all tensors,
stacks them and gives the tree to Orbax, and checks nothing. Each figure is of a fresh process, of the call alone;
memory is RssAnon, which leaves out pages of files. DIR keeps the folder.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.export import SMALL, draw
from benchmarks.measure import compare, measure_way, render


def build(folder: Path, form: str) -> None:
    from safetensors.numpy import save_file

    from crystal_jax.convert.forms import get_form, leaf_shape, leaves, make_config, read_tensor, tensors

    params = {leaf: draw(leaf, leaf_shape(leaf, SMALL)) for leaf in leaves(SMALL)}
    table = get_form(form, "--form")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file({tensor.name: read_tensor(params, tensor, SMALL) for tensor in tensors(table, SMALL)},
              partial / "model.safetensors")
    (partial / "config.json").write_text(json.dumps(make_config(table, SMALL)))
    partial.rename(folder)


def streamed(folder: Path, form: str, output: Path) -> None:
    from crystal_jax.convert.importer import import_checkpoint

    import_checkpoint(form, folder, output)


def naive(folder: Path, form: str, output: Path) -> None:
    import numpy as np
    import orbax.checkpoint as ocp
    from safetensors.numpy import load_file

    from crystal_jax.convert.forms import get_form, leaf_shape, leaves, tensors, unflatten, write_tensor

    stored = load_file(folder / "model.safetensors")
    params = {leaf: np.empty(leaf_shape(leaf, SMALL), np.float32) for leaf in leaves(SMALL)}
    for tensor in tensors(get_form(form, "--form"), SMALL):
        write_tensor(params, tensor, SMALL, stored[tensor.name])
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    with ocp.Checkpointer(handler) as writer:
        writer.save(output.absolute(), args=ocp.args.PyTreeSave(unflatten(params)))


WAYS: dict[str, Callable[[Path, str, Path], None]] = {"streamed": streamed, "naive": naive}


def measure(way: str, folder: Path, form: str) -> dict[str, float]:
    """Of one import in this process, after its imports."""
    import safetensors.numpy  # noqa: F401

    import crystal_jax.checkpoint
    import crystal_jax.convert.importer  # noqa: F401

    return measure_way(WAYS[way], folder, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="for what is built, and kept; the default is a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", default="llm360", help="crystal or llm360")
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.input, args.form)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        published = Path(args.folder or temporary) / args.form
        if not published.exists():
            build(published, args.form)
        print(render(compare("benchmarks.torch_import", list(WAYS), args.rounds,
                             [f"--input={published}", f"--form={args.form}"])))


if __name__ == "__main__":
    main()
