"""The mesh and its rules, and that a training run is the same however it is split."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from crystal_jax import sharding
from crystal_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, Phase, TrainingConfig
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, abstract_params, init_params, is_spec, map_specs, unpadded
from crystal_jax.optimizer import make_optimizer, moments, with_moments
from crystal_jax.sharding import make_mesh
from crystal_jax.update import TrainState, make_model, make_train_step

MODEL = ModelConfig(vocab_size=104, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=88, max_length=32, rotary_dim=4,
                    mup_base_width=8)
SPLITS = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)]
LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    *((sizes, {}) for sizes in (*SPLITS, (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 1, 4))),
    ((2, 1, 4), {"pad_to": 16}),
    ((1, 2, 2, 2), {"pad_to": 16, "accumulate": 2, "remat": "products"}),
    ((2, 2, 1), {"accumulate": 2, "remat": "full"}),
    ((1, 1, 1), {"accumulate": 8, "remat": "attention"}),
    ((3, 1, 1), {"fill_batch": True}),
    ((3, 1, 2), {"fill_batch": True, "accumulate": 2}),
]
"""(data, fsdp, tensor and slice, fields of config.training) on 1 to 8 devices; data = 3 doesn't divide the batch."""
STEPS = 20
LENGTH = 16
ROWS = "mesh axis slice x data x fsdp"
FILL = ", or set config.training.fill_batch=true: 2 sequences of nothing are computed with it,"
PAD = ", or set config.training.pad_to=2: it pads in memory"
BATCH = ("slice", "data", "fsdp")


# The mesh


@pytest.mark.parametrize(("sizes", "expected"), [
    ((-1, 1, 1), (8, 1, 1)), ((1, -1, 2), (1, 4, 2)), ((2, 2, -1), (2, 2, 2)), ((-1, 2, 4), (1, 2, 4)),
    ((1, 8, 1), (1, 8, 1))])
def test_one_axis_takes_what_is_left(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape[axis] for axis in sharding.AXES) == (1, *expected)
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,) * 4


@pytest.mark.parametrize(("sizes", "message"), [
    ((1, 1, 1), "config.training.mesh: slice=1, data=1, fsdp=1, tensor=1 doesn't fit 8 devices; the sizes must "
                "multiply to 8, with -1 for the axis that takes what is left"),
    ((2, 2, 4), "slice=1, data=2, fsdp=2, tensor=4 doesn't fit 8 devices"),
    ((-1, 3, 1), "data=-1, fsdp=3, tensor=1 doesn't fit 8 devices"),
    ((-1, 1, 16), "data=-1, fsdp=1, tensor=16 doesn't fit 8 devices"),
    ((-1, -1, 2), "config.training.mesh: slice=1, data=-1, fsdp=-1, tensor=2: only one axis can be -1"),
])
def test_a_mesh_that_does_not_fit_the_devices(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(*sizes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def config_with(**changes: Any) -> Config:
    """A config that fits data=2, fsdp=2, tensor=2, with fields of model, phase or training changed."""
    config = Config(model=dataclasses.replace(MODEL), phases=[Phase(name=name, global_batch_size=8) for name in "ab"],
                    training=TrainingConfig(eval_sequences=8))
    for owner in (config.model, config.phases[1], config.training):
        for name in changes.keys() & vars(owner).keys():
            setattr(owner, name, changes[name])
    return config


def test_sizes_that_divide_are_accepted() -> None:
    sharding.check_divisible(config_with(), make_mesh(MeshConfig(2, 2, 2)))


@pytest.mark.parametrize(("owner", "field", "value", "rule"), [
    ("phases[1]", "global_batch_size", 10, f"4 equal parts ({ROWS}); the nearest that do are 8 and 12{FILL} 20.0%"),
    ("phases[1]", "global_batch_size", 2, f"4 equal parts ({ROWS}); the nearest that do are 4{FILL} 100.0%"),
    ("model", "embed_dim", 33, "2 equal parts (mesh axis fsdp); the nearest that do are 32 and 34"),
    ("model", "num_heads", 5, "2 equal parts (mesh axis tensor); the nearest that do are 4 and 6"),
    ("model", "mlp_dim", 171, f"2 equal parts (mesh axis tensor); the nearest that do are 170 and 172{PAD}"),
    ("model", "vocab_size", 101, f"2 equal parts (mesh axis tensor); the nearest that do are 100 and 102{PAD}"),
])
def test_sizes_that_do_not_divide(owner: str, field: str, value: int, rule: str) -> None:
    with pytest.raises(UserError) as error:
        sharding.check_divisible(config_with(**{field: value}), make_mesh(MeshConfig(2, 2, 2)))
    assert str(error.value) == f"config.{owner}.{field}: {value} doesn't divide into {rule}"


# The table


def test_every_parameter_is_split_by_the_table() -> None:
    """All that is large is split over fsdp and tensor, by the layouts that are written here."""
    mesh = make_mesh(MeshConfig(1, 4, 2))
    found = map_specs(lambda spec: sharding.named(mesh, spec.axes).spec, Crystal(MODEL).specs())
    norm, norms = {"scale": P("fsdp"), "bias": P("fsdp")}, {"scale": P(None, "fsdp"), "bias": P(None, "fsdp")}
    inward, across = P(None, "fsdp", "tensor"), P(None, "tensor")
    assert found == {
        "embed": P("tensor", "fsdp"), "final_norm": norm,
        "layers": {
            "attn_norm": norms, "mlp_norm": norms,
            "attn": {**{name: P(None, "fsdp", "tensor", None) for name in "qkv"},
                     **{f"{name}_bias": P(None, "tensor", None) for name in "qkv"},
                     "o": P(None, "tensor", None, "fsdp"), "o_bias": P(None, "fsdp")},
            "mlp": {"gate": inward, "up": inward, "gate_bias": across, "up_bias": across,
                    "down": P(None, "tensor", "fsdp"), "down_bias": P(None, "fsdp")},
        },
    }


def test_without_a_mesh_the_helpers_do_nothing() -> None:
    assert sharding.used("batch", "length", "embed") is None
    weight = jnp.ones((4, 4))
    assert sharding.lay(weight, "embed", "mlp") is weight


def test_a_wrong_layout_fails_when_it_is_traced() -> None:
    """Layouts are part of types: no program with a surprise in it is ever compiled."""
    mesh = make_mesh(MeshConfig(1, 4, 2))
    with jax.set_mesh(mesh):
        rows, columns = (jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P(axis)))
                         for axis in ("fsdp", "tensor"))
        with pytest.raises(Exception, match="incompatible shardings"):
            jax.eval_shape(lambda a, b: a + b, rows, columns)


