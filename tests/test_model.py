"""The transformer against the original's values, and what must hold of any of its kind: causality, isolation, init."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from crystal_jax import attention as attention_module
from crystal_jax import recipe, sharding
from crystal_jax.config import MeshConfig, ModelConfig
from crystal_jax.kernels import Seen, attention, make_seen
from crystal_jax.layers import project, rotary_tables
from crystal_jax.model import Crystal, init_params, is_spec, map_specs, parameter_count, truncated_normal

SMALL = ModelConfig(vocab_size=40, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=16, rotary_dim=4,
                    mup_base_width=8)
TOLERANCE = {"f32": 1e-5, "f64": 1e-6}
"""Of the logits; the original computes some of its float64 model in float32."""


@pytest.fixture(scope="module")
def originals(reference: Path) -> dict[str, dict[str, np.ndarray]]:
    return {dtype: oracle.load(reference, dtype) for dtype in ("f32", "f64")}


Gradients = Callable[..., tuple[float, np.ndarray, dict[str, Any]]]


@pytest.fixture(scope="module")
def gradients(originals: dict[str, dict[str, np.ndarray]]) -> Gradients:
    """gradients(f32 or f64, remat, unroll, compute dtype) -> (loss, nll, gradients) on the original's batch."""

    @functools.cache
    def compute(values: str, remat: str = "none", unroll: int = 1, dtype: str = "") -> tuple[Any, ...]:
        found = originals[values]
        model = Crystal(oracle.MODEL, dtype or {"f32": "float32", "f64": "float64"}[values], remat, unroll)

        def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
            return model.bind(params).loss(*map(jnp.asarray, oracle.batch(found)))

        with jax.enable_x64(values == "f64"):
            step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=oracle.QUICK)
            (value, nll), grads = step(oracle.published(found, "sd"))
        return float(value), np.asarray(nll), jax.tree.map(np.asarray, grads)

    return compute


@pytest.fixture(scope="module", params=["f32", "f64"])
def inside(request: pytest.FixtureRequest, originals: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """The original's values and ours: logits, the stream before and after each layer, q, k, v and mixed of each."""
    found = originals[request.param]
    ids = found["input_ids"]
    model = Crystal(oracle.MODEL, {"f32": "float32", "f64": "float64"}[request.param])
    seen: list[tuple[jax.Array, ...]] = []

    def recorded(q: jax.Array, k: jax.Array, v: jax.Array, where: Seen, power: float) -> jax.Array:
        seen.append((q, k, v, attention(q, k, v, where, power)))
        return seen[-1][-1]

    def walk(params: dict[str, Any]) -> dict[str, Any]:
        bound = model.bind(params)
        rotary = rotary_tables(oracle.MODEL, jnp.arange(ids.shape[1])[None, :], jnp.dtype(model.dtype))
        streams = [bound.embedded(ids, jnp.arange(ids.shape[1])[None, :])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_module, "attention", recorded)
            for layer in range(oracle.MODEL.num_layers):
                block = jax.tree.map(lambda leaf, i=layer: leaf[i], bound.layers)
                streams.append(block(streams[-1], rotary, make_seen("xla", ids.shape[1]))[0])
        return {"logits": bound(ids), "streams": streams, "normed": bound.final_norm(streams[-1]), "attention": seen}

    with jax.enable_x64(request.param == "f64"):
        # float32 as a run compiles it, with all optimisations.
        options = {"f32": None, "f64": oracle.QUICK}[request.param]
        ours = jax.tree.map(np.asarray, jax.jit(walk, compiler_options=options)(oracle.published(found, "sd")))
    return {**ours, "original": found, "tolerance": TOLERANCE[request.param]}


# The original's values


def test_logits_are_the_originals(inside: dict[str, Any]) -> None:
    assert np.abs(inside["logits"] - inside["original"]["logits"]).max() <= inside["tolerance"]
    assert inside["original"]["logits"].std() > 0.5


def test_the_stream_is_the_originals_at_every_layer(inside: dict[str, Any]) -> None:
    """The original keeps the last stream only after the final norm."""
    for layer, ours in enumerate([*inside["streams"][:-1], inside["normed"]]):
        theirs = inside["original"][f"hidden/{layer}"]
        assert np.abs(ours - theirs).max() <= inside["tolerance"] * np.abs(theirs).max(), layer


def test_attention_is_the_originals(inside: dict[str, Any]) -> None:
    """Probabilities from the module's own q and k are the original's, and `attention` mixes v by them."""
    for layer, (q, k, v, mixed) in enumerate(inside["attention"]):
        scores = np.einsum("bnth,bnsh->bnts", q, k) / oracle.MODEL.head_dim
        scores = np.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        assert np.abs(weights - inside["original"][f"attn/{layer}"]).max() <= inside["tolerance"] / 5
        assert np.abs(weights @ v - mixed).max() <= inside["tolerance"]


@pytest.mark.parametrize("values", ["f32", "f64"])
def test_loss_and_gradients_are_the_originals(originals: dict[str, Any], gradients: Gradients, values: str) -> None:
    found = originals[values]
    loss, nll, grads = gradients(values)
    mask = found["loss_mask"]
    assert 0 < mask.mean() < 1, "masked tokens stay in the denominator"
    assert abs(loss - found["loss_cerebras"]) <= 1e-6
    assert abs((nll * mask).sum() / mask.size - loss) <= 1e-6
    differences = oracle.worst(grads, oracle.published(found, "grad"), relative=True)
    limit = {"f32": 1e-4, "f64": 1e-6}[values]
    assert max(differences.values()) <= limit, differences


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("none", 3)])
def test_remat_and_unrolling_change_rounding_only(gradients: Gradients, remat: str, unroll: int) -> None:
    loss, _, grads = gradients("f32")
    other_loss, _, other_grads = gradients("f32", remat, unroll)
    assert abs(loss - other_loss) <= 1e-6
    assert max(oracle.worst(other_grads, grads, relative=True).values()) <= 1e-5


