"""Fingerprints: 64 bits per array that say whether its bits are the same, computed where the array lies.

Invariant: the fingerprint of an array depends on its values and their places in it alone, never on mesh, layout,
number of processes or on whether it lies on devices or on the host.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crystal_jax.config import digest
from crystal_jax.errors import HardwareError

# Odd multipliers of xxHash (XXH32): products with them mix all bits upward, the shifts mix them downward.
PLACE, FIRST, SECOND, THIRD = (np.uint32(prime) for prime in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F))
BLOCK = 1 << 16
"""Values of a host array that are taken at once: what they need fits a core's cache."""

Leaves = dict[str, str]
"""Path of a leaf, with dots, to 16 hex digits."""


def dotted(path: tuple[Any, ...]) -> str:
    """layers.mlp.up for a path of jax.tree_util."""
    return ".".join(str(getattr(key, "key", key)) for key in path)


def short(leaves: Leaves) -> str:
    """One hash over the fingerprints of a tree's leaves, 16 hex digits."""
    return digest(leaves)


def fingerprint(tree: Any) -> Leaves:
    """Of every leaf of a tree, which lies on the devices of one mesh (all processes take part) or on the host.

    Raises:
      HardwareError: as Sums.leaves.
    """
    first = next(iter(jax.tree.leaves(tree)))
    if isinstance(first, jax.Array):
        return dispatch(tree).leaves()
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {dotted(path): _hex(_host_sums(np.asarray(leaf))) for path, leaf in found}


@dataclass(frozen=True)
class Sums:
    """Fingerprints under way on the devices."""

    arrays: tuple[jax.Array, ...]
    """Per leaf uint32 [devices, 2]: what each device has of it."""
    names: tuple[str, ...]
    owners: tuple[tuple[Any, ...], ...]
    """Per leaf and device, which part of the leaf it has: equal for copies."""
    devices: tuple[jax.Device, ...]

    def leaves(self) -> Leaves:
        """Waits for them.

        Raises:
          HardwareError: copies of one part that differ, by device, process and leaf.
        """
        found = {}
        for name, owners, array in zip(self.names, self.owners, self.arrays, strict=True):
            sums, copies = np.asarray(array), defaultdict(list)
            for device, part in enumerate(owners):
                copies[part].append(device)
            for same in copies.values():
                if not (sums[same] == sums[same[:1]]).all():
                    raise HardwareError(self._accuse(name, {device: _hex(sums[device]) for device in same}))
            found[name] = _hex(np.sum([sums[same[0]].astype(np.uint64) for same in copies.values()], axis=0))
        return found

    def _accuse(self, name: str, values: dict[int, str]) -> str:
        (usual, times), *others = Counter(values.values()).most_common()
        clear = times > others[0][1]
        wrong = [number for number, value in values.items() if value != usual or not clear]
        shown = ", ".join(f"device {self.devices[number].id} of process {self.devices[number].process_index} has "
                          f"{values[number]}" for number in wrong[:8])
        end = f", the {times} others have {usual}" if clear else ""
        return (f"{name}: copies of it differ: {shown}{end}; the hardware computes or keeps it wrongly: nothing was "
                "saved, the same command goes on from the last state; replace the device if it happens again")