def test_a_batch_is_split_over_its_rows() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    batch = {"inputs": np.arange(48, dtype=np.int32).reshape(8, 6), "source": np.arange(8, dtype=np.int32)}
    placed = sharding.put_batch(mesh, batch)
    for name, rows in batch.items():
        assert placed[name].dtype == rows.dtype
        assert placed[name].sharding.spec == P(BATCH)
        assert np.array_equal(placed[name], rows)
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(2, *rows.shape[1:])}


def test_a_batch_that_does_not_divide_is_filled_up() -> None:
    """Each of the three devices has every row of its own, and zeros of no source behind them."""
    mesh = make_mesh(MeshConfig(3, 1, 1), jax.devices()[:3])
    batch = {"inputs": np.arange(1, 49, dtype=np.int32).reshape(8, 6), "source": np.arange(8, dtype=np.int32)}
    placed = sharding.put_batch(mesh, batch, 8, 2)
    assert sharding.padded(8, 3 * 2) == 12 and sharding.padded(2112, 256) == 2304
    assert placed["source"].tolist() == [0, 1, 2, -1, 3, 4, 5, -1, 6, 7, -1, -1]
    inside = np.asarray(placed["source"]) >= 0
    assert np.array_equal(np.asarray(placed["inputs"])[inside], batch["inputs"])
    assert not np.asarray(placed["inputs"])[~inside].any()


def test_it_is_filled_up_only_where_that_is_asked_for() -> None:
    mesh = make_mesh(MeshConfig(3, 1, 1), jax.devices()[:3])
    with pytest.raises(UserError, match=r"\[0\].global_batch_size: 8 doesn't divide into 3 .* are 6 and 9, or set "
                                        r"config.training.fill_batch=true: 1 sequences of nothing .* with it, 12.5%"):
        sharding.check_divisible(config_with(), mesh)
    sharding.check_divisible(config_with(fill_batch=True), mesh)


# A training run


Result = dict[str, Any]


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (8, LENGTH + 1)) + np.zeros((STEPS, 1, 1), int).astype(np.int32)
    mask = (rng.random((STEPS, 8, LENGTH)) < 0.9).astype(np.float32)
    source = np.arange(8, dtype=np.int32) % 3
    return [{"inputs": rows[:, :-1], "targets": rows[:, 1:], "mask": kept, "source": source}
            for rows, kept in zip(tokens, mask, strict=True)]


def fresh(optimizer: Any, params: Any, mesh: jax.sharding.Mesh) -> TrainState:
    """Zero moments in the parameters' layouts."""

    def zeros() -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), params)

    count = jax.device_put(np.zeros((), np.int32), sharding.replicated(mesh))
    skeleton = jax.eval_shape(optimizer.init, params)
    return TrainState(params, with_moments(skeleton, {"count": count, "mu": zeros(), "nu": zeros()}))


