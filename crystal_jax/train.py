"""Training, told in order: open the data, restore or draw the state, step through the phases, keep what must be kept.

`train` never goes on with something silently wrong: the plan of a run's folder must be the plan of the command, and a
state is restored only if every leaf has the expected shape. Data has no state of its own: its position is the step.
"""

import argparse
import math
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
from etils import epath

from crystal_jax import files, processes, recipe, sharding
from crystal_jax.checkpoint import Weights, load_weights
from crystal_jax.config import Config, to_dict
from crystal_jax.data.pipeline import Stores, heldout
from crystal_jax.data.rows import segments
from crystal_jax.errors import UserError
from crystal_jax.evaluate import HeldOut
from crystal_jax.fingerprint import fingerprint, short
from crystal_jax.goodput import Ledger, process_age
from crystal_jax.history import read_record
from crystal_jax.loop import Run, say
from crystal_jax.processes import Watchdog, is_main
from crystal_jax.progress import Signals
from crystal_jax.run_dir import begin, check, differences, locked, results_depend_on
from crystal_jax.states import newest_state


def train(config: Config, run_dir: str | Path, init_from: str | Path | None = None, amend_from: int | None = None,
          profile: str | None = None, spent: float = 0.0) -> int:
    """Trains, or continues the run in `run_dir`, with a changed recipe from step `amend_from` on.

    profile: updates to trace, as --profile has them. spent: seconds of this process that are the run's already.

    Returns the exit code, 0 or PREEMPTED.

    Raises:
      UserError: before any work, for data, a mesh or a run's folder that doesn't fit the config.
      FatalError: more updates in a row were skipped than config.training.skips_in_a_row.
      RestartError: storage that refuses once training has begun, or a run that another process trains.
    """
    with (Ledger(spent) as ledger, processes.together("train"), Signals() as signals,
          Watchdog(config.training.hang_seconds) as watchdog):
        run, weights = open_run(config, files.as_path(run_dir), ledger, init_from, amend_from, profile)
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
            evaluator = HeldOut(run.model, windows, config.phases[0].global_batch_size, run.mesh, ids.byte_lengths,
                                documents)
            return run.loop(state, start, standing, evaluator, signals, watchdog)


def open_run(config: Config, run_dir: epath.Path, ledger: Ledger, init_from: str | Path | None = None,
             amend_from: int | None = None, profile: str | None = None) -> tuple[Run, Weights | None]:
    """A run that passed every check, and the weights it begins with if they are given. Writes nothing.

    Raises:
      UserError: data, a mesh, weights, a profile or a run's folder that doesn't fit the config.
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
    return Run(config, run_dir, mesh, stores, record, ledger, profile), weights


def dry_run(config: Config, run_dir: str | Path, init_from: str | Path | None = None, amend_from: int | None = None,
            profile: str | None = None) -> str:
    """The plan, the mesh and the bytes per device, after every check that `train` makes before it works."""
    processes.start()
    run, _ = open_run(config, files.as_path(run_dir), Ledger(), init_from, amend_from, profile)
    lines = [recipe.render(recipe.describe(config)), "",
             f"mesh {dict(run.mesh.shape)} on {run.mesh.devices.flat[0].device_kind}"]
    for path, leaf in jax.tree_util.tree_flatten_with_path(run.abstract)[0]:
        shard = leaf.sharding.shard_shape(leaf.shape)
        name = ".".join(key.key for key in path)
        lines.append(f"  {name:26} {leaf.shape!s:24} {leaf.sharding.spec!s:44} a device: {shard}")
    state, weights = (sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
                          for leaf in jax.tree.leaves(tree)) for tree in (run.abstract_state, run.abstract))
    lines.append(f"  float32 parameters {weights / 1e6:,.1f} MB a device, with Adam's moments {state / 1e6:,.1f} MB")
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
    parser.add_argument("--profile", metavar="STEPS", help="trace updates into RUN/profile: FIRST:LAST (20:25 for the "
                        "five after update 20), or a number of them from this process's second update on")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the plan, train nothing")


def main(args: argparse.Namespace) -> int:
    use_compilation_cache()
    if args.dry_run:
        plan = dry_run(args.config, args.run_dir, args.init_from, args.amend_from, args.profile)
        if is_main():
            print(plan)
        return 0
    return train(args.config, args.run_dir, args.init_from, args.amend_from, args.profile, process_age())
