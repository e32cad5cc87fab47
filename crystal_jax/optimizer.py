"""AdamW as Crystal used it: groups by kind of parameter, epsilon before the bias correction.

The learning rate is no part of the optimizer: the recipe's schedule (phases.py) is the only clock, and its value is an
argument of each update. The optimizer's own count is for the bias correction and restarts with fresh moments.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from crystal_jax.config import ModelConfig, OptimizerConfig
from crystal_jax.model import Params, map_specs

# Group -> (learning-rate multiplier, decays). Hidden matrices take lr * width_scale, the muP rule: 0.0625 at 7B.
GROUPS: dict[str, tuple[Any, bool]] = {
    "matrix": (lambda model: model.width_scale, True),
    "embedding": (lambda model: 1.0, True),
    "vector": (lambda model: 1.0, False),
}


def scale_by_adam(beta1: float, beta2: float, eps: float, mu_dtype: str = "float32") -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) * sqrt(1 - beta2^t) / (1 - beta1^t), with m and v the uncorrected moments.

    m is kept in `mu_dtype` between updates; what the update itself uses isn't rounded to it.

    optax.scale_by_adam corrects v before it adds epsilon; on the original optimizer's outputs that order is 100 times
    further off.
    """

    def init(params: Params) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype if p.dtype == jnp.float32 else None), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, jax.tree.map(jnp.zeros_like, params))

    def update(grads: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        assert isinstance(state, optax.ScaleByAdamState)
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m.astype(g.dtype) + (1 - beta1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, grads)
        t = count.astype(jnp.float32)
        correction = jnp.sqrt(1 - beta2**t) / (1 - beta1**t)
        updates = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        kept = jax.tree.map(lambda m, before: m.astype(before.dtype), mu, state.mu)
        return updates, optax.ScaleByAdamState(count, kept, nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, model: ModelConfig, specs: Params) -> optax.GradientTransformation:
    """Updates to subtract after multiplication with the learning rate of the step."""
    decays = map_specs(lambda spec: GROUPS[spec.group][1], specs)
    multiplier = map_specs(lambda spec: GROUPS[spec.group][0](model), specs)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.beta1, config.beta2, config.eps, config.mu_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, scale: u * scale, updates, multiplier)),
    )


def apply_updates(params: Params, updates: Params, lr: jax.Array) -> Params:
    return jax.tree.map(lambda p, u: p - lr * u, params, updates)


def moments(opt_state: optax.OptState) -> dict[str, Any]:
    """Everything the optimizer remembers, as plain data: {count, mu, nu}."""
    return next(part for part in opt_state if isinstance(part, optax.ScaleByAdamState))._asdict()


def with_moments(opt_state: optax.OptState, values: dict[str, Any]) -> optax.OptState:
    """The optimizer state with other moments; the inverse of `moments`."""
    return tuple(part._replace(**values) if isinstance(part, optax.ScaleByAdamState) else part for part in opt_state)
