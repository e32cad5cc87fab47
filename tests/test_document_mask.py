"""The document mask: packed documents are as if each stood alone, in loss, gradients, updates and held-out loss."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_packing import make_store

from crystal_jax import sharding
from crystal_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from crystal_jax.data.packing import write_plan
from crystal_jax.data.rows import make_rows, segments
from crystal_jax.evaluate import HeldOut
from crystal_jax.model import Crystal, init_params
from crystal_jax.optimizer import make_optimizer
from crystal_jax.update import TrainState, make_train_step

BOS, EOS, T = 1, 2, 16
MODEL = ModelConfig(vocab_size=48, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=T, rotary_dim=4,
                    mup_base_width=8)
LENGTHS = [[5, 6, 3, 40, 9, 2, 12, 2], [7, 17, 18, 4, 4, 30]]
"""Of documents; those longer than T + 1 are cut, and their ends stand behind other documents."""
Params = dict[str, Any]


@dataclasses.dataclass
class Packed:
    """Rows of documents, and each of their pieces in a row of its own."""

    batch: dict[str, np.ndarray]
    """With segment_ids and positions."""
    alone: dict[str, np.ndarray]
    """Filled up behind the piece; without them."""
    place: np.ndarray
    """int [pieces, 2]: the row and column of `batch` in which each piece of `alone` begins."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    store = make_store(tmp_path_factory.mktemp("mask") / "store", LENGTHS)
    write_plan(store.path, T)
    rows = make_rows(store, "train", "all", 1.0, "best_fit", T)
    tokens, kept = rows.read(np.arange(rows.num_rows))
    assert kept is not None
    tokens = np.where(tokens > EOS, 3 + tokens % 45, tokens)  # within the vocabulary; neither <s> nor </s>
    ids, positions = segments(tokens[:, :-1], BOS, EOS)
    batch = {**as_batch(tokens, kept), "segment_ids": ids, "positions": positions}
    alone, mask, place = [], [], []
    for row in range(rows.num_rows):
        done = 0
        for piece in rows.pieces(row):
            alone.append(np.resize(tokens[row, done : done + piece.length], T + 1))
            mask.append(np.arange(T + 1) < piece.length)
            place.append((row, done))
            done += piece.length
    return Packed(batch, as_batch(np.array(alone), np.array(mask)), np.array(place))


def as_batch(tokens: np.ndarray, kept: np.ndarray) -> dict[str, np.ndarray]:
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": kept[:, 1:].astype(np.float32)}


@pytest.fixture(scope="module")
def params() -> Params:
    return jax.tree.map(jnp.asarray, oracle.random_params(Crystal(MODEL).specs()))


@functools.cache
def value_and_grads() -> Any:
    """(params, batch) -> ((sum of the losses of kept targets, nll [B, T]), gradients)."""
    model = Crystal(MODEL)

    def total(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss, nll = model.bind(params).loss(batch["inputs"], batch["targets"], batch["mask"], batch.get("positions"),
                                            batch.get("segment_ids"))
        return loss * nll.size, nll

    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=oracle.QUICK)


def without(batch: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in batch.items() if name not in names}


def test_packed_documents_are_separate_documents(packed: Packed, params: Params) -> None:
    """The loss of every target, their sum and its gradient; and without the mask they are told apart."""
    (loss, nll), grads = value_and_grads()(params, packed.batch)
    (expected, own_nll), own_grads = value_and_grads()(params, packed.alone)
    assert packed.batch["mask"].sum() == packed.alone["mask"].sum() > 100
    assert abs(loss - expected) <= 1e-5 * expected
    for (row, column), values, mask in zip(packed.place, np.asarray(own_nll), packed.alone["mask"], strict=True):
        size = int(mask.sum())
        assert np.abs(np.asarray(nll)[row, column : column + size] - values[:size]).max() <= 1e-5
    assert max(oracle.worst(grads, own_grads, relative=True).values()) <= 1e-5
    for names in (("segment_ids", "positions"), ("segment_ids",)):
        (mixed, _), _ = value_and_grads()(params, without(packed.batch, *names))
        assert abs(mixed - expected) > 1e-3


