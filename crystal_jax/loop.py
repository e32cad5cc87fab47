"""The loop of a training: a run's parts, the state that it goes on from, and what each step does.

Invariant: the position that a state is saved with is that of the data, and all that the log says of a step is written
before a state of it can be gone on from.
"""

import os
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from crystal_jax import sharding
from crystal_jax.checkpoint import Weights
from crystal_jax.config import Config, to_dict
from crystal_jax.data.pipeline import Batch, Batches, Stores, hash_words
from crystal_jax.errors import RestartError, UserError, first_line, refusal
from crystal_jax.evaluate import HeldOut
from crystal_jax.exports import Calendar, catch_up
from crystal_jax.fingerprint import dispatch, short
from crystal_jax.goodput import Ledger, Program
from crystal_jax.history import Record
from crystal_jax.metrics import Interval, MetricsLog
from crystal_jax.model import Params, abstract_params, init_params, map_specs, padded_to, parameter_count
from crystal_jax.optimizer import make_optimizer, moments, with_moments
from crystal_jax.phases import checkpoint_name
from crystal_jax.processes import SILENT, Watchdog, is_main
from crystal_jax.progress import Clock, Profile, Progress, Signals, Timer, parse_profile
from crystal_jax.recipe import human
from crystal_jax.run_dir import versions
from crystal_jax.snapshot import code_hash
from crystal_jax.spikes import Window
from crystal_jax.states import GIVEN_UP, RollingStates
from crystal_jax.update import TrainState, abstract_state, add_up, make_model, make_train_step
from crystal_jax.utilisation import Utilisation, device_memory, program_memory

PREEMPTED = 3
"""Exit code: stopped by a signal, with everything saved."""


