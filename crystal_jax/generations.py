"""The one table of TPU generations: names, shapes, hosts, peak figures, prices, compiler flags.

Invariant: planning, utilisation and the launching scripts read it here and nowhere else. The scripts do so by
`python -m crystal_jax.generations v5p-128 --field=hosts`, which needs the standard library only.

Figures: Google's pages of each generation. Prices are estimates: list prices of August 2026 in dollars per chip and
hour, of which spot moves from zone to zone, hence (from, to). A price of None isn't known.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from math import prod

from crystal_jax.errors import UserError


@dataclass(frozen=True)
class Generation:
    """One generation; bandwidths in GB/s (1e9), of ICI per torus axis and in both directions."""

    name: str
    prefix: str  # of its accelerator types
    cores_per_chip: int  # in the number of an accelerator type: 1 where that counts chips
    devices_per_chip: int
    chips_per_host: int
    chips_on_one_host: int  # the largest slice that is one host
    tflops: float  # bfloat16, per chip
    hbm_gib: int
    usable_gib: float  # that the compiler lets a program have on a device; the rest is the runtime's
    cycles_ghz: float  # of its estimates: as many as give a product of 8192 x 8192 matrices 90% of the peak
    hbm_gb_s: float
    ici_gb_s: float
    dcn_gb_s: float  # per chip, to other slices
    torus_dims: int
    largest: int  # chips of the largest slice
    runtime_version: str  # of the virtual machine's image; empty: reached through GKE only
    on_demand: float | None
    spot: tuple[float, float] | None
    chip_config: str  # libtpu's, for compiling without a device
    device_kinds: tuple[str, ...]  # what JAX calls its devices
    gke_accelerator: str
    gke_machine: str


GENERATIONS = {generation.name: generation for generation in (
    Generation(
        name="v4", prefix="v4", cores_per_chip=2, devices_per_chip=1, chips_per_host=4, chips_on_one_host=4,
        tflops=275, hbm_gib=32, usable_gib=30.75, cycles_ghz=1.02, hbm_gb_s=1228, ici_gb_s=90, dcn_gb_s=6.25,
        torus_dims=3, largest=4096, runtime_version="tpu-ubuntu2204-base", on_demand=3.22, spot=(0.92, 0.92),
        chip_config="megacore", device_kinds=("TPU v4",), gke_accelerator="tpu-v4-podslice",
        gke_machine="ct4p-hightpu-4t"),
    Generation(
        name="v5e", prefix="v5litepod", cores_per_chip=1, devices_per_chip=1, chips_per_host=4, chips_on_one_host=8,
        tflops=197, hbm_gib=16, usable_gib=15.75, cycles_ghz=1.54, hbm_gb_s=819, ici_gb_s=90, dcn_gb_s=3.125,
        torus_dims=2, largest=256, runtime_version="v2-alpha-tpuv5-lite", on_demand=1.20, spot=(0.25, 0.60),
        chip_config="default", device_kinds=("TPU v5 lite", "TPU v5e"), gke_accelerator="tpu-v5-lite-podslice",
        gke_machine="ct5lp-hightpu-4t"),
    Generation(
        name="v5p", prefix="v5p", cores_per_chip=2, devices_per_chip=1, chips_per_host=4, chips_on_one_host=4,
        tflops=459, hbm_gib=95, usable_gib=95.74, cycles_ghz=1.75, hbm_gb_s=2765, ici_gb_s=180, dcn_gb_s=6.25,
        torus_dims=3, largest=6144, runtime_version="v2-alpha-tpuv5", on_demand=4.20, spot=(0.93, 1.68),
        chip_config="megacore", device_kinds=("TPU v5p", "TPU v5"), gke_accelerator="tpu-v5p-slice",
        gke_machine="ct5p-hightpu-4t"),
    Generation(
        name="v6e", prefix="v6e", cores_per_chip=1, devices_per_chip=1, chips_per_host=4, chips_on_one_host=8,
        tflops=918, hbm_gib=32, usable_gib=31.25, cycles_ghz=2.24, hbm_gb_s=1638, ici_gb_s=180, dcn_gb_s=12.5,
        torus_dims=2, largest=256, runtime_version="v2-alpha-tpuv6e", on_demand=2.70, spot=(0.57, 1.35),
        chip_config="default", device_kinds=("TPU v6 lite", "TPU v6e"), gke_accelerator="tpu-v6e-slice",
        gke_machine="ct6e-standard-4t"),
    Generation(
        name="tpu7x", prefix="tpu7x", cores_per_chip=2, devices_per_chip=2, chips_per_host=4, chips_on_one_host=4,
        tflops=2307, hbm_gib=192, usable_gib=94.75, cycles_ghz=2.46, hbm_gb_s=7380, ici_gb_s=180, dcn_gb_s=12.5,
        torus_dims=3, largest=9216, runtime_version="", on_demand=None, spot=None, chip_config="default",
        device_kinds=("TPU7x",), gke_accelerator="tpu7x", gke_machine="tpu7x-standard-4t"),
)}

SPARSE_CORE = {f"xla_tpu_enable_sparse_core_collective_offload_{operation}": True for operation in (
    "all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "all_reduce")}

# What a set adds to the compiler's own choice, by generation. None is on unless it is named: `async` hides the layers'
# collectives behind matrix products (39.7 to 0.26 GB exposed a step at 7B), but wrong losses from all-reduces on
# SparseCore have been reported of some versions, so it needs a run's losses compared with and without.
ASYNC = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": False, **SPARSE_CORE,
         "xla_tpu_use_tc_device_shape_on_sc": True, "xla_sc_enable_instruction_fusion": False,
         "xla_sc_disable_megacore_partitioning": True}
FLAG_SETS: dict[str, dict[str, dict[str, bool]]] = {
    "default": {name: {} for name in GENERATIONS},
    "async": {"v5p": ASYNC, "v6e": ASYNC},
}


@dataclass(frozen=True)
class Slice:
    """Chips joined by ICI; `topology` in chips per axis."""

    generation: Generation
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        return prod(self.topology)

    @property
    def accelerator_type(self) -> str:
        """As gcloud takes it, in cores or chips by generation."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores_per_chip}"

    @property
    def hosts(self) -> int:
        generation = self.generation
        return 1 if self.chips <= generation.chips_on_one_host else self.chips // generation.chips_per_host

    @property
    def devices(self) -> int:
        return self.chips * self.generation.devices_per_chip

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes are rings: in 3D all of them, if each is whole cubes of 4; in 2D those of 16."""
        if self.generation.torus_dims == 3:
            return (all(side % 4 == 0 for side in self.topology),) * 3
        return tuple(side == 16 for side in self.topology)

    def dollars_per_hour(self, spot: bool) -> tuple[float, float] | None:
        """(from, to) for the whole slice; None if the price isn't known."""
        price = self.generation.on_demand
        prices = self.generation.spot if spot else (None if price is None else (price, price))
        return prices and (prices[0] * self.chips, prices[1] * self.chips)


