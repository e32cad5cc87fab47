"""softmax(q k^T / H^power) v, by the kernel that the devices have, all of them the same function.

Invariant: a query sees what `Seen` says, whichever kernel computes it; the softmax runs in float32 or wider.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Literal, Var

from crystal_jax import sharding
from crystal_jax.errors import UserError
from crystal_jax.products import on_devices

PLATFORMS = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
"""The kernel that `auto` is, by JAX's name of the devices' platform."""

CAUSAL_BLOCKS = 4
"""Blocks of queries, each of which meets only the keys up to its end: 3/8 of the products are hidden and never made."""

SPLASH_BLOCK = 512
"""Queries and keys at a time, at most."""


@dataclass(frozen=True)
class Seen:
    """Where queries may look: at themselves and before, inside their own document; or just where `allowed` says."""

    kernel: str = "xla"
    allowed: jax.Array | None = None
    """[B or 1, 1, T, S], True where a query may look; only xla and cudnn read it."""
    segment_ids_BT: jax.Array | None = None
    """Documents; None for one document a row."""
    causal: bool = True
    """Promises that T = S and that nothing sees what comes after it."""


def choose_kernel(name: str, platform: str, length: int, head_dim: int) -> str:
    """The kernel of config.training.attention on these devices.

    Raises:
      UserError: the devices don't have it, or it doesn't take these sizes.
    """
    path, kernel = "config.training.attention", PLATFORMS[platform] if name == "auto" else name
    if kernel not in ("xla", PLATFORMS[platform]):
        raise UserError(f"{path}: {kernel} doesn't run on {platform}; use {PLATFORMS[platform]}, or auto")
    splits = length % 128 == 0 and head_dim % 64 == 0
    if kernel == "splash" and not splits:
        if name == "auto":
            return "xla"
        raise UserError(f"{path}: splash takes lengths in multiples of 128 and head sizes in multiples of 64, not "
                        f"{length} and {head_dim}; use xla")
    return kernel


def make_seen(kernel: str, length: int, segment_ids_BT: jax.Array | None = None,
              branch_ids_BT: jax.Array | None = None) -> Seen:
    """What rows of `length` tokens see; branches (see `causal_mask`) are for the xla kernel."""
    if kernel == "splash":
        assert branch_ids_BT is None, "splash knows documents only"
        return Seen(kernel, None, segment_ids_BT)
    return Seen(kernel, causal_mask(length, segment_ids_BT, branch_ids_BT), segment_ids_BT)


def attention(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, seen: Seen, power: float = 1.0) -> jax.Array:
    """softmax(q k^T / H^power) v over what is seen; returns [B, N, T, H]."""
    # q is scaled once, in its own dtype: T*H products instead of T*S, and exact where H is a power of two.
    q_BNTH = q_BNTH * jnp.asarray(q_BNTH.shape[-1] ** -power, q_BNTH.dtype)
    return KERNELS[seen.kernel if seen.causal else "xla"](q_BNTH, k_BNSH, v_BNSH, seen)


def _xla(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, seen: Seen) -> jax.Array:
    length, mask = q_BNTH.shape[2], seen.allowed
    assert mask is not None, "what is seen"
    if not seen.causal or length % CAUSAL_BLOCKS:
        return checkpoint_name(_attend(q_BNTH, k_BNSH, v_BNSH, mask), "context")
    ends = [length // CAUSAL_BLOCKS * (block + 1) for block in range(CAUSAL_BLOCKS)]
    return checkpoint_name(jnp.concatenate(
        [_attend(q_BNTH[:, :, start:end], k_BNSH[:, :, :end], v_BNSH[:, :, :end], mask[:, :, start:end, :end])
         for start, end in zip([0, *ends], ends, strict=False)], axis=2), "context")


def _attend(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, mask: jax.Array) -> jax.Array:
    wide = jnp.promote_types(q_BNTH.dtype, jnp.float32)
    scores_BNTS = jnp.einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH, preferred_element_type=wide)
    scores_BNTS = jnp.where(mask, scores_BNTS, jnp.finfo(wide).min)
    top_BNT1 = jax.lax.stop_gradient(jnp.max(scores_BNTS, axis=-1, keepdims=True))
    weights_BNTS = jnp.exp(scores_BNTS - top_BNT1)
    # The division comes after the product with v: T*H divisions instead of T*S.
    total_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    mixed_BNTH = jnp.einsum("bnts,bnsh->bnth", weights_BNTS.astype(v_BNSH.dtype), v_BNSH, preferred_element_type=wide)
    return (mixed_BNTH / total_BNT1).astype(q_BNTH.dtype)


def _splash(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, seen: Seen, interpret: bool = False) -> jax.Array:
    """Pallas' splash attention, each device on its own rows and heads."""
    heads, rows = sharding.used("batch", "heads", "length", None), sharding.used("batch", "length")
    ids = () if seen.segment_ids_BT is None else (seen.segment_ids_BT,)
    return on_devices(jax.vmap(partial(_splash_row, interpret)), (heads,) * 3 + (rows,) * len(ids), heads,
                      q_BNTH, k_BNSH, v_BNSH, *ids, check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _splash_row(interpret: bool, q_NTH: jax.Array, k_NSH: jax.Array, v_NSH: jax.Array, *ids_T: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    kernel = _splash_kernel(q_NTH.shape[0], q_NTH.shape[1], interpret)
    return kernel(q_NTH, k_NSH, v_NSH, splash.SegmentIds(*ids_T, *ids_T) if ids_T else None)


def _splash_row_forward(interpret: bool, q_NTH: jax.Array, k_NSH: jax.Array, v_NSH: jax.Array, *ids_T: jax.Array
                        ) -> tuple[jax.Array, tuple[Callable[..., tuple[jax.Array, ...]], int]]:
    mixed_NTH, back = jax.vjp(lambda *qkv: _splash_row.fun(interpret, *qkv, *ids_T), q_NTH, k_NSH, v_NSH)
    return mixed_NTH, (back, len(ids_T))


def _splash_row_back(_interpret: bool, kept: tuple[Callable[..., tuple[jax.Array, ...]], int], do_NTH: jax.Array
                     ) -> tuple[jax.Array | None, ...]:
    """Splash's own gradient. It sums up q's over the blocks of keys by a reduction, for which XLA makes TPUs a pass at
    a tenth of the memory's rate, 3% of a 7B step by its estimate; additions pass at half of it."""
    back, ids = kept
    return (*_with_additions(jax.make_jaxpr(back)(do_NTH), do_NTH), *(None,) * ids)


_splash_row.defvjp(_splash_row_forward, _splash_row_back)


def _with_additions(program: ClosedJaxpr, *arguments: jax.Array) -> list[jax.Array]:
    """The program's results, its sums over a first axis made by additions and rounded to what the parts were."""
    jaxpr = program.jaxpr
    narrow: dict[Var, jax.Array] = {}
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments], strict=True))
    for step in jaxpr.eqns:
        operands = [source.val if isinstance(source, Literal) else values[source] for source in step.invars]
        with jax.named_scope(str(step.source_info.name_stack)):
            if step.primitive.name == "jit":
                results = _with_additions(step.params["jaxpr"], *operands)
            elif step.primitive.name == "reduce_sum" and step.params["axes"] == (0,):
                # Otherwise XLA writes a wide copy of all parts, or lays them out anew for what comes after.
                parts, wide = narrow.get(step.invars[0], operands[0]), operands[0].dtype
                total = reduce(jnp.add, (part.astype(wide) for part in parts))
                results = [jax.lax.optimization_barrier(total.astype(parts.dtype)).astype(wide)]
            else:
                results = step.primitive.bind(*operands, **step.params)
                results = results if step.primitive.multiple_results else [results]
        if step.primitive.name == "convert_element_type":
            narrow[step.outvars[0]] = operands[0]
        values |= zip(step.outvars, results, strict=True)
    return [source.val if isinstance(source, Literal) else values[source] for source in jaxpr.outvars]