def dispatch(tree: Any) -> Sums:
    """Starts to compute fingerprints of arrays on the devices of one mesh; the arrays may be donated afterwards."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    kinds = [(leaf.sharding.mesh, leaf.sharding.spec, leaf.shape) for _, leaf in found]
    arrays = tuple(_program(mesh, spec)(leaf) for (_, leaf), (mesh, spec, _) in zip(found, kinds, strict=True))
    if jax.process_count() > 1:  # so that each process can read all of it; in one exchange for all leaves
        # Waited for: on CPUs it and an exchange of the next step could each wait for the other's processes.
        arrays = jax.block_until_ready(_everywhere(arrays))
    return Sums(arrays, tuple(dotted(path) for path, _ in found), tuple(_owners(*kind) for kind in kinds),
                tuple(kinds[0][0].devices.flat))


@jax.jit
def _everywhere(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    together = jnp.stack(arrays, axis=1)
    together = jax.reshard(together, NamedSharding(jax.typeof(together).sharding.mesh, P()))
    return tuple(together[:, index] for index in range(len(arrays)))


@functools.lru_cache(maxsize=256)
def _owners(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> tuple[Any, ...]:
    places = NamedSharding(mesh, spec).devices_indices_map(shape)
    return tuple(tuple(each.indices(size)[:2] for each, size in zip(places[device], shape, strict=True))
                 for device in mesh.devices.flat)


@functools.lru_cache(maxsize=64)
def _program(mesh: Mesh, spec: P) -> Callable[[jax.Array], jax.Array]:
    """Array to what each device has of it; one per layout, which compiles in less time than one for a whole tree."""

    def local(shard: jax.Array) -> jax.Array:
        return _device_sums(shard, mesh, spec)[None]

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names), check_vma=False))


def _device_sums(shard: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    """uint32 [2] of a device's part of an array, at the places that it has in the whole."""
    axes = [() if axis is None else axis if isinstance(axis, tuple) else (axis,)
            for axis in (*spec, *[None] * (shard.ndim - len(spec)))]
    place, stride = jnp.zeros(shard.shape, jnp.uint32), 1
    for dim in reversed(range(shard.ndim)):
        part = jnp.uint32(0)
        for axis in axes[dim]:
            part = part * np.uint32(mesh.shape[axis]) + jax.lax.axis_index(axis).astype(jnp.uint32)
        within = jax.lax.broadcasted_iota(jnp.uint32, shard.shape, dim) + part * np.uint32(shard.shape[dim])
        place = place + within * np.uint32(stride & 0xFFFFFFFF)
        stride *= shard.shape[dim] * math.prod(mesh.shape[axis] for axis in axes[dim])
    width = jnp.dtype(f"uint{8 * shard.dtype.itemsize}")
    mixed = _mix(jax.lax.bitcast_convert_type(shard, width).astype(jnp.uint32), place)
    # Both sums in one reduction: as two, XLA keeps what they share in memory, which takes 20 times as long on a CPU.
    return jnp.stack(jax.lax.reduce(mixed, (np.uint32(0), np.uint32(0)), _add, tuple(range(shard.ndim))))


def _add(have: tuple[Any, Any], more: tuple[Any, Any]) -> tuple[Any, Any]:
    return have[0] + more[0], have[1] + more[1]


def _host_sums(array: np.ndarray) -> np.ndarray:
    """uint32 [2] of an array on the host, which may be mapped from a file."""
    total, places = np.zeros(2, np.uint64), np.arange(BLOCK, dtype=np.uint32)
    values = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK].astype(np.uint32)
        mixed = _mix(block, places[: block.size] + np.uint32(start & 0xFFFFFFFF))
        total += [np.sum(each, dtype=np.uint64) for each in mixed]
    return total


def _mix(bits: Any, place: Any) -> tuple[Any, Any]:
    """Two uint32 per value, in numpy or JAX: for its place each is a one-to-one function of its bits.

    The first is MurmurHash3's fmix32 with other multipliers: each bit changes every other one half of the time, so that
    changes of two values, also of their signs alone, make up for each other in neither sum but by chance.
    """
    mixed = bits ^ place * PLACE
    mixed = (mixed ^ mixed >> np.uint32(16)) * FIRST
    mixed = (mixed ^ mixed >> np.uint32(13)) * SECOND
    mixed = mixed ^ mixed >> np.uint32(16)
    other = mixed * THIRD
    return mixed, other ^ other >> np.uint32(15)


def _hex(sums: np.ndarray) -> str:
    high, low = (int(each) & 0xFFFFFFFF for each in sums)
    return f"{high:08x}{low:08x}"
