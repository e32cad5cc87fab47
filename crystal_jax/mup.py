"""The same model at other widths, by the maximal-update parametrisation or by the standard one.

Invariant: `at_widths` changes only sizes, so that what differs between two widths is what the parametrisation makes of
them (ModelConfig's scales, the groups of optimizer.py).
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from crystal_jax.config import FAMILIES, Family, ModelConfig
from crystal_jax.errors import UserError

NARROWEST_HEAD = 16
"""Dims that a head has at the smallest width, at least."""


def at_widths(model: ModelConfig, widths: Iterable[int]) -> dict[int, ModelConfig]:
    """The model at each width, narrowest first; MLP and heads grow in proportion.

    All have as many of the model's heads as divide each width and have room for 16 dims at the smallest.

    Raises:
      UserError: fewer than two widths, or one below 16.
    """
    found = sorted(set(widths))
    if len(found) < 2 or found[0] < NARROWEST_HEAD:
        raise UserError(f"--widths={','.join(map(str, found))}: give two or more that differ, each {NARROWEST_HEAD} or "
                        "more, such as 64,128,256")
    heads = max(n for n in range(1, found[0] // NARROWEST_HEAD + 1) if math.gcd(n, model.num_heads, *found) == n)
    return {width: _at_width(model, width, heads) for width in found}


def _at_width(model: ModelConfig, width: int, heads: int) -> ModelConfig:
    rotary_dim = 2 * int(model.rotary_dim / model.head_dim * (width // heads) / 2)
    shared = math.gcd(heads, model.num_kv_heads) if model.num_kv_heads else None
    return replace(model, embed_dim=width, num_heads=heads, num_kv_heads=shared, rotary_dim=rotary_dim,
                   mlp_dim=max(1, round(model.mlp_dim * width / model.embed_dim)))


class StandardModelConfig(ModelConfig):
    """A model whose scores are divided by the square root of the head size, whatever its family."""

    @property
    def choices(self) -> Family:
        return replace(FAMILIES[self.family], attention_power=0.5)


def standard(model: ModelConfig) -> ModelConfig:
    """The model as it is usually parametrised: it equals the given one at its base width, but for the scores' divisor.

    Every matrix still begins with deviations of 1 / sqrt(fan-in), the tied embedding with it, whose rows are multiplied
    by sqrt(width) where they enter, as in the original transformer. What is left out is what muP adds: a learning rate
    of the hidden matrices and a multiplier of the logits that fall with the width, and scores divided by the head size.
    """
    grown = math.sqrt(1 / model.width_scale)
    return StandardModelConfig(**vars(model) | {"mup_base_width": model.embed_dim, "init_std": model.init_std / grown,
                                                "embed_scale": model.embed_scale * grown})
