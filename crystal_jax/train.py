"""Training, told in order: open the data, restore or draw the state, step through the phases, keep what must be kept.

`train` never goes on with something silently wrong: the plan of a run's folder must be the plan of the command, and a
state is restored only if every leaf has the expected shape. Data has no state of its own: its position is the step.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from crystal_jax import recipe, sharding
from crystal_jax.checkpoint import Calendar, RollingStates, Weights, fingerprint, load_weights, newest_state
from crystal_jax.config import Config, to_dict
from crystal_jax.data.pipeline import Batches, Stores, batch_hash, heldout
from crystal_jax.data.rows import segments
from crystal_jax.errors import UserError
from crystal_jax.evaluate import HeldOut
from crystal_jax.history import Record, read_record
from crystal_jax.metrics import Interval, MetricsLog
from crystal_jax.model import Crystal, Params, abstract_params, init_params, map_specs, parameter_count
from crystal_jax.optimizer import apply_updates, make_optimizer, moments, with_moments
from crystal_jax.phases import checkpoint_name
from crystal_jax.progress import Clock, Progress, Signals
from crystal_jax.run_dir import begin, check, differences, locked, results_depend_on, versions

PREEMPTED = 3
"""Exit code: stopped by a signal, with everything saved."""


def train(config: Config, run_dir: str | Path, init_from: str | Path | None = None,
          amend_from: int | None = None) -> int:
    """Trains, or continues the run in `run_dir`, with a changed recipe from step `amend_from` on.

    Returns the exit code, 0 or PREEMPTED.

    Raises:
      UserError: before any work, for data, a mesh or a run's folder that doesn't fit the config.
      FatalError: more non-finite updates in a row than config.training.skip_nonfinite.
    """
    with Signals() as signals:
        run, weights = open_run(config, Path(run_dir), init_from, amend_from)
        if newest_state(run.run_dir) == run.plan.total_steps and read_record(run.run_dir) == run.record:
            print(f"{run.run_dir}: done already, all {run.plan.total_steps} steps", file=sys.stderr)
            return 0
        with locked(run.run_dir), jax.set_mesh(run.mesh):
            begin(run.run_dir, run.record, config, run.stores.tokenizer.path)
            state, start, interval = run.restore(weights)
            windows = heldout(config, run.stores)
            ids = run.stores.tokenizer
            documents = partial(segments, bos_id=ids.bos_id, eos_id=ids.eos_id) if config.data.document_mask else None
            evaluator = HeldOut(run.model, windows, config.phases[0].global_batch_size, run.mesh, documents)
            return run.loop(state, start, interval, evaluator, signals)


def open_run(config: Config, run_dir: Path, init_from: str | Path | None = None,
             amend_from: int | None = None) -> tuple["Run", Weights | None]:
    """A run that passed every check, and the weights it begins with if they are given. Writes nothing.

    Raises:
      UserError: data, a mesh, weights or a run's folder that doesn't fit the config.
    """
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: training over several hosts isn't supported yet; use one")
    mesh = sharding.make_mesh(config.training.mesh)
    sharding.check_divisible(config, mesh)
    stores = Stores(config)
    weights = None
    if init_from is not None and newest_state(run_dir) is not None:
        print(f"--init_from={init_from}: left aside, since {run_dir} goes on from its own state", file=sys.stderr)
    elif init_from is not None:
        weights = load_weights(init_from)
        if changes := differences(to_dict(weights.model), to_dict(config.model), "config.model"):
            raise UserError(f"--init_from={init_from}: {'; '.join(changes)}; the model must be the checkpoint's")
    began_with = None if weights is None else fingerprint(weights.params)
    record = check(run_dir, results_depend_on(config, stores, began_with), config, amend_from)
    if record.amendments:
        stores = Stores(config, record.eras)
    return Run(config, run_dir, mesh, stores, record), weights


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    params: Params
    opt_state: optax.OptState


def make_train_step(model: Crystal, optimizer: optax.GradientTransformation, sources: int) -> Callable[..., Any]:
    """The jitted update (state, batch, lr) -> (state, metrics); a non-finite one leaves the state as it was."""

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: dict[str, jax.Array], lr: jax.Array):
        def loss_fn(params: Params) -> tuple[jax.Array, jax.Array]:
            return model.bind(params).loss(batch["inputs"], batch["targets"], batch["mask"],
                                           batch.get("positions"), batch.get("segment_ids"))

        (loss, nll_BT), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(apply_updates(state.params, updates, lr), opt_state)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        from_source_BS = batch["source"][:, None] == jnp.arange(sources)[None, :]

        def per_source(values_BT: jax.Array) -> jax.Array:
            row_B = jnp.sum(values_BT * batch["mask"], axis=1)
            return jnp.sum(jnp.where(from_source_BS, row_B[:, None], 0), axis=0)

        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "finite": finite,
            "nll_per_source": per_source(nll_BT),
            "tokens_per_source": per_source(jnp.ones_like(nll_BT)),
        }
        return new, metrics

    return train_step


class Run:
    """A run in progress: what every step of the loop needs to know."""

    def __init__(self, config: Config, run_dir: Path, mesh: Mesh, stores: Stores, record: Record):
        training = config.training
        self.config, self.run_dir, self.mesh, self.stores = config, run_dir, mesh, stores
        self.record, self.plan_hash = record, record.hash
        self.batches = Batches(config, stores, eras=record.eras)
        self.plan = self.batches.plan
        self.calendar = Calendar(run_dir)
        self.model = Crystal(config.model, training.dtype, training.remat, training.unroll)
        self.specs = self.model.specs()
        self.optimizer = make_optimizer(config.optimizer, config.model, self.specs)
        self.train_step = make_train_step(self.model, self.optimizer, len(config.sources))
        self.abstract = abstract_params(self.specs, mesh)
        self.permanent = self.plan.calendar()

    def restore(self, weights: Weights | None) -> tuple[TrainState, int, Interval]:
        """The newest saved state, its step and its place between log lines; in a new run `weights` or drawn ones."""
        self.states = RollingStates(self.run_dir / "checkpoints", self.config.checkpoints,
                                    keep=[placed.end for placed in self.plan.phases])
        step = self.states.latest
        if step is None:
            if weights is None:
                params = init_params(self.specs, self.config.training.seed, self.mesh)
            else:
                params = jax.tree.map(lambda leaf, to: jax.device_put(np.asarray(leaf, np.float32), to.sharding),
                                      weights.params, self.abstract)
            return TrainState(params, self._fresh()), 0, Interval(sorted(self.config.sources))
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self.mesh))
        found, position = self.states.restore(
            step, {"params": self.abstract, "moments": {"count": count, "mu": self.abstract, "nu": self.abstract}})
        if not self.record.accepts(position["plan_hash"], step):
            raise UserError(f"{self.states.folder}/{step}: a state of plan {position['plan_hash']}, but this run's is "
                            f"{self.plan_hash}; it was copied from another run: move it away")
        state = TrainState(found["params"], with_moments(self._fresh(), found["moments"]))
        return state, step, Interval(**position["interval"]).of(sorted(self.config.sources))

    def _fresh(self) -> optax.OptState:
        """Zero moments, laid out like the parameters."""

        def zeros() -> Params:
            return map_specs(lambda spec: jnp.zeros(spec.shape, jnp.float32, out_sharding=sharding.stored(spec.axes)),
                             self.specs)

        count = jax.device_put(np.zeros((), np.int32), sharding.replicated(self.mesh))
        skeleton = jax.eval_shape(self.optimizer.init, self.abstract)
        return with_moments(skeleton, {"count": count, "mu": zeros(), "nu": zeros()})

    def loop(self, state: TrainState, start: int, interval: Interval, evaluator: HeldOut, signals: Signals) -> int:
        self.log, self.progress = MetricsLog(self.run_dir), Progress(self.plan, start)
        self.log.write("start", start, versions=versions(), parameters=parameter_count(self.specs), resumed=start > 0,
                       devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}")
        if start:
            self.progress.note(f"going on from step {start}")
        for domain in sorted({source.domain for source in self.config.sources.values()} - evaluator.windows.keys()):
            self.progress.note(f"no held-out tokens of {domain}; `prepare --heldout` sets their share")
        clock = Clock(self.config.training, self.plan, interval, self.report)
        self.hashes: dict[int, str] = {}
        try:
            return self._steps(state, start, clock, evaluator, signals)
        except Exception:
            with suppress(Exception):  # a save under way is finished: the error that stopped the run is the one to show
                self.states.close()
            raise

    def _steps(self, state: TrainState, start: int, clock: Clock, evaluator: HeldOut, signals: Signals) -> int:
        batches = self.batches.iterate(start)
        stopped = False
        for step in range(start, self.plan.total_steps):
            placed, phase_step = self.plan.at(step)
            if phase_step == 0 and step and placed.phase.optimizer == "fresh":
                state = TrainState(state.params, self._fresh())
            lr = jax.device_put(np.float32(self.plan.learning_rate(step)), sharding.replicated(self.mesh))
            batch = next(batches)
            state, metrics = self.train_step(state, sharding.put_batch(self.mesh, batch), lr)
            if clock.logs(step + 1):
                self.hashes[step + 1] = batch_hash(batch)
            clock.dispatched(step + 1, metrics)
            stopped = signals.received is not None and step + 1 < self.plan.total_steps
            self.keep(step + 1, state, clock, evaluator, stopped)
            if stopped:
                break
        self.states.close()
        self.log.close()
        if stopped:
            self.progress.note(f"saved step {step + 1}; the same command goes on from there")
        self.progress.close()
        return PREEMPTED if stopped else 0

    def keep(self, done: int, state: TrainState, clock: Clock, evaluator: HeldOut, stopped: bool) -> None:
        """Evaluates and saves what is due after `done` updates."""
        phase_end = done == self.plan.done(done)[0].end
        evaluate = phase_end or done % self.config.training.eval_every == 0
        roll = phase_end or stopped or done % self.config.checkpoints.every_steps == 0
        if not (evaluate or roll or done in self.permanent):
            return
        described = self.describe(done)
        with clock.paused():
            if evaluate and evaluator.windows:
                found = evaluator(state.params)
                described["heldout"] = found["heldout"]
                self.log.write("eval", done, **self.place(done), **found)
                self.progress.note(f"step {done}: held-out " + ", ".join(
                    f"{domain} {values['loss']:.3f}" for domain, values in found["heldout"].items()))
            if done in self.permanent:
                self.calendar.write(self.permanent[done], state.params, self.config.model,
                                    self.config.checkpoints.export_dtype, described)
                self.log.write("checkpoint", done, name=self.permanent[done])
            if roll:
                tree = {"params": state.params, "moments": moments(state.opt_state)}
                self.states.save(done, tree, {"model": to_dict(self.config.model), "interval": to_dict(clock.interval),
                                              **described})

    def report(self, done: int, record: dict[str, Any]) -> None:
        """What is due at a log interval; background saves that failed surface here."""
        self.log.write("train", done, **self.place(done), **self.consumed(done), batch_hash=self.hashes.pop(done),
                       **record)
        self.progress.show(done, record)
        self.states.check()

    def place(self, done: int) -> dict[str, Any]:
        placed, phase_step = self.plan.done(done)
        return {"phase": placed.phase.name, "phase_step": phase_step, "tokens": self.plan.tokens(done)}

    def consumed(self, done: int) -> dict[str, Any]:
        counts = self.batches.counts(done)
        return {"tokens_per_source": {name: count * self.plan.sequence_length for name, count in counts.items()},
                "lr": self.plan.learning_rate(done - 1)}

    def describe(self, done: int) -> dict[str, Any]:
        """What a checkpoint after `done` updates says of itself, beside the held-out losses of that step, if any."""
        place = self.place(done)
        return {"name": checkpoint_name(place["phase"], place["phase_step"]), "step": done, **place,
                **self.consumed(done), "plan_hash": self.plan_hash, "config": to_dict(self.config),
                "versions": versions()}


def dry_run(config: Config, run_dir: str | Path, init_from: str | Path | None = None,
            amend_from: int | None = None) -> str:
    """The plan, the mesh and the bytes per device, after every check that `train` makes before it works."""
    run, _ = open_run(config, Path(run_dir), init_from, amend_from)
    lines = [recipe.render(recipe.describe(config)), "",
             f"mesh {dict(run.mesh.shape)} on {run.mesh.devices.flat[0].device_kind}"]
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(run.abstract)[0]:
        shard = leaf.sharding.shard_shape(leaf.shape)
        total += 4 * int(np.prod(shard))
        name = ".".join(key.key for key in path)
        lines.append(f"  {name:26} {leaf.shape!s:24} {leaf.sharding.spec!s:44} a device: {shard}")
    lines.append(f"  float32 parameters {total / 1e6:,.1f} MB a device, with Adam's moments {3 * total / 1e6:,.1f} MB")
    return "\n".join(lines)


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, unless JAX was told where to."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "crystal_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/X.py[:VARIANT]; --config.a.b=VALUE overrides a field")
    parser.add_argument("--run_dir", required=True, help="the run's folder: a new one, or one to continue")
    parser.add_argument("--init_from", help="start from the weights of this checkpoint, with fresh optimizer state")
    parser.add_argument("--amend_from", type=int, metavar="STEP",
                        help="follow a changed recipe from this saved step on, and record that")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, train nothing")


def main(args: argparse.Namespace) -> int:
    use_compilation_cache()
    if args.dry_run:
        print(dry_run(args.config, args.run_dir, args.init_from, args.amend_from))
        return 0
    return train(args.config, args.run_dir, args.init_from, args.amend_from)
