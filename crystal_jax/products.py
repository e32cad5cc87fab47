"""Products with split weights: each device gathers what it needs of a weight, cast first, and its gradient goes back.

Invariant: a weight is gathered inside `shard_map`. Only there does its gradient come back reduce-scattered over fsdp
(each device sums the share that it stores) and is then summed over the copies; a resharded weight's gradient is
all-reduced whole, with twice the bytes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from crystal_jax import sharding
from crystal_jax.sharding import BATCH, COPIES, Axes


def on_devices(local: Callable[..., Any], in_specs: Any, out_specs: Any, *operands: Any, check_vma: bool = True) -> Any:
    """local(*operands) on the parts that each device holds, or on the whole without a mesh.

    check_vma: whether JAX follows which axes a value varies along, which a Pallas kernel doesn't tell it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return local(*operands)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)(*operands)


def whole(weight: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Inside `on_devices`: this device's part of a weight, gathered over fsdp; half the bytes travel in bfloat16."""
    weight = weight.astype(dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    weight = jax.lax.pcast(weight, COPIES, to="varying")
    return jax.lax.all_gather(weight, "fsdp", axis=axes.index("embed"), tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum(x, y), summed up in float32 or wider and then rounded to x's dtype; its gradients likewise.

    Every dim of x is in y or in the result, and every dim of y in x or in the result. Accelerators sum so whatever they
    are asked for; a CPU multiplies bfloat16 as such, at twice float32's rate, where float32 comes out, and converts it
    first where bfloat16 does.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=wide).astype(x.dtype)


def _product_forward(equation: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(equation, x, y), (x, y)


def _product_backward(equation: str, kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    (of_x, of_y), of_result = (side.split(",") for side in equation.split("->"))
    x, y = kept
    return product(f"{of_result[0]},{of_y}->{of_x}", grad, y), product(f"{of_x},{of_result[0]}->{of_y}", x, grad)


product.defvjp(_product_forward, _product_backward)


def spread(array: jax.Array) -> Sequence[str | tuple[str, ...] | None]:
    """The mesh axes of each dim of an array, by its type."""
    spec = jax.typeof(array).sharding.spec
    return [*spec, *(None,) * (array.ndim - len(spec))]


def tensor_ways() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["tensor"]


def products(equation: str, x: jax.Array, weights: Sequence[jax.Array], axes: Axes, out: Axes,
             dtype: jnp.dtype | None = None) -> list[jax.Array]:
    """einsum(x, weight) of each weight, in x's dtype or summed up in `dtype`.

    axes: how the weights lie, all alike. out: how the results do. A length that tensor splits is gathered once for all
    weights; a sum that goes over a split dim is summed over tensor, straight into a split length where `out` says so.
    """
    inputs, result = equation.split("->")
    letters = inputs.split(",")[1]
    split = [letter for letter, axis in zip(letters, axes, strict=True) if axis and sharding.USED[axis] == "tensor"]
    if not split:  # what comes out is the same on all of tensor, so what goes in must be, too
        x = sharding.lay(x, *("batch" if part == BATCH else None for part in spread(x)))
    stream = [dim for dim, part in enumerate(spread(x)) if part == "tensor" and inputs[dim] in result]
    summed = bool(split) and split[0] not in result

    def local(x: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        for dim in stream:
            x = jax.lax.all_gather(x, "tensor", axis=dim, tiled=True)
        found = [_product(equation, x, whole(weight, axes, x.dtype), dtype) for weight in weights]
        return [_sum_over_tensor(value, out) for value in found] if summed else found

    return on_devices(local, (P(*spread(x)), *(sharding.stored(axes) for _ in weights)),
                      [sharding.used(*out)] * len(weights), x, *weights)


def _product(equation: str, x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    if dtype is not None:
        return jnp.einsum(equation, x, weight, preferred_element_type=dtype)
    if not jax.sharding.get_abstract_mesh().empty:  # where one varies and the other doesn't, its gradient is a sum
        axes = [jax.typeof(array).manual_axis_type.varying for array in (x, weight)]
        x, weight = (jax.lax.pcast(array, tuple(frozenset().union(*axes) - own), to="varying")
                     for array, own in zip((x, weight), axes, strict=True))
    return product(equation, x, weight)


def _sum_over_tensor(value: jax.Array, out: Axes) -> jax.Array:
    if tensor_ways() == 1 and jax.sharding.get_abstract_mesh().empty:
        return value
    if "stream" in out:
        return jax.lax.psum_scatter(value, "tensor", scatter_dimension=out.index("stream"), tiled=True)
    return jax.lax.psum(value, "tensor")


def rows(table: jax.Array, axes: Axes, ids_BT: jax.Array, out: Axes, dtype: jnp.dtype) -> jax.Array:
    """Rows [B, T, D] of a table [V, D], cast to `dtype`; the gradient of a row is summed up in float32 or wider."""

    def local(table: jax.Array, ids_BT: jax.Array) -> jax.Array:
        table = whole(table, axes, dtype)
        if axes[0] is None or sharding.USED[axes[0]] is None:
            return _take(table, ids_BT, len(table))
        ids_BT = ids_BT - first_of(len(table))
        mine_BT = (ids_BT >= 0) & (ids_BT < len(table))
        found_BTD = jnp.where(mine_BT[..., None], _take(table, jnp.where(mine_BT, ids_BT, 0), len(table)), 0)
        return _sum_over_tensor(found_BTD, out)

    ids_BT = sharding.lay(ids_BT, "batch", "length")  # a prompt that is the same in all rows lies anywhere
    return on_devices(local, (sharding.stored(axes), sharding.used("batch", "length")), sharding.used(*out), table,
                      ids_BT)


def first_of(share: int) -> jax.Array | int:
    """Inside `on_devices`: the first row of this device's share of a dim that tensor splits."""
    return 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index("tensor") * share


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(table: jax.Array, ids_BT: jax.Array, size: int) -> jax.Array:
    return table[ids_BT]


def _take_forward(table: jax.Array, ids_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    return table[ids_BT], ids_BT


def _take_backward(size: int, ids_BT: jax.Array, grad_BTD: jax.Array) -> tuple[jax.Array, None]:
    """A frequent token's gradient has thousands of terms, of which bfloat16 would lose all but the first hundreds."""
    wide = grad_BTD.astype(jnp.promote_types(grad_BTD.dtype, jnp.float32)).reshape(-1, grad_BTD.shape[-1])
    summed = jax.ops.segment_sum(wide, ids_BT.reshape(-1), size)
    return summed.astype(grad_BTD.dtype), None


_take.defvjp(_take_forward, _take_backward)
