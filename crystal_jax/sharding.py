"""Where every array lies: the mesh, and one table from a dim's logical name to the mesh axes that split it.

All layout knowledge is here. A change of parallelism changes `STORED` and `USED`, nothing else. Sharding is explicit
(part of each array's type), so that a wrong layout fails when the step is traced, on one CPU as on a pod. Without a
mesh (a script, a unit test) every helper does nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crystal_jax.config import Config, MeshConfig, ModelConfig
from crystal_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]
"""A logical name per dim of a tensor; None for a dim that is never split."""

STORED: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "batch": ("data", "fsdp"),
    "length": None,
}
"""How parameters, optimizer state and batches lie between steps."""

USED = {**STORED, "embed": None}
"""How they lie inside a step: weights are gathered over fsdp where they are used."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of the run.

    Raises:
      UserError: the sizes don't multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise UserError(f"config.training.mesh: {shown}: only one axis can be -1")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(f"config.training.mesh: {shown} doesn't fit {len(devices)} devices; the sizes must multiply to "
                        f"{len(devices)}, with -1 for the axis that takes what is left")
    return jax.make_mesh(tuple(sizes), AXES, devices=devices)


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Refuses sizes that the mesh can't split evenly.

    Raises:
      UserError: the field, its value and the divisor.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for index, phase in enumerate(config.phases):
        _divides(f"config.phases[{index}].global_batch_size", phase.global_batch_size, ways, "data x fsdp")
    check_model_divisible(config.model, mesh)


def check_model_divisible(model: ModelConfig, mesh: Mesh) -> None:
    _divides("config.model.embed_dim", model.embed_dim, mesh.shape["fsdp"], "fsdp")
    for name in ("num_heads", "mlp_dim", "vocab_size"):
        _divides(f"config.model.{name}", getattr(model, name), mesh.shape["tensor"], "tensor")


def _divides(path: str, value: int, ways: int, axis: str) -> None:
    if value % ways:
        near = [n for n in (value // ways * ways, -(-value // ways) * ways) if n]
        raise UserError(f"{path}: {value} doesn't divide into {ways} equal parts (mesh axis {axis}); the nearest that "
                        f"do are {' and '.join(map(str, near))}")


def stored(axes: Axes) -> P:
    return P(*(STORED.get(axis) if axis else None for axis in axes))


def used(*axes: str | None) -> P | None:
    """The layout of an activation or a gathered weight inside a step, or None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return P(*(USED.get(axis) if axis else None for axis in axes))


def batch_ways() -> int:
    """Into how many parts a batch is split, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


def lay(array: jax.Array, *axes: str | None) -> jax.Array:
    """An activation moved to another layout."""
    spec = used(*axes)
    return array if spec is None else jax.reshard(array, spec)


def gather(weight: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """A weight as a step uses it: cast to the compute dtype first, so that half the bytes travel, then gathered."""
    return lay(weight.astype(dtype), *axes)


def named(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, stored(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


@dataclass(frozen=True)
class Part:
    """The rows of a global batch that lie on this process's devices, as blocks: the mesh cuts a batch into `ways`.

    Processes that differ only along `tensor` hold the same blocks, and a mesh that follows a pod's wiring may give a
    host blocks that don't adjoin.
    """

    ways: int
    held: tuple[int, ...]
    """In the order of their rows."""
    counted: tuple[int, ...]
    """Those of them that no process before this one holds, so that a sum over processes has each row once."""

    @classmethod
    def of(cls, mesh: Mesh, process: int | None = None) -> "Part":
        """That of a process, by default of this one."""
        process = jax.process_index() if process is None else process
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        holders = [{device.process_index for device in block} for block in mesh.devices.reshape(ways, -1)]
        held = tuple(block for block in range(ways) if process in holders[block])
        return cls(ways, held, tuple(block for block in held if min(holders[block]) == process))

    def slots(self, size: int, counted: bool = False) -> np.ndarray:
        """Which rows of a global batch of `size` these are."""
        return np.arange(size).reshape(self.ways, -1)[list(self.counted if counted else self.held)].reshape(-1)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch, those of its `Part`, as global arrays that are split over the batch axes."""
    part, layout = Part.of(mesh), NamedSharding(mesh, P(STORED["batch"]))

    def put(rows: np.ndarray) -> jax.Array:
        share = len(rows) // len(part.held)

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            at = part.held.index(_first(index) // share)
            return rows[at * share : (at + 1) * share]

        return jax.make_array_from_callback((share * part.ways, *rows.shape[1:]), layout, block)

    return {name: put(rows) for name, rows in batch.items()}


def put(layout: NamedSharding, value: np.ndarray) -> jax.Array:
    """An array that every process has whole, laid out; jax.device_put would first compare it between the processes."""
    return jax.make_array_from_callback(value.shape, layout, lambda index: value[index or ()])


def put_words(mesh: Mesh, words: np.ndarray) -> jax.Array:
    """uint32 [devices, W]: `words` [W] in the row of this process's first device and zeros in its others.

    The sum over the rows is the sum over the processes.
    """
    devices = list(mesh.devices.flat)
    first = next(i for i, device in enumerate(devices) if device.process_index == jax.process_index())

    def row(index: tuple[slice, ...] | None) -> np.ndarray:
        return words[None] * np.uint32(_first(index) == first)

    return jax.make_array_from_callback((len(devices), len(words)), NamedSharding(mesh, P(AXES)), row)


def _first(index: tuple[slice, ...] | None) -> int:
    """The first row of a shard."""
    return (index[0].start or 0) if index else 0
