"""One update of a run: its state, and the jitted step that every process takes together.

What the processes have to tell each other travels with the step, so that all of them learn it at the same step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crystal_jax.model import Crystal, Params
from crystal_jax.optimizer import apply_updates


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    params: Params
    opt_state: optax.OptState


def make_train_step(model: Crystal, optimizer: optax.GradientTransformation, sources: int) -> Callable[..., Any]:
    """The jitted update (state, batch, lr, limits) -> (state, metrics).

    One whose loss or gradient norm isn't finite, or above its limit, leaves the state as it was.

    limits float32 [2]: see spikes.py; none without them.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: dict[str, jax.Array], lr: jax.Array,
                   limits: jax.Array | None = None):
        def loss_fn(params: Params) -> tuple[jax.Array, jax.Array]:
            return model.bind(params).loss(batch["inputs"], batch["targets"], batch["mask"],
                                           batch.get("positions"), batch.get("segment_ids"))

        (loss, nll_BT), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(apply_updates(state.params, updates, lr), opt_state)
        measured = jnp.stack([loss, grad_norm])
        taken = jnp.all(jnp.isfinite(measured))
        if limits is not None:
            taken &= jnp.all(measured <= limits)
        new = jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, state)
        from_source_BS = batch["source"][:, None] == jnp.arange(sources)[None, :]

        def per_source(values_BT: jax.Array) -> jax.Array:
            row_B = jnp.sum(values_BT * batch["mask"], axis=1)
            return jnp.sum(jnp.where(from_source_BS, row_B[:, None], 0), axis=0)

        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "taken": taken,
            "nll_per_source": per_source(nll_BT),
            "tokens_per_source": per_source(jnp.ones_like(nll_BT)),
        }
        return new, metrics

    return train_step


@jax.jit
def add_up(words: jax.Array) -> jax.Array:
    """uint32 [W], the sums of what `sharding.put_words` gave: what the processes say, for all to read.

    A program of its own: inside train_step, the sum depends on nothing there, and the devices of a CPU reached it and
    the other sums in different orders: each waited for the others for ever.
    """
    return jnp.sum(words, axis=0, dtype=jnp.uint32)
