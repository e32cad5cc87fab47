"""The Crystal recipe on the scale of a laptop: the demo's three phases on Python's standard library.

Derived from configs/crystal_7b.py: the same shares of code and text, the same FIM rates, subsets and shape of the
learning-rate schedule; 4 layers 128 wide, about two million tokens. `make demo` trains it on 2 CPU cores in about five
minutes. Another length: `configs/crystal_tiny.py:6000` takes 6,000 steps.

    crystal-jax train --config=configs/crystal_tiny.py --run_dir=demo/run
"""

from crystal_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, Source, TrainingConfig
from crystal_jax.errors import UserError
from crystal_jax.phases import Scale, scaled

from configs import crystal_7b

TEXT = tuple(name for name in crystal_7b.SLIMPAJAMA if name != "Github")
CODE = ("Github", "StarCoder", *crystal_7b.LANGUAGES)


def get_config(steps: str = "1900") -> Config:
    if not steps.isdecimal():
        raise UserError(f"the variant is a number of steps, such as 6000, not {steps!r}")
    config = scaled(
        crystal_7b.get_config(),
        Scale(
            steps=int(steps),
            global_batch_size=4,
            sequence_length=256,
            kept=12,
            min_warmup=10,
            sources={"text": (Source("pystd-text", "text"), TEXT), "code": (Source("pystd-code", "code"), CODE)},
        ),
        # A base width of 64 keeps the logits of a model this narrow near 1 at first; with the published 256 they begin
        # at 3.7, and the same compute ends 0.2 to 0.3 nats higher (docs/log.md).
        model=ModelConfig(vocab_size=4096, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=344, max_length=256,
                          rotary_dim=8, mup_base_width=64),
        name="crystal_tiny",
    )
    config.data = DataConfig(root="demo/data", tokenizer="tokenizer.json", sequence_length=256)
    # A CPU emulates bfloat16: float32 is a fifth faster there.
    config.training = TrainingConfig(dtype="float32", log_every=20, eval_every=200, eval_sequences=64)
    config.checkpoints = CheckpointConfig(every_steps=200, keep_last=3)
    return config
