"""What a user may ask of `prepare`.

This file owns the options and the names of stores. Its invariant: what passes its checks can be carried out, as far as
a look at the arguments tells.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from etils import epath

from crystal_jax import files
from crystal_jax.config import nearest
from crystal_jax.data.fast_tokenizer import ENGINES
from crystal_jax.data.store import MANIFEST, SPLITS
from crystal_jax.data.tasks import PROGRESS
from crystal_jax.errors import UserError

PACKINGS = ("concat", "best_fit")
RESERVED = frozenset({*SPLITS, PROGRESS, "packing"})
"""Folders inside a store."""


@dataclass(frozen=True)
class Options:
    """How a source is prepared; of all this only `heldout` decides what a store holds."""

    workers: int = 1
    heldout: float | None = None
    """Share of the documents kept out of training; None: as the kind of the source has it."""
    engine: str = "auto"
    runner: str = "local"
    beam_options: str = ""
    shard: tuple[int, int] = (0, 1)
    """(i, n): this machine takes every n-th input, from the i-th on."""
    packing: str = "concat"
    """best_fit also plans rows of `sequence_length` + 1 tokens."""
    sequence_length: int = 2048
    repair: bool = False
    """Reads a finished store whole, to mend it: else only the sizes of its files are looked at."""


DEFAULTS = Options()


def check_options(options: Options, runners: Iterable[str]) -> None:
    """Raises UserError for an option that is out of its range; `runners` are those that there are."""
    index, count = options.shard
    for flag, value, known in (("engine", options.engine, ENGINES), ("runner", options.runner, runners),
                               ("packing", options.packing, PACKINGS)):
        if value not in known:
            raise UserError(f"--{flag}: {value!r} must be one of {', '.join(known)}{nearest(value, known)}")
    rules: tuple[tuple[str, Any, bool, str], ...] = (
        ("heldout", options.heldout, 0 <= (options.heldout or 0.0) < 1, "be a share from 0 up to, not including, 1"),
        ("workers", options.workers, options.workers >= 1, "be 1 or more"),
        ("shard", f"{index}/{count}", 0 <= index < count, "be I/N with I from 0 to N-1"),
        ("sequence_length", options.sequence_length, options.sequence_length >= 1, "be 1 or more"),
        ("beam_options", options.beam_options, options.runner == "beam" or not options.beam_options,
         "be left out without --runner=beam"),
    )  # fmt: skip
    for flag, value, right, rule in rules:
        if not right:
            raise UserError(f"--{flag}: {value} must {rule}")


def check_name(name: str, output: epath.Path) -> None:
    """Raises UserError for a store's name that is no path of folders below `output`, or lies inside another store."""
    parts = name.split("/")
    for part in parts:
        if not part.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"--name: {name!r} must be a path below --output of letters, digits, - and _, such as "
                            "slimpajama/C4")
        if part in RESERVED:
            raise UserError(f"--name: {name!r} has {part!r}, which is a folder of stores; choose another")
    for depth in range(1, len(parts)):
        parent = output.joinpath(*parts[:depth])
        if files.exists(parent / MANIFEST):
            raise UserError(f"--name: {name!r} lies in {parent}, which is a token store itself; choose another")