class Run:
    """A run in progress: what every step of the loop needs to know."""

    def __init__(self, config: Config, run_dir: epath.Path, mesh: Mesh, stores: Stores, record: Record,
                 ledger: Ledger, profile: str | None = None):
        """profile: as --profile has it.

        Raises:
          UserError: devices without the kernel of attention that the config asks for; a profile that can't be.
        """
        training = config.training
        self.config, self.run_dir, self.mesh, self.stores = config, run_dir, mesh, stores
        self.record, self.plan_hash = record, record.hash
        self.part = sharding.Part.of(mesh)
        self.batches = Batches(config, stores, self.part.slots, record.eras)
        self.plan = self.batches.plan
        self.calendar = Calendar(run_dir, self.plan.calendar())
        self.ledger, self.asked = ledger, profile and parse_profile(profile, self.plan.total_steps)
        self.utilisation = Utilisation.of(config.model, self.plan.sequence_length)
        self.model = make_model(config, mesh)
        self.specs = self.model.specs()
        self.optimizer = make_optimizer(config.optimizer, config.model, self.specs)
        self.train_step: Any = make_train_step(self.model, self.optimizer, len(config.sources), training.accumulate,
                                               training.z_loss)
        self.memory: dict[int, dict[str, int]] = {}
        """That the compiled step takes on a device, by its global batch size."""
        self.abstract = abstract_params(self.specs, mesh)
        self.permanent = self.calendar.planned

    def restore(self, weights: Weights | None) -> tuple[TrainState, int, tuple[Interval, Window]]:
        """The newest saved state, its step, and where log and limits stand; in a new run `weights` or drawn ones."""
        self.states = RollingStates(self.run_dir / "checkpoints", self.config.checkpoints, self.keeps_state)
        if is_main():
            self.calendar.refresh(self.plan_hash)
        with self.ledger.doing("restoring"):
            kept = self.states.restore_newest(self.abstract_state, self.accept)
        if kept is None:
            if weights is None:
                params = init_params(self.specs, self.config.training.seed, self.mesh)
            else:
                params = map_specs(lambda spec, leaf, to: sharding.put(to.sharding, padded_to(
                    spec, np.asarray(leaf, np.float32))), self.specs, weights.params, self.abstract)
            return TrainState(params, self._fresh()), 0, (Interval(sorted(self.config.sources)), Window())
        step, found, position = kept
        with self.ledger.doing("restoring"):
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
        """Shapes, dtypes and layouts of what is saved."""
        return abstract_state(self.optimizer, self.abstract)

    def accept(self, step: int, position: dict[str, Any]) -> None:
        """Refuses a state of another run."""
        if not self.record.accepts(position["plan_hash"], step):
            raise UserError(f"{self.run_dir}/checkpoints/{step}: a state of plan {position['plan_hash']}, but this "
                            f"run's is {self.plan_hash}; it was copied from another run: move it away")
        pad_to = position["config"]["training"]["pad_to"]
        if pad_to != self.config.training.pad_to:
            raise UserError(f"config.training.pad_to: {self.config.training.pad_to}, but the states of {self.run_dir} "
                            f"are padded to {pad_to}; leave it, or begin another run from them with --init_from")

    @property
    def keeps_state(self) -> list[int]:
        """Steps whose full states stay: each phase's last, and of the permanent checkpoints every K-th."""
        every = self.config.checkpoints.keep_public_every
        public = sorted(self.permanent)[every - 1 :: every] if every else []
        return [*(placed.end for placed in self.plan.phases), *public]

    def _fresh(self) -> optax.OptState:
        """Zero moments, laid out like the parameters."""

        def zeros(tree: Params) -> Params:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding.spec), tree)

        kept = self.abstract_state["moments"]
        count = sharding.put(sharding.replicated(self.mesh), np.zeros((), np.int32))
        skeleton = jax.eval_shape(self.optimizer.init, self.abstract)
        return with_moments(skeleton, {"count": count, "mu": zeros(kept["mu"]), "nu": zeros(kept["nu"])})

    def loop(self, state: TrainState, start: int, standing: tuple[Interval, Window], evaluator: HeldOut,
             signals: Signals, watchdog: Watchdog) -> int:
        self.log, self.progress = SILENT, SILENT
        if is_main():
            self.log, self.progress = MetricsLog(self.run_dir), Progress(self.plan, start)
        self.signals, self.watchdog, self.timer = signals, watchdog, Timer(self.config.checkpoints.every_minutes)
        self.profile = Profile(self.run_dir, self.asked, start, self.ledger) if self.asked and is_main() else None
        self.log.write("start", start, parameters=parameter_count(self.specs), resumed=start > 0, **self.environment(),
                       utilisation=asdict(self.utilisation), spent=self.ledger.rounded())
        if start:
            self.progress.note(f"going on from step {start}")
        for domain in sorted({source.domain for source in self.config.sources.values()} - evaluator.windows.keys()):
            self.progress.note(f"no held-out tokens of {domain}; `prepare --heldout` sets their share")
        clock = Clock(self.config.training, self.plan, standing, self.report, self.ledger)
        self.done = start
        try:
            with self.ledger.doing("stepping"):
                return self._steps(state, start, clock, evaluator)
        except Exception as error:
            with suppress(Exception):
                self.log.write("end", self.done, error=first_line(error), spent=self.ledger.rounded())
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
            placed, phase_step = self.plan.at(step)
            self.trace(step, clock)
            if step > start + 1 and phase_step:
                self.watchdog.step()
            else:
                self.watchdog.slow()  # it is compiled
            with self.ledger.doing("data"):
                batch = next(batches)
            known = placed.phase.global_batch_size in self.memory
            state = self.update(state, step, batch, clock, (self.signals.received is not None,
                                                            is_main() and self.timer.due()))
            self.done = step + 1
            if not known:
                self.describe_program(step + 1, clock)
            stopped = clock.stop and step + 1 < self.plan.total_steps
            self.keep(step + 1, state, clock, evaluator, stopped)
            if stopped:
                break
        self.trace(self.done, clock, last=True)
        self.watchdog.slow(GIVEN_UP * self.config.checkpoints.slow_save_seconds)
        with self.ledger.doing("saving"):
            self.states.close()
        self.warn(self.done)
        spent = self.ledger.rounded()
        self.log.write("end", self.done, stopped=stopped, spent=spent)
        self.log.close()
        if stopped:
            self.progress.note(f"saved step {self.done}; the same command goes on from there")
        self.progress.note("seconds of this process: " + ", ".join(f"{name} {s:.1f}" for name, s in spent.items()))
        self.progress.close()
        return PREEMPTED if stopped else 0

    def trace(self, done: int, clock: Clock, last: bool = False) -> None:
        """Begins or ends what --profile asks for."""
        if self.profile is None or not (self.profile.under_way if last else self.profile.due(done)):
            return
        self.watchdog.slow()
        clock.settle()
        if folder := self.profile.turn(done):
            self.log.write("profile", done, folder=folder)
            self.progress.note(f"trace in {self.run_dir}/{folder}; tensorboard --logdir={self.run_dir}/profile")

    def describe_program(self, done: int, clock: Clock) -> None:
        """Logs what the step took to compile, and what memory it takes, once it has been made for the first time."""
        clock.settle()
        found = self.ledger.programs.pop("train_step", Program())
        size = self.plan.done(done)[0].phase.global_batch_size
        needed, device = self.memory[size], device_memory()
        self.log.write("program", done, global_batch_size=size, seconds=round(found.seconds, 3), cache=found.cache,
                       memory={"program": needed, "device": device}, spent=self.ledger.rounded())
        cache = {"hit": "from the cache", "miss": "kept in the cache"}.get(found.cache, "without a cache")
        held = f", {human(device['peak'], 'B')} at its peak" if "peak" in device else ""
        limit = f" of {human(device['limit'], 'B')}" if "limit" in device else ""
        self.progress.note(f"step {done}: compiled in {found.seconds:.1f} s, {cache}; "
                           f"{human(needed.get('total', 0), 'B')} a device{held}{limit}")

    def environment(self) -> dict[str, Any]:
        """What equal bits depend on, beside the plan."""
        return {"versions": versions(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "cpus": os.cpu_count(), "processes": jax.process_count(), "mesh": dict(self.mesh.shape),
                "code": code_hash()}

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
        size = placed.phase.global_batch_size
        rows = sharding.put_batch(self.mesh, batch, size, self.config.training.accumulate)
        arguments = (state, rows, lr, limits, size)
        self.compile(size, arguments)
        state, metrics = self.train_step(*arguments)
        clock.dispatched(step + 1, metrics | {"words": add_up(self.words(batch, step, clock, asked))})
        return state

    def compile(self, size: int, arguments: tuple[Any, ...]) -> None:
        """Compiles the step for a global batch size, once; the call that follows finds the program.

        Raises:
          UserError: it doesn't fit the devices.
        """
        if size in self.memory:
            return
        try:
            self.memory[size] = program_memory(self.train_step.lower(*arguments).compile())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            training = self.config.training
            raise UserError(f"config.training: a step of {size} sequences with remat={training.remat} and accumulate="
                            f"{training.accumulate} doesn't fit the devices ({first_line(error)}); try remat=full, "
                            f"accumulate={2 * training.accumulate} or more of mesh.fsdp; `plan --sweep` ranks them"
                            ) from error

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
        clock.settle()
        if evaluate and evaluator.windows:
            with self.ledger.doing("evaluating"):
                found = evaluator(state.params)
            described["heldout"] = found["heldout"]
            self.log.write("eval", done, **self.place(done), **found, spent=self.ledger.rounded())
            self.progress.note(f"step {done}: held-out " + ", ".join(
                f"{domain} {values['loss']:.3f}" for domain, values in found["heldout"].items()))
        with self.ledger.doing("saving"):
            tree = {"params": state.params, "moments": moments(state.opt_state)}
            sums = dispatch(tree) if stamp else None
            if sums:
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
        if "tokens_per_second" in record:
            record = record | self.utilisation.at(record["tokens_per_second"])
        self.log.write("train", done, **self.place(done), **self.consumed(done), **record, spent=self.ledger.rounded())
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
