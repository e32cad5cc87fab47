"""Training, told in order: open the data, restore or draw the state, step through the phases, keep what must be kept.

`train` never goes on with something silently wrong: the plan of a run's folder must be the plan of the command, and a
state is restored only if every leaf has the expected shape. Data has no state of its own: its position is the step.
"""

import argparse
import os
import sys
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from crystal_jax import files, processes, recipe, sharding
from crystal_jax.checkpoint import Weights, load_weights
from crystal_jax.config import Config, to_dict
from crystal_jax.data.pipeline import Batch, Batches, Stores, hash_words, heldout
from crystal_jax.data.rows import segments
from crystal_jax.errors import RestartError, UserError, refusal
from crystal_jax.evaluate import HeldOut
from crystal_jax.exports import Calendar, catch_up
from crystal_jax.fingerprint import dispatch, fingerprint, short
from crystal_jax.history import Record, read_record
from crystal_jax.metrics import Interval, MetricsLog
from crystal_jax.model import Crystal, Params, abstract_params, init_params, map_specs, parameter_count
from crystal_jax.optimizer import make_optimizer, moments, with_moments
from crystal_jax.phases import checkpoint_name
from crystal_jax.processes import SILENT, Watchdog, is_main
from crystal_jax.progress import Clock, Progress, Signals, Timer
from crystal_jax.run_dir import begin, check, differences, locked, results_depend_on, versions
from crystal_jax.spikes import Window
from crystal_jax.states import GIVEN_UP, RollingStates, newest_state
from crystal_jax.update import TrainState, add_up, make_train_step

PREEMPTED = 3
"""Exit code: stopped by a signal, with everything saved."""


def train(config: Config, run_dir: str | Path, init_from: str | Path | None = None,
          amend_from: int | None = None) -> int:
    """Trains, or continues the run in `run_dir`, with a changed recipe from step `amend_from` on.

    Returns the exit code, 0 or PREEMPTED.

    Raises:
      UserError: before any work, for data, a mesh or a run's folder that doesn't fit the config.
      FatalError: more updates in a row were skipped than config.training.skips_in_a_row.
      RestartError: storage that refuses once training has begun, or a run that another process trains.
    """
    with processes.together("train"), Signals() as signals, Watchdog(config.training.hang_seconds) as watchdog:
        run, weights = open_run(config, files.as_path(run_dir), init_from, amend_from)
        finished = newest_state(run.run_dir) == run.plan.total_steps and read_record(run.run_dir) == run.record
        processes.barrier("all have looked")
        if finished:
            say(f"{run.run_dir}: done already, all {run.plan.total_steps} steps")
            return 0
        with locked(run.run_dir) if is_main() else nullcontext(), jax.set_mesh(run.mesh):
            if is_main():
                begin(run.run_dir, run.record, config, run.stores.tokenizer.path)
            processes.barrier("the folder is ours")
            state, start, standing = run.restore(weights)
            windows = heldout(config, run.stores)
            ids = run.stores.tokenizer
            documents = partial(segments, bos_id=ids.bos_id, eos_id=ids.eos_id) if config.data.document_mask else None
            evaluator = HeldOut(run.model, windows, config.phases[0].global_batch_size, run.mesh, documents)
            return run.loop(state, start, standing, evaluator, signals, watchdog)


def open_run(config: Config, run_dir: Path, init_from: str | Path | None = None,
             amend_from: int | None = None) -> tuple["Run", Weights | None]:
    """A run that passed every check, and the weights it begins with if they are given. Writes nothing.

    Raises:
      UserError: data, a mesh, weights or a run's folder that doesn't fit the config.
    """
    mesh = sharding.make_mesh(config.training.mesh)
    sharding.check_divisible(config, mesh)
    stores = Stores(config)
    weights = None
    if init_from is not None and newest_state(run_dir) is not None:
        say(f"--init_from={init_from}: left aside, since {run_dir} goes on from its own state")
    elif init_from is not None:
        weights = load_weights(init_from)
        if changes := differences(to_dict(weights.model), to_dict(config.model), "config.model"):
            raise UserError(f"--init_from={init_from}: {'; '.join(changes)}; the model must be the checkpoint's")
    began_with = None if weights is None else short(fingerprint(weights.params))
    record = check(run_dir, results_depend_on(config, stores, began_with), config, amend_from)
    if record.amendments:
        stores = Stores(config, record.eras)
    return Run(config, run_dir, mesh, stores, record), weights


