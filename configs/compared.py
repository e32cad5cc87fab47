"""The systems that Crystal's paper compares it with, on Crystal's recipe: the same data, another architecture.

Variants: llama2 and codellama (7B), starcoder (15B). Each keeps its own vocabulary and context (their released
config.json); the phases, sources and schedules are those of configs/crystal_7b.py. Learning rates there are for muP
with base width 256: choose your own for a model without it.

    crystal-jax recipe show --config=configs/compared.py:llama2
"""

import dataclasses

from crystal_jax.config import Config, ModelConfig
from crystal_jax.errors import UserError

from configs import crystal_7b

LLAMA2 = ModelConfig(family="llama", vocab_size=32000, embed_dim=4096, num_layers=32, num_heads=32, mlp_dim=11008,
                     max_length=4096, rotary_dim=128, mup_base_width=4096, embed_scale=1.0, output_scale=1.0,
                     init_std=0.02)
MODELS = {
    "llama2": LLAMA2,
    "codellama": dataclasses.replace(LLAMA2, vocab_size=32016, max_length=16384, rotary_base=1e6),
    "starcoder": ModelConfig(family="starcoder", vocab_size=49152, embed_dim=6144, num_layers=40, num_heads=48,
                             num_kv_heads=1, mlp_dim=24576, exact_gelu=True, max_length=8192, rotary_dim=0,
                             mup_base_width=6144, embed_scale=1.0, output_scale=1.0, init_std=0.02),
}


def get_config(name: str = "llama2") -> Config:
    if name not in MODELS:
        raise UserError(f"the variants are {', '.join(MODELS)}, not {name!r}")
    config = crystal_7b.get_config()
    config.name, config.model = name, MODELS[name]
    return config
