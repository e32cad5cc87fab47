"""`replay`: steps of a run again, from a state that it kept, compared bit for bit with all that it left of them.

Invariant: nothing is written, and nothing counts as equal that wasn't compared: what the log has and the replay hasn't,
or the other way round, is a difference.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from etils import epath

from crystal_jax import files, processes, sharding
from crystal_jax.config import Config, from_dict
from crystal_jax.data.pipeline import Stores
from crystal_jax.errors import FatalError, UserError
from crystal_jax.exports import EXPORTS, INFO, cast
from crystal_jax.fingerprint import fingerprint, short
from crystal_jax.goodput import Ledger
from crystal_jax.history import Line, Record, load_run, read_metrics, read_record
from crystal_jax.loop import Run
from crystal_jax.metrics import BY_THE_CLOCK
from crystal_jax.optimizer import moments
from crystal_jax.progress import Clock
from crystal_jax.rules import validate
from crystal_jax.run_dir import differences, results_depend_on
from crystal_jax.states import FOLDER, RollingStates, read_position, saved_states
from crystal_jax.train import use_compilation_cache
from crystal_jax.update import TrainState

LINES = {"train": "log line", "skip": "skipped update", "fingerprint": "fingerprint"}
SHOWN = 3
"""Values of a row that are printed."""


@dataclass(frozen=True)
class Compared:
    """One thing that the run left, and what came out now."""

    step: int
    what: str
    kept: dict[str, Any]
    found: dict[str, Any]

    @property
    def differing(self) -> list[str]:
        return [name for name in {**self.kept, **self.found}
                if name not in self.kept or name not in self.found or self.kept[name] != self.found[name]]


@dataclass
class Replay:
    """What `replay` found."""

    run: str
    start: int
    steps: int
    compared: list[Compared] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    """How versions, devices and mesh differ from those of the run."""
    stopped: str | None = None
    """Why the run can't go on, if it came to that."""

    @property
    def first_difference(self) -> int | None:
        return next((row.step for row in self.compared if row.differing), None)


def replay(run_dir: str, start: int, steps: int) -> Replay:
    """Makes the `steps` updates again that the run in `run_dir` made from its state of step `start` on.

    Raises:
      UserError: no run, no such state, steps that the run hasn't made by one recipe, stores that have changed.
    """
    folder = files.as_path(run_dir)
    config, record, lines = _recipe(folder, start, steps)
    mesh = sharding.make_mesh(config.training.mesh)
    sharding.check_divisible(config, mesh)
    stores = Stores(config, record.eras)
    known = {**results_depend_on(config, stores, None), "init_from": record.plan["init_from"]}
    if changes := differences(record.plan, known):
        raise UserError(f"{folder}: {'; '.join(changes[:3])}; put back what the run has read and followed")
    run, result = Run(config, folder, mesh, stores, record, Ledger()), Replay(str(folder), start, steps)
    with jax.set_mesh(mesh):
        _run(run, _Kept(folder, config, record, lines), result)
    result.compared.sort(key=lambda row: (row.step, row.what))
    result.environment = _environment(lines, start, start + steps, run)
    return result


def _recipe(folder: epath.Path, start: int, steps: int) -> tuple[Config, Record, list[Line]]:
    """What decided the steps, and the log."""
    run, record = load_run(folder), read_record(folder)
    config, end = run.config, run.step
    for index, left in enumerate(record.amendments):
        if start < left["from_step"]:
            config, end = validate(from_dict(Config, left["config"])), left["from_step"]
            record = Record(left["plan"], record.amendments[:index])
            break
    kept = saved_states(folder)
    if start not in kept:
        raise UserError(f"--from={start}: no state of that step; {folder} has {', '.join(map(str, kept)) or 'none'}")
    if not 0 < steps <= end - start:
        raise UserError(f"--steps={steps}: from step {start} the run has made {end - start} by one recipe; give 1 to "
                        f"{end - start}" if end > start else f"--from={start}: the log ends there; take another state")
    return config, record, read_metrics(folder / "metrics.jsonl")


class _Kept:
    """What the run left of each step."""

    def __init__(self, folder: epath.Path, config: Config, record: Record, lines: list[Line]):
        self.folder, self.dtype, self.record = folder, config.checkpoints.export_dtype, record
        self.lines = {(line["kind"], line["step"]): _results(line) for line in lines if line["kind"] in LINES}
        self.states = saved_states(folder)

    def of_state(self, done: int) -> dict[str, str] | None:
        """Fingerprints of the state of a step, if it is kept and this run's."""
        position = read_position(self.folder / FOLDER / str(done)) if done in self.states else None
        return position["fingerprint"] if position and self.record.accepts(position["plan_hash"], done) else None

    def of_export(self, done: int, name: str | None) -> dict[str, str] | None:
        path = self.folder / EXPORTS / str(name) / INFO
        info = files.read_json(path) if name and files.exists(path) else None
        return info["fingerprint"] if info and self.record.accepts(info["plan_hash"], done) else None


class _Clock(Clock):
    """Reports where the log has lines: config.training.log_every may have been changed since."""

    steps: set[int]

    def logs(self, done: int) -> bool:
        return done in self.steps


