"""`plan`: whether a config fits a TPU slice, how fast it should be there and what it costs, without a TPU.

Invariant: what is said of memory, FLOPs, bytes and collectives is read from the program that the TPU's compiler made of
the real train step; times, days and dollars follow from it by `cost.ASSUMED` and are called predictions.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from crystal_jax.ahead import Compiled, Refused, compile_step
from crystal_jax.buffers import memory
from crystal_jax.config import REMAT, Config
from crystal_jax.cost import ASSUMED, GIB, Machine, prices, timeline
from crystal_jax.errors import UserError
from crystal_jax.generations import FLAG_SETS, Slice, find_flags, find_slice
from crystal_jax.hlo import Program, total
from crystal_jax.phases import make_plan
from crystal_jax.plan_text import render, render_sweep
from crystal_jax.rules import validate
from crystal_jax.sharding import BATCH, padded
from crystal_jax.topology import MISSING, is_installed, libtpu_version
from crystal_jax.utilisation import flops_per_token

Note = Callable[[str], None]

TENSOR = (1, 2, 4)
"""Ways that a sweep splits heads and MLP; a v5p:4x4x4 has sides of 4."""
FINALISTS = 3
"""Layouts of a sweep that are tried with every remat preset."""
STATE_BYTES = 12
"""Per parameter: the float32 weight and Adam's two moments."""


def plan(config: Config, piece: Slice, slices: int = 1, flags: str = "default", machine_code: bool = True,
         note: Note = lambda line: None) -> dict[str, Any]:
    """What phase 1's step is on these slices, as plain JSON data.

    Without `machine_code` the compiler stops ten times earlier: times are then by rates alone.

    Raises:
      UserError: a config or flags that the devices or the compiler don't take; one that doesn't fit in memory is no
        error here, but "fits": false.
    """
    if not is_installed():
        raise UserError(MISSING)
    named = f"{piece.generation.name}:{'x'.join(map(str, piece.topology))}"
    note(f"compiling for {f'{slices} x ' if slices > 1 else ''}{named}, {layout(config, piece.devices * slices)}")
    compiled = compile_step(config, piece, slices, find_flags(flags, piece.generation), machine_code,
                            lambda seconds: note(f"\rcompiling, {seconds:.0f} s"))
    return {"name": config.name, "topology": named, "slices": slices, "chips": piece.chips * slices, "flags": flags,
            "libtpu": libtpu_version(), "compile_seconds": round(compiled.seconds, 1),
            **describe(compiled, config, piece, slices)}


def describe(compiled: Compiled, config: Config, piece: Slice, slices: int) -> dict[str, Any]:
    """The figures of a compiled step."""
    program = Program(compiled.program)
    machine = Machine(piece, compiled.mesh, compiled.places)
    line, work = timeline(program.events, machine), total(program.events)
    chips, generation = piece.chips * slices, piece.generation
    sequences, ways = config.phases[0].global_batch_size, math.prod(compiled.mesh[axis] for axis in BATCH)
    tokens = sequences * config.data.sequence_length
    formula = {name: flops * tokens / len(compiled.places)
               for name, flops in flops_per_token(config.model, config.data.sequence_length).items()}
    whole = make_plan(config)
    all_tokens = whole.tokens(whole.total_steps)
    seconds = all_tokens / tokens * line.seconds
    return {
        "mesh": compiled.mesh,
        "training": {name: getattr(config.training, name)
                     for name in ("remat", "attention", "accumulate", "pad_to", "dtype")},
        "batch": {"sequences": sequences, "computed": padded(sequences, ways * config.training.accumulate),
                  "tokens": tokens, "sequences_per_chip": sequences / chips},
        "memory": room(compiled, program, config, generation.usable_gib),
        "flops": {"program": work.flops + work.kernel_flops, "kernels": work.kernel_flops, **formula},
        "bytes": work.bytes + work.prefetched,
        "collectives": [asdict(row) for row in sorted(line.traffic.values(), key=lambda row: -row.gb)],
        "step": {"seconds": line.seconds, "computing": line.computing, "kernels": line.kernels,
                 "exposed": line.exposed, "cycles": work.cycles,
                 "tokens_per_second_per_chip": tokens / line.seconds / chips,
                 "mfu": formula["palm"] / (line.seconds * machine.peak)},
        "recipe": {"tokens": all_tokens, "days": seconds / 86400, "dollars": prices(piece, slices, seconds)},
        "assumed": {**ASSUMED, "from_cycles": work.cycles is not None},
    }