class Run:
    """A run in progress: what every step of the loop needs to know."""

    def __init__(self, config: Config, run_dir: Path, mesh: Mesh, stores: Stores, record: Record):
        training = config.training
        self.config, self.run_dir, self.mesh, self.stores = config, run_dir, mesh, stores
        self.record, self.plan_hash = record, record.hash
        self.part = sharding.Part.of(mesh)
        self.batches = Batches(config, stores, self.part.held, self.part.ways, record.eras)
        self.plan = self.batches.plan
        self.calendar = Calendar(run_dir, self.plan.calendar())
        self.model = Crystal(config.model, training.dtype, training.remat, training.unroll)
        self.specs = self.model.specs()
        self.optimizer = make_optimizer(config.optimizer, config.model, self.specs)
        self.train_step = make_train_step(self.model, self.optimizer, len(config.sources))
        self.abstract = abstract_params(self.specs, mesh)
        self.permanent = self.calendar.planned

    def restore(self, weights: Weights | None) -> tuple[TrainState, int, tuple[Interval, Window]]:
        """The newest saved state, its step, and where log and limits stand; in a new run `weights` or drawn ones."""
        self.states = RollingStates(self.run_dir / "checkpoints", self.config.checkpoints, self.keeps_state)
        if is_main():
            self.calendar.refresh(self.plan_hash)
        kept = self.states.restore_newest(self.abstract_state, self.accept)
        if kept is None:
            if weights is None:
                params = init_params(self.specs, self.config.training.seed, self.mesh)
            else:
                params = jax.tree.map(lambda leaf, to: sharding.put(to.sharding, np.asarray(leaf, np.float32)),
                                      weights.params, self.abstract)
            return TrainState(params, self._fresh()), 0, (Interval(sorted(self.config.sources)), Window())
        step, found, position = kept
        for line in catch_up(self.calendar, step, self.states, self.abstract, self.config):
            say(f"{self.run_dir}: {line}")
        state, standing = self.going_on(found, position)
        return state, step, standing

    def going_on(self, found: dict[str, Any], position: dict[str, Any]) -> tuple[TrainState, tuple[Interval, Window]]:
        """What a saved state holds: the state, its place between log lines and what its next updates are judged by."""
        state = TrainState(found["params"], with_moments(self._fresh(), found["moments"]))
        interval = Interval(**position["interval"]).of(sorted(self.config.sources))
        return state, (interval, Window(**position["window"]))

    @property
    def abstract_state(self) -> dict[str, Any]:
        """Shapes and layouts of what is saved."""
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self.mesh))
        return {"params": self.abstract, "moments": {"count": count, "mu": self.abstract, "nu": self.abstract}}

    def accept(self, step: int, position: dict[str, Any]) -> None:
        """Refuses a state of another run."""
        if not self.record.accepts(position["plan_hash"], step):
            raise UserError(f"{self.run_dir}/checkpoints/{step}: a state of plan {position['plan_hash']}, but this "
                            f"run's is {self.plan_hash}; it was copied from another run: move it away")

    @property
    def keeps_state(self) -> list[int]:
        """Steps whose full states stay: each phase's last, and of the permanent checkpoints every K-th."""
        every = self.config.checkpoints.keep_public_every
        public = sorted(self.permanent)[every - 1 :: every] if every else []
        return [*(placed.end for placed in self.plan.phases), *public]

    def _fresh(self) -> optax.OptState:
        """Zero moments, laid out like the parameters."""

        def zeros() -> Params:
            return map_specs(lambda spec: jnp.zeros(spec.shape, jnp.float32, out_sharding=sharding.stored(spec.axes)),
                             self.specs)

        count = sharding.put(sharding.replicated(self.mesh), np.zeros((), np.int32))
        skeleton = jax.eval_shape(self.optimizer.init, self.abstract)
        return with_moments(skeleton, {"count": count, "mu": zeros(), "nu": zeros()})

    def loop(self, state: TrainState, start: int, standing: tuple[Interval, Window], evaluator: HeldOut,
             signals: Signals, watchdog: Watchdog) -> int:
        self.log, self.progress = SILENT, SILENT
        if is_main():
            self.log, self.progress = MetricsLog(self.run_dir), Progress(self.plan, start)
        self.signals, self.watchdog, self.timer = signals, watchdog, Timer(self.config.checkpoints.every_minutes)
        self.log.write("start", start, parameters=parameter_count(self.specs), resumed=start > 0, **self.environment())
        if start:
            self.progress.note(f"going on from step {start}")
        for domain in sorted({source.domain for source in self.config.sources.values()} - evaluator.windows.keys()):
            self.progress.note(f"no held-out tokens of {domain}; `prepare --heldout` sets their share")
        clock = Clock(self.config.training, self.plan, standing, self.report)
        try:
            return self._steps(state, start, clock, evaluator)
        except Exception as error:
            with suppress(Exception):
                self.log.close()  # the last lines tell how it came to this
            if jax.process_count() == 1:  # of several, the others may never come to finish theirs
                with suppress(Exception):  # a save under way is finished: the first error is the one to show
                    self.states.close()
            if line := refusal(error):  # storage that was there when the run began may be there again
                raise RestartError(f"{self.run_dir}: {line} ({' '.join(str(error).split())[:200]})") from error
            raise

    def _steps(self, state: TrainState, start: int, clock: Clock, evaluator: HeldOut) -> int:
        batches = self.batches.iterate(start)
        stopped = False
        for step in range(start, self.plan.total_steps):
            _, phase_step = self.plan.at(step)
            if clock.started and phase_step:
                self.watchdog.step()
            else:
                self.watchdog.slow()  # it is compiled
            state = self.update(state, step, next(batches), clock, (self.signals.received is not None,
                                                                    is_main() and self.timer.due()))
            stopped = clock.stop and step + 1 < self.plan.total_steps
            self.keep(step + 1, state, clock, evaluator, stopped)
            if stopped:
                break
        self.watchdog.slow(GIVEN_UP * self.config.checkpoints.slow_save_seconds)
        self.states.close()
        self.warn(step + 1)
        self.log.close()
        if stopped:
            self.progress.note(f"saved step {step + 1}; the same command goes on from there")
        self.progress.close()
        return PREEMPTED if stopped else 0

    def environment(self) -> dict[str, Any]:
        """What equal bits depend on, beside the plan."""
        return {"versions": versions(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "cpus": os.cpu_count(), "processes": jax.process_count(), "mesh": dict(self.mesh.shape)}

    def update(self, state: TrainState, step: int, batch: Batch, clock: Clock,
               asked: tuple[bool, bool] = (False, False)) -> TrainState:
        """Dispatches the update at global `step`, of which the clock gets the metrics; takes the state.

        asked: whether this process wants to stop after it, and to save.
        """
        placed, phase_step = self.plan.at(step)
        if phase_step == 0 and step and placed.phase.optimizer == "fresh":
            state = TrainState(state.params, self._fresh())
        lr = sharding.put(sharding.replicated(self.mesh), np.asarray(self.plan.learning_rate(step), np.float32))
        limits = sharding.put(sharding.replicated(self.mesh), clock.limits(step))
        state, metrics = self.train_step(state, sharding.put_batch(self.mesh, batch), lr, limits)
        clock.dispatched(step + 1, metrics | {"words": add_up(self.words(batch, step, clock, asked))})
        return state

    def words(self, batch: Batch, step: int, clock: Clock, asked: tuple[bool, bool]) -> jax.Array:
        """What this process has to tell the others with this step; see WORDS."""
        found = np.array([*asked, 0, 0], np.uint32)
        if clock.logs(step + 1):
            size = self.plan.at(step)[0].phase.global_batch_size
            slots, counted = self.part.slots(size), self.part.slots(size, counted=True)
            mine = np.isin(slots, counted)
            found[2:] = hash_words({name: rows[mine] for name, rows in batch.items()}, counted)
        return sharding.put_words(self.mesh, found)

    def keep(self, done: int, state: TrainState, clock: Clock, evaluator: HeldOut, stopped: bool) -> None:
        """Evaluates and saves what is due after `done` updates."""
        phase_end = done == self.plan.done(done)[0].end
        evaluate = phase_end or done % self.config.training.eval_every == 0
        roll = done in self.states.keep or stopped or clock.save or done % self.config.checkpoints.every_steps == 0
        stamp = done % self.config.training.fingerprint_every == 0
        if not (evaluate or roll or stamp or done in self.permanent):
            return
        described = self.describe(done)
        self.watchdog.slow(GIVEN_UP * self.config.checkpoints.slow_save_seconds)
        with clock.paused():
            if evaluate and evaluator.windows:
                found = evaluator(state.params)
                described["heldout"] = found["heldout"]
                self.log.write("eval", done, **self.place(done), **found)
                self.progress.note(f"step {done}: held-out " + ", ".join(
                    f"{domain} {values['loss']:.3f}" for domain, values in found["heldout"].items()))
            tree = {"params": state.params, "moments": moments(state.opt_state)}
            sums = dispatch(tree) if roll or stamp else None
            if sums and stamp:
                self.log.write("fingerprint", done, state=short(sums.leaves()))
            if done in self.permanent:
                self.calendar.write(self.permanent[done], state.params, self.config.model,
                                    self.config.checkpoints.export_dtype, described)
                self.log.write("checkpoint", done, name=self.permanent[done])
            if roll:
                clock.save = False
                self.timer.saved()
                self.log.flush()  # the lines before a state that goes on behind them
                self.states.save(done, tree, {"model": to_dict(self.config.model), "interval": to_dict(clock.interval),
                                              "window": to_dict(clock.window), **described}, sums)

    def report(self, done: int, record: dict[str, Any], kind: str = "train") -> None:
        """What is due at a log interval, or for a skipped update; background saves that failed surface here."""
        if kind == "skip":
            self.log.write("skip", done, **self.place(done), **record)
            self.progress.note(f"step {done}: skipped: {record['reason']}")
            return
        self.log.write("train", done, **self.place(done), **self.consumed(done), **record)
        self.progress.show(done, record)
        self.warn(done)

    def warn(self, done: int) -> None:
        for line in self.states.check():
            self.log.write("warning", done, text=line)
            self.progress.note(line)

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


def say(line: str) -> None:
    """To the user, who needs it once and not from every process."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def dry_run(config: Config, run_dir: str | Path, init_from: str | Path | None = None,
            amend_from: int | None = None) -> str:
    """The plan, the mesh and the bytes per device, after every check that `train` makes before it works."""
    processes.start()
    run, _ = open_run(config, files.as_path(run_dir), init_from, amend_from)
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
        plan = dry_run(args.config, args.run_dir, args.init_from, args.amend_from)
        if is_main():
            print(plan)
        return 0
    return train(args.config, args.run_dir, args.init_from, args.amend_from)