def _results(line: Line) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("kind", "step", *BY_THE_CLOCK)}


def _run(run: Run, kept: _Kept, result: Replay) -> None:
    """Makes the updates; adds to the result whatever can be compared."""
    end = result.start + result.steps
    states = RollingStates(run.run_dir / FOLDER, run.config.checkpoints, [])
    state, standing = run.going_on(*states.restore(result.start, run.abstract_state, run.accept))
    states.close()

    def compare(done: int, what: str, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        result.compared.append(Compared(done, what, before or {}, now))

    def report(done: int, record: dict[str, Any], kind: str = "train") -> None:
        consumed = run.consumed(done) if kind == "train" else {}
        compare(done, LINES[kind], kept.lines.get((kind, done)), _results({**run.place(done), **consumed, **record}))

    clock = _Clock(run.config.training, run.plan, standing, report, run.ledger)
    clock.steps = {step for kind, step in kept.lines if kind == "train"}
    batches = run.batches.iterate(result.start)
    try:
        for step in range(result.start, end):
            state = run.update(state, step, next(batches), clock)
            _compare_arrays(run, kept, step + 1, state, clock, compare)
        clock.settle()
    except FatalError as error:
        result.stopped = str(error)
    seen = {(row.what, row.step) for row in result.compared}
    for (kind, done), values in kept.lines.items():
        if result.start < done <= end and (LINES[kind], done) not in seen:
            compare(done, LINES[kind], values, {})


def _compare_arrays(run: Run, kept: _Kept, done: int, state: TrainState, clock: Clock, compare: Any) -> None:
    logged, whole = kept.lines.get(("fingerprint", done)), kept.of_state(done)
    name = run.permanent.get(done)
    public = kept.of_export(done, name)
    if logged or whole or public:
        clock.settle()  # on CPUs, what the processes exchange for two programs at a time may wait for each other
    if logged or whole:
        found = fingerprint({"params": state.params, "moments": moments(state.opt_state)})
        if logged:
            compare(done, LINES["fingerprint"], logged, {"state": short(found)})
        if whole:
            compare(done, "state", whole, found)
    if public:
        compare(done, f"export {name}", public, fingerprint(cast(state.params, run.config.model, kept.dtype)))


def _environment(lines: list[Line], start: int, end: int, run: Run) -> list[str]:
    """How the processes that made these steps differ from this one."""
    now, begun = run.environment(), dict[str, Any]()
    found = dict[str, None]()  # in order
    for line in lines:
        if line["kind"] == "start":
            begun = {name: line.get(name) for name in now}
        elif line["kind"] in LINES and start < line["step"] <= end:
            found |= dict.fromkeys(differences(begun, json.loads(json.dumps(now)), "environment"))
    return list(found)


def render(result: Replay) -> str:
    """A line for each thing that was compared; the answer last."""
    lines = [f"{result.run}: steps {result.start + 1} to {result.start + result.steps} again, from the state of step "
             f"{result.start}", ""]
    width = max((len(row.what) for row in result.compared), default=0)
    lines += [f"{row.step:>9,}  {row.what:{width}}  {_verdict(row)}" for row in result.compared]
    lines += ["", *result.environment, *([f"it stops there: {result.stopped}"] if result.stopped else [])]
    counts = Counter(row.what.split(" ")[0] if row.what.startswith("export") else row.what for row in result.compared)
    first = result.first_difference
    said = ", ".join(f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items())
    if not result.compared:
        lines.append("nothing to compare: neither a log line nor a state or checkpoint lies there; take more --steps")
    else:
        lines.append(f"equal bit for bit: {said}" if first is None else f"DIFFERS, first at step {first}: of {said}, "
                     f"{sum(bool(row.differing) for row in result.compared)} differ")
    return "\n".join(lines)


def _verdict(row: Compared) -> str:
    if not row.kept or not row.found:
        return "DIFFERS: " + ("the run has none" if row.found else "the run has it, the replay hasn't")
    if row.differing:
        shown = [f"{name} was {row.kept.get(name)}, is {row.found.get(name)}" for name in row.differing[:SHOWN]]
        return f"DIFFERS in {len(row.differing)} of {len(row.kept)}: {'; '.join(shown)}"
    if row.what == "state" or row.what.startswith("export"):
        return f"equal: {len(row.found)} arrays, {short(row.found)}"
    names = [name for name in ("loss", "grad_norm", "batch_hash", "state", "reason") if name in row.found]
    return "equal: " + ", ".join(f"{name} {row.found[name]}" for name in names)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run_dir", required=True, help="the run's folder")
    parser.add_argument("--from", required=True, type=int, dest="start", metavar="STEP", help="a state that it kept")
    parser.add_argument("--steps", required=True, type=int, help="updates to make again")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Exit code 0 for equal, 1 for a difference or nothing to compare."""
    use_compilation_cache()
    with processes.together("replay"):
        result = replay(args.run_dir, args.start, args.steps)
    equal = bool(result.compared) and result.first_difference is None
    if processes.is_main():
        print(json.dumps({**asdict(result), "equal": equal, "first_difference": result.first_difference}, indent=2)
              if args.json else render(result))
    return 0 if equal else 1