def _splash_kernel(heads: int, length: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in (SPLASH_BLOCK, 256, 128) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret,
                                  residual_checkpoint_name="context")


def _cudnn(q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, seen: Seen) -> jax.Array:
    """cuDNN's flash attention, of q, k and v as [B, T, N, H]."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BNTH, k_BNSH, v_BNSH))
    heads = sharding.used("batch", "length", "heads", None)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *allowed: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=allowed[0] if allowed else None, scale=1.0, is_causal=True,
                                            implementation="cudnn")

    # One document a row needs no mask, and a mask costs T*S values to read.
    allowed = () if seen.segment_ids_BT is None else (seen.allowed,)
    specs = (heads,) * 3 + (sharding.used("batch", None, "length", None),) * len(allowed)
    mixed = on_devices(local, specs, heads, q, k, v, *allowed, check_vma=False)
    return checkpoint_name(jnp.swapaxes(mixed, 1, 2), "context")


KERNELS = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}


def causal_mask(length: int, segment_ids_BT: jax.Array | None = None,
                branch_ids_BT: jax.Array | None = None) -> jax.Array:
    """[B or 1, 1, T, T]: a query sees itself and what lies before it, inside its own document if ids are given.

    With branches a document is a stem, branch 0, and continuations of it that see the stem and themselves only.
    """
    index = jnp.arange(length)
    mask = (index[:, None] >= index[None, :])[None, None]
    if segment_ids_BT is not None:
        mask = mask & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
    if branch_ids_BT is not None:
        key_B11T = branch_ids_BT[:, None, None, :]
        mask = mask & ((key_B11T == 0) | (key_B11T == branch_ids_BT[:, None, :, None]))
    return mask