def room(compiled: Compiled, program: Program, config: Config, usable_gib: float) -> dict[str, Any]:
    """Bytes of one device by what they are for, and what is left; "fits" is the compiler's word."""
    parts = memory(program, compiled.buffers, compiled.live_ranges, config.model.num_layers)
    parts["code"] = compiled.code_bytes or 0
    used = sum(parts.values())
    usable = round(usable_gib * GIB)
    return {"fits": not compiled.refused, "used": used, "usable": usable, "left": usable - used, "parts": parts,
            "refused": compiled.refused}


def sweep(config: Config, piece: Slice, slices: int = 1, flags: str = "default",
          note: Note = lambda line: None) -> list[dict[str, Any]]:
    """Layouts with the config's own remat, then the best of them with every preset; the fastest that fit come first.

    Each row has "mesh", "remat", the overrides "given" and either the figures of `plan` or "refused".
    """
    layouts = list(_layouts(config, piece.devices))
    rows = [_try(variant, piece, slices, flags, _numbered(note, index, len(layouts)))
            for index, variant in enumerate(layouts)]
    best = [row["config"] for row in sorted(rows, key=_rank) if "step" in row][:FINALISTS]
    others = [_changed(variant, remat=remat) for variant in best for remat in REMAT if remat != config.training.remat]
    rows += [_try(variant, piece, slices, flags, _numbered(note, index, len(others)))
             for index, variant in enumerate(others)]
    return [{**{key: value for key, value in row.items() if key != "config"}, "given": overrides(config, row["config"])}
            for row in sorted(rows, key=_rank)]


def _numbered(note: Note, index: int, count: int) -> Note:
    return lambda line: note(line if line.startswith(("\r", " ")) else f"{index + 1}/{count}: {line}")


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    fits = row.get("memory", {}).get("fits", False)
    return not fits, row["step"]["seconds"] if fits else 0.0


