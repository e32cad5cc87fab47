"""Text from a checkpoint: completion and filling in the middle, with a KV cache and static shapes.

A sample's text depends on its prompt, the seed and its number only, never on what is sampled beside it.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from crystal_jax.attention import empty_cache
from crystal_jax.checkpoint import Weights, load_weights
from crystal_jax.data.fim import fim_prompt
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, Params

BUCKET = 64
"""Prompts are filled up to a multiple of this, so that lengths share compiled programs."""


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 64
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set with at least this probability."""
    seed: int = 0
    num_samples: int = 1

    def check(self) -> None:
        for name, rule, holds in (("max_tokens", "above 0", self.max_tokens > 0),
                                  ("temperature", "0 or more", self.temperature >= 0),
                                  ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
                                  ("seed", "from 0 to 2147483647", 0 <= self.seed < 2**31),
                                  ("num_samples", "above 0", self.num_samples > 0)):
            if not holds:
                raise UserError(f"--{name}: {getattr(self, name)} must be {rule}")


class Knobs(NamedTuple):
    """The part of Sampling that compiled programs take as arguments."""

    temperature: ArrayLike
    top_p: ArrayLike
    seed: ArrayLike


class Generator:
    """A loaded checkpoint that completes prompts.

    Raises:
      UserError: a path that is no checkpoint, or one without a tokenizer.
    """

    def __init__(self, weights: Weights, dtype: str = "float32"):
        if weights.tokenizer is None:
            raise UserError("--checkpoint: it has no tokenizer.json beside it, so text can't be generated; put the "
                            "tokenizer it was trained with there")
        self.tokenizer = Tokenizer.load(weights.tokenizer)
        self.config = weights.model
        self.model = Crystal(weights.model, dtype, unroll=weights.model.num_layers)
        self.params = jax.tree.map(jnp.asarray, weights.params)

    def complete(self, prompt: str, sampling: Sampling) -> list[str]:
        """What follows `prompt`, once per sample. Special tokens in the prompt are recognised; <s> goes before it."""
        return self._texts([self.tokenizer.bos_id, *self.tokenizer.encode_prompt(prompt)], sampling)

    def infill(self, prefix: str, suffix: str, sampling: Sampling) -> list[str]:
        """What stands between `prefix` and `suffix`, once per sample."""
        return self._texts(fim_prompt(self.tokenizer, prefix, suffix), sampling)

    def _texts(self, prompt: list[int], sampling: Sampling) -> list[str]:
        return [self.tokenizer.decode_fragment(ids) for ids in self.tokens(prompt, sampling)]

    def tokens(self, prompt: list[int], sampling: Sampling) -> list[list[int]]:
        """Ids that follow the ids of a prompt, without the </s> that ends them.

        Raises:
          UserError: prompt and max_tokens together are longer than the model's context.
        """
        sampling.check()
        room = self.config.max_length - len(prompt)
        if sampling.max_tokens > room:
            raise UserError(f"--max_tokens: {sampling.max_tokens} after a prompt of {len(prompt)} tokens is more than "
                            f"the model's context of {self.config.max_length}; at most {max(room, 0)} fit")
        length = -(-len(prompt) // BUCKET) * BUCKET
        ids = np.zeros((sampling.num_samples, length), np.int32)
        ids[:, : len(prompt)] = prompt
        knobs = Knobs(np.float32(sampling.temperature), np.float32(sampling.top_p), np.int32(sampling.seed))
        found = np.asarray(_generate(self.model, self.tokenizer.eos_id, sampling.max_tokens, self.params, ids,
                                     np.int32(len(prompt)), knobs))
        return [_until(row.tolist(), self.tokenizer.eos_id) for row in found]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model: Crystal, eos_id: int, max_tokens: int, params: Params, prompt_BP: jax.Array, length: jax.Array,
              knobs: Knobs) -> jax.Array:
    """Ids [B, max_tokens]; what follows a row's </s> is </s>.

    Slots of the cache: 0..P-1 the prompt, of which the first `length` count, then one for each new token.
    """
    bound = model.bind(params)
    B, P = prompt_BP.shape
    slot_S = jnp.arange(P + max_tokens)
    position_BP = jnp.broadcast_to(jnp.arange(P)[None, :], (B, P))
    prompt_mask = (slot_S[None, :] <= jnp.arange(P)[:, None])[None, None]
    cache = empty_cache(model.config, B, P + max_tokens, jnp.dtype(model.dtype))
    hidden_BPD, cache = bound.extend(prompt_BP, position_BP, prompt_mask, cache, jnp.int32(0))
    last_B1D = jax.lax.dynamic_slice_in_dim(hidden_BPD, length - 1, 1, axis=1)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(knobs.seed), row))(jnp.arange(B))

    def sample(hidden_B1D: jax.Array, t: jax.Array, ended_B: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys_B)
        ids_B = _sample(bound.logits(hidden_B1D)[:, 0], keys, knobs.temperature, knobs.top_p)
        return jnp.where(ended_B, eos_id, ids_B).astype(jnp.int32)

    def more(carry: tuple[Any, ...]) -> jax.Array:
        t, ended_B = carry[0], carry[1]
        return (t < max_tokens) & ~jnp.all(ended_B)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        t, _, out_BM, cache = carry
        ids_B = jax.lax.dynamic_slice_in_dim(out_BM, t - 1, 1, axis=1)[:, 0]
        mask = (slot_S < length) | ((slot_S >= P) & (slot_S < P + t))
        positions_B1 = jnp.full((B, 1), length + t - 1)
        hidden_B1D, cache = bound.extend(ids_B[:, None], positions_B1, mask[None, None, None], cache, P + t - 1)
        ids_B = sample(hidden_B1D, t, ids_B == eos_id)
        return t + 1, ids_B == eos_id, jax.lax.dynamic_update_slice_in_dim(out_BM, ids_B[:, None], t, axis=1), cache

    first_B = sample(last_B1D, jnp.int32(0), jnp.zeros(B, bool))
    out_BM = jnp.full((B, max_tokens), eos_id, jnp.int32).at[:, 0].set(first_B)
    return jax.lax.while_loop(more, step, (jnp.int32(1), first_B == eos_id, out_BM, cache))[2]


