"""A run's folder and its identity: config.json, plan.json, and whether a command may go on with what lies there."""

import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from crystal_jax import __version__
from crystal_jax.checkpoint import read_json, write_json
from crystal_jax.config import Config, digest, to_dict
from crystal_jax.data.pipeline import Stores
from crystal_jax.errors import UserError


def claim(run_dir: Path, config: Config, stores: Stores) -> str:
    """Writes config.json and plan.json into a new run's folder, or checks that they are this plan's; its hash."""
    plan = results_depend_on(config, stores)
    plan_hash = digest(plan)
    path = run_dir / "plan.json"
    if path.exists():
        known = read_json(path)
        if known["hash"] != plan_hash:
            changes = differences(known["plan"], plan)
            raise UserError(f"{run_dir}: its plan differs: {'; '.join(changes[:3])}"
                            f"{f' and {len(changes) - 3} more' if len(changes) > 3 else ''}; undo the change, or start "
                            "a new run in another --run_dir")
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir}: not empty and no run's folder (it has no plan.json); name a new one")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stores.tokenizer.path, run_dir / "tokenizer.json")
        write_json(path, {"hash": plan_hash, "plan": plan})
    write_json(run_dir / "config.json", to_dict(config) | {"versions": versions()})
    return plan_hash


def results_depend_on(config: Config, stores: Stores) -> dict[str, Any]:
    """What decides the parameters of every step, up to rounding: the identity of a run."""
    data = to_dict(config)
    training = data.pop("training")
    paths = [data["data"].pop(name) for name in ("root", "tokenizer")] + [data.pop("checkpoints"), data.pop("name")]
    assert len(paths) == 4, "where things lie and what is kept decides no result"
    for phase in data["phases"]:
        phase.pop("checkpoint_every")
    data["sources"] = {name: source["domain"] for name, source in data["sources"].items()}
    kept = {name: training[name] for name in ("seed", "dtype")}
    return {**data, "training": kept, "fingerprints": stores.fingerprints()}


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
        joined = [f"{path}[{key}]" for key in old]
    elif isinstance(old, dict) and isinstance(new, dict):
        joined = [f"{path}.{key}" for key in {**old, **new}]
    else:
        return [] if old == new else [f"{path} was {old!r}, is {new!r}"]
    keys = list({**old, **new})
    return [line for key, name in zip(keys, joined, strict=True)
            for line in differences(old.get(key), new.get(key), name)]


def versions() -> dict[str, str]:
    """Of the code and of what its numbers depend on."""
    return {"crystal_jax": __version__, "python": sys.version.split()[0], "jax": jax.__version__,
            "numpy": np.__version__, "optax": optax.__version__}
