"""CPU seconds and tokens per second of a training step, ours against the plain program, in alternation.

    python -m benchmarks.train_step [--dtype=float32|bfloat16] [--rounds=8]

The comparison shape: 4 layers, 256 wide, 8 heads, MLP 688, vocabulary 4096, 256 long, batch 8, AdamW and clipping. Each
round runs every program for a few steps in turn, in one process; ratios are per round, so that a machine whose speed
drifts doesn't decide. Ours does more per step: biases, LayerNorm, loss per source, finiteness check.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import plain
from crystal_jax import sharding
from crystal_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from crystal_jax.model import Crystal, init_params
from crystal_jax.optimizer import make_optimizer
from crystal_jax.update import TrainState, make_train_step

LAYERS, DIM, HEADS, MLP, VOCAB, LENGTH, BATCH = 4, 256, 8, 688, 4096, 256, 8
STEPS = 3


def ours(dtype: str, remat: str, unroll: int):
    config = ModelConfig(vocab_size=VOCAB, embed_dim=DIM, num_layers=LAYERS, num_heads=HEADS, mlp_dim=MLP,
                         max_length=LENGTH, rotary_dim=8)
    mesh = sharding.make_mesh(MeshConfig())
    jax.set_mesh(mesh)
    model = Crystal(config, dtype, remat, unroll)
    optimizer = make_optimizer(OptimizerConfig(), config, model.specs())
    params = init_params(model.specs(), 1, mesh)
    state = TrainState(params, optimizer.init(params))
    step, lr = make_train_step(model, optimizer, 2), jnp.float32(1e-3)

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((BATCH, LENGTH), np.float32),
                 "source": np.arange(BATCH, dtype=np.int32) % 2}
        state, metrics = step(state, sharding.put_batch(mesh, batch), lr)
        return float(metrics["loss"])

    return run


def the_plain(dtype: str, remat: bool):
    params = plain.init(jax.random.key(0), LAYERS, DIM, HEADS, MLP, VOCAB)
    state = (params, plain.optimizer.init(params))
    step = plain.make_step(HEADS, jnp.dtype(dtype), remat)

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, loss = step(state, tokens[:, :-1], tokens[:, 1:])
        return float(loss)

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    programs = {
        "plain, scan, full remat": the_plain(args.dtype, True),
        "plain, scan, no remat": the_plain(args.dtype, False),
        "ours, unrolled, no remat": ours(args.dtype, "none", LAYERS),
        "ours, scan, full remat": ours(args.dtype, "full", 1),
    }
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    for run in programs.values():
        run(tokens)
    cpu = {name: [] for name in programs}
    wall = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, run in programs.items():
            before, began = time.process_time(), time.perf_counter()
            for _ in range(STEPS):
                run(tokens)
            cpu[name].append((time.process_time() - before) / STEPS)
            wall[name].append((time.perf_counter() - began) / STEPS)
    base = np.array(cpu["plain, scan, full remat"])
    print(f"{args.dtype}, {jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
          f"{args.rounds} rounds of {STEPS} steps; medians")
    for name in programs:
        ratio = np.median(np.array(cpu[name]) / base)
        print(f"{name:26} {np.median(cpu[name]):6.3f} CPU-s/step   {BATCH * LENGTH / np.median(wall[name]):7,.0f} tok/s"
              f"   {ratio:5.2f} of plain's CPU-s")


if __name__ == "__main__":
    main()
