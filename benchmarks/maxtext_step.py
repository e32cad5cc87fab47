"""MaxText's own training loop, a few steps at each word; run by benchmarks/peers.py with MaxText's own Python.

    PYTHON -m benchmarks.maxtext_step DTYPE REMAT SHAPE

Imports nothing of ours but the clock. Its loop, step, synthetic data and metrics are its own, at the defaults of its
base.yml but for the shape (its decoder block is Llama 2's), the dtype, the tied embedding, the learning rate,
`remat_policy` (its default is full), and what would reach for a cloud or save checkpoints.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import maxtext
from maxtext.trainers.pre_train import train
from maxtext.utils import exceptions

from benchmarks.rounds import turns

FIELDS = {"layers": "base_num_decoder_layers", "dim": "base_emb_dim", "mlp": "base_mlp_dim", "vocab": "vocab_size",
          "length": "max_target_length", "batch": "per_device_batch_size"}


def arguments(dtype: str, remat: str, shape: dict[str, int], output: str) -> list[str]:
    heads = shape["heads"]
    values = {FIELDS[name]: value for name, value in shape.items() if name in FIELDS}
    values |= {"base_num_query_heads": heads, "base_num_kv_heads": heads, "head_dim": shape["dim"] // heads,
               "logits_via_embedding": True, "dtype": dtype, "remat_policy": remat,
               "learning_rate": 1e-3, "warmup_steps_fraction": 0.0}
    values |= {"run_name": "peers", "base_output_directory": output, "jax_cache_dir": "", "hardware": "cpu",
               "skip_jax_distributed_system": True, "enable_checkpointing": False, "dataset_type": "synthetic",
               "steps": 100_000}
    config = next(Path(folder) / "configs" / "base.yml" for folder in maxtext.__path__)
    return ["maxtext", str(config), *(f"{name}={value}" for name, value in values.items())]


def main() -> None:
    dtype, remat, shape = sys.argv[1:]
    taken: dict[str, Any] = {}
    iterate = train.training_loop_iteration

    def finish() -> dict[str, Any]:
        jax.block_until_ready(taken["state"])
        return {"loss": float(taken["loss"]), "jax": jax.__version__}

    granted = turns(finish)

    def iterate_in_turn(state: dict[str, Any], *others: dict[str, Any]) -> Any:
        if next(granted, granted) is granted:
            raise exceptions.StopTraining("no more rounds")
        metrics = iterate(state, *others)
        taken.update(state=state["state"], loss=metrics["scalar"]["learning/loss"])
        return metrics

    train.training_loop_iteration = iterate_in_turn
    with tempfile.TemporaryDirectory() as output:
        train.main(arguments(dtype, remat, json.loads(shape), output))


if __name__ == "__main__":
    main()
