"""What lies in a device's memory while a compiled step runs, read from the compiler's buffer assignment.

Invariant: standard library only; the parts sum to the bytes that the program takes of HBM, machine code apart.
"""

import re
from dataclasses import dataclass

from crystal_jax.hlo import Program
from crystal_jax.hlo_text import read_arrays

PARTS = ("parameters", "moments", "inputs", "gradients", "activations", "temporaries", "unused")
"""Of a step, where it needs the most: `gradients` are arrays of a parameter's shape (a copy of a weight in the compute
dtype is one too), `activations` what is saved for the backward pass, an array per layer; `temporaries` all else;
`unused` lies between them because arrays have to be where they fit."""

KINDS = (("parameters", r"^state\.params\b"), ("moments", r"\.(?:mu|nu)\b"))
"""Of an argument, by its name in the step."""


@dataclass(frozen=True)
class Value:
    allocation: int
    offset: int
    size: int
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Allocations:
    """HBM of one device: arguments, constants and results by themselves, all else in one block."""

    arguments: dict[int, int]
    """Bytes by number of the argument."""
    constants: int
    temporary: dict[int, int]
    """Bytes by number of the block."""
    values: dict[str, Value]

    @property
    def total(self) -> int:
        return sum(self.arguments.values()) + self.constants + sum(self.temporary.values())


def read_allocations(text: str) -> Allocations:
    """Those of a buffer assignment."""
    arguments: dict[int, int] = {}
    temporary: dict[int, int] = {}
    values, constants = {}, 0
    for block in re.split(r"^allocation ", text, flags=re.M)[1:]:
        head, _, rest = block.partition("\n")
        match = re.match(r"(\d+): size (\d+), (.*)", head)
        assert match, head
        number, size, about = int(match[1]), int(match[2]), match[3]
        if about.startswith(("color", "thread-local")):
            continue
        if argument := re.match(r"parameter (\d+)", about):
            arguments[int(argument[1])] = size
            continue
        if "preallocated-temp" not in about:
            constants += size
            continue
        temporary[number] = size
        for name, bytes_, offset, kind in re.findall(
                r"^ value: <\d+ (\S+?)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$", rest, re.M):
            arrays = read_arrays(kind) if not kind.startswith("(") else []
            dtype, dims = (arrays[0].dtype, arrays[0].dims) if arrays else ("", ())
            values[name.removesuffix("{}")] = Value(number, int(offset), int(bytes_), dtype, dims)
    return Allocations(arguments, constants, temporary, values)


def peak_names(live_ranges: str) -> list[str]:
    """Values that live at the step's fullest moment."""
    _, _, rest = live_ranges.partition("(peak):\n")
    return [name.removesuffix("{}") for name in re.findall(r"^    (\S+): \d+ bytes", rest, re.M)]


def memory(program: Program, assignment: str, live_ranges: str, layers: int) -> dict[str, int]:
    """Bytes on one device by `PARTS`."""
    found = read_allocations(assignment)
    parts = dict.fromkeys(PARTS, 0)
    parts["temporaries"] = found.constants
    names = arguments(program)
    shapes = set()
    for number, size in found.arguments.items():
        name, dims = names.get(number, ("", ()))
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name)), "inputs")
        parts[kind] += size
        if kind == "parameters" and len(dims) > 1:
            shapes |= {dims, dims[1:]}
    used = dict.fromkeys(found.temporary, 0)
    for value in _apart([found.values[name] for name in peak_names(live_ranges) if name in found.values]):
        saved = len(value.dims) > 2 and value.dims[0] == layers
        part = "gradients" if value.dims in shapes else "activations" if saved else "temporaries"
        parts[part] += value.size
        used[value.allocation] += value.size
    parts["unused"] = sum(size - used[number] for number, size in found.temporary.items())
    return parts


def arguments(program: Program) -> dict[int, tuple[str, tuple[int, ...]]]:
    """(name in the step, dims) by number, of the program's arguments."""
    found = {}
    for item in program.computations[program.entry].parameters:
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', item.text)
        dims = item.arrays[0].dims if item.arrays else ()
        found[int(re.findall(r"\d+", item.text)[0])] = (name[1] if name else "", dims)
    return found


def _apart(values: list[Value]) -> list[Value]:
    """The largest first; what overlaps one before it is another name of the same bytes."""
    kept: list[Value] = []
    for value in sorted(values, key=lambda value: -value.size):
        end = value.offset + value.size
        if not any(value.allocation == other.allocation and value.offset < other.offset + other.size
                   and other.offset < end for other in kept):
            kept.append(value)
    return kept
