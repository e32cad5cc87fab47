"""The compiler's text of a program: computations of instructions, their types, operands and attributes.

Invariant: standard library only, and nothing is interpreted here but types and groups of devices; hlo.py says what the
instructions do.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
"""Of an element; of the others the name tells it."""


@dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    space: int
    """0 is HBM, 1 the vector memory."""

    @property
    def bytes(self) -> int:
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8

    @property
    def hbm(self) -> int:
        return 0 if self.space else self.bytes


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    text: str
    """All that follows the opcode."""
    root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        return read_arrays(self.type)

    @property
    def hbm(self) -> int:
        return sum(array.hbm for array in self.arrays)

    def find(self, pattern: str) -> re.Match[str]:
        """The attribute of that form.

        Raises:
          ValueError: it has none.
        """
        match = re.search(pattern, self.text)
        if not match:
            raise ValueError(f"{self.name}: no {pattern} in {self.text[:200]}")
        return match

    def named(self, attribute: str) -> str:
        """The computation that an attribute names."""
        match = re.search(rf"\b{attribute}=\{{?%?([\w.-]+)", self.text)
        return match[1] if match else ""


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(item for item in self.instructions.values() if item.root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [item for item in self.instructions.values() if item.opcode == "parameter"]
        return sorted(found, key=lambda item: int(re.findall(r"\d+", item.text)[0]))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for item in self.instructions.values():
            for operand in dict.fromkeys(item.operands):
                found.setdefault(operand, []).append(item)
        return found


def read_arrays(text: str) -> list[Array]:
    """Those of a type, a tuple's in order."""
    found = []
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim),
                           int(space[1]) if space else 0))
    return found


def read_computations(text: str) -> Iterator[tuple[str, list[str], bool]]:
    """(name, a line per instruction, whether it is the entry); attributes may run over several lines."""
    lines: list[str] = []
    name, is_entry = "", False
    for line in text.splitlines():
        if not name:
            if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name, lines, is_entry = match[2], [], bool(match[1])
        elif re.match(r"\}($|, execution_thread)", line):
            yield name, lines, is_entry
            name = ""
        elif re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
            lines.append(line)
        elif lines:
            lines[-1] += line


def read_instruction(line: str) -> Instruction | None:
    """One line; None of a line that is none."""
    match = re.match(r"\s+(ROOT )?%?([\w.-]+) = (\(|\S+ )", line)
    if not match:
        return None
    start = match.start(3)
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    rest = line[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1:close - 1]
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    text = rest[close:] if operands else inside + rest[close:]
    return Instruction(match[2], opcode, line[start:end], operands, text, bool(match[1]))


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"a bracket that isn't closed: {text[start:start + 80]}")


def read_group(text: str) -> tuple[int, ...]:
    """The first of a collective's groups, in any of the ways the compiler writes them."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return tuple(sorted((int(pairs[1]), int(pairs[2]))))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(device) for device in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(_iota(iota[2], iota[3])[:_ints(iota[1])[-1]])
    named = re.search(r"replica_groups=@?\w*mesh\w*\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
                      r"\{([^}]*)\}", text)
    if not named:
        raise ValueError(f"a collective without groups: {text[:200]}")
    # One with a part of an axis, as 'x':(2)4, has that axis cut in three: before it, it, behind it.
    sizes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])]
    wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in
              re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[4])}
    devices = _iota(named[2], named[3]) if named[2] else list(range(math.prod(size for _, size in sizes)))
    places, step = [0], len(devices)
    for name, size in sizes:
        step //= size
        before, part = wanted.get(name, (1, 1))
        part = part or size
        stride = step * (size // (before * part))
        places = [place + stride * index for place in places for index in range(part)]
    return tuple(devices[place] for place in places)


def _iota(dims: str, order: str | None) -> list[int]:
    """0, 1, 2, ... in the shape `dims`, its axes put in `order`, flat."""
    sizes = _ints(dims)
    axes = _ints(order) if order else list(range(len(sizes)))
    strides = [math.prod(sizes[axis + 1:]) for axis in range(len(sizes))]
    places = [0]
    for axis in axes:
        places = [place + strides[axis] * index for place in places for index in range(sizes[axis])]
    return places


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