def test_bfloat16_stays_near_float32(gradients: Gradients) -> None:
    """bf16 has 8 bits: 0.4% a rounding. Gradients of float32 masters are float32."""
    loss, nll, grads = gradients("f32")
    half_loss, half_nll, half_grads = gradients("f32", dtype="bfloat16")
    assert 0 < abs(half_loss - loss) <= 2e-3 * loss
    assert np.abs(half_nll - nll).max() <= 0.05
    for whole, half in zip(jax.tree.leaves(grads), jax.tree.leaves(half_grads), strict=True):
        assert half.dtype == np.float32
        assert np.vdot(whole, half) >= 0.999 * np.linalg.norm(whole) * np.linalg.norm(half)


def test_a_key_bias_has_no_gradient_where_nothing_rotates(gradients: Gradients) -> None:
    """It shifts all scores of a query alike there; Adam would turn its rounding noise into drift."""
    bias = np.abs(gradients("f64")[2]["layers"]["attn"]["k_bias"])
    rotary = oracle.MODEL.rotary_dim
    assert bias[..., rotary:].max() <= 1e-15
    assert bias[..., :rotary].min() >= 1e-7


# What the parameters are


def test_the_parameters_of_a_layer() -> None:
    D, N, H, F, L, V = 16, 2, 8, 24, 2, 40
    norm = {"scale": ("vector", D), "bias": ("vector", D)}
    layer = {
        "attn_norm": norm, "mlp_norm": norm,
        "attn": {**dict.fromkeys("qkv", ("matrix", D, N, H)),
                 **dict.fromkeys(["q_bias", "k_bias", "v_bias"], ("vector", N, H)),
                 "o": ("matrix", N, H, D), "o_bias": ("vector", D)},
        "mlp": {"gate": ("matrix", D, F), "gate_bias": ("vector", F), "up": ("matrix", D, F), "up_bias": ("vector", F),
                "down": ("matrix", F, D), "down_bias": ("vector", D)},
    }
    stacked = jax.tree.map(lambda leaf: (leaf[0], L, *leaf[1:]), layer, is_leaf=lambda node: isinstance(node, tuple))
    found = map_specs(lambda spec: (spec.group, *spec.shape), Crystal(SMALL).specs())
    assert found == {"embed": ("embedding", V, D), "layers": stacked, "final_norm": norm}


def test_the_7b_model_is_counted_without_an_array() -> None:
    specs = Crystal(ModelConfig()).specs()
    assert all(is_spec(leaf) for leaf in jax.tree.leaves(specs, is_leaf=is_spec))
    assert parameter_count(specs) == recipe.parameter_count(ModelConfig()) == 6_575_278_720
    assert parameter_count(Crystal(SMALL).specs()) == recipe.parameter_count(SMALL)


def test_initial_distributions_at_7b_are_the_published_ones() -> None:
    specs = Crystal(ModelConfig()).specs()
    stds = {"embed": 0.073, "q": 0.01825, "k": 0.01825, "v": 0.01825, "gate": 0.01825, "up": 0.01825,
            "o": 0.00228125, "down": 0.00228125}
    for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]:
        name = path[-1].key
        assert math.isclose(spec.std, stds.get(name, 0), rel_tol=1e-12), name
        assert spec.mean == (name == "scale"), name


