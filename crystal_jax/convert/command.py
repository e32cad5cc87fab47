"""`convert export` and `convert import`: the command line over export.py and importer.py."""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crystal_jax.config import check_local
from crystal_jax.convert.forms import FORMS
from crystal_jax.convert.gguf_file import KINDS
from crystal_jax.convert.made import MAX_SHARD_SIZE, Options
from crystal_jax.convert.makers import MAKERS
from crystal_jax.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    to = actions.add_parser("export", help="JAX → PyTorch: a checkpoint as a folder for transformers")
    to.add_argument("--to", required=True, choices=sorted(MAKERS), help="form of the folder")
    to.add_argument("--checkpoint", required=True, help="a run (its newest checkpoint), a checkpoint or an export; "
                    "local or gs://")
    to.add_argument("--output", required=True, help="folder to write: new, empty or this very export")
    to.add_argument("--all", action="store_true", help="all permanent checkpoints of the run --checkpoint, to "
                    "OUTPUT/PHASE/STEP; those that are there are passed over")
    to.add_argument("--dtype", choices=KINDS, help="of the stored tensors (default: the checkpoint's); q8_0 for gguf")
    to.add_argument("--max_shard_size", help="of one file, in bytes, KB, MB or GB (default: 5GB)")
    to.add_argument("--heads", type=int, help="of the model, in the forms that widen it (default: two more)")
    back = actions.add_parser("import", help="PyTorch → JAX: a published folder as a checkpoint to start from")
    back.add_argument("--from", dest="form", required=True, choices=sorted(FORMS), help="form of the folder")
    back.add_argument("--input", required=True, help="folder with config.json and weights, or with a "
                      "folder for each published branch")
    back.add_argument("--output", required=True, help="checkpoint to write")
    for action in (to, back):
        action.add_argument("--json", action="store_true", help="print the summary as JSON")


def main(args: argparse.Namespace) -> None:
    for name in ("input", "output"):
        if hasattr(args, name):
            check_local(f"--{name}", getattr(args, name))  # before Path makes one slash of two
            setattr(args, name, Path(getattr(args, name)))
    for summary in _export(args) if args.action == "export" else _import(args):
        print(json.dumps(summary) if args.json else _sentence(summary), flush=True)


def _export(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    from crystal_jax.convert.calendar import export_all, export_checkpoint

    size = parse_size(args.max_shard_size) if args.max_shard_size else MAX_SHARD_SIZE
    options = Options(args.dtype, size, args.heads)
    if args.all:
        return export_all(args.checkpoint, args.to, args.output, options)
    return [export_checkpoint(args.checkpoint, args.to, args.output, options)]


def _import(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    from crystal_jax.convert.importer import import_all

    return import_all(args.form, args.input, args.output)


def parse_size(text: str) -> int:
    """Bytes in '5GB', '200MB' or '1000'.

    Raises:
      UserError: text that isn't such a size.
    """
    found = re.fullmatch(r"(\d+)\s*([KMG]?B|)", text.strip(), re.IGNORECASE)
    unit = found and {"B": ""}.get(found[2].upper(), found[2].upper())
    if not found or unit is None or int(found[1]) == 0:
        raise UserError(f"--max_shard_size={text}: must be a size above 0, such as 5GB, 200MB or 1000000")
    return int(found[1]) * UNITS[unit]


def _sentence(summary: dict[str, Any]) -> str:
    if "passed_over" in summary:
        return f"{summary['output']}: there already"
    if "unchanged" not in summary:
        return f"{summary['output']}: a checkpoint in {summary['dtype']} from the form {summary['form']}"
    done = "already holds exactly this export" if summary["unchanged"] else "written and read back"
    return (f"{summary['output']}: {done} ({summary['form']}, {summary['tensors']} tensors, {summary['dtype']}, "
            f"{summary['bytes']:,} bytes); logits within {summary['parity']['relative_difference']:.1e} of the "
            "checkpoint's")
