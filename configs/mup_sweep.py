"""A model to look for a learning rate with: two layers, half text and half code of Python's standard library.

Base width 64, as in configs/crystal_tiny.py. The variant is the width: `configs/mup_sweep.py:256`. docs/mup.md tells
how its stores are made and what a sweep over it found; 300 steps, 153,600 tokens.

    crystal-jax coord_check --config=configs/mup_sweep.py
    python -m benchmarks.lr_sweep --config=configs/mup_sweep.py --output=demo/mup/sweep
"""

from crystal_jax.config import Config, DataConfig, LearningRate, ModelConfig, Phase, Source, TrainingConfig
from crystal_jax.errors import UserError


def get_config(width: str = "64") -> Config:
    if not width.isdecimal() or int(width) < 16 or int(width) % 16:
        raise UserError(f"the variant is a width in multiples of 16, such as 128, not {width!r}")
    embed_dim = int(width)
    return Config(
        name="mup_sweep",
        model=ModelConfig(vocab_size=1024, embed_dim=embed_dim, num_layers=2, num_heads=4, mlp_dim=embed_dim * 43 // 16,
                          max_length=128, rotary_dim=embed_dim // 16 // 2 * 2, mup_base_width=64),
        sources={"text": Source("pystd-text", "text"), "code": Source("pystd-code", "code")},
        phases=[Phase(steps=300, global_batch_size=4, mix={"text": 0.5, "code": 0.5},
                      lr=LearningRate(peak=0.012, warmup_steps=30, end=0.0012, decay_steps=270), checkpoint_every=300)],
        data=DataConfig(root="demo/mup", tokenizer="tokenizer.json", sequence_length=128),
        training=TrainingConfig(dtype="float32", log_every=50, eval_every=300, eval_sequences=128),
    )
