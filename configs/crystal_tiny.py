"""The Crystal recipe on the scale of a laptop: the demo's three phases on Python's standard library.

Derived from configs/crystal_7b.py: the same shares of code and text, the same FIM rates, subsets and shape of the
learning-rate schedule; 4 layers 256 wide, about one million tokens. `make demo` trains it on 2 CPU cores in minutes.

    crystal-jax train --config=configs/crystal_tiny.py --run_dir=demo/run
"""

from crystal_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, Source, TrainingConfig
from crystal_jax.phases import Scale, scaled

from configs import crystal_7b

TEXT = tuple(name for name in crystal_7b.SLIMPAJAMA if name != "Github")
CODE = ("Github", "StarCoder", *crystal_7b.LANGUAGES)


def get_config(steps: str = "600") -> Config:
    config = scaled(
        crystal_7b.get_config(),
        Scale(
            steps=int(steps),
            global_batch_size=8,
            sequence_length=256,
            kept=12,
            min_warmup=10,
            sources={"text": (Source("pystd-text", "text"), TEXT), "code": (Source("pystd-code", "code"), CODE)},
        ),
        model=ModelConfig(
            vocab_size=4096, embed_dim=256, num_layers=4, num_heads=8, mlp_dim=688, max_length=256, rotary_dim=8
        ),
        name="crystal_tiny",
    )
    config.data = DataConfig(root="demo/data", tokenizer="tokenizer.json", sequence_length=256)
    config.training = TrainingConfig(
        remat="none", unroll=4, mesh=MeshConfig(), log_every=10, eval_every=100, eval_sequences=64
    )
    config.checkpoints = CheckpointConfig(every_steps=100, keep_last=3)
    return config
