"""The optimizer against the original's three steps and against its formula in float64; its groups and its state."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.config import ModelConfig, OptimizerConfig
from crystal_jax.model import Crystal, map_specs
from crystal_jax.optimizer import (
    GROUPS,
    apply_updates,
    make_optimizer,
    moments,
    scale_by_adam,
    with_moments,
)

CONFIG = OptimizerConfig()
Tree = dict[str, Any]

# What the original's float32 knows of a first gradient; Adam divides by it, so that its rounding becomes a step.
KNOWN_TO = 0.01


def plain_adamw(specs: Tree) -> optax.GradientTransformation:
    """optax.adamw, which corrects v before it adds epsilon, with the same groups."""
    decays = map_specs(lambda spec: GROUPS[spec.group][1], specs)
    multiplier = map_specs(lambda spec: GROUPS[spec.group][0](oracle.MODEL), specs)
    return optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(1.0, CONFIG.beta1, CONFIG.beta2, CONFIG.eps, weight_decay=CONFIG.weight_decay, mask=decays),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, scale: -u * scale, updates, multiplier)),
    )


@pytest.fixture(scope="module")
def originals(reference: Path) -> tuple[Tree, Tree, Tree, Tree]:
    """(batch and values, parameters before, metrics of the three steps, parameters after)."""
    found = oracle.load(reference, "f32")
    return found, oracle.published(found, "sd"), *oracle.after_training(reference)


@pytest.fixture(scope="module")
def trained(originals: tuple[Tree, ...]) -> dict[str, tuple[Tree, Tree]]:
    """(metrics, parameters) after the same three steps, by our optimizer and by plain AdamW."""
    found, before, _, _ = originals
    model = Crystal(oracle.MODEL)
    batch = tuple(map(jnp.asarray, oracle.batch(found)))
    step = jax.jit(jax.value_and_grad(lambda params: model.bind(params).loss(*batch)[0]), compiler_options=oracle.QUICK)
    results = {}
    for name, optimizer in {"ours": make_optimizer(CONFIG, oracle.MODEL, model.specs()),
                            "plain": plain_adamw(model.specs())}.items():
        @functools.partial(jax.jit, compiler_options=oracle.QUICK)
        def update(params: Tree, grads: Tree, state: Any, lr: jax.Array, chosen: Any = optimizer) -> tuple[Tree, Any]:
            updates, state = chosen.update(grads, state, params)
            return apply_updates(params, updates, lr), state

        params, state = jax.tree.map(jnp.asarray, before), optimizer.init(before)
        metrics: Tree = {"loss": [], "gnorm": []}
        for i in range(3):
            loss, grads = step(params)
            params, state = update(params, grads, state, jnp.float32(0.012 * (40 + i) / 86))
            metrics["loss"].append(float(loss))
            metrics["gnorm"].append(float(optax.tree.norm(grads)))
        results[name] = metrics, params
    return results


@pytest.fixture(scope="module")
def known(reference: Path) -> Tree:
    """Where the original's own float32 gradient agrees with its float64 one to KNOWN_TO."""
    exact, rounded = (oracle.published(oracle.load(reference, dtype), "grad") for dtype in ("f64", "f32"))
    return jax.tree.map(lambda a, b: np.abs(b - a) <= KNOWN_TO * np.abs(a), exact, rounded)


def furthest(params: Tree, reference: Tree, where: Tree) -> float:
    """Largest difference among the chosen elements."""
    return max(float(np.max(np.abs(a - b), where=chosen, initial=0)) for a, b, chosen in zip(
        *map(jax.tree.leaves, (params, reference, where)), strict=True))


# The original's values


def test_which_elements_float32_does_not_determine(known: Tree) -> None:
    """The key bias where nothing rotates (a true gradient of 0), and five other elements of 157,000."""
    bias = known["layers"]["attn"]["k_bias"]
    rotary = oracle.MODEL.rotary_dim
    assert bias[..., :rotary].all()
    assert not bias[..., rotary:].any()
    others = sum(int((~leaf).sum()) for leaf in jax.tree.leaves(known)) - int((~bias).sum())
    assert others == 5
    assert not known["layers"]["mlp"]["gate"][1, 45, 63], "a gradient of 1e-8, known to 18%"


def test_losses_and_gradient_norms_are_the_originals(originals: tuple[Tree, ...], trained: Tree) -> None:
    metrics = trained["ours"][0]
    assert np.abs(np.array(metrics["loss"]) - originals[2]["loss"]).max() <= 1e-6
    assert np.abs(np.array(metrics["gnorm"]) - originals[2]["gnorm"]).max() <= 1e-6
    np.testing.assert_allclose([0.012 * (40 + i) / 86 for i in range(3)], originals[2]["lr"], 1e-6)


