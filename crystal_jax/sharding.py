"""Where every array lies: the mesh, and one table from a dim's logical name to the mesh axes that split it.

All layout knowledge is here and in products.py, which multiplies by it. A change of parallelism changes `STORED` and
`USED`, nothing else. Sharding is explicit (part of each array's type), so that a wrong layout fails when the step is
traced, on one CPU as on a pod. Without a mesh (a script, a unit test) every helper does nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crystal_jax.config import Config, MeshConfig, ModelConfig
from crystal_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")
"""slice: the slices of a pod, joined by its data-centre network; data: copies of the parameters; fsdp: parameters are
split and gathered where they are used; tensor: heads, MLP and vocabulary are split."""

BATCH = ("slice", "data", "fsdp")
COPIES = ("slice", "data")
"""The axes along which parameters are copies."""

Axes = tuple[str | None, ...]
"""A logical name per dim of a tensor; None for a dim that is never split."""

STORED: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "batch": BATCH,
    "length": None,
    "stream": "tensor",
}
"""How parameters, optimizer state and batches lie between steps; `stream` is the length of the residual stream, which
tensor splits between the products (sequence parallelism)."""

USED = {**STORED, "embed": None}
"""How they lie inside a step: weights are gathered over fsdp where they are used."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of the run; its slices are the pod's, where the devices know theirs.

    Raises:
      UserError: the sizes don't multiply to the number of devices, their slices are others, or an axis can't be laid on
        a slice's torus.
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
    types = (AxisType.Explicit,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices != 1 and sizes[0] != slices:
        raise UserError(f"config.training.mesh.slice: {sizes[0]} must be {slices}, the slices that were found")
    try:
        if slices == 1:
            return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=types)
        grid = mesh_utils.create_hybrid_device_mesh([1, *sizes[1:]], [slices, 1, 1, 1], devices)
    except NotImplementedError as error:
        sides = [1 + max(side) for side in zip(*(device.coords for device in devices), strict=True)]
        torus = "x".join(str(side) for side in sides if side > 1)
        shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"config.training.mesh: {shown} can't be laid on {torus} chips: an axis must be made of whole "
                        f"sides of them; `plan --sweep` lists the meshes that can") from error
    return Mesh(grid, AXES, axis_types=types)


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Refuses sizes that the mesh can't split evenly.

    Raises:
      UserError: the field, its value and the divisor.
    """
    ways, parts = batch_ways(mesh), config.training.accumulate
    for index, phase in enumerate(config.phases):
        size = phase.global_batch_size
        if not config.training.fill_batch:
            added = padded(size, ways * parts) - size
            _divides(f"config.phases[{index}].global_batch_size", size, ways * parts,
                     "slice x data x fsdp" + (f", each {parts} times" if parts > 1 else ""),
                     f", or set config.training.fill_batch=true: {added:,} sequences of nothing are computed with it, "
                     f"{added / size:.1%}")
    check_model_divisible(config.model, mesh, config.training.pad_to)


def check_model_divisible(model: ModelConfig, mesh: Mesh, pad_to: int = 1) -> None:
    _divides("config.model.embed_dim", model.embed_dim, mesh.shape["fsdp"], "fsdp")
    tensor = mesh.shape["tensor"]
    _divides("config.model.num_heads", model.num_heads, tensor, "tensor")
    for name in ("mlp_dim", "vocab_size"):
        if padded(getattr(model, name), pad_to) % tensor:
            _divides(f"config.model.{name}", getattr(model, name), tensor, "tensor",
                     f", or set config.training.pad_to={tensor}: it pads in memory")


def padded(size: int, to: int) -> int:
    """The next multiple of `to`: 11,008 for 10,922 and 32,256 for 32,032 with 256."""
    return -(-size // to) * to


def _divides(path: str, value: int, ways: int, axis: str, otherwise: str = "") -> None:
    if value % ways:
        near = [n for n in (value // ways * ways, -(-value // ways) * ways) if n]
        raise UserError(f"{path}: {value} doesn't divide into {ways} equal parts (mesh axis {axis}); the nearest that "
                        f"do are {' and '.join(map(str, near))}{otherwise}")


def stored(axes: Axes) -> P:
    return P(*(STORED.get(axis) if axis else None for axis in axes))


def used(*axes: str | None) -> P | None:
    """The layout of an activation or a gathered weight inside a step, or None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return P(*(USED.get(axis) if axis else None for axis in axes))


def batch_ways(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Into how many parts a mesh, by default the one that is set, splits a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)


def stream(length: int) -> str:
    """The logical name of the residual stream's length: one that tensor can't split, as of a single token, stays."""
    mesh = jax.sharding.get_abstract_mesh()
    return "length" if mesh.empty or length % mesh.shape["tensor"] else "stream"


def lay(array: jax.Array, *axes: str | None) -> jax.Array:
    """An array moved to the layout in which a step uses it; for a vector of weights that is whole on every device."""
    spec = used(*axes)
    return array if spec is None else jax.reshard(array, spec)


def lay_stored(array: jax.Array, axes: Axes) -> jax.Array:
    """An array moved to another of the layouts that lie between steps."""
    return array if jax.sharding.get_abstract_mesh().empty else jax.reshard(array, stored(axes))


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
        ways = batch_ways(mesh)
        holders = [{device.process_index for device in block} for block in mesh.devices.reshape(ways, -1)]
        held = tuple(block for block in range(ways) if process in holders[block])
        return cls(ways, held, tuple(block for block in held if min(holders[block]) == process))

    def blocks(self, size: int, counted: bool = False) -> list[np.ndarray]:
        """Which rows of a global batch of `size` each block holds: where it doesn't divide, some hold one more."""
        every = np.array_split(np.arange(size), self.ways)
        return [every[block] for block in (self.counted if counted else self.held)]

    def slots(self, size: int, counted: bool = False) -> np.ndarray:
        """The rows of all blocks."""
        return np.concatenate([np.arange(0), *self.blocks(size, counted)])


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], size: int | None = None,
              accumulate: int = 1) -> dict[str, jax.Array]:
    """This process's rows of a global batch of `size`, those of its `Part`, as arrays split over the batch axes.

    Blocks are filled up with zeros, of source -1: none. By default the mesh divides the batch.
    """
    part, layout = Part.of(mesh), NamedSharding(mesh, P(STORED["batch"]))
    size = len(next(iter(batch.values()))) * part.ways // len(part.held) if size is None else size
    share = padded(size, part.ways * accumulate) // part.ways
    ends = np.cumsum([len(block) for block in part.blocks(size)])

    def put(rows: np.ndarray, filling: int) -> jax.Array:
        blocks = np.split(rows, ends[:-1])

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            mine = blocks[part.held.index(_first(index) // share)]
            missing = np.full((share - len(mine), *rows.shape[1:]), filling, rows.dtype)
            return np.concatenate([mine, missing]) if len(missing) else mine

        return jax.make_array_from_callback((share * part.ways, *rows.shape[1:]), layout, block)

    return {name: put(rows, -1 if name == "source" else 0) for name, rows in batch.items()}


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
