"""The 7B recipe's twelve sources and three phases over small stores of the published shapes: ten steps of a tiny model.

Derived from configs/crystal_7b.py: the same shares, subsets, FIM rates and shape of the learning-rate schedule.
docs/data_walkthrough.sh makes the stores from files on the machine and trains it in seconds; it is for looking at the
data, not for the loss. Another length: `configs/crystal_small.py:100` takes 100 steps.

    crystal-jax train --config=configs/crystal_small.py --config.data.root=STORES --run_dir=RUN
"""

from crystal_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainingConfig
from crystal_jax.errors import UserError
from crystal_jax.phases import Scale, scaled

from configs import crystal_7b


def get_config(steps: str = "10") -> Config:
    if not steps.isdecimal():
        raise UserError(f"the variant is a number of steps, such as 100, not {steps!r}")
    original = crystal_7b.get_config()
    config = scaled(
        original,
        # 132 sequences are a sixteenth of the published batch: the smallest source of a phase has at least one in each.
        Scale(steps=int(steps), global_batch_size=132, sequence_length=128, kept=5, min_warmup=1,
              sources={name: (source, (name,)) for name, source in original.sources.items()}),
        model=ModelConfig(vocab_size=2048, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=172, max_length=128,
                          rotary_dim=4, mup_base_width=64),
        name="crystal_small",
    )
    config.data = DataConfig(root="data", tokenizer="tokenizer.json", sequence_length=128)
    config.training = TrainingConfig(dtype="float32", log_every=1, eval_every=1000, eval_sequences=32)
    config.checkpoints = CheckpointConfig(every_steps=5, keep_last=2)
    return config
