"""One update of a run: its state, and the jitted step that every process takes together.

What the processes have to tell each other travels with the step, so that all of them learn it at the same step.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crystal_jax import sharding
from crystal_jax.config import Config
from crystal_jax.kernels import choose_kernel
from crystal_jax.model import Crystal, Params, abstract_params
from crystal_jax.optimizer import apply_updates, make_optimizer, moments, with_moments

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    params: Params
    opt_state: optax.OptState


def make_train_step(model: Crystal, optimizer: optax.GradientTransformation, sources: int, accumulate: int = 1,
                    z_loss: float = 0.0) -> jax.stages.Wrapped:
    """The jitted update (state, batch, lr, limits, sequences) -> (state, metrics).

    One whose loss or gradient norm isn't finite, or above its limit, leaves the state as it was.

    accumulate: parts of the batch that gradients are computed of, one after the other; their sum is that of the whole.
    limits float32 [2]: see spikes.py; none without them.
    sequences: the global batch size, if the batch was filled up to what the mesh divides; a constant.
    """

    def measure(params: Params, batch: Batch, sequences: float | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a batch and, per source, its sum and the tokens that it is of."""
        loss, nll_BT = model.bind(params).loss(batch["inputs"], batch["targets"], batch["mask"], batch.get("positions"),
                                               batch.get("segment_ids"), z_loss, sequences)
        from_source_BS = batch["source"][:, None] == jnp.arange(sources)[None, :]

        def per_source(values_BT: jax.Array) -> jax.Array:
            row_B = jnp.sum(values_BT * batch["mask"], axis=1)
            return jnp.sum(jnp.where(from_source_BS, row_B[:, None], 0), axis=0)

        return loss, {"loss": loss, "nll_per_source": per_source(nll_BT),
                      "tokens_per_source": per_source(jnp.ones_like(nll_BT))}

    gradients = jax.grad(measure, has_aux=True)

    def accumulated(params: Params, batch: Batch, sequences: int | None) -> tuple[Params, dict[str, jax.Array]]:
        if accumulate == 1:
            return gradients(params, batch, sequences)

        def add(total: Params, part: Batch) -> tuple[Params, dict[str, jax.Array]]:
            grads, found = gradients(params, part, sequences and sequences / accumulate)
            return jax.tree.map(jnp.add, total, grads), found

        parts = {name: _parts(rows, accumulate) for name, rows in batch.items()}
        grads, found = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        found = jax.tree.map(lambda each: jnp.sum(each, axis=0), found)
        return jax.tree.map(lambda g: g / accumulate, grads), found | {"loss": found["loss"] / accumulate}

    @partial(jax.jit, donate_argnums=0, static_argnames="sequences")
    def train_step(state: TrainState, batch: Batch, lr: jax.Array, limits: jax.Array | None = None,
                   sequences: int | None = None):
        grads, metrics = accumulated(state.params, batch, sequences)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(apply_updates(state.params, updates, lr), opt_state)
        measured = jnp.stack([metrics["loss"], grad_norm])
        taken = jnp.all(jnp.isfinite(measured))
        if limits is not None:
            taken &= jnp.all(measured <= limits)
        new = jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, state)
        return new, metrics | {"grad_norm": grad_norm, "taken": taken}

    return train_step


def _parts(rows: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], of which each device keeps its own rows: part p has every count-th row."""
    split = rows.reshape(-1, count, *rows.shape[1:], out_sharding=sharding.used("batch", *(None,) * rows.ndim))
    return jnp.swapaxes(split, 0, 1)


def lower_step(config: Config, mesh: Mesh, phase: int = 0) -> jax.stages.Lowered:
    """The train step of one of a config's phases, lowered for a mesh of present or described devices.

    Allocates nothing on them.
    """
    model = make_model(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.model, model.specs())
    saved = abstract_state(optimizer, abstract_params(model.specs(), mesh))
    opt_state = with_moments(jax.eval_shape(optimizer.init, saved["params"]), saved["moments"])
    whole = NamedSharding(mesh, P())
    size, T = config.phases[phase].global_batch_size, config.data.sequence_length
    B = sharding.padded(size, sharding.batch_ways(mesh) * config.training.accumulate)

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=sharding.named(mesh, ("batch",)))

    batch = {"inputs": rows(jnp.int32, T), "targets": rows(jnp.int32, T), "mask": rows(jnp.float32, T),
             "source": rows(jnp.int32)}
    if config.data.document_mask:
        batch |= {"positions": rows(jnp.int32, T), "segment_ids": rows(jnp.int32, T)}
    scalars = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for shape in ((), (2,))]
    with jax.set_mesh(mesh):
        step = make_train_step(model, optimizer, len(config.sources), config.training.accumulate,
                               config.training.z_loss)
        return step.lower(TrainState(saved["params"], opt_state), batch, *scalars, size)


def abstract_state(optimizer: optax.GradientTransformation, params: Params) -> dict[str, Any]:
    """Shapes, dtypes and layouts of what is saved of a state, {params, moments}, for those of the parameters."""
    found = moments(jax.eval_shape(optimizer.init, params))

    def laid_out(tree: Params) -> Params:
        return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to.sharding), tree,
                            params)

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(jax.tree.leaves(params)[0].sharding.mesh))
    return {"params": params, "moments": {"count": count, "mu": laid_out(found["mu"]), "nu": laid_out(found["nu"])}}


def make_model(config: Config, mesh: Mesh) -> Crystal:
    """The model as a run computes it on these devices.

    Raises:
      UserError: they lack the kernel of attention that the config asks for.
    """
    training, device = config.training, mesh.devices.flat[0]
    kernel = choose_kernel(training.attention, device.platform, config.data.sequence_length, config.model.head_dim)
    return Crystal(config.model, training.dtype, training.remat, training.unroll, kernel, training.pad_to)


@jax.jit
def add_up(words: jax.Array) -> jax.Array:
    """uint32 [W], the sums of what `sharding.put_words` gave: what the processes say, for all to read.

    A program of its own: inside train_step, the sum depends on nothing there, and the devices of a CPU reached it and
    the other sums in different orders: each waited for the others for ever.
    """
    return jnp.sum(words, axis=0, dtype=jnp.uint32)