def test_draws_are_a_normal_cut_at_two_sigma() -> None:
    """The std is that before the cut, as in jax.nn.initializers.truncated_normal: 0.8796 of it is left."""
    values = truncated_normal((200, 500), 0.073, "a key").ravel().astype(np.float64) / 0.073
    assert np.abs(values).max() <= 2 + 1e-6
    assert abs(values.mean()) <= 4 * 0.8796 / math.sqrt(values.size)
    assert abs(values.std() - 0.8796256610342398) <= 0.01
    inside = math.erf(math.sqrt(2))
    for z in np.linspace(-1.9, 1.9, 20):
        expected = 0.5 + 0.5 * math.erf(z / math.sqrt(2)) / inside
        assert abs((values < z).mean() - expected) <= 0.007  # 4.4 standard errors


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def drawn(config: ModelConfig, seed: int = 1, sizes: tuple[int, ...] = (1, 1, 1)) -> dict[str, Any]:
    return jax.tree.map(np.asarray, init_params(Crystal(config).specs(), seed, mesh_of(*sizes)))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_initial_values_do_not_depend_on_the_mesh(sizes: tuple[int, ...]) -> None:
    one, many = drawn(SMALL), drawn(SMALL, sizes=sizes)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, many))


def test_initial_values_depend_on_seed_name_and_layer_only() -> None:
    base, other = drawn(SMALL), drawn(SMALL, seed=2)
    assert not np.array_equal(base["embed"], other["embed"])
    specs = Crystal(SMALL).specs()
    alone = init_params({"embed": specs["embed"]}, 1, mesh_of(1, 1, 1))
    assert np.array_equal(base["embed"], alone["embed"])
    deeper = drawn(dataclasses.replace(SMALL, num_layers=4))["layers"]["attn"]["q"]
    assert np.array_equal(base["layers"]["attn"]["q"], deeper[:2])
    matrices = [leaf.ravel() for name in "qkv" for leaf in base["layers"]["attn"][name]]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.3 for i, a in enumerate(matrices) for b in matrices[:i])


def test_initial_values_stay_the_same_between_versions() -> None:
    """Frozen: another order of draws, in ours or in numpy's generator, makes another model of the same seed."""
    embed = truncated_normal((4,), 1.0, "1/embed")
    np.testing.assert_allclose(embed, [0.9165251, 0.9878706, 1.0240887, -0.24817735], 1e-6)
    layer = truncated_normal((4,), 1.0, "1/layers/attn/q/0")
    np.testing.assert_allclose(layer, [-0.44820732, -1.8789351, 1.503587, 0.6024383], 1e-6)


# How it behaves


@pytest.fixture(scope="module")
def small() -> tuple[Crystal, dict[str, Any]]:
    model = Crystal(SMALL)
    return model, jax.tree.map(jnp.asarray, oracle.random_params(model.specs()))


@pytest.fixture(scope="module")
def reach(small: tuple[Crystal, dict[str, Any]]) -> Callable[[np.ndarray], np.ndarray]:
    """reach(segments [T]) -> largest |d hidden[t] / d embedding of v|, [T, V], for tokens DISTINCT."""
    model, params = small
    T = len(DISTINCT)
    directions = np.random.default_rng(1).standard_normal((T, 1, 1, SMALL.embed_dim)).astype(np.float32)
    cotangents = jnp.asarray(np.eye(T, dtype=np.float32)[:, None, :, None] * directions)

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def compute(embed: jax.Array, segments_BT: jax.Array) -> jax.Array:
        def hidden(embed: jax.Array) -> jax.Array:
            bound = model.bind({**params, "embed": embed})
            return bound.hidden(jnp.asarray(DISTINCT)[None], segment_ids_BT=segments_BT)

        pullback = jax.vjp(hidden, embed)[1]
        return jnp.max(jnp.abs(jax.vmap(lambda row: pullback(row)[0])(cotangents)), axis=-1)

    return lambda segments: np.asarray(compute(params["embed"], jnp.asarray(segments)[None]))


DISTINCT = np.random.default_rng(0).permutation(SMALL.vocab_size)[:12].astype(np.int32)


@pytest.mark.parametrize("lengths", [(12,), (5, 1, 6)], ids=["causal", "documents"])
def test_gradients_reach_exactly_what_a_token_may_see(reach: Callable[[np.ndarray], np.ndarray],
                                                      lengths: tuple[int, ...]) -> None:
    """Zero, exactly, where a token may not look; above zero everywhere else."""
    segments = np.repeat(np.arange(len(lengths)), lengths)
    reached = reach(segments)
    allowed = np.tri(12, dtype=bool) & (segments[:, None] == segments[None, :])
    assert np.array_equal(reached[:, DISTINCT] > 0, allowed)
    assert not reached[:, np.setdiff1d(np.arange(SMALL.vocab_size), DISTINCT)].any()


