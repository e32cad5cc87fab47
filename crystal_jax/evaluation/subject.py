"""A checkpoint on this machine's devices, ready to be asked: log-probabilities and texts.

Invariant: which devices there are changes no answer beyond rounding.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystal_jax import files, sharding
from crystal_jax.checkpoint import Weights, load_weights
from crystal_jax.config import MeshConfig, ModelConfig, from_dict, to_dict
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, Params, map_specs
from crystal_jax.sampling import Sampler
from crystal_jax.scoring import Scorer


@dataclass
class Subject:
    """A model, its parameters on the devices, its tokenizer, and what its checkpoint says of itself."""

    model: Crystal
    params: Params
    tokenizer: Tokenizer
    info: dict[str, Any]

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.model, self.params)

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(self.model, self.params, self.tokenizer.eos_id)


def make_mesh(weights: Weights) -> jax.sharding.Mesh:
    """All devices: each holds a part of every weight where the model's width divides, else all of them."""
    divides = weights.model.embed_dim % jax.device_count() == 0
    return sharding.make_mesh(MeshConfig(data=1, fsdp=-1) if divides else MeshConfig(data=-1))


@cache
def _model(config: str, dtype: str) -> Crystal:
    """One object for all checkpoints of a run: what is compiled for it is compiled once."""
    model = from_dict(ModelConfig, json.loads(config), "model")
    return Crystal(model, dtype, unroll=model.num_layers)


@contextlib.contextmanager
def open_subject(path: files.Location, dtype: str = "float32") -> Iterator[Subject]:
    """The checkpoint, for as long as the block runs.

    Raises:
      UserError: as load_weights; a checkpoint without tokenizer.
    """
    weights = load_weights(path)
    if weights.tokenizer is None:
        raise UserError(f"--checkpoint={path}: no tokenizer.json beside it; put the one it was trained with there")
    tokenizer = Tokenizer.load(weights.tokenizer)
    model = _model(json.dumps(to_dict(weights.model)), dtype)
    mesh = make_mesh(weights) if jax.device_count() > 1 else None

    def put(spec: Any, leaf: np.ndarray) -> jax.Array:
        return jnp.asarray(leaf, dtype) if mesh is None else jax.device_put(
            leaf.astype(dtype), sharding.named(mesh, spec.axes))

    params = map_specs(put, model.specs(), weights.params)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        yield Subject(model, params, tokenizer, weights.info)
