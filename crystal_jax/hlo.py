"""What a scheduled TPU program does, read from the compiler's text: operations in order, their FLOPs and bytes, loops
with their trip counts, and every collective with its devices, its start and its end.

Invariant: standard library only, and every number is per device. The compiler's own cost analysis counts a loop's body
once and a Pallas kernel as nothing; here a body counts as often as it runs and attention kernels by `KERNELS`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

from crystal_jax.hlo_text import Computation, Instruction, read_computations, read_group, read_instruction

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "iota", "async-done", "copy-done"}
"""Operations that move nothing: the last two wait for what an earlier one moves."""

SAME = ("bitcast", "copy")
"""Operations that inside a fusion only give an array another layout; TPU7x has many."""

KERNELS = {"splash_mha_fwd": 2, "splash_mqa_fwd": 2, "splash_mha_dkv": 5, "splash_mqa_dkv": 5}
"""Products of T x S x H that an attention kernel makes for each head: q k and p v; backward both again as four
gradients need them, with the fused kernel q k, dO v, dq, dk, dv."""


@dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int
    """Of the whole array: what all-gather makes, what the others take."""
    group: tuple[int, ...]
    """The first set of devices that take part together, by their place in the mesh."""
    name: str


@dataclass(frozen=True)
class Op:
    """What one device does between two collectives."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: float = 0.0
    prefetched: float = 0.0
    """Bytes that move while something else is computed."""
    cycles: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Start:
    """A collective begins; `waits` for it at once if it is synchronous."""

    collective: Collective
    waits: bool


@dataclass(frozen=True)
class Done:
    name: str


@dataclass(frozen=True)
class Loop:
    trips: int
    body: "tuple[Event, ...]"


Event = Op | Start | Done | Loop


