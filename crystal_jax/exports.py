"""The permanent checkpoints of a run, RUN/exports/PHASE/step_N, and manifest.json: what is planned, what is there.

Its invariant: a folder with checkpoint.json, which is written last, has been read back bit for bit and never changes;
one without is unfinished and is written anew. Writing is synchronous: training waits, so that no state of a later step
exists without the permanent checkpoint of an earlier one, and a kill at any moment leaves no hole.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from crystal_jax import files, sharding, trees
from crystal_jax.config import Config, ModelConfig, to_dict
from crystal_jax.errors import UserError
from crystal_jax.fingerprint import fingerprint
from crystal_jax.layers import PADDED, ParamSpec
from crystal_jax.model import Crystal, Params, map_specs, unpadded
from crystal_jax.states import FORMAT, RollingStates

INFO = "checkpoint.json"
MANIFEST = "manifest.json"
WEIGHTS = "params"
EXPORTS = "exports"
EVALUATIONS = "evaluations"
"""RUN/evaluations/PHASE/step_N/TASK.json: the results that `evaluate --all` made."""
REQUESTS = 16
"""Under way at a time when the calendar is read."""
OF_FOLDER = ("format", "model", "config")
"""What checkpoint.json says and manifest.json doesn't repeat."""
OF_STATE = ("format", "model", "interval", "window", "fingerprint")
"""What position.json says of the state alone."""


class Calendar:
    """Writes what is due, and what is found missing later."""

    def __init__(self, run_dir: files.Location, planned: Mapping[int, str] | None = None):
        """planned: step to the name of its permanent checkpoint."""
        self.run_dir = files.as_path(run_dir)
        self.planned = dict(planned or {})
        self._entries: dict[str, dict[str, Any]] = {}

    def write(self, name: str, params: Params, model: ModelConfig, dtype: str, info: Mapping[str, Any]) -> None:
        """Writes one if it isn't there, then the manifest. All processes take part.

        Raises:
          UserError: a full disk, storage that refuses, or bytes that come back changed.
        """
        folder = self.run_dir / EXPORTS / name
        if not files.exists(folder / INFO):
            weights = cast(params, model, dtype)
            found = fingerprint(weights)
            with trees.saving(folder):
                trees.write(_absolute(folder / WEIGHTS), weights)
                self._read_back(folder, weights, found)
                if jax.process_index() == 0:
                    files.write_bytes(folder / "tokenizer.json", files.read_bytes(self.run_dir / "tokenizer.json"))
                    files.write_json(folder / INFO, {"format": FORMAT, "model": to_dict(model), **info,
                                                     "fingerprint": found})
        if jax.process_index() == 0:
            self._entries[name] = _entry(files.read_json(folder / INFO))
            self._write_manifest(info["plan_hash"])

    def _read_back(self, folder: Any, weights: Params, expected: dict[str, str]) -> None:
        try:
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                                    weights)
            found = fingerprint(trees.read(_absolute(folder / WEIGHTS), abstract))
            trees.check_fingerprint(str(folder), expected, found)
        except trees.DamageError as error:
            raise UserError(f"{folder}: read back differs from what was written ({error}); the disk or its memory is "
                            "faulty") from error

    def refresh(self, plan_hash: str) -> None:
        """manifest.json anew from the folders: what they say is the truth. For one process."""
        names = files.list_files(self.run_dir / EXPORTS)
        found = sorted(name for name in names if name.endswith(f"/{INFO}"))
        with ThreadPoolExecutor(REQUESTS) as pool:
            read = pool.map(lambda name: files.read_json(self.run_dir / EXPORTS / name), found)
            self._entries = {name.removesuffix(f"/{INFO}"): _entry(info)
                             for name, info in zip(found, read, strict=True)}
        self._write_manifest(plan_hash)

    def _write_manifest(self, plan_hash: str) -> None:
        waiting = [{"name": name, "step": step, "exported": False} for step, name in self.planned.items()
                   if name not in self._entries]
        entries = sorted([*self._entries.values(), *waiting], key=lambda entry: entry["step"])
        files.write_json(self.run_dir / MANIFEST, {"format": FORMAT, "plan_hash": plan_hash,
                                                   "checkpoints": with_evaluations(self.run_dir, entries)})

    def missing(self, done: int) -> dict[int, str]:
        """Step to name of what should be there after `done` updates, by manifest.json and a look at each folder.

        Raises:
          UserError: gs:// that can't be reached.
        """
        due = {step: name for step, name in self.planned.items() if step <= done}
        with ThreadPoolExecutor(REQUESTS) as pool:
            there = pool.map(lambda name: files.exists(self.run_dir / EXPORTS / name / INFO), due.values())
            return {step: name for (step, name), found in zip(due.items(), there, strict=True) if not found}


def with_evaluations(run_dir: files.Location, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of manifest.json, each with the tasks of which it has a result."""
    results = [name.removesuffix(".json").rpartition("/")
               for name in sorted(files.list_files(files.as_path(run_dir) / EVALUATIONS)) if name.endswith(".json")]
    return [entry | {"evaluated": [task for checkpoint, _, task in results if checkpoint == entry["name"]]}
            for entry in entries]


def catch_up(calendar: Calendar, done: int, states: RollingStates, abstract: Params, config: Config) -> list[str]:
    """Writes what is missing after `done` updates from the states of those very steps; all processes take part.

    abstract: of the parameters, with their layouts.

    Returns lines about what was written and what can't be.
    """
    lines, saved = [], states.steps()
    for step, name in calendar.missing(done).items():
        if step not in saved:
            lines.append(f"{EXPORTS}/{name}: missing, and no state of step {step} is kept to make it from")
            continue
        try:
            state, position = states.restore(step, {"params": abstract})
        except trees.DamageError as error:
            lines.append(f"{EXPORTS}/{name}: missing, and can't be made from the state of step {step}: {error}")
            continue
        info = {key: value for key, value in position.items() if key not in OF_STATE}
        calendar.write(name, state["params"], config.model, config.checkpoints.export_dtype, info)
        lines.append(f"{EXPORTS}/{name}: was missing, made from the state of step {step}")
    return lines


@partial(jax.jit, static_argnames=("model", "dtype"))
def cast(params: Params, model: ModelConfig, dtype: str) -> Params:
    """In another dtype, and without padding; a dim that the mesh can split with it only is whole then."""

    def one(spec: ParamSpec, leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.dtype(dtype))
        if spec.shape == leaf.shape:
            return leaf
        return unpadded(spec, sharding.lay_stored(leaf, tuple(None if axis in PADDED else axis for axis in spec.axes)))

    return map_specs(one, Crystal(model).specs(), params)


def _entry(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key not in OF_FOLDER} | {"exported": True}


def _absolute(path: Any) -> Any:
    return path if files.is_remote(path) else path.absolute()