@pytest.fixture(scope="module")
def run() -> Callable[..., Result]:
    """run(mesh sizes, fields of config.training) -> metrics of each step, the state after the last, and types."""

    @functools.cache
    def compute(sizes: tuple[int, ...], fields: tuple[tuple[str, Any], ...] = ()) -> Result:
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
        training = TrainingConfig(**{"dtype": "float32", "remat": "none", **dict(fields)})
        config = config_with()
        config.training, config.data.sequence_length = training, LENGTH
        model = make_model(config, mesh)
        optimizer = make_optimizer(OptimizerConfig(), MODEL, model.specs())
        with jax.set_mesh(mesh):
            params = init_params(model.specs(), 1, mesh)
            before = jax.tree.map(np.asarray, params)
            placed = [sharding.put_batch(mesh, batch, 8, training.accumulate) for batch in batches()]
            grads = jax.eval_shape(jax.grad(lambda params, batch: model.bind(params).loss(
                batch["inputs"], batch["targets"], batch["mask"])[0]), params, placed[0])
            lr = jax.device_put(np.float32(0.01), sharding.replicated(mesh))
            state, metrics = fresh(optimizer, params, mesh), []
            step = make_train_step(model, optimizer, 3, training.accumulate).lower(
                state, placed[0], lr, sequences=8).compile(oracle.QUICK)
            for batch in placed:
                state, found = step(state, batch, lr)
                metrics.append(jax.tree.map(np.asarray, found))
        return {"metrics": metrics, "before": before, "state": state, "params": jax.tree.map(np.asarray, state.params),
                "grads": grads, "abstract": abstract_params(model.specs(), mesh), "specs": model.specs()}

    return compute


def without_padding(result: Result, name: str) -> Any:
    return map_specs(unpadded, result["specs"], result[name])


@pytest.mark.parametrize(("sizes", "fields"), LAYOUTS, ids=str)
def test_training_is_the_same_on_every_mesh(run: Callable[..., Result], sizes: tuple[int, ...],
                                            fields: dict[str, Any]) -> None:
    """Losses, gradient norms and sums per source of twenty updates, and the parameters after them."""
    whole, split = run((1, 1, 1)), run(sizes, tuple(fields.items()))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole["before"], without_padding(split, "before")))
    for ours, theirs in zip(split["metrics"], whole["metrics"], strict=True):
        assert ours["taken"]
        assert np.array_equal(ours["tokens_per_source"], theirs["tokens_per_source"])
        for name in ("loss", "grad_norm", "nll_per_source"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    # The key bias keeps rounding noise where nothing rotates: Adam makes steps of it.
    far = oracle.worst(without_padding(split, "params"), whole["params"])
    del far["layers.attn.k_bias"]
    assert max(far.values()) <= 2e-4, far


def test_padding_is_zero_and_stays_so(run: Callable[..., Result]) -> None:
    """After twenty updates with weight decay, everything that pads is still zero."""
    result = run((2, 1, 4), (("pad_to", 16),))
    padded = 0
    for spec, leaf in zip(jax.tree.leaves(result["specs"], is_leaf=is_spec), jax.tree.leaves(result["params"]),
                          strict=True):
        inside = np.zeros(leaf.shape, bool)
        inside[tuple(slice(size) for size in spec.true_shape)] = True
        assert not leaf[~inside].any(), spec
        padded += (~inside).sum()
    assert padded > 1000


def test_the_run_learns(run: Callable[..., Result]) -> None:
    """So that equal losses say something of gradients and updates."""
    losses = [float(metrics["loss"]) for metrics in run((1, 1, 1))["metrics"]]
    assert len(set(losses)) == STEPS
    assert losses[-1] < losses[0] - 0.05
    assert min(oracle.worst(run((1, 1, 1))["params"], run((1, 1, 1))["before"]).values()) > 1e-3


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_gradients_and_state_lie_as_the_parameters_do(run: Callable[..., Result], sizes: tuple[int, ...]) -> None:
    result = run(sizes)
    state = result["state"]
    trees = {"grads": result["grads"], "params": state.params,
             **{name: moments(state.opt_state)[name] for name in ("mu", "nu")}}
    for name, tree in trees.items():
        for (path, leaf), wanted in zip(jax.tree_util.tree_flatten_with_path(tree)[0],
                                        jax.tree.leaves(result["abstract"]), strict=True):
            assert jax.typeof(leaf).sharding.spec == wanted.sharding.spec, (name, path)
            assert leaf.dtype == wanted.dtype
            assert leaf.shape == wanted.shape
    shards = {shard.data.size for shard in state.params["layers"]["mlp"]["gate"].addressable_shards}
    assert shards == {2 * 32 * 88 // (sizes[1] * sizes[2])}, "every device holds its share and no more"
