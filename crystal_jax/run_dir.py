"""A run's folder and its identity: config.json, plan.json, and whether a command may go on with what lies there."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

from crystal_jax import __version__, files, storage
from crystal_jax.amend import amended, set_aside
from crystal_jax.config import Config, to_dict
from crystal_jax.data.pipeline import Stores
from crystal_jax.errors import UserError
from crystal_jax.history import Record, read_record
from crystal_jax.lease import held
from crystal_jax.snapshot import record_code
from crystal_jax.states import newest_state


def check(run_dir: epath.Path, plan: dict[str, Any], config: Config, amend_from: int | None = None) -> Record:
    """What plan.json is to say, once `run_dir` is a folder that may be begun or continued with `plan`. Writes nothing.

    Where a state is saved, what the run began from is in it: `init_from` is taken from the folder then.

    Raises:
      UserError: a folder of something else, or of another plan: the fields that differ; an amendment that can't be.
    """
    storage.check(run_dir)
    if not files.exists(run_dir / "plan.json"):
        # A kill may have left the first files of a run that was just being begun; launching has its own folder, pod.
        strangers = [entry.name for entry in run_dir.iterdir() if entry.name not in ("tokenizer.json", "pod")
                     and not entry.name.startswith(".")] if run_dir.is_dir() else []
        if strangers or (run_dir.exists() and not run_dir.is_dir()):
            raise UserError(f"{run_dir}: not empty and no run's folder (it has no plan.json); name a new one")
        if amend_from is not None:
            raise UserError(f"--amend_from={amend_from}: {run_dir} holds no run to amend; leave the flag out")
        return Record(plan, [])
    known = read_record(run_dir)
    if newest_state(run_dir) is not None:
        plan = {**plan, "init_from": known.plan.get("init_from")}
    changes = differences(known.plan, plan)
    if not changes and amend_from is not None and amend_from not in [left["from_step"] for left in known.amendments]:
        raise UserError(f"--amend_from={amend_from}: {run_dir} follows this very plan; change the plan, or leave the "
                        "flag out")
    if not changes:
        return known
    if amend_from is None:
        raise UserError(f"{run_dir}: its plan differs: {'; '.join(changes[:3])}"
                        f"{f' and {len(changes) - 3} more' if len(changes) > 3 else ''}; undo the change, start a new "
                        "run in another --run_dir, or make it from a saved step on with --amend_from=STEP")
    return amended(run_dir, known, plan, changes, config, amend_from)


def begin(run_dir: epath.Path, record: Record, config: Config, tokenizer: epath.Path) -> None:
    """Writes a new run's plan.json and tokenizer.json, and what this command runs with: its config and its code."""
    path = run_dir / "plan.json"
    if not files.exists(path):
        files.write_bytes(run_dir / "tokenizer.json", files.read_bytes(tokenizer))
    if not files.exists(path) or read_record(run_dir) != record:
        files.write_json(path, {"hash": record.hash, "plan": record.plan, "amendments": record.amendments})
    set_aside(run_dir, record)
    files.write_json(run_dir / "config.json", to_dict(config) | {"versions": versions()})
    record_code(run_dir)


@contextmanager
def locked(run_dir: epath.Path) -> Iterator[None]:
    """Makes the folder and keeps a second `train` out of it; the lock ends with the process, however it ends.

    On gs:// that takes as long as a newcomer needs to see it; see lease.py.

    Raises:
      UserError: another process trains there, or the folder can't be made.
    """
    if files.is_remote(run_dir):
        with held(run_dir / ".lock"):
            yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run_dir={run_dir}: {error.strerror}; name a folder that can be made") from error
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{run_dir}: another process is training there; wait for it, or stop it") from error
        yield


def is_locked(run_dir: epath.Path) -> bool:
    """Whether a process seems to train there; on gs:// also one that was killed, until the next takes its place."""
    path = run_dir / ".lock"
    if files.is_remote(run_dir) or not files.exists(path):
        return files.exists(path)
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


DECIDE = ("seed", "dtype", "z_loss", "spike_window", "spike_factor")
"""The fields of config.training that do."""


def results_depend_on(config: Config, stores: Stores, init_from: str | None) -> dict[str, Any]:
    """What decides the parameters of every step, up to rounding: the identity of a run.

    `init_from` is the fingerprint of the weights it began with, None for drawn ones.
    """
    plan = to_dict(config)
    training = plan.pop("training")
    # Where things lie and what is kept decides no result; stated epochs are only a limit.
    del plan["name"], plan["checkpoints"]
    for name in ("root", "tokenizer", "check_blocks"):
        del plan["data"][name]
    for phase in plan["phases"]:
        del phase["checkpoint_every"], phase["epochs"]
    plan["sources"] = {name: source["domain"] for name, source in plan["sources"].items()}
    return {**plan, "training": {name: training[name] for name in DECIDE},
            "fingerprints": stores.fingerprints(), "init_from": init_from}


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Each leaf in which two plain trees differ, by its path."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (before, now) in pairs for line in differences(before, now, f"{path}[{i}]")]
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in {**old, **new} for line in differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def versions() -> dict[str, str]:
    """Of the code and of what its numbers depend on."""
    return {"crystal_jax": __version__, "python": sys.version.split()[0], "jax": jax.__version__,
            "numpy": np.__version__, "optax": optax.__version__}