def _layouts(config: Config, devices: int) -> Iterator[Config]:
    for tensor in TENSOR:
        fsdp = devices // tensor
        while fsdp and devices % tensor == 0:
            yield _changed(config, data=devices // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
            fsdp //= 2


def _changed(config: Config, **values: Any) -> Config:
    """A copy with other fields of the mesh or of training; padded and filled up where it splits what doesn't divide."""
    found = copy.deepcopy(config)
    for name, value in values.items():
        setattr(found.training.mesh if hasattr(found.training.mesh, name) else found.training, name, value)
    mesh = found.training.mesh
    if any(size % mesh.tensor for size in (config.model.mlp_dim, config.model.vocab_size)):
        found.training.pad_to = max(found.training.pad_to, 256)
    if -1 not in (mesh.data, mesh.fsdp):
        ways = mesh.slice * mesh.data * mesh.fsdp * found.training.accumulate
        found.training.fill_batch |= any(phase.global_batch_size % ways for phase in config.phases)
    return found


def _try(config: Config, piece: Slice, slices: int, flags: str, note: Note) -> dict[str, Any]:
    """A row of a sweep; its outcome is told at once, since the whole takes minutes."""
    row = {"remat": config.training.remat,
           "mesh": asdict(config.training.mesh),
           **_outcome(config, piece, slices, flags, note)}
    if "refused" in row:
        note(f"  {row['refused']}")
    else:
        step, used = row["step"], row["memory"]["used"]
        note(f"  {step['seconds']:.3f} s, MFU {step['mfu']:.1%}, {used / GIB:.1f} GiB")
    return row | {"config": config}


def _outcome(config: Config, piece: Slice, slices: int, flags: str, note: Note) -> dict[str, Any]:
    mesh = config.training.mesh
    state = flops_per_token(config.model, 0)["palm"] / 6 * STATE_BYTES / (mesh.fsdp * mesh.tensor)
    usable = piece.generation.usable_gib * GIB
    if state > usable:
        return {"refused": f"out of memory: parameters and moments alone are {state / GIB:.1f} of "
                           f"{usable / GIB:.2f} GiB"}
    try:
        found = plan(config, piece, slices, flags, machine_code=False, note=note)
    except Refused as error:
        return {"refused": str(error)}
    if found["memory"]["fits"]:
        return found
    return {"refused": f"out of memory: {found['memory']['used'] / GIB:.1f} of {usable / GIB:.2f} GiB"}


def nearest_fit(config: Config, piece: Slice, slices: int, flags: str, note: Note) -> str:
    """Overrides with which the step does fit: the state cut further, less saved, fewer rows at a time."""
    mesh = config.training.mesh
    tried = config
    every = piece.devices // mesh.tensor
    steps: list[dict[str, Any]] = [{"data": 1, "fsdp": every}] if mesh.fsdp not in (-1, every) else []
    steps += [{"remat": "full"}] if config.training.remat != "full" else []
    rows = config.phases[0].global_batch_size * mesh.tensor // (piece.devices * slices)
    parts = [part for part in (4, 16, 64, rows) if rows % part == 0 and part > config.training.accumulate]
    steps += [{"accumulate": part} for part in dict.fromkeys(parts)]
    for change in steps:
        tried = _changed(tried, **change)
        found = _try(tried, piece, slices, flags, note)
        if "refused" not in found:
            given = " ".join(overrides(config, tried))
            return f"this fits, at {found['memory']['used'] / GIB:.1f} GiB: {given}"
    return "nothing nearby fits: take a larger slice"


def overrides(before: Config, after: Config) -> list[str]:
    """The arguments that make one config of another, of training's fields."""
    old, new = asdict(before.training), asdict(after.training)
    changed = [f"--config.training.mesh.{axis}={size}" for axis, size in new["mesh"].items()
               if size != old["mesh"][axis]]
    return changed + [f"--config.training.{name}={value}" for name, value in new.items()
                      if name != "mesh" and value != old[name]]


def layout(config: Config, devices: int) -> str:
    """data 4 x fsdp 16, remat full."""
    mesh = asdict(config.training.mesh)
    rest = devices // math.prod(size for size in mesh.values() if size != -1)
    sizes = {axis: rest if size == -1 else size for axis, size in mesh.items()}
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
    return f"{shown or 'one device'}, remat {config.training.remat}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/X.py[:VARIANT]; --config.a.b=VALUE overrides a field")
    parser.add_argument("--topology", required=True, metavar="NAME",
                        help="a slice: v5p:4x4x4 (its shape in chips) or v5p-128 (its accelerator type)")
    parser.add_argument("--slices", type=int, help="such slices, joined by the data-centre network")
    parser.add_argument("--flags", default="default", help=f"compiler flags: {', '.join(FLAG_SETS)}")
    parser.add_argument("--batch_per_chip", type=int, metavar="N", help="sequences a chip, instead of the recipe's")
    parser.add_argument("--quick", action="store_true",
                        help="stop at the scheduled program: a tenth of the time, without the compiler's cycles")
    parser.add_argument("--sweep", action="store_true", help="rank layouts and remat presets")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    piece = find_slice(args.topology)
    config: Config = args.config
    for name in ("slices", "batch_per_chip"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name}={value}: must be above 0")
    slices = args.slices or max(1, config.training.mesh.slice)
    config.training.mesh.slice = slices
    if args.batch_per_chip:
        for phase in config.phases:
            # The budget is in tokens, so that another batch leaves it as it is.
            phase.tokens, phase.steps = _tokens(config, phase.name), None
            phase.global_batch_size = args.batch_per_chip * piece.chips * slices
        validate(config)
    note = _progress if sys.stderr.isatty() else lambda line: None if line.startswith("\r") else _say(line)
    if args.sweep:
        rows = sweep(config, piece, slices, args.flags, note)
        _clear()
        print(json.dumps(rows, indent=1) if args.json else render_sweep(rows))
        return 0
    found = plan(config, piece, slices, args.flags, not args.quick, note)
    fits = found["memory"]["fits"]
    way_out = "" if fits else nearest_fit(config, piece, slices, args.flags, note)
    _clear()
    if fits or args.json:
        print(json.dumps(found, indent=1) if args.json else render(found))
    if not fits:
        took = found["memory"]
        raise UserError(f"--topology={args.topology}: out of memory: {layout(config, piece.devices * slices)} takes "
                        f"{took['used'] / GIB:.1f} of {took['usable'] / GIB:.2f} GiB a device; {way_out}")
    return 0


def _tokens(config: Config, name: str) -> int:
    placed = next(placed for placed in make_plan(config).phases if placed.phase.name == name)
    return placed.steps * placed.phase.global_batch_size * config.data.sequence_length


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress(line: str) -> None:
    """On a terminal the seconds pass in one line."""
    print(f"\r\033[K{line.lstrip(chr(13))}", end="" if line.startswith("\r") else "\n", file=sys.stderr, flush=True)


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