class Program:
    """The computations of a program's text."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        for name, lines, is_entry in read_computations(text):
            found = (read_instruction(line) for line in lines)
            self.computations[name] = Computation({item.name: item for item in found if item})
            self.entry = name if is_entry else self.entry
        if not self.entry:
            raise ValueError("no program: the text has no ENTRY")

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """What a device does, in order."""
        return self.walk(self.entry)

    @cache  # noqa: B019 (a program is read once and dropped)
    def walk(self, name: str) -> tuple[Event, ...]:
        return tuple(event for item in self.computations[name].instructions.values()
                     for event in self._events(item, self.computations[name]))

    def _events(self, item: Instruction, place: Computation) -> Iterator[Event]:
        opcode = item.opcode.removesuffix("-start").removesuffix("-done")
        if item.opcode == "while":
            yield Loop(self.trips(item, place), self.walk(item.named("body")))
        elif item.opcode == "call":
            yield from self.walk(item.named("to_apply"))
        elif item.opcode == "conditional":
            branches = re.findall(r"%([\w.-]+)", item.find(r"branch_computations=\{([^}]*)\}")[1])
            yield from max((self.walk(branch) for branch in branches), key=lambda events: total(events).flops)
        elif opcode in COLLECTIVES and not item.opcode.endswith("-done"):
            yield Start(self.collective(item, place, item.name), waits=not item.opcode.endswith("-start"))
        elif item.opcode in ("send", "recv", "send-done", "recv-done"):
            yield from _exchanged(item, place)
        elif item.opcode in ("async-start", "async-update"):
            yield from self._begun(item, place)
        elif item.opcode.endswith("-done"):
            start = self._start(item, place)
            if start:
                yield Done(start)
        elif item.opcode == "fusion" and (inner := self.inside(item.named("calls"))):
            yield from self._fused(item, place, *inner)
        elif item.opcode not in FREE:
            yield self.op(item, place)

    def _begun(self, item: Instruction, place: Computation) -> Iterator[Event]:
        """An operation apart from the others; it begins where it gets its operands, be it after its own start."""
        start = item
        while start.opcode == "async-update":
            start = place.instructions[start.operands[0]]
        inner = self.inside(start.named("calls"))
        if inner and len(item.operands) > (item is not start):
            yield Start(self.collective(*inner, start.name), waits=False)
        elif not inner and item is start:
            yield self.op(item, place)

    def _fused(self, item: Instruction, place: Computation, inner: Instruction,
               within: Computation) -> Iterator[Event]:
        """A fusion that contains a collective: its start, its end, a product that it goes on beside, or all of it."""
        channel = inner.find(r"channel_id=\d+")[0]
        if item.name.startswith("async-collective-start"):
            yield Start(self.collective(inner, within, channel), waits=False)
        elif item.name.startswith("async-collective-done"):
            yield Done(channel)
        elif item.named("calls").startswith("async_collective_fusion"):
            yield self.op(item, place)
        else:
            whole = self.collective(inner, within, item.name)
            kept = sum(array.bytes for array in item.arrays)
            # A part of a sum is how the compiler writes a reduce-scatter.
            scattered = whole.kind == "all-reduce" and 2 * kept <= whole.bytes
            yield Start(replace(whole, kind="reduce-scatter") if scattered else whole, waits=True)

    def _start(self, item: Instruction, place: Computation) -> str | None:
        """The start of a collective whose end an instruction is."""
        while item.operands and item.operands[0] in place.instructions:
            item = place.instructions[item.operands[0]]
            if item.opcode.endswith("-start"):
                inner = item.opcode == "async-start" and self.inside(item.named("calls"))
                return item.name if inner or item.opcode.removesuffix("-start") in COLLECTIVES else None
        return None

    @cache  # noqa: B019
    def inside(self, name: str) -> tuple[Instruction, Computation] | None:
        """The collective that a computation contains, however deep."""
        place = self.computations.get(name, Computation())
        for item in place.instructions.values():
            if item.opcode in COLLECTIVES:
                return item, place
            called = item.named("calls") or item.named("to_apply") or item.named("called_computations")
            if found := self.inside(called):
                return found
        return None

    def collective(self, item: Instruction, place: Computation, name: str) -> Collective:
        kind = item.opcode.removesuffix("-start")
        taken = sum(array.bytes for operand in item.operands if operand in place.instructions
                    for array in place.instructions[operand].arrays)
        group = read_group(item.text)
        return Collective(kind, taken * (len(group) if kind == "all-gather" else 1), group, name)

    def trips(self, loop: Instruction, place: Computation) -> int:
        """How often a loop runs: its counter goes from a constant to the one that the condition compares it with."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = self.computations[loop.named("condition")]
        limit = [item for item in condition.instructions.values() if item.opcode == "constant"]
        if len(limit) != 1:
            raise ValueError(f"{loop.name}: how often this loop runs isn't in its condition")
        counter = next(item for item in condition.instructions.values() if item.opcode == "get-tuple-element")
        index = int(counter.find(r"index=(\d+)")[1])
        values = place.instructions[loop.operands[0]]
        while values.opcode in ("opt-barrier", "copy"):
            values = place.instructions[values.operands[0]]
        start = place.instructions[values.operands[index]]
        while start.opcode in ("copy", "bitcast"):
            start = place.instructions[start.operands[0]]
        return _constant(limit[0]) - (_constant(start) if start.opcode == "constant" else 0)

    def op(self, item: Instruction, place: Computation) -> Op:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', item.text)
        moved = self.moved(item, place)
        apart = item.opcode in ("copy-start", "async-start")
        return Op(self.flops(item, place), _kernel_flops(item, place), 0 if apart else moved, moved if apart else 0,
                  int(cycles[1]) if cycles else None, item.name)

    def flops(self, item: Instruction, place: Computation) -> float:
        """Of the matrix products in an instruction."""
        if item.opcode == "convolution":
            return convolution_flops(item, place)
        if item.opcode == "fusion":
            return self.fused_flops(item.named("calls"))
        return 0.0

    @cache  # noqa: B019
    def fused_flops(self, name: str) -> float:
        place = self.computations[name]
        return sum(self.flops(item, place) for item in place.instructions.values())

    def moved(self, item: Instruction, place: Computation) -> float:
        """Bytes between HBM and the cores: of arrays that are only sliced or updated in place, the part that is."""
        if item.opcode == "copy-start":
            return max((array.bytes for array in item.arrays), default=0)
        if item.opcode == "async-start":
            return item.arrays[-2].bytes if len(item.arrays) > 2 else item.hbm
        operands = [place.instructions[name] for name in item.operands if name in place.instructions]
        if item.opcode == "custom-call" and "tpu_custom_call" not in item.text:
            return 0.0
        if item.opcode == "dynamic-slice":
            return 2 * item.hbm
        if item.opcode == "dynamic-update-slice":
            return 2 * operands[1].hbm
        if item.opcode == "fusion":
            inner = self.computations[item.named("calls")]
            read = sum(min(operand.hbm, self.read(inner, parameter.name)) if operand.hbm else 0
                       for operand, parameter in zip(operands, inner.parameters, strict=False))
            return read + self.written(inner, item)
        return item.hbm + sum(operand.hbm for operand in operands)

    def read(self, place: Computation, name: str, beyond: Callable[[], float] | None = None) -> float:
        """Bytes of a value that its users in a fused computation look at.

        beyond: what is looked at where the computation's result goes to; without it, all of the result.
        """
        whole = sum(array.bytes for array in place.instructions[name].arrays)
        looked = 0.0
        if place.root.name == name:
            looked += beyond() if beyond else whole
        for user in place.users.get(name, ()):
            if user.opcode == "dynamic-slice":
                looked += sum(array.bytes for array in user.arrays)
            elif user.opcode in SAME:
                looked += self.read(place, user.name, beyond)
            elif user.opcode == "fusion":
                inner, after = self.computations[user.named("calls")], partial(self.read, place, user.name, beyond)
                looked += sum(self.read(inner, inner.parameters[index].name, after)
                              for index, operand in enumerate(user.operands) if operand == name)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(looked, whole)

    def written(self, place: Computation, item: Instruction) -> float:
        """Bytes that a fusion leaves in HBM."""
        roots = [place.root]
        if place.root.opcode == "tuple":
            roots = [place.instructions[name] for name in place.root.operands]
        arrays = item.arrays
        if len(roots) != len(arrays):
            return item.hbm
        return sum(self.updated(place, root, array.bytes)
                   for root, array in zip(roots, arrays, strict=True) if array.hbm)

    def updated(self, place: Computation, root: Instruction, whole: float) -> float:
        """Of an array of `whole` bytes that a computation makes: all of it, or the part that is updated in place."""
        while root.opcode in SAME:
            root = place.instructions[root.operands[0]]
        if root.opcode == "fusion":
            inner = self.computations[root.named("calls")]
            return self.updated(inner, inner.root, whole)
        return place.instructions[root.operands[1]].arrays[0].bytes if root.opcode == "dynamic-update-slice" else whole


