"""Slots that are refilled: what a request gives depends on nothing but itself."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_jax import sampling, sharding
from crystal_jax.attention import BLOCK, KV, empty_tails
from crystal_jax.config import MeshConfig, ModelConfig
from crystal_jax.model import Crystal, Params, map_specs
from crystal_jax.sampling import BUCKET, Request, Sampler

MODEL = ModelConfig(vocab_size=400, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=2 * BUCKET + 12,
                    rotary_dim=4, mup_base_width=8, embed_scale=0.1)
CRYSTAL = Crystal(MODEL)
EOS = 2


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_admit", "_decode", "_prefill"):
            made = jax.jit(getattr(sampling, name).__wrapped__, static_argnums=0, compiler_options=oracle.QUICK)
            patch.setattr(sampling, name, made)
        yield


@pytest.fixture(scope="module")
def params() -> Params:
    found = oracle.random_params(CRYSTAL.specs(), std=0.8)
    found["embed"] *= 3 / np.linalg.norm(found["embed"], axis=1, keepdims=True)
    found["final_norm"] = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    return jax.tree.map(jnp.asarray, found)


def requests(count: int, seed: int = 0) -> list[Request]:
    """Of all lengths and settings; some end at </s>, and none of the choices hangs on rounding."""
    rng = np.random.default_rng(seed)
    made = []
    for sample in range(count):
        length = int(rng.integers(1, 100))
        made.append(Request(tuple(rng.integers(3, 300, length).tolist()), int(rng.integers(1, 40)),
                            float(rng.choice([0.0, 0.7, 1.3])), float(rng.choice([1.0, 0.8])), 5, sample))
    return made


@pytest.fixture(scope="module")
def sampler(params: Params) -> Sampler:
    return Sampler(CRYSTAL, params, EOS, slots=4)


@pytest.fixture(scope="module")
def together(sampler: Sampler) -> dict[int, list[int]]:
    return dict(sampler(requests(24)))


def test_a_request_gives_the_same_alone_and_among_others(sampler: Sampler, together: dict[int, list[int]]) -> None:
    asked = requests(24)
    assert set(together) == set(range(24))
    assert len({tuple(ids) for ids in together.values()}) > 20
    for index in range(0, 24, 3):
        assert dict(sampler([asked[index]])) == {0: together[index]}
    order = np.random.default_rng(1).permutation(24)
    assert dict(sampler([asked[i] for i in order])) == {n: together[int(i)] for n, i in enumerate(order)}


def test_the_number_of_slots_changes_nothing_beyond_rounding(params: Params, together: dict[int, list[int]]) -> None:
    assert dict(Sampler(CRYSTAL, params, EOS, slots=1)(requests(8))) == {n: together[n] for n in range(8)}


def test_longer_texts_beside_it_add_exact_zeros(params: Params) -> None:
    """The same bits for a row, however many blocks of the cache the others take, and whatever lies behind its end."""
    rng = np.random.default_rng(0)
    shape = (MODEL.num_layers, 2, MODEL.kv_heads, 3 * BLOCK, MODEL.head_dim)
    keys, values = (rng.standard_normal(shape, np.float32) for _ in range(2))

    @functools.partial(jax.jit, compiler_options=oracle.QUICK)
    def step(cache: KV, length_B: jax.Array) -> jax.Array:
        bound, tails = CRYSTAL.bind(params), empty_tails(MODEL, 2, 1, jnp.dtype(jnp.float32))
        return bound.extend(bound.blocks(), jnp.full((2, 1), 7), tails, 0, cache, length_B)[0]

    alone = np.asarray(step((keys, values), jnp.asarray([50, 0])))
    for length in (50, BLOCK, BLOCK + 1, 3 * BLOCK):
        assert np.array_equal(step((keys, values), jnp.asarray([50, length]))[0], alone[0])
    keys[:, :, :, 50:], values[:, :, :, 50:] = 1e3, -1e3
    assert np.array_equal(step((keys, values), jnp.asarray([50, 3 * BLOCK]))[0], alone[0])


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_devices_change_nothing_beyond_rounding(params: Params, together: dict[int, list[int]],
                                                mesh: MeshConfig) -> None:
    devices = sharding.make_mesh(mesh)
    with jax.set_mesh(devices):
        placed = map_specs(lambda spec, leaf: jax.device_put(np.asarray(leaf), sharding.named(devices, spec.axes)),
                           CRYSTAL.specs(), params)
        assert dict(Sampler(CRYSTAL, placed, EOS, slots=3)(requests(12))) == {n: together[n] for n in range(12)}


def test_shared_keys_and_values_on_several_devices() -> None:
    """Fewer heads of keys than devices to split the queries' over: they are whole on each."""
    model = Crystal(ModelConfig(family="llama", vocab_size=400, embed_dim=32, num_layers=2, num_heads=4,
                                num_kv_heads=2, mlp_dim=24, max_length=2 * BUCKET + 12, rotary_dim=8,
                                mup_base_width=32, embed_scale=1.0, output_scale=1.0))
    params = jax.tree.map(jnp.asarray, oracle.random_params(model.specs(), std=0.8))
    alone = dict(Sampler(model, params, EOS, slots=2)(requests(4)))
    assert len({tuple(ids) for ids in alone.values()}) == 4
    devices = sharding.make_mesh(MeshConfig(data=2, tensor=4))
    with jax.set_mesh(devices):
        placed = map_specs(lambda spec, leaf: jax.device_put(np.asarray(leaf), sharding.named(devices, spec.axes)),
                           model.specs(), params)
        assert dict(Sampler(model, placed, EOS, slots=2)(requests(4))) == alone


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=9))
def test_every_request_ends_once_and_in_time(sampler: Sampler, drawn: list[tuple[int, int, int]]) -> None:
    asked = [Request(tuple(range(3, 3 + length)), tokens, 1.0, sample=n) for n, (length, tokens, _) in enumerate(drawn)]

    def ended(index: int, ids: list[int]) -> bool:
        return bool(drawn[index][2]) and len(ids) >= 4 * drawn[index][2]

    found = list(sampler(asked, ended))
    assert sorted(index for index, _ in found) == list(range(len(asked)))
    for index, ids in found:
        assert EOS not in ids and len(ids) <= asked[index].max_tokens
        if drawn[index][2]:
            assert len(ids) <= 4 * drawn[index][2] + sampling.STEPS


def test_up_to_the_very_end_of_the_context(sampler: Sampler) -> None:
    """The longest prompt in the largest room, and one that leaves room for a single token."""
    longest = Request(tuple(range(3, 3 + MODEL.max_length - 1)), 1)
    room = Request(tuple(range(3, 15)), MODEL.max_length - 12)
    found = dict(sampler([longest, room]))
    assert len(found[0]) <= 1 and len(found[1]) <= MODEL.max_length - 12


def test_a_prompt_that_several_samples_share_is_read_once(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = sampling._prefill
    monkeypatch.setattr(sampling, "_prefill", lambda *args: calls.append(1) or real(*args))
    prompt = tuple(range(10, 40))
    asked = [Request(prompt, 20, 1.0, sample=n) for n in range(9)]
    found = dict(sampler(asked))
    assert len(calls) == 1 and len({tuple(ids) for ids in found.values()}) == 9