def find_slice(name: str) -> Slice:
    """The slice of an accelerator type (v5p-128, v5litepod-16, v5e-16) or a topology (v5p:4x4x4).

    Raises:
        UserError: no such generation, or a shape that it isn't sold in.
    """
    match = re.fullmatch(r"([a-z0-9]+?)(?:-([1-9][0-9]*)|:([1-9][0-9]*(?:x[1-9][0-9]*)+))", name)
    generation = match and _generation(match[1])
    if not match or not generation:
        raise UserError(f"TPU type {name!r}: is a generation and a size, such as v5p-128 (cores), v6e-256 (chips) or "
                        f"v5p:4x4x4 (a topology); generations: {', '.join(GENERATIONS)}")
    sizes = topologies(generation)
    if match[3]:
        topology = tuple(int(side) for side in match[3].split("x"))
        cubes = generation.torus_dims == 3 and all(side % 4 == 0 for side in topology) and (
            prod(topology) <= generation.largest)
        if len(topology) != generation.torus_dims or not (cubes or topology in sizes.values()):
            known = ", ".join("x".join(map(str, shape)) for shape in sizes.values())
            raise UserError(f"TPU topology {name!r}: {generation.name} comes as {known}"
                            f"{' or another of whole cubes, such as 4x4x12' if generation.torus_dims == 3 else ''}")
        return Slice(generation, topology)
    chips, rest = divmod(int(match[2]), generation.cores_per_chip)
    if rest or chips not in sizes:
        known = ", ".join(Slice(generation, shape).accelerator_type for shape in sizes.values())
        raise UserError(f"TPU type {name!r}: {generation.name} comes as {known}"
                        f"{f', or by topology as {generation.name}:4x4x12' if generation.torus_dims == 3 else ''}")
    return Slice(generation, sizes[chips])


