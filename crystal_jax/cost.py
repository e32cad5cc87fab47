"""How long a compiled step should take, and what the recipe then costs: a prediction, with every assumption stated.

Invariant: a device does one thing after the other, as the program has them; its collectives use the network one after
the other, and it waits where the program waits for one that isn't there yet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from crystal_jax.generations import Generation, Slice
from crystal_jax.hlo import Collective, Done, Event, Loop, Op, Start

ASSUMED = {
    "matrix": 0.86,
    "memory": 0.57,
    "kernel": 0.5,
    "network": 0.8,
}
"""Shares of the peak rates: of matrix products and of memory, where the compiler's cycles aren't at hand (fitted to
them at 7B: within 5% on v4 and v5p, 10% on the others); of Pallas kernels, for which it has no cycles; of the links."""

GIB = 2**30
REDUCING = ("all-reduce",)
"""Collectives that pass an array over the links twice."""


@dataclass(frozen=True)
class Traffic:
    """One row of the table of collectives: one kind on one set of mesh axes; GB (1e9) a chip and step."""

    kind: str
    axis: str
    devices: int
    gb: float = 0.0
    synchronous_gb: float = 0.0
    bare_gb: float = 0.0
    """Begun early, but without a matrix product between its start and its end."""
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Spent waiting for it."""

    def plus(self, other: "Traffic", times: float = 1.0) -> "Traffic":
        names = ("gb", "synchronous_gb", "bare_gb", "seconds", "exposed_seconds")
        return replace(self, **{name: getattr(self, name) + times * getattr(other, name) for name in names})


@dataclass
class Timeline:
    """One pass over a stretch of a program, in seconds."""

    seconds: float = 0.0
    computing: float = 0.0
    kernels: float = 0.0
    products: bool = False
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def add(self, row: Traffic, times: float = 1.0) -> None:
        key = (row.kind, row.axis)
        self.traffic[key] = self.traffic.get(key, Traffic(row.kind, row.axis, row.devices)).plus(row, times)

    @property
    def exposed(self) -> float:
        return sum(row.exposed_seconds for row in self.traffic.values())


@dataclass(frozen=True)
class Machine:
    """What a program is timed on: devices of a slice, by their places."""

    piece: Slice
    mesh: dict[str, int]
    places: Sequence[Sequence[int]]
    """Slice, coordinates and core of each device, in the mesh's order."""

    @property
    def generation(self) -> Generation:
        return self.piece.generation

    @property
    def peak(self) -> float:
        """FLOP/s of one device."""
        return self.generation.tflops * 1e12 / self.generation.devices_per_chip

    def seconds(self, op: Op) -> tuple[float, float]:
        """(by the core, by Pallas kernels) of one operation."""
        if op.cycles is not None:
            computing = op.cycles / (self.generation.cycles_ghz * 1e9)
        else:
            memory = self.generation.hbm_gb_s * 1e9 / self.generation.devices_per_chip
            computing = op.flops / (ASSUMED["matrix"] * self.peak) + op.bytes / (ASSUMED["memory"] * memory)
        return (0.0 if op.kernel_flops else computing), op.kernel_flops / (ASSUMED["kernel"] * self.peak)

    def axis(self, group: Sequence[int]) -> str:
        """The mesh axes along which a group's devices differ: data+fsdp."""
        sizes, names = list(self.mesh.values()), []
        for index, name in enumerate(self.mesh):
            stride = math.prod(sizes[index + 1:])
            if len({device // stride % sizes[index] for device in group}) > 1:
                names.append(name)
        return "+".join(names) or "none"

    def transfer(self, collective: Collective) -> float:
        """Seconds of a collective that has the network for itself: rings along each side of the torus it spans."""
        places = [self.places[device] for device in collective.group]
        slices = len({place[0] for place in places})
        times = 2 if collective.kind in REDUCING else 1
        inside = len(places) // slices

        def travels(size: float, ways: int) -> float:
            return times * size * (ways - 1) / ways

        if collective.kind == "collective-permute":
            return collective.bytes / (self.links(places) if slices == 1 else self.network)
        local = travels(collective.bytes, inside) / self.links(places) if inside > 1 else 0.0
        return local + travels(collective.bytes / inside, slices) / self.network

    def leaves(self, collective: Collective) -> bool:
        """Whether it goes to other slices."""
        return len({self.places[device][0] for device in collective.group}) > 1

    @property
    def network(self) -> float:
        """Bytes a second of one device to other slices."""
        return ASSUMED["network"] * self.generation.dcn_gb_s * 1e9 / self.generation.devices_per_chip

    def links(self, places: Sequence[Sequence[int]]) -> float:
        """Bytes a second of one device along the sides of the torus in which these places differ."""
        rate = 0.0
        for side, length in enumerate(self.piece.topology):
            spread = len({place[1 + side] for place in places})
            if spread > 1:
                # What isn't a whole ring goes and comes on the same links.
                rate += self.generation.ici_gb_s * (1.0 if spread == length and self.piece.wrap[side] else 0.5)
        return ASSUMED["network"] * max(rate, self.generation.ici_gb_s) * 1e9 / self.generation.devices_per_chip


def timeline(events: Sequence[Event], machine: Machine) -> Timeline:
    """How a device passes through a program."""
    line, free = Timeline(), [0.0, 0.0]  # of the slice's own links, and of the network between slices
    pending: dict[str, tuple[Collective, float, bool]] = {}

    def finish(collective: Collective, ready: float, kind: str) -> None:
        gb = collective.bytes / 1e9
        exposed = max(0.0, ready - line.seconds)
        line.seconds = max(line.seconds, ready)
        line.add(Traffic(collective.kind, machine.axis(collective.group), len(collective.group), gb,
                         gb * (kind == "synchronous"), gb * (kind == "bare"), machine.transfer(collective), exposed))

    for event in events:
        if isinstance(event, Start):
            leaves = machine.leaves(event.collective)
            free[leaves] = ready = max(line.seconds, free[leaves]) + machine.transfer(event.collective)
            if event.waits:
                finish(event.collective, ready, "synchronous")
            else:
                pending[event.collective.name] = (event.collective, ready, False)
        elif isinstance(event, Done):
            if event.name in pending:
                collective, ready, hidden = pending.pop(event.name)
                finish(collective, ready, "hidden" if hidden else "bare")
        else:
            part, times = _pass(event, machine)
            line.seconds += times * part.seconds
            line.computing += times * part.computing
            line.kernels += times * part.kernels
            line.products = line.products or part.products
            for row in part.traffic.values():
                line.add(row, times)
            if part.products:
                pending = {name: (collective, ready, True) for name, (collective, ready, _) in pending.items()}
    for collective, _, hidden in pending.values():
        # Its end lies in the next pass of the loop.
        finish(collective, line.seconds, "hidden" if hidden or line.products else "bare")
    return line


def _pass(event: Op | Loop, machine: Machine) -> tuple[Timeline, int]:
    if isinstance(event, Loop):
        return timeline(event.body, machine), event.trips
    computing, kernels = machine.seconds(event)
    return Timeline(computing + kernels, computing, kernels, bool(event.flops or event.kernel_flops)), 1


def prices(piece: Slice, slices: int, seconds: float) -> dict[str, Any]:
    """Dollars of so many seconds, {on_demand, spot}: (from, to), None where the price isn't known."""
    def dollars(spot: bool) -> list[float] | None:
        hourly = piece.dollars_per_hour(spot)
        return hourly and [price * slices * seconds / 3600 for price in hourly]

    return {"on_demand": dollars(False), "spot": dollars(True)}