def test_no_gradient_crosses_into_another_document(packed: Packed, params: Params) -> None:
    """Zero, exactly: of each token's stream with respect to the embeddings of other documents' tokens."""
    rows = [row for row in range(len(packed.batch["inputs"])) if packed.batch["segment_ids"][row].max() >= 2]
    distinct = np.broadcast_to(3 + np.arange(T, dtype=np.int32), (len(rows), T))
    ids, positions = packed.batch["segment_ids"][rows], packed.batch["positions"][rows]
    directions = np.random.default_rng(0).standard_normal((len(rows), T, MODEL.embed_dim)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def reach(embed: jax.Array) -> jax.Array:
        """[rows, T, V] sizes of d(hidden of token t) / d(embedding of v)."""

        def row(tokens: jax.Array, positions: jax.Array, ids: jax.Array, direction: jax.Array) -> jax.Array:
            def hidden(embed: jax.Array) -> jax.Array:
                bound = Crystal(MODEL).bind({**params, "embed": embed})
                return bound.hidden(tokens[None], positions[None], ids[None])[0]

            pull = jax.vjp(hidden, embed)[1]
            one = jnp.eye(T)[:, :, None] * direction[None]
            return jnp.abs(jax.vmap(lambda cotangent: pull(cotangent)[0])(one)).max(-1)

        return jax.vmap(row)(distinct, positions, ids, directions)

    reached = np.asarray(reach(params["embed"]))[:, :, 3 : 3 + T] > 0
    allowed = np.tri(T, dtype=bool) & (ids[:, :, None] == ids[:, None, :])
    assert len(rows) >= 2 and np.array_equal(reached, allowed)


def test_what_stands_in_front_changes_no_bit(packed: Packed, params: Params) -> None:
    """Other tokens in the first document of a row: the losses of the others are the same, bit for bit."""
    changed = {**packed.batch, "inputs": packed.batch["inputs"].copy()}
    first = (packed.batch["segment_ids"] == 0) & (changed["inputs"] > EOS)
    changed["inputs"][first] = 3 + (changed["inputs"][first] + 7) % 45
    (_, before), _ = value_and_grads()(params, packed.batch)
    (_, after), _ = value_and_grads()(params, changed)
    others = packed.batch["segment_ids"] > 0
    assert others.any() and np.array_equal(np.asarray(before)[others], np.asarray(after)[others])
    assert not np.array_equal(before, after)


# Training


def run(batches: list[dict[str, np.ndarray]], sizes: tuple[int, int, int] = (1, 1, 1)) -> tuple[Params, list[float]]:
    """Parameters and losses after one update on each batch, on a mesh."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    model = Crystal(MODEL, remat="full")
    specs = model.specs()
    optimizer = make_optimizer(OptimizerConfig(), MODEL, specs)
    with jax.set_mesh(mesh):
        drawn = init_params(specs, 1, mesh)
        state = TrainState(drawn, optimizer.init(drawn))
        step, losses = make_train_step(model, optimizer, 1), []
        for batch in batches:
            state, metrics = step(state, sharding.put_batch(mesh, batch), jnp.float32(0.01))
            assert bool(metrics["taken"])
            losses.append(float(metrics["loss"]))
    return jax.tree.map(np.asarray, state.params), losses


def first_eight(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of one source."""
    return {"source": np.zeros(8, np.int32), **{name: value[:8] for name, value in batch.items()}}


def test_an_update_hides_documents_from_each_other_on_any_mesh(packed: Packed) -> None:
    masked = first_eight(packed.batch)
    params, losses = run([masked] * 2)
    split, split_losses = run([masked] * 2, (2, 2, 2))
    assert losses == pytest.approx(split_losses, rel=1e-5) and losses[1] < losses[0]
    assert max(oracle.worst(split, params, relative=True).values()) <= 1e-3
    drawn = jax.tree.map(np.asarray, init_params(Crystal(MODEL).specs(), 1, sharding.make_mesh(
        MeshConfig(), jax.devices()[:1])))
    for batch, same in ((packed.batch, True), (without(packed.batch, "segment_ids", "positions"), False)):
        (_, nll), _ = value_and_grads()(drawn, batch)
        expected = (np.asarray(nll)[:8] * masked["mask"]).sum() / masked["mask"].size
        assert (abs(losses[0] - expected) <= 1e-6) == same, (losses[0], expected)


def test_rows_of_one_document_train_the_same_bits_with_and_without(packed: Packed) -> None:
    """The mask of a row that is one document is the causal mask: switching it on changes nothing."""
    plain = first_eight(packed.alone)
    one = np.zeros_like(plain["inputs"]), np.broadcast_to(np.arange(T, dtype=np.int32), plain["inputs"].shape)
    params, losses = run([plain] * 2)
    other, other_losses = run([{**plain, "segment_ids": one[0], "positions": one[1]}] * 2)
    assert losses == other_losses
    assert jax.tree.all(jax.tree.map(np.array_equal, params, other))


# Held-out loss


def test_held_out_windows_are_split_into_documents(packed: Packed) -> None:
    mesh = sharding.make_mesh(MeshConfig(data=4), jax.devices()[:4])
    windows = np.concatenate([packed.batch["inputs"], packed.batch["targets"][:, -1:]], axis=1)
    assert len(windows) % 4, "the last batch is filled up"
    documents = functools.partial(segments, bos_id=BOS, eos_id=EOS)
    model, lengths = Crystal(MODEL), np.ones(MODEL.vocab_size, int)
    with jax.set_mesh(mesh):
        params = init_params(model.specs(), 1, mesh)
        masked = HeldOut(model, {"code": windows}, 4, mesh, lengths, documents)(params)["heldout"]["code"]
        plain = HeldOut(model, {"code": windows}, 4, mesh, lengths)(params)["heldout"]["code"]
    alone = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    whole = {**packed.batch, "mask": np.ones(packed.batch["mask"].shape, np.float32)}
    (expected, nll), _ = value_and_grads()(alone, whole)
    assert masked["loss"] == pytest.approx(float(expected) / nll.size, rel=1e-5)
    (expected, _), _ = value_and_grads()(alone, without(whole, "segment_ids", "positions"))
    assert plain["loss"] == pytest.approx(float(expected) / nll.size, rel=1e-5)
    assert masked["loss"] != plain["loss"] and masked["tokens"] == plain["tokens"] == windows[:, 1:].size


def test_the_configs_switch_reaches_the_batches(world: Path) -> None:
    """Off as published: neither segment ids nor positions; on: those of the documents in the inputs."""
    from world import make_config

    from crystal_jax.data.pipeline import Batches, Stores

    config = make_config(world)
    stores = Stores(config)
    plain = Batches(config, stores)[3]
    assert not {"segment_ids", "positions"} & plain.keys()
    data = dataclasses.replace(config.data, document_mask=True)
    masked = Batches(dataclasses.replace(config, data=data), stores)[3]
    tokenizer = stores.tokenizer
    ids, positions = segments(plain["inputs"], tokenizer.bos_id, tokenizer.eos_id)
    np.testing.assert_array_equal(masked["segment_ids"], ids)
    np.testing.assert_array_equal(masked["positions"], positions)
    assert ids.max() > 0
    assert all(np.array_equal(masked[name], value) for name, value in plain.items())