def _exchanged(item: Instruction, place: Computation) -> Iterator[Event]:
    """What the devices of one place in each slice do together through their hosts: from its sending to its receipt.

    Its target is written {1,2}x{0:3}: the slices, and the devices of each.
    """
    if item.opcode == "recv-done":
        yield Done(place.instructions[item.operands[0]].find(r'_host_transfer_rendezvous="([^"]*)"')[1])
    elif item.opcode == "send":
        slices, devices = item.find(r'_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"').groups()
        kind = item.find(r'_megascale_transfer_type="(\w+)"')[1].lower().replace("_", "-")
        group = tuple(index * (int(devices) + 1) for index in range(slices.count(",") + 1))
        sent = sum(array.bytes for array in place.instructions[item.operands[0]].arrays)
        yield Start(Collective(kind, sent, group, item.find(r'_host_transfer_rendezvous="([^"]*)"')[1]), waits=False)


def total(events: tuple[Event, ...]) -> Op:
    """The sum over a stretch of a program, loops multiplied; cycles None if the program has none."""
    flops = kernel_flops = moved = prefetched = 0.0
    cycles, known = 0, False
    for event in events:
        times, part = (event.trips, total(event.body)) if isinstance(event, Loop) else (1, event)
        if isinstance(part, Op):
            flops, kernel_flops = flops + times * part.flops, kernel_flops + times * part.kernel_flops
            moved, prefetched = moved + times * part.bytes, prefetched + times * part.prefetched
            cycles, known = cycles + times * (part.cycles or 0), known or part.cycles is not None
    return Op(flops, kernel_flops, moved, prefetched, cycles if known else None)


def convolution_flops(item: Instruction, place: Computation) -> float:
    """Two per product that isn't with a hole or the padding: a batched matrix product is written as a window."""
    labels = item.find(r"dim_labels=(\w+)_(\w+)->(\w+)")
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", item.find(r"window=\{([^}]*)\}|$")[1] or ""))
    left, right = (place.instructions[name].arrays[0].dims for name in item.operands[:2])
    out = item.arrays[0].dims
    products = out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for axis in range(sum(letter.isdigit() for letter in labels[3])):
        def of(key: str, default: str, axis: int = axis) -> str:
            return window[key].split("x")[axis] if key in window else default

        products *= _valid(left[labels[1].index(str(axis))], out[labels[3].index(str(axis))], int(of("size", "1")),
                           int(of("stride", "1")), int(of("pad", "0_0").split("_")[0]), int(of("lhs_dilate", "1")),
                           int(of("rhs_dilate", "1")))
    return 2.0 * products


@cache
def _valid(size: int, out: int, window: int, stride: int, pad: int, dilate: int, window_dilate: int) -> int:
    """Pairs of output and window places that meet an element of the input."""
    return sum((at := o * stride + k * window_dilate - pad) >= 0 and at % dilate == 0 and at // dilate < size
               for o in range(out) for k in range(window))


def _kernel_flops(item: Instruction, place: Computation) -> float:
    """Of an attention kernel that passes over the blocks that its causal mask hides; 0 of any other operation."""
    if item.opcode != "custom-call" or "tpu_custom_call" not in item.text:
        return 0.0
    products = next((count for name, count in KERNELS.items() if name in item.text or name in item.name), None)
    if products is None:
        raise ValueError(f"{item.name}: a Pallas kernel that hlo.KERNELS doesn't know")
    arrays = [place.instructions[name].arrays[0] for name in item.operands]
    q, k = [array for array in arrays if len(array.dims) >= 3 and array.dtype.startswith(("bf", "f"))][:2]
    block = re.search(r'block_q\\*": (\d+)', item.text)
    blocks = q.dims[-2] // int(block[1]) if block else 1
    return 2.0 * products * math.prod(q.dims) * k.dims[-2] * (blocks + 1) / (2 * blocks)


def _constant(item: Instruction) -> int:
    return int(re.findall(r"-?\d+", item.text)[0])
