"""Does the best learning rate of a narrow model suit a wide one? With muP and without it.

    python -m benchmarks.lr_sweep --config=configs/mup_sweep.py --output=demo/mup/sweep [--widths=64,128,256]
        [--rates=0.001,0.002,0.004,0.008,0.016,0.032,0.064] [--seeds=1] [--config.a.b=VALUE ...]

Trains the config's recipe at each width and peak learning rate, by both parametrisations, and takes the mean of the
held-out losses of all domains at the end. The schedules of all phases are scaled as the first one's peak is. Each run
is a line of OUTPUT/runs.jsonl; the same command makes what is missing, then draws OUTPUT/lr_sweep.png from all of it:
more rates or seeds can be added.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from crystal_jax import files, sharding
from crystal_jax.config import Config, MeshConfig, ModelConfig, digest, to_dict
from crystal_jax.config_file import load_config
from crystal_jax.data.pipeline import Batches, Stores, heldout
from crystal_jax.errors import UserError
from crystal_jax.evaluate import HeldOut
from crystal_jax.model import Crystal, init_params
from crystal_jax.mup import at_widths, standard
from crystal_jax.optimizer import make_optimizer
from crystal_jax.plots_mup import best, draw_sweep
from crystal_jax.update import TrainState, make_train_step

RATES = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064]
PARAMETRISATIONS = {"muP": lambda model: model, "standard": standard}
Sweep = dict[str, dict[int, dict[float, float]]]
"""Parametrisation, width and rate to the held-out loss, the mean over seeds."""


class Trainer:
    """Trains one model again and again, compiled once: neither rate nor seed is part of the program."""

    def __init__(self, config: Config, model: ModelConfig, stores: Stores):
        self.config, self.batches = config, Batches(config, stores)
        self.mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self.model = Crystal(model, config.training.dtype)
        self.specs = self.model.specs()
        self.optimizer = make_optimizer(config.optimizer, model, self.specs)
        self.train_step = make_train_step(self.model, self.optimizer, len(config.sources))
        self.evaluator = HeldOut(self.model, heldout(config, stores), config.phases[0].global_batch_size, self.mesh,
                                 stores.tokenizer.byte_lengths)

    def loss(self, rate: float, seed: int) -> float:
        """Held-out at the end, in nats; the seed is that of the initial values."""
        scale, plan = rate / self.config.phases[0].lr.peak, self.batches.plan
        with jax.set_mesh(self.mesh):
            params = init_params(self.specs, seed, self.mesh)
            state = TrainState(params, self.optimizer.init(params))
            for step in range(plan.total_steps):
                placed, phase_step = plan.at(step)
                if phase_step == 0 and step and placed.phase.optimizer == "fresh":
                    state = TrainState(state.params, self.optimizer.init(state.params))
                batch = sharding.put_batch(self.mesh, self.batches[step])
                state, _ = self.train_step(state, batch, jnp.float32(scale * plan.learning_rate(step)))
            found = self.evaluator(state.params)["heldout"]
        return float(np.mean([row["loss"] for row in found.values()]))


def sweep(config: Config, widths: list[int], rates: list[float], seeds: int, output: Path) -> Sweep:
    """Makes the runs that OUTPUT/runs.jsonl lacks; the result has all that it holds of these models and this recipe."""
    stores = Stores(config)
    recipe = digest([to_dict(config) | {"model": None}, stores.fingerprints()])
    path = output / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["recipe"], line["model"], line["rate"], line["seed"]): line["loss"] for line in lines}
    losses: Sweep = {}
    output.mkdir(parents=True, exist_ok=True)
    for name, parametrise in PARAMETRISATIONS.items():
        for width, sized in at_widths(config.model, widths).items():
            model, trainer = parametrise(sized), None
            key = digest([name, to_dict(model)])
            for rate in rates:
                for seed in range(1, seeds + 1):
                    if (recipe, key, rate, seed) not in done:
                        trainer, began = trainer or Trainer(config, model, stores), time.process_time()
                        done[recipe, key, rate, seed] = loss = trainer.loss(rate, seed)
                        seconds = time.process_time() - began
                        line = {"parametrisation": name, "width": width, "rate": rate, "seed": seed, "loss": loss,
                                "cpu_seconds": round(seconds, 1), "recipe": recipe, "model": key}
                        with open(path, "a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
                        print(f"{name} width {width} rate {rate:g} seed {seed}: {loss:.4f} ({seconds:.0f} CPU-s)",
                              file=sys.stderr, flush=True)
            found: dict[float, list[float]] = {}
            for (of, known, rate, _), loss in done.items():
                if (of, known) == (recipe, key):
                    found.setdefault(rate, []).append(loss)
            losses.setdefault(name, {})[width] = {rate: float(np.mean(found[rate])) for rate in sorted(found)}
    return losses


def render(losses: Sweep) -> str:
    """A table in markdown: held-out loss per rate, the best of each width in bold."""
    rates = sorted({rate for widths in losses.values() for found in widths.values() for rate in found})
    lines = ["| | width | " + " | ".join(f"{rate:g}" for rate in rates) + " | best rate |",
             "|---|---|" + "---|" * (len(rates) + 1)]
    for name, widths in losses.items():
        for width, found in widths.items():
            cells = [f"{found[rate]:.3f}" if rate in found else "" for rate in rates]
            cells[rates.index(best(found))] = f"**{found[best(found)]:.3f}**"
            lines.append(f"| {name} | {width} | {' | '.join(cells)} | {best(found):g} |")
    return "\n".join(lines)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lr_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mup_sweep.py", help="--config.a.b=VALUE overrides a field")
    parser.add_argument("--widths", type=_numbers, default=[64, 128, 256], help="with commas: 64,128,256")
    parser.add_argument("--rates", type=_numbers, default=RATES, help="peak learning rates, with commas")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each combination (1)")
    parser.add_argument("--output", default="demo/mup/sweep", help="folder for runs.jsonl and lr_sweep.png")
    args, overrides = parser.parse_known_args()
    try:
        config = load_config(args.config, overrides)
        losses = sweep(config, list(map(int, args.widths)), args.rates, args.seeds, Path(args.output))
    except UserError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    files.write_bytes(Path(args.output) / "lr_sweep.png", draw_sweep(losses))
    print(render(losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
