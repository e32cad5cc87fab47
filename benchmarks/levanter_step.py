"""Levanter's own trainer, a few steps at each word; run by benchmarks/peers.py with Levanter's own Python.

    PYTHON -m benchmarks.levanter_step DTYPE REMAT SHAPE

Imports nothing of ours but the clock. Its Trainer, loss, optimizer and Llama model are as in its train_lm, at their
defaults but for the shape, the dtype, the tied embedding, the learning rate, `gradient_checkpointing` (its default is
on: full), and what would reach for a network or write; without the norms that it watches every tenth step. It takes one
batch again and again, as MaxText does with synthetic data.
"""

import json
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import haliax
import jax
import jmp
import numpy as np
from levanter.callbacks.watch import WatchConfig
from levanter.checkpoint import CheckpointerConfig
from levanter.data.dataset import ListAsyncDataset
from levanter.distributed import RayConfig
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample, compute_next_token_loss
from levanter.optim import AdamConfig
from levanter.tracker.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

from benchmarks.rounds import turns

POLICIES = {"float32": "f32", "bfloat16": "p=f32,c=bfloat16"}


def trainer_config(dtype: str, batch: int, folder: Path) -> TrainerConfig:
    checkpointer = CheckpointerConfig(str(folder / "checkpoints"), save_interval=timedelta(days=9))
    return TrainerConfig(
        id="peers", mp=jmp.get_policy(POLICIES[dtype]), train_batch_size=batch, tracker=NoopConfig(),
        watch=WatchConfig(watch_targets=[]), log_dir=folder, log_jaxprs=False, log_xla_hlo=False,
        checkpointer=checkpointer, require_accelerator=False, ray=RayConfig(auto_start_cluster=False))


def main() -> None:
    dtype, remat, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    model = LlamaConfig(
        seq_len=shape["length"], hidden_dim=shape["dim"], intermediate_dim=shape["mlp"], num_layers=shape["layers"],
        num_heads=shape["heads"], num_kv_heads=shape["heads"], tie_word_embeddings=True,
        gradient_checkpointing=remat == "full")
    vocab = haliax.Axis("vocab", shape["vocab"])
    rows = np.random.default_rng(0).integers(0, vocab.size, (shape["batch"], shape["length"])).astype(np.int32)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_config(dtype, shape["batch"], Path(folder))
        config.initialize()
        optimizer = AdamConfig(learning_rate=1e-3, warmup=0).build(config.num_train_steps)
        with Trainer(config, optimizer, compute_next_token_loss) as trainer:
            key = jax.random.PRNGKey(0)
            state = trainer.initial_state(key, model_init=lambda: model.build(vocab, key=key))
            examples = [LmExample.causal(haliax.named(row, model.Pos)) for row in rows]
            batch = next(iter(trainer.data_loader(ListAsyncDataset(examples, is_complete=True))))
            trainer.add_hook(lambda info: losses.append(info.loss), every=1)
            # Each step waits for its loss.
            trainer.train(state, (batch for _ in turns(lambda: {"loss": losses[-1], "jax": jax.__version__})))


if __name__ == "__main__":
    main()
