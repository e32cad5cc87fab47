"""What the numerics tests compare with: the original model and optimizer on a tiny configuration, in our layout.

Owns the mapping from the original's names to those of `params`. The files lie in ../shared/reference:
oracle_tiny_f32.npz and _f64.npz (parameters, one batch, logits, gradients, residual stream, attention) and
oracle_optim.npz (three optimizer steps on that batch).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crystal_jax.config import ModelConfig
from crystal_jax.model import map_specs

Tree = dict[str, Any]
MODEL = ModelConfig(vocab_size=101, embed_dim=64, num_layers=3, num_heads=4, mlp_dim=171, max_length=64, rotary_dim=4,
                    mup_base_width=4)
_D, _N, _H, _L = MODEL.embed_dim, MODEL.num_heads, MODEL.head_dim, MODEL.num_layers


def load(reference: Path, dtype: str) -> dict[str, np.ndarray]:
    """oracle_tiny_f32 or _f64, with integers as int32; checks that its configuration is MODEL."""
    with np.load(reference / f"oracle_tiny_{dtype}.npz") as file:
        found = dict(file)
    theirs = json.loads(str(found["config"]))
    ours = {"vocab_size": MODEL.vocab_size, "n_embd": _D, "n_layer": _L, "n_head": _N, "n_inner": MODEL.mlp_dim,
            "n_positions": MODEL.max_length, "rotary_dim": MODEL.rotary_dim, "layer_norm_epsilon": MODEL.norm_eps,
            "mup_embeddings_scale": MODEL.embed_scale, "mup_output_alpha": MODEL.output_scale,
            "mup_width_scale": MODEL.width_scale}
    assert {key: theirs[key] for key in ours} == ours
    for name in ("input_ids", "labels"):
        found[name] = found[name].astype(np.int32)
    return found


def batch(found: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, targets, mask) [B, T]."""
    return found["input_ids"], found["labels"], found["loss_mask"]


def published(found: dict[str, np.ndarray], prefix: str) -> Tree:
    """Parameters (`sd`) or their gradients (`grad`), from the names of the released checkpoints."""

    def get(name: str) -> np.ndarray:
        return found[f"{prefix}/transformer.{name}"]

    def third(name: str, index: int, layer: int) -> np.ndarray:
        return np.split(get(f"h.{layer}.attn.c_attn.{name}"), 3, axis=-1)[index]

    tree = _norms(get, "wte.weight", "ln_f", "h.{}.ln_1", "h.{}.ln_2")
    tree["layers"]["attn"] = {
        "o": _stack(lambda i: get(f"h.{i}.attn.c_proj.weight").reshape(_N, _H, _D)),
        "o_bias": _stack(lambda i: get(f"h.{i}.attn.c_proj.bias")),
    }
    for index, name in enumerate("qkv"):
        tree["layers"]["attn"][name] = _stack(lambda i, n=index: third("weight", n, i).reshape(_D, _N, _H))
        tree["layers"]["attn"][f"{name}_bias"] = _stack(lambda i, n=index: third("bias", n, i).reshape(_N, _H))
    tree["layers"]["mlp"] = _linears(get, "h.{}.mlp.", {"gate": "c_fc2", "up": "c_fc", "down": "c_proj"})
    return tree


def after_training(reference: Path) -> tuple[dict[str, np.ndarray], Tree]:
    """({loss, gnorm, lr} [3], parameters after the third step): its matrices are stored [out, in]."""
    with np.load(reference / "oracle_optim.npz") as file:
        found = dict(file)

    def get(name: str) -> np.ndarray:
        return found[f"after3/model.{name}"].T

    layer = "transformer_decoder.layers.{}."
    embed = "embedding_layer.word_embeddings.weight"
    tree = _norms(lambda name: get(name).T, embed, "ln_f", f"{layer}norm1", f"{layer}norm3")
    attn = _linears(get, f"{layer}self_attn.proj_", {
        **{name: f"{name}_dense_layer" for name in "qkv"}, "o": "output_dense_layer"})
    for name in "qkv":
        attn[name] = attn[name].reshape(_L, _D, _N, _H)
        attn[f"{name}_bias"] = attn[f"{name}_bias"].reshape(_L, _N, _H)
    attn["o"] = attn["o"].reshape(_L, _N, _H, _D)
    tree["layers"]["attn"] = attn
    tree["layers"]["mlp"] = _linears(get, f"{layer}ffn.ffn.", {
        "gate": "0.linear_layer_for_glu", "up": "0.linear_layer", "down": "1.linear_layer"})
    return {name: np.array([found[f"{name}/{i}"] for i in range(3)]) for name in ("loss", "gnorm", "lr")}, tree


def _norms(get: Callable[[str], np.ndarray], embed: str, final: str, first: str, second: str) -> Tree:
    def stacked(name: str) -> Tree:
        return {"scale": _stack(lambda i: get(f"{name.format(i)}.weight")),
                "bias": _stack(lambda i: get(f"{name.format(i)}.bias"))}

    return {"embed": get(embed), "final_norm": {"scale": get(f"{final}.weight"), "bias": get(f"{final}.bias")},
            "layers": {"attn_norm": stacked(first), "mlp_norm": stacked(second)}}


def _linears(get: Callable[[str], np.ndarray], prefix: str, names: dict[str, str]) -> Tree:
    tree = {}
    for ours, theirs in names.items():
        tree[ours] = _stack(lambda i, t=theirs: get(f"{prefix.format(i)}{t}.weight"))
        tree[f"{ours}_bias"] = _stack(lambda i, t=theirs: get(f"{prefix.format(i)}{t}.bias"))
    return tree


def _stack(make: Callable[[int], np.ndarray]) -> np.ndarray:
    return np.stack([make(layer) for layer in range(_L)])


# A training step compiles in a quarter of the time without LLVM's optimisations and the MLIR emitters of fused loops;
# what is computed, and how it is partitioned, stays as it is.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def random_params(specs: Tree, seed: int = 0, std: float = 0.3) -> Tree:
    """Float32 parameters none of which is at its initial value, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: (spec.mean + std * rng.standard_normal(spec.shape)).astype(np.float32), specs)


def worst(tree: Tree, reference: Tree, relative: bool = False) -> dict[str, float]:
    """Largest absolute difference of each leaf, by its path; `relative` to the leaf's largest value."""

    def difference(ours: Any, theirs: Any) -> float:
        theirs = np.asarray(theirs, np.float64)
        return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / (np.abs(theirs).max() if relative else 1))

    found = jax.tree_util.tree_flatten_with_path(jax.tree.map(difference, tree, reference))[0]
    return {".".join(key.key for key in path): value for path, value in found}