def _sample(logits_BV: jax.Array, keys_B: jax.Array, temperature: ArrayLike, top_p: ArrayLike) -> jax.Array:
    """Ids [B]: the most probable at temperature 0, else drawn from the nucleus of probability top_p."""
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    order_BV = jnp.argsort(-scaled_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    # The most probable token always stays, so that the nucleus is never empty.
    kept_BV = jnp.where((before_BV < top_p) | (jnp.arange(logits_BV.shape[1]) == 0)[None, :], sorted_BV, -jnp.inf)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
    drawn_B = jnp.take_along_axis(order_BV, drawn_B[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.greater(temperature, 0), drawn_B, jnp.argmax(logits_BV, axis=-1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or one of its states or exports")
    parser.add_argument("--prompt", help="text to complete")
    parser.add_argument("--prefix", help="with --suffix: text before the gap to fill")
    parser.add_argument("--suffix", help="text after the gap")
    default = Sampling()
    for name in ("max_tokens", "temperature", "top_p", "seed", "num_samples"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--json", action="store_true", help="one JSON object per sample")


def main(args: argparse.Namespace) -> None:
    infilling = args.prefix is not None or args.suffix is not None
    if infilling == (args.prompt is not None):
        raise UserError("--prompt: give either --prompt=TEXT or --prefix=TEXT --suffix=TEXT")
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p, args.seed, args.num_samples)
    sampling.check()
    generator = Generator(load_weights(args.checkpoint))
    prefix, suffix = (args.prefix or "", args.suffix or "") if infilling else (args.prompt, "")
    texts = generator.infill(prefix, suffix, sampling) if infilling else generator.complete(prefix, sampling)
    for number, text in enumerate(texts):
        if args.json:
            print(json.dumps({"sample": number, "prefix": prefix, "text": text, "suffix": suffix}))
        else:
            header = f"--- {number + 1} of {len(texts)}\n" if len(texts) > 1 else ""
            print(f"{header}{prefix}{text}{suffix}")
