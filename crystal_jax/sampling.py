"""Sampling from a model: a fixed number of slots with a KV cache, each refilled as soon as its text has ended.

Invariant: what a request gives depends on its own prompt, settings and key only. All that it is computed with follows
from itself and from the number of slots; of the requests beside it, longer ones add exact zeros (attention.py).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from crystal_jax import sharding
from crystal_jax.attention import BLOCK, KV, cache_layout, empty_cache, empty_tails, write
from crystal_jax.model import Block, Crystal, Params

SLOTS = 8
BUCKET = 64
"""The least length that prompts are filled up to."""
STEPS = 8
"""Tokens that all slots make before the host looks at them."""


@dataclass(frozen=True)
class Request:
    """A text to make."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    """With the seed, the key of its random numbers."""

    @property
    def needed(self) -> int:
        """Tokens, with the prompt."""
        return len(self.prompt) + self.max_tokens


def key_of(*names: object) -> int:
    """A seed from 0 to 2^31 - 1 for what has these names."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:4], "little") >> 1


def size_of(tokens: int, least: int) -> int:
    """The next multiple of `least` that is among few sizes: four to each doubling, so that little is compiled."""
    step = max(least, 1 << (tokens - 1).bit_length() >> 3)
    return -(-tokens // step) * step


def until(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


class Slots(NamedTuple):
    """B texts in the making; S is the room of each."""

    cache: KV
    last_B: jax.Array
    """The newest token, not in the cache yet."""
    length_B: jax.Array
    """Tokens before it."""
    made_B: jax.Array
    """Tokens made so far."""
    temperature_B: jax.Array
    top_p_B: jax.Array
    seed_B: jax.Array
    sample_B: jax.Array


Ended = Callable[[int, list[int]], bool]
"""(index of the request, its ids so far) -> whether its text is complete."""


class Sampler:
    """Makes texts with a model whose parameters are given; call it inside `jax.set_mesh` for several devices.

    It holds a copy of the layers' weights.
    """

    def __init__(self, model: Crystal, params: Params, eos_id: int, slots: int = SLOTS):
        self.ways = sharding.batch_ways()
        self.model, self.params, self.eos_id = model, params, eos_id
        self.blocks = _blocks(model, params)
        self.slots = -(-slots // self.ways) * self.ways
        self._prefilled: tuple[tuple[int, ...], tuple[KV, jax.Array]] | None = None

    def __call__(self, requests: list[Request], ended: Ended = lambda index, ids: False) -> Iterator[
            tuple[int, list[int]]]:
        """(index, ids made, without </s>) of each request, in the order in which they end.

        A prompt and its max_tokens must fit the model's context together.
        """
        # Texts of one length run together, and the longest don't start last.
        waiting = iter(sorted(enumerate(requests), key=lambda item: -item[1].needed))
        room = size_of(max((request.needed for request in requests), default=0), BLOCK)
        slots = _empty(self.model, self.slots, room)
        running: dict[int, tuple[int, Request, list[int]]] = {}
        while True:
            for slot in range(self.slots):
                while slot not in running and (found := next(waiting, None)):
                    index, request = found
                    slots, first = self._admit(slots, slot, request)
                    ids, complete = self._taken(index, request, [], [int(first)], ended)
                    if complete:
                        yield index, ids
                    else:
                        running[slot] = (index, request, ids)
            if not running:
                return
            running_B = np.isin(np.arange(self.slots), list(running))
            slots, made_BN = _decode(self.model, self.params, self.blocks, slots, running_B)
            rows = np.asarray(made_BN)
            for slot, (index, request, ids) in list(running.items()):
                _, complete = self._taken(index, request, ids, rows[slot].tolist(), ended)
                if complete:
                    del running[slot]
                    yield index, ids

    def _taken(self, index: int, request: Request, ids: list[int], new: list[int], ended: Ended) -> tuple[
            list[int], bool]:
        """Appends the tokens that count; whether the text is complete."""
        for token in new:
            if token == self.eos_id:
                return ids, True
            ids.append(token)
            if len(ids) == request.max_tokens:
                return ids, True
        return ids, ended(index, ids)

    def _admit(self, slots: Slots, slot: int, request: Request) -> tuple[Slots, jax.Array]:
        prompt = request.prompt
        if self._prefilled is None or self._prefilled[0] != prompt:
            length = min(size_of(len(prompt), BUCKET), self.model.config.max_length)
            ids = np.zeros((self.ways, length), np.int32)
            ids[:, : len(prompt)] = prompt
            self._prefilled = (prompt, _prefill(self.model, self.params, self.blocks, ids, np.int32(len(prompt))))
        settings = (np.float32(request.temperature), np.float32(request.top_p), np.int32(request.seed),
                    np.int32(request.sample))
        return _admit(self.model, self.params, slots, self._prefilled[1], np.int32(len(prompt)), np.int32(slot),
                      settings)


def sample_texts(sampler: Sampler, requests: list[Request], stops: Sequence[Sequence[str]],
                 decode: Callable[[list[int]], str], shown: Callable[[list[int]], str], progress: bool) -> list[str]:
    """The text of each request, up to the first of its stop strings.

    decode: the text in which they are looked for while it is made. shown: the text that is cut there and returned.
    """

    def ended(index: int, ids: list[int]) -> bool:
        text = decode(ids)
        return any(stop in text for stop in stops[index])

    texts = [""] * len(requests)
    for index, ids in tqdm(sampler(requests, ended), total=len(requests), unit="text",
                           disable=None if progress else True):
        texts[index] = until(shown(ids), stops[index])
    return texts


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(model: Crystal, slots: int, room: int) -> Slots:
    layout = sharding.used("batch")
    ints, floats = (jnp.zeros(slots, dtype, out_sharding=layout) for dtype in (jnp.int32, jnp.float32))
    cache = empty_cache(model.config, slots, room, jnp.dtype(model.dtype))
    return Slots(cache, ints, ints, ints, floats, floats, ints, ints)


@partial(jax.jit, static_argnums=0)
def _blocks(model: Crystal, params: Params) -> list[Block]:
    return model.bind(params).blocks()


@partial(jax.jit, static_argnums=0)
def _prefill(model: Crystal, params: Params, blocks: list[Block], prompt_RP: jax.Array, length: jax.Array) -> tuple[
        list[KV], jax.Array]:
    """Each layer's keys and values [R, K, P, H] of R times the same prompt, of which the first `length` tokens count,
    and the stream [R, 1, D] at the last of them; R is the number of ways in which a batch is split over devices.
    """
    bound = model.bind(params)
    rows, room = prompt_RP.shape
    tails = empty_tails(model.config, rows, room, jnp.dtype(model.dtype))
    hidden_RPD, tails = bound.extend(blocks, prompt_RP, tails, 0)
    return tails, jax.lax.dynamic_slice_in_dim(hidden_RPD, length - 1, 1, axis=1)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admit(model: Crystal, params: Params, slots: Slots, prefilled: tuple[list[KV], jax.Array], length: jax.Array,
           slot: jax.Array, settings: tuple[jax.Array, ...]) -> tuple[Slots, jax.Array]:
    """The slots with a prompt in one of them, and the first token after it."""
    tails, hidden_R1D = prefilled
    rows, B = len(hidden_R1D), len(slots.last_B)
    each_R = [jnp.broadcast_to(value, rows, out_sharding=sharding.used("batch")) for value in settings]
    temperature_R, top_p_R, seed_R, sample_R = each_R
    keys_R = _keys(seed_R, sample_R, jnp.zeros_like(seed_R))
    first_R = draw(model.bind(params).logits(hidden_R1D)[:, 0], keys_R, temperature_R, top_p_R)
    first = jnp.max(first_R)  # all rows are equal
    here_B = jnp.arange(B) == slot

    def placed(old: jax.Array, new: jax.Array) -> jax.Array:
        spread = jnp.repeat(new, B // rows, axis=1, out_sharding=cache_layout(model.config))
        both = jnp.where(here_B[None, :, None, None, None], spread, old[:, :, :, : spread.shape[3]])
        return jax.lax.dynamic_update_slice(old, both, (0,) * 5)

    def changed(old_B: jax.Array, value: jax.Array | int) -> jax.Array:
        return jnp.where(here_B, value, old_B)

    keys, values = map(jnp.stack, zip(*tails, strict=True))
    cache = (placed(slots.cache[0], keys), placed(slots.cache[1], values))
    last, lengths, made, *rest = slots[1:]
    return Slots(cache, changed(last, first), changed(lengths, length), changed(made, 1),
                 *(changed(old, value) for old, value in zip(rest, settings, strict=True))), first


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(model: Crystal, params: Params, blocks: list[Block], slots: Slots, running_B: jax.Array) -> tuple[
        Slots, jax.Array]:
    """STEPS tokens more in each slot: the slots after them, and the ids [B, STEPS].

    What they add to the cache is written once, at the end: a cache that a loop reads and writes is copied each time.
    A slot that isn't running begins anew, so that nothing reads as far as it would have come.
    """
    bound = model.bind(params)
    slots = slots._replace(length_B=jnp.where(running_B, slots.length_B, 0))

    def step(state: tuple[jax.Array, list[KV]], number: jax.Array) -> tuple[tuple[jax.Array, list[KV]], jax.Array]:
        last_B, tails = state
        hidden_B1D, tails = bound.extend(blocks, last_B[:, None], tails, number, slots.cache, slots.length_B)
        keys_B = _keys(slots.seed_B, slots.sample_B, slots.made_B + number)
        ids_B = draw(bound.logits(hidden_B1D)[:, 0], keys_B, slots.temperature_B, slots.top_p_B)
        return (ids_B, tails), ids_B

    tails = empty_tails(model.config, len(slots.last_B), STEPS, jnp.dtype(model.dtype))
    (last_B, tails), made_NB = jax.lax.scan(step, (slots.last_B, tails), jnp.arange(STEPS))
    cache = write(slots.cache, tails, slots.length_B)
    return slots._replace(cache=cache, last_B=last_B, length_B=slots.length_B + STEPS,
                          made_B=slots.made_B + STEPS), made_NB.T


def _keys(seed_B: jax.Array, sample_B: jax.Array, made_B: jax.Array) -> jax.Array:
    """A key for each token of each sample."""

    def key(seed: jax.Array, sample: jax.Array, made: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), made)

    return jax.vmap(key)(seed_B, sample_B, made_B)


def draw(logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Ids [B]: the most probable at temperature 0, else drawn from the nucleus of probability top_p."""
    logits_BV = sharding.lay(logits_BV, "batch", None)
    # On a CPU twice as fast as argmax.
    top_B1, index_1V = jnp.max(logits_BV, axis=-1, keepdims=True), jnp.arange(logits_BV.shape[1])[None, :]
    greedy_B = jnp.min(jnp.where(logits_BV == top_B1, index_1V, logits_BV.shape[1] - 1), axis=-1)
    # Sorting the vocabulary costs more than a small model's layers: only where a row asks for it.
    drawn_B = jax.lax.cond(jnp.any(temperature_B > 0), _draw, lambda *_: greedy_B, logits_BV, keys_B, temperature_B,
                           top_p_B)
    return jnp.where(temperature_B > 0, drawn_B, greedy_B).astype(jnp.int32)


def _draw(logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    scaled_BV = logits_BV / jnp.maximum(temperature_B, 1e-6)[:, None]
    order_BV = jnp.argsort(-scaled_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # The most probable token always stays, so that the nucleus is never empty.
    inside_BV = (before_BV < top_p_B[:, None]) | (jnp.arange(logits_BV.shape[1]) == 0)[None, :]
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, jnp.where(inside_BV, sorted_BV, -jnp.inf))
    return jnp.take_along_axis(order_BV, drawn_B[:, None], axis=-1)[:, 0]
