"""Sampling from a model: a fixed number of slots with a KV cache, each refilled as soon as its text has ended.

Invariant: what a request gives depends on its own prompt, settings and key only. All shapes that it is computed with
follow from itself and from the number of slots, never from the requests beside it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from crystal_jax import sharding
from crystal_jax.attention import KV, cache_layout, empty_cache
from crystal_jax.model import Crystal, Params

SLOTS = 8
BUCKET = 64
"""The least room of a slot; others have twice as much, four times and so on, up to the model's context."""
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


def key_of(*names: object) -> int:
    """A seed from 0 to 2^31 - 1 for what has these names."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:4], "little") >> 1


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
    """Makes texts with a model whose parameters are given; call it inside `jax.set_mesh` for several devices."""

    def __init__(self, model: Crystal, params: Params, eos_id: int, slots: int = SLOTS):
        self.ways = sharding.batch_ways()
        self.model, self.params, self.eos_id = model, params, eos_id
        self.slots = -(-slots // self.ways) * self.ways
        self._prefilled: tuple[tuple[int, ...], tuple[KV, jax.Array]] | None = None

    def __call__(self, requests: list[Request], ended: Ended = lambda index, ids: False) -> Iterator[
            tuple[int, list[int]]]:
        """(index, ids made, without </s>) of each request, in the order in which they end.

        A prompt and its max_tokens must fit the model's context together.
        """
        by_room: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            by_room.setdefault(self._room(len(request.prompt) + request.max_tokens), []).append(index)
        for room, indices in sorted(by_room.items()):
            yield from self._run(room, [(index, requests[index]) for index in indices], ended)

    def _room(self, needed: int) -> int:
        room = BUCKET
        while room < needed:
            room *= 2
        return min(room, self.model.config.max_length)

    def _run(self, room: int, requests: Iterable[tuple[int, Request]], ended: Ended) -> Iterator[
            tuple[int, list[int]]]:
        slots = _empty(self.model, self.slots, room)
        waiting = iter(requests)
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
            slots, made_BN = _decode(self.model, self.params, slots)
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
        room = slots.cache[0].shape[3]
        prompt = request.prompt
        if self._prefilled is None or self._prefilled[0] != prompt or self._prefilled[1][0][0].shape[3] > room:
            ids = np.zeros((self.ways, min(self._room(len(prompt)), room)), np.int32)
            ids[:, : len(prompt)] = prompt
            self._prefilled = (prompt, _prefill(self.model, self.params, ids, np.int32(len(prompt))))
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
    ints, floats = jnp.zeros(slots, jnp.int32, out_sharding=layout), jnp.ones(slots, jnp.float32, out_sharding=layout)
    cache = empty_cache(model.config, slots, room, jnp.dtype(model.dtype))
    return Slots(cache, ints, ints, ints, floats, floats, ints, ints)


@partial(jax.jit, static_argnums=0)
def _prefill(model: Crystal, params: Params, prompt_RP: jax.Array, length: jax.Array) -> tuple[KV, jax.Array]:
    """Keys and values [L, R, K, P, H] of R times the same prompt, of which the first `length` tokens count, and the
    stream [R, 1, D] at the last of them; R is the number of ways in which a batch is split over devices.
    """
    bound, (rows, room) = model.bind(params), prompt_RP.shape
    position_1P = jnp.arange(room)[None, :]
    mask = (position_1P <= jnp.arange(room)[:, None])[None, None]
    empty = empty_cache(model.config, rows, room, jnp.dtype(model.dtype))
    start_R = jnp.zeros(rows, jnp.int32, out_sharding=sharding.used("batch"))
    hidden_RPD, cache = bound.extend(prompt_RP, position_1P, mask, empty, start_R)
    return cache, jax.lax.dynamic_slice_in_dim(hidden_RPD, length - 1, 1, axis=1)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admit(model: Crystal, params: Params, slots: Slots, prefilled: tuple[KV, jax.Array], length: jax.Array,
           slot: jax.Array, settings: tuple[jax.Array, ...]) -> tuple[Slots, jax.Array]:
    """The slots with a prompt in one of them, and the first token after it."""
    kv, hidden_R1D = prefilled
    rows, B = len(hidden_R1D), len(slots.last_B)
    each_R = [jnp.broadcast_to(value, rows, out_sharding=sharding.used("batch")) for value in settings]
    temperature_R, top_p_R, seed_R, sample_R = each_R
    keys_R = _keys(seed_R, sample_R, jnp.zeros_like(seed_R))
    first_R = draw(model.bind(params).logits(hidden_R1D)[:, 0], keys_R, temperature_R, top_p_R)
    first = jnp.max(first_R)  # all rows are equal
    here_B = jnp.arange(B) == slot

    def placed(old: jax.Array, new: jax.Array) -> jax.Array:
        spread = jnp.repeat(new, B // rows, axis=1, out_sharding=cache_layout(model.config))
        return jnp.where(here_B[None, :, None, None, None], jax.lax.dynamic_update_slice(old, spread, (0,) * 5), old)

    def changed(old_B: jax.Array, value: jax.Array | int) -> jax.Array:
        return jnp.where(here_B, value, old_B)

    cache = (placed(slots.cache[0], kv[0]), placed(slots.cache[1], kv[1]))
    last, lengths, made, *rest = slots[1:]
    return Slots(cache, changed(last, first), changed(lengths, length), changed(made, 1),
                 *(changed(old, value) for old, value in zip(rest, settings, strict=True))), first


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(model: Crystal, params: Params, slots: Slots) -> tuple[Slots, jax.Array]:
    """STEPS tokens more in each slot: the slots after them, and the ids [B, STEPS]."""
    bound = model.bind(params)
    index_S = jnp.arange(slots.cache[0].shape[3])

    def step(slots: Slots, _: None) -> tuple[Slots, jax.Array]:
        mask_BS = index_S[None, :] <= slots.length_B[:, None]
        hidden_B1D, cache = bound.extend(slots.last_B[:, None], slots.length_B[:, None], mask_BS[:, None, None, :],
                                         slots.cache, slots.length_B)
        keys_B = _keys(slots.seed_B, slots.sample_B, slots.made_B)
        ids_B = draw(bound.logits(hidden_B1D)[:, 0], keys_B, slots.temperature_B, slots.top_p_B)
        return slots._replace(cache=cache, last_B=ids_B, length_B=slots.length_B + 1, made_B=slots.made_B + 1), ids_B

    slots, made_NB = jax.lax.scan(step, slots, length=STEPS)
    return slots, made_NB.T


def _keys(seed_B: jax.Array, sample_B: jax.Array, made_B: jax.Array) -> jax.Array:
    """A key for each token of each sample."""

    def key(seed: jax.Array, sample: jax.Array, made: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), made)

    return jax.vmap(key)(seed_B, sample_B, made_B)


def draw(logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Ids [B]: the most probable at temperature 0, else drawn from the nucleus of probability top_p."""
    logits_BV = sharding.lay(logits_BV, "batch", None)
    greedy_B = jnp.argmax(logits_BV, axis=-1)
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