def test_packed_documents_are_as_if_alone(small: tuple[Crystal, dict[str, Any]]) -> None:
    """Segment ids and positions that restart give each document of a row what it gets in a row of its own."""
    model, params = small
    first, second = np.arange(5), np.arange(10, 17)
    filler = np.full(12, 39)
    ids = np.stack([np.concatenate([first, second]), np.concatenate([first, filler[5:]]),
                    np.concatenate([second, filler[7:]])])
    positions = np.stack([np.concatenate([np.arange(5), np.arange(7)]), np.arange(12), np.arange(12)])
    segments = np.stack([np.repeat([1, 2], [5, 7]), np.zeros(12, int), np.zeros(12, int)])
    logits = np.asarray(jax.jit(lambda *row: model.bind(params)(*row), compiler_options=oracle.QUICK)(
        *(array.astype(np.int32) for array in (ids, positions, segments))))
    assert np.abs(logits[0, :5] - logits[1, :5]).max() <= 1e-5
    assert np.abs(logits[0, 5:] - logits[2, :7]).max() <= 1e-5
    assert np.abs(logits[0, 5:] - logits[1, 5:]).max() > 0.1, "the test can tell them apart"


def test_a_plain_row_is_one_document_from_position_zero(small: tuple[Crystal, dict[str, Any]]) -> None:
    model, params = small
    ids = np.arange(12, dtype=np.int32)[None]

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def three(ids: jax.Array) -> list[jax.Array]:
        bound, positions = model.bind(params), jnp.arange(12)[None]
        return [bound(ids), bound(ids, positions, jnp.ones_like(ids)), bound(ids, positions + 3)]

    plain, stated, moved = map(np.asarray, three(ids))
    assert np.array_equal(plain, stated)
    assert np.abs(plain - moved).max() <= 1e-5, "only differences of positions count"


# LayerNorm


def normed(x: np.ndarray, eps: float, params: dict[str, Any]) -> np.ndarray:
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    scale, bias = (np.asarray(params[name], np.float64) for name in ("scale", "bias"))
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + bias


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_layer_norm_adds_its_epsilon_to_the_variance(small: tuple[Crystal, dict[str, Any]], eps: float) -> None:
    """At a variance of 1e-6 the published epsilon, 1e-5, decides the result; 1e-6 is told apart."""
    model, params = small
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)
    ours = np.asarray(model.bind(params).final_norm(jnp.asarray(x)))
    difference = np.abs(ours - normed(x, eps, params["final_norm"])).max()
    assert (difference <= 1e-6) == (eps == ModelConfig().norm_eps), difference


@pytest.mark.parametrize(("dtype", "offset", "limit"), [("float32", 1e3, 1e-3), ("bfloat16", 0.0, 1e-2)])
def test_layer_norm_computes_in_float32(small: tuple[Crystal, dict[str, Any]], dtype: str, offset: float,
                                        limit: float) -> None:
    """A large mean costs no more than its rounding; bf16 activations are rounded once, at the end."""
    model, params = small
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16)) + offset, dtype)
    ours = model.bind(params).final_norm(x)
    assert ours.dtype == x.dtype
    expected = normed(np.asarray(x, np.float32), SMALL.norm_eps, params["final_norm"])
    assert np.abs(np.asarray(ours, np.float64) - expected).max() <= limit
    if dtype == "bfloat16":
        rounded = np.asarray(jnp.asarray(expected.astype(np.float32), dtype), np.float32)
        assert (np.asarray(ours, np.float32) == rounded).mean() > 0.98


def test_the_gradient_of_a_bias_is_summed_in_float32() -> None:
    """3,001 times one: bfloat16 holds 3,008 at best, and a sum in it stays at 256."""

    class Weight(SimpleNamespace):
        def __getitem__(self, _: Any) -> jax.Array:
            return self.value

    def total(bias: jax.Array) -> jax.Array:
        layer: Any = SimpleNamespace(
            up=Weight(value=jnp.zeros((4, 8)), spec=SimpleNamespace(axes=("embed", "mlp"))),
            up_bias=Weight(value=bias, spec=SimpleNamespace(axes=("mlp",))))
        found, = project("btd,df->btf", jnp.ones((1, 3001, 4), jnp.bfloat16), layer, ["up"], ("batch", "length", "mlp"))
        assert found.dtype == jnp.bfloat16
        return jnp.sum(found.astype(jnp.float32))

    assert np.array_equal(jax.grad(total)(jnp.zeros(8)), np.full(8, 3001.0))