def test_three_steps_are_the_originals(originals: tuple[Tree, ...], trained: Tree, known: Tree) -> None:
    after = originals[3]
    assert furthest(trained["ours"][1], after, known) <= 5e-6
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), originals[1], after)
    assert min(jax.tree.leaves(moved)) > 1e-4, "every leaf has moved"


def test_epsilon_before_the_bias_correction_is_what_decides(originals: tuple[Tree, ...], trained: Tree,
                                                            known: Tree) -> None:
    ours, plain = (furthest(trained[name][1], originals[3], known) for name in ("ours", "plain"))
    assert plain > 10 * ours
    assert plain > 1e-4


# The formula


def formula(grads: np.ndarray) -> np.ndarray:
    """Updates in float64 for gradients [steps, n], epsilon before the correction."""
    m = v = np.zeros(grads.shape[1])
    updates = []
    for t, g in enumerate(grads.astype(np.float64), start=1):
        m = CONFIG.beta1 * m + (1 - CONFIG.beta1) * g
        v = CONFIG.beta2 * v + (1 - CONFIG.beta2) * g**2
        updates.append(m / (np.sqrt(v) + CONFIG.eps) * math.sqrt(1 - CONFIG.beta2**t) / (1 - CONFIG.beta1**t))
    return np.array(updates)


