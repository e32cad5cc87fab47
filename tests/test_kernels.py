"""Attention kernels against the plain one: values and gradients, with and without documents, alone and on a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from crystal_jax import kernels, sharding
from crystal_jax.config import MeshConfig
from crystal_jax.errors import UserError
from crystal_jax.kernels import attention, choose_kernel, make_seen

B, N, T, H = 4, 4, 384, 64  # three blocks of splash's
DOCUMENTS = np.sort(np.random.default_rng(5).integers(0, 4, (B, T)), axis=1).astype(np.int32)
HEADS = ("batch", "heads", "length", None)


def inputs(dtype: str) -> list[jax.Array]:
    """q, k, v and a cotangent; scores of deviation one."""
    rng = np.random.default_rng(0)
    scales = (H**0.5, 1, 1, 1)
    return [jnp.asarray(scale * rng.standard_normal((B, N, T, H)), dtype) for scale in scales]


def run(kernel: str, documents: bool, dtype: str, power: float = 1.0) -> list[np.ndarray]:
    """The output and the gradients by q, k and v."""

    @partial(jax.jit, compiler_options=oracle.QUICK)
    def compute(q: jax.Array, k: jax.Array, v: jax.Array, away: jax.Array, ids: jax.Array) -> list[jax.Array]:
        def mixed(*qkv: jax.Array) -> jax.Array:
            return attention(*qkv, make_seen(kernel, T, ids if documents else None), power)

        out, back = jax.vjp(mixed, q, k, v)
        return [out, *back(away)]

    arrays: list[Any] = [*inputs(dtype), jnp.asarray(DOCUMENTS)]
    if not jax.sharding.get_abstract_mesh().empty:
        arrays = [sharding.lay(array, *HEADS[: array.ndim]) for array in arrays[:4]] + [
            sharding.lay(arrays[4], "batch", "length")]
    return [np.asarray(value, np.float64) for value in compute(*arrays)]


def worst(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Relative to the largest value of each."""
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash attention as its definition in JAX's own operations, which a CPU can run."""
    monkeypatch.setitem(kernels.KERNELS, "splash", partial(kernels._splash, interpret=True))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_splash_is_the_plain_attention(documents: bool, dtype: str, limit: float) -> None:
    assert worst(run("splash", documents, dtype), run("xla", documents, "float32")) <= limit


@pytest.mark.usefixtures("interpreted")
def test_splash_divides_by_the_power_of_the_head_size() -> None:
    """By 64 for muP, by 8 in the other families: the kernel itself scales nothing."""
    one, half = run("splash", False, "float32"), run("splash", False, "float32", 0.5)
    assert worst(half, run("xla", False, "float32", 0.5)) <= 1e-5
    assert worst(one, half) > 0.1


def test_splash_adds_up_its_partial_gradients() -> None:
    """JAX's own rule reduces those of q over the blocks of keys, which a TPU does slowly."""
    def gradient(row: Callable[..., jax.Array]) -> str:
        arrays = [array[0] for array in inputs("bfloat16")]
        return str(jax.make_jaxpr(lambda q, k, v, away: jax.vjp(row, q, k, v)[1](away))(*arrays))

    assert "reduce_sum[axes=(0,)" in gradient(kernels._splash_kernel(N, T, True))
    ours = gradient(partial(kernels._splash_row, True))
    assert "splash_mha_dkv" in ours and "reduce_sum[axes=(0,)" not in ours


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_splash_on_a_mesh(documents: bool) -> None:
    """Rows over data and fsdp, heads over tensor."""
    alone = run("xla", documents, "float32")
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2))):
        assert worst(run("splash", documents, "float32"), alone) <= 1e-5


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_cudnn_is_the_plain_attention(documents: bool) -> None:
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("needs a GPU with cuDNN: JAX_PLATFORMS=cuda")
    assert worst(run("cudnn", documents, "bfloat16"), run("xla", documents, "float32")) <= 2e-2


@pytest.mark.parametrize(("asked", "platform", "length", "head", "expected"), [
    ("auto", "cpu", 2048, 128, "xla"), ("auto", "tpu", 2048, 128, "splash"), ("auto", "gpu", 2048, 128, "cudnn"),
    ("xla", "tpu", 2048, 128, "xla"), ("auto", "tpu", 100, 128, "xla"), ("auto", "tpu", 2048, 32, "xla")])
def test_the_kernel_that_the_devices_have(asked: str, platform: str, length: int, head: int, expected: str) -> None:
    assert choose_kernel(asked, platform, length, head) == expected


@pytest.mark.parametrize(("asked", "platform", "length", "message"), [
    ("splash", "cpu", 2048, "config.training.attention: splash doesn't run on cpu; use xla, or auto"),
    ("cudnn", "tpu", 2048, "config.training.attention: cudnn doesn't run on tpu; use splash, or auto"),
    ("splash", "tpu", 100, "config.training.attention: splash takes lengths in multiples of 128 and head sizes in "
                           "multiples of 64, not 100 and 128; use xla")])
def test_a_kernel_that_the_devices_lack(asked: str, platform: str, length: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        choose_kernel(asked, platform, length, 128)
    assert str(error.value) == message
