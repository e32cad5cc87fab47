"""Where every array lies: the mesh, and one table from a dim's logical name to the mesh axes that split it.

All layout knowledge is here. A change of parallelism changes `STORED` and `USED`, nothing else. Sharding is explicit
(part of each array's type), so that a wrong layout fails when the step is traced, on one CPU as on a pod. Without a
mesh (a script, a unit test) every helper does nothing.
"""

import math
from collections.abc import Sequence

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


def gather(weight: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """A weight as a step uses it: cast to the compute dtype first, so that half the bytes travel, then gathered."""
    weight = weight.astype(dtype)
    spec = used(*axes)
    return weight if spec is None else jax.reshard(weight, spec)


def named(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, stored(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over the batch axes."""
    return {
        name: jax.make_array_from_process_local_data(NamedSharding(mesh, P(STORED["batch"])), rows)
        for name, rows in batch.items()
    }
