"""Checkpoints as they lie on disk or gs:// to exported folders: one, or all of a run's calendar.

A checkpoint's arrays are copied into files beside the output and mapped from there, so its size isn't bounded by the
memory. Its invariant: the same command goes on where it was, and does nothing twice.
"""

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crystal_jax import files
from crystal_jax.checkpoint import open_weights, outline
from crystal_jax.convert.export import export, make, partial_folder
from crystal_jax.convert.forms import flatten
from crystal_jax.convert.made import Made, Options, Weights
from crystal_jax.errors import UserError
from crystal_jax.exports import EXPORTS, INFO, WEIGHTS
from crystal_jax.stream import MANIFEST, check_space, clear, find_place, locked

PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED")
"""What TensorStore says where the files aren't at fault."""
RECORD = "exports.json"
"""In the output of a calendar: checkpoint to what its folder was made of, and the size of each of its files."""


def export_checkpoint(checkpoint: str, to: str, output: Path, options: Options) -> dict[str, Any]:
    """`export` of a run's folder, RUN/checkpoints/STEP or a permanent checkpoint, local or on gs://.

    Raises:
      UserError: as find_place, open_weights and export; another process that writes the same output.
    """
    place = find_place(output)
    if place.is_file():
        raise UserError(f"{output}: is a file; --output must name a folder")
    scratch = place.with_name(f".{place.name}.scratch")
    command = command_line(checkpoint, to, output, options)
    outlined = outline(checkpoint)
    made, _ = make(outlined, to, options, command)  # refuses what it can before anything is copied
    with locked(scratch):
        try:
            _check_space(place, scratch, outlined, made)
            weights = open_weights(checkpoint, scratch)
            summary = export(weights, to, output, dtype=options.dtype, max_shard_size=options.max_shard_size,
                             heads=options.heads, command=command)
        except UserError as error:
            if not _passes(error):  # what the same command would meet again
                clear(scratch)
            raise
        clear(scratch)
    return summary


def _check_space(place: Path, scratch: Path, outlined: Weights, made: Made) -> None:
    """Refuses what won't fit, before a byte is written; what an earlier command has left counts as there."""
    copy = sum(values.nbytes for values in flatten(outlined.params).values())
    written = 0 if place.exists() and any(place.iterdir()) else made.storage.nbytes  # it is only compared
    left = sum(path.stat().st_size for folder in (scratch, partial_folder(place)) for path in folder.glob("*"))
    check_space(place.parent, copy + written - left, f"the export ({written:,}) and, while it is made, a copy of the "
                f"checkpoint's arrays ({copy:,}, of which {left:,} are there)")


def _passes(error: UserError) -> bool:
    """Whether it was the network's or the storage's: what has come from gs:// then stays, and isn't fetched again."""
    return any(kind in str(error.__cause__) for kind in PASSING)


def command_line(checkpoint: str, to: str, output: Path, options: Options) -> str:
    """The command that makes this very export."""
    given = {"to": to, "checkpoint": checkpoint, "output": output}
    given |= {name: value for name, value in asdict(options).items() if value != getattr(Options(), name)}
    return shlex.join(["crystal-jax", "convert", "export", *(f"--{name}={value}" for name, value in given.items())])


def export_all(run: str, to: str, output: Path, options: Options) -> Iterator[dict[str, Any]]:
    """Exports RUN/exports/PHASE/STEP to OUTPUT/PHASE/STEP, one after the other, and gives each one's summary.

    One that was exported in the same way, and whose files have the sizes that they had, is passed over without a look
    at its arrays.

    Raises:
      UserError: a run without permanent checkpoints; a folder that isn't the export any more, with the file; as
        export_checkpoint.
    """
    if Path(output).is_file():
        raise UserError(f"{output}: is a file; --output must name a folder")
    calendar = files.as_path(run) / EXPORTS
    names = sorted(name.removesuffix(f"/{INFO}") for name in files.list_files(calendar) if name.endswith(f"/{INFO}"))
    if not names:
        raise UserError(f"{calendar}: no permanent checkpoints there; --all takes a run's folder")
    record = Path(output) / RECORD
    done: dict[str, Any] = files.read_json(record) if record.exists() else {}
    for name in names:
        version = files.sha256(calendar / name / WEIGHTS / MANIFEST)
        made = {"form": to, **asdict(options), "checkpoint": version}
        place = Path(output) / name
        kept = done.get(name)
        if kept and kept == made | {"files": _sizes(place, kept.get("files", ()))}:
            yield {"output": str(place), "form": to, "passed_over": True}
            continue
        summary = export_checkpoint(os.fspath(calendar / name), to, place, options)
        done[name] = made | {"files": _sizes(place, summary["files"])}
        try:
            files.write_json(record, done)
        except OSError as error:
            raise UserError(f"{record}: can't be written: {error.strerror}") from None
        yield summary


def _sizes(place: Path, names: Iterable[str]) -> dict[str, int | None]:
    """File name to its size in bytes; None for one that isn't there."""
    return {name: os.stat(place / name).st_size if (place / name).is_file() else None for name in names}
