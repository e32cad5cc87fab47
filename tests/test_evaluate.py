"""Held-out loss: every window once, padded batches count for nothing, beside the entropy of unigrams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystal_jax import sharding
from crystal_jax.config import MeshConfig, ModelConfig
from crystal_jax.evaluate import HeldOut, measures, unigram_entropy
from crystal_jax.model import Crystal, init_params

MODEL = ModelConfig(vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_length=16, rotary_dim=4)


@pytest.mark.parametrize("rows", [1, 4, 7, 8])
def test_the_loss_is_the_mean_over_all_windows_whatever_the_batch(rows: int) -> None:
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=1, tensor=1), jax.devices()[:4])
    windows = np.random.default_rng(rows).integers(0, 32, (rows, 9)).astype(np.int32)
    model, lengths = Crystal(MODEL), np.arange(32) % 5
    with jax.set_mesh(mesh):
        params = init_params(model.specs(), 1, mesh)
        found = HeldOut(model, {"code": windows}, 4, mesh, lengths)(params)
    alone = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    loss, _ = Crystal(MODEL).bind(alone).loss(windows[:, :-1], windows[:, 1:], jnp.ones((rows, 8)))
    values = found["heldout"]["code"]
    assert values["loss"] == pytest.approx(float(loss), rel=1e-5) and values["tokens"] == rows * 8
    assert values["perplexity"] == pytest.approx(np.exp(float(loss)), rel=1e-5)
    written = sum(int(token) % 5 for token in windows[:, 1:].flat)
    assert values["bits_per_byte"] == pytest.approx(float(loss) * rows * 8 / np.log(2) / written, rel=1e-5)
    assert found["seconds"] > 0


@pytest.mark.parametrize("targets", [[[0, 5]], [[1, 6]], [[7, 1]]])
def test_bits_per_byte_of_nothing_known_are_left_out(targets: list[list[int]]) -> None:
    """Special tokens only; tokens that the tokenizer lacks. The rest stands."""
    found = measures(2.0, np.array(targets), np.arange(6) % 5)
    assert found == {"loss": 1.0, "perplexity": pytest.approx(np.e), "tokens": 2}


def test_unigram_entropy_against_its_definition() -> None:
    assert unigram_entropy(np.zeros((3, 3), np.int32)) == 0
    assert unigram_entropy(np.arange(64).reshape(8, 8)) == pytest.approx(np.log(64))
    assert unigram_entropy(np.array([0, 0, 1])) == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