def topologies(generation: Generation) -> dict[int, tuple[int, ...]]:
    """Chips to topology of the common slices: doubled from one host up, the smallest side first."""
    if generation.torus_dims == 2:
        first: list[tuple[int, ...]] = [(1, 1), (2, 2)]
    else:
        first = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    shapes, shape = first, first[-1]
    while 2 * prod(shape) <= generation.largest:
        # The last of the smallest sides, which keeps them in order.
        axis = max(index for index, side in enumerate(shape) if side == min(shape))
        shape = tuple(sorted(side * (2 if index == axis else 1) for index, side in enumerate(shape)))
        shapes.append(shape)
    return {prod(shape): shape for shape in shapes}


def find_flags(flag_set: str, generation: Generation) -> dict[str, bool]:
    """The compiler flags of a named set.

    Raises:
        UserError: no such set, or none for this generation.
    """
    sets = [name for name, flags in FLAG_SETS.items() if generation.name in flags]
    if flag_set not in sets:
        raise UserError(f"flag set {flag_set!r}: for {generation.name} there is {', '.join(sets)}")
    return FLAG_SETS[flag_set][generation.name]


def libtpu_arguments(flags: dict[str, bool]) -> str:
    """For LIBTPU_INIT_ARGS: --flag=true --other=false."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())


def by_device_kind(kind: str) -> Generation | None:
    """The generation that JAX names so (`device.device_kind`); None if it is none of these."""
    return next((generation for generation in GENERATIONS.values() if kind in generation.device_kinds), None)


def fields(found: Slice, flag_set: str = "default") -> dict[str, str]:
    """What the scripts ask for, as text: empty where there is none."""
    generation = found.generation
    prices = {name: found.dollars_per_hour(spot) for name, spot in (("on_demand", False), ("spot", True))}
    return {
        "generation": generation.name, "accelerator_type": found.accelerator_type, "chips": str(found.chips),
        "hosts": str(found.hosts), "devices": str(found.devices),
        "chips_per_host": str(found.chips // found.hosts), "topology": "x".join(map(str, found.topology)),
        "runtime_version": generation.runtime_version, "tflops": f"{generation.tflops * found.chips:g}",
        "hbm_gib": str(generation.hbm_gib * found.chips),
        "dollars_per_hour_on_demand": f"{prices['on_demand'][0]:.2f}" if prices["on_demand"] else "",
        "dollars_per_hour_spot": f"{prices['spot'][1]:.2f}" if prices["spot"] else "",
        "gke_accelerator": generation.gke_accelerator, "gke_machine": generation.gke_machine,
        "libtpu_init_args": libtpu_arguments(find_flags(flag_set, generation)),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints one field, or all as NAME=VALUE lines or JSON; exit code 1 and one line for a type that isn't one."""
    parser = argparse.ArgumentParser(prog="python -m crystal_jax.generations", description="Facts of a TPU slice.")
    parser.add_argument("slice", help="an accelerator type (v5p-128) or a topology (v5p:4x4x4)")
    parser.add_argument("--field", help="print this one only")
    parser.add_argument("--flags", default="default", help="the flag set of libtpu_init_args")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        found = fields(find_slice(args.slice), args.flags)
        if args.field is not None and args.field not in found:
            raise UserError(f"--field={args.field}: is one of {', '.join(found)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if args.field is not None:
        print(found[args.field])
    elif args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(f"{name}={value}" for name, value in found.items()))
    return 0


def _generation(prefix: str) -> Generation | None:
    return next((generation for generation in GENERATIONS.values() if prefix in (generation.name, generation.prefix)),
                None)


if __name__ == "__main__":
    sys.exit(main())