@given(data=st.data(), exponent=st.integers(-10, 3))
def test_adam_is_its_formula(data: st.DataObject, exponent: int) -> None:
    """At every size of gradient: near epsilon it decides the size of the step."""
    number = st.floats(-1, 1, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    rows = st.lists(st.lists(number, min_size=3, max_size=3), min_size=1, max_size=4)
    grads = (10.0**exponent * np.array(data.draw(rows))).astype(np.float32)
    adam = scale_by_adam(CONFIG.beta1, CONFIG.beta2, CONFIG.eps)
    state = adam.init(jnp.zeros(3))
    for grad, expected in zip(grads, formula(grads), strict=True):
        update, state = adam.update(jnp.asarray(grad), state)
        np.testing.assert_allclose(update, expected, rtol=2e-5, atol=1e-7)


# Groups, clipping, state


@pytest.fixture(scope="module")
def specs() -> Tree:
    """Declarations of a small model; its width doesn't matter to the groups."""
    return Crystal(oracle.MODEL).specs()


def one_update(optimizer: optax.GradientTransformation, params: Tree, grads: Tree) -> tuple[Tree, Any]:
    """(updates, state) from fresh moments."""

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def update(params: Tree, grads: Tree) -> tuple[Tree, Any]:
        return optimizer.update(grads, optimizer.init(params), params)

    return update(params, grads)


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
EXPECTED = {**dict.fromkeys(MATRICES, (0.0625, True)), "embed": (1.0, True)}
VECTOR = (1.0, False)
"""(multiplier of the learning rate, decays) of all other leaves."""


def test_groups_at_7b(specs: Tree) -> None:
    """The seven matrices of a layer: lr / 16, decays; the embedding: lr, decays; biases and norms: lr, no decay."""
    assert ModelConfig().width_scale == 0.0625
    optimizer = make_optimizer(CONFIG, ModelConfig(), specs)

    def full(value: float) -> Tree:
        return map_specs(lambda spec: np.full(spec.shape, value, np.float32), specs)

    pull, _ = one_update(optimizer, full(2), full(0))
    # Large enough to be clipped, so that each element of the first update is 1 but for the epsilon.
    step, _ = one_update(optimizer, full(0), full(3))
    for (path, decay), size in zip(jax.tree_util.tree_flatten_with_path(pull)[0], jax.tree.leaves(step), strict=True):
        multiplier, decays = EXPECTED.get(path[-1].key, VECTOR)
        np.testing.assert_allclose(size, multiplier, rtol=1e-5, err_msg=str(path))
        np.testing.assert_allclose(decay, 2 * 0.1 * multiplier * decays, rtol=1e-6, err_msg=str(path))
    assert {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(pull)[0]} >= set(EXPECTED)


@pytest.mark.parametrize(("norm", "kept"), [(0.5, 0.5), (1.0, 1.0), (40.0, 1.0)])
def test_gradients_are_clipped_by_their_norm_over_all_leaves(specs: Tree, norm: float, kept: float) -> None:
    grads = oracle.random_params(specs)
    size = math.sqrt(sum(float((leaf.astype(np.float64) ** 2).sum()) for leaf in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda leaf: leaf * np.float32(norm / size), grads)
    optimizer = make_optimizer(CONFIG, oracle.MODEL, specs)
    _, state = one_update(optimizer, grads, grads)
    seen = moments(state)["mu"]
    assert math.isclose(optax.tree.norm(seen), (1 - CONFIG.beta1) * kept, rel_tol=1e-5)
    assert max(oracle.worst(seen, jax.tree.map(lambda g: (1 - CONFIG.beta1) * kept / norm * g, grads)).values()) <= 1e-8


def test_a_learning_rate_of_zero_changes_nothing(specs: Tree) -> None:
    """The first update of every phase: parameters keep their bits while the moments begin."""
    params = oracle.random_params(specs)
    updates, state = one_update(make_optimizer(CONFIG, oracle.MODEL, specs), params, params)
    after = jax.jit(apply_updates)(params, updates, jnp.float32(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, after))
    assert int(moments(state)["count"]) == 1
    assert all(leaf.any() for leaf in jax.tree.leaves(moments(state)["mu"]))


@pytest.fixture(scope="module")
def small() -> tuple[optax.GradientTransformation, Any, Tree]:
    """(optimizer, its compiled update, parameters that serve as gradients too)."""
    config = ModelConfig(vocab_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, mup_base_width=4)
    specs = Crystal(config).specs()
    optimizer = make_optimizer(CONFIG, config, specs)
    return optimizer, jax.jit(optimizer.update, compiler_options=oracle.QUICK), oracle.random_params(specs)


def test_moments_are_the_whole_memory(small: tuple[Any, ...]) -> None:
    """As plain data and back: the next update has the same bits; {count, mu, nu} as checkpoints name them."""
    optimizer, update, params = small
    _, state = update(params, optimizer.init(params), params)
    kept = jax.tree.map(np.asarray, moments(state))
    assert set(kept) == {"count", "mu", "nu"}
    assert jax.tree.structure(kept["mu"]) == jax.tree.structure(kept["nu"]) == jax.tree.structure(params)
    again = with_moments(optimizer.init(params), kept)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    results = (jax.tree.leaves(update(params, before, params)) for before in (state, again))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_fresh_moments_restart_the_bias_correction(small: tuple[Any, ...]) -> None:
    """A new phase's first update is that of a new run, whatever came before; carried moments give another."""
    optimizer, update, params = small
    first, state = update(params, optimizer.init(params), params)
    for _ in range(3):
        _, state = update(jax.tree.map(lambda g: -3 * g, params), state, params)
    fresh = with_moments(state, moments(optimizer.init(params)))
    assert int(moments(fresh)["count"]) == 0
    restarted, _ = update(params, fresh, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, restarted))
    carried, _ = update(params, state, params)
    assert not np.array_equal(first["embed"], carried["embed"])


def falling(mu_dtype: str, steps: int = 60) -> list[float]:
    """Losses of a small model on one batch, by an optimizer that keeps its first moment in `mu_dtype`."""
    config = ModelConfig(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=48, max_length=16,
                         rotary_dim=4, mup_base_width=16)
    model = Crystal(config)
    optimizer = make_optimizer(OptimizerConfig(mu_dtype=mu_dtype), config, model.specs())
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17))
    batch = (jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.ones((8, 16), jnp.float32))
    gradients = jax.value_and_grad(lambda params: model.bind(params).loss(*batch)[0])

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def step(params: Tree, state: optax.OptState) -> tuple[jax.Array, Tree, optax.OptState]:
        loss, grads = gradients(params)
        updates, state = optimizer.update(grads, state, params)
        return loss, apply_updates(params, updates, jnp.float32(0.01)), state

    params: Any = jax.tree.map(jnp.asarray, oracle.random_params(model.specs()))
    state, losses = optimizer.init(params), []
    for _ in range(steps):
        loss, params, state = step(params, state)
        losses.append(float(loss))
    kept = moments(state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept["mu"])} == {mu_dtype}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept["nu"])} == {"float32"}
    return losses


def test_a_first_moment_in_bfloat16_trains_as_well() -> None:
    """The same losses within half a percent all the way down."""
    wide, half = falling("float32"), falling("bfloat16")
    assert wide[-1] < 0.6 * wide[0], "so that equal losses say something"
    assert wide != half
    np.testing.assert_allclose(half, wide, rtol=5e-3)
