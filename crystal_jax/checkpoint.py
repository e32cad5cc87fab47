"""Checkpoints: the rolling full states of a run, and its permanent ones. The only file that knows Orbax.

A rolling state is one unit of parameters, optimizer moments and position; the permanent checkpoint of a step is weights
in half precision under its phase's name, written once, read back before it counts. The order is a contract: permanent
checkpoint, manifest.json, then the rolling state of the same step, so that a kill at any moment leaves no hole.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from crystal_jax import files, stream
from crystal_jax.config import CheckpointConfig, ModelConfig, check_local, from_dict, to_dict
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, Params, map_specs

FORMAT = 1
INFO = "checkpoint.json"
WEIGHTS = "params"


@dataclass
class Weights:
    """Parameters without optimizer state, on the host."""

    params: Params
    """Nested dict of numpy arrays, in the dtype they were kept in."""
    model: ModelConfig
    tokenizer: Path | None
    info: dict[str, Any] = field(default_factory=dict)
    """Phase, step, tokens per source and the like; see `describe` in train.py."""


def _handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    # Compression made saves 5 to 10 times slower for 7.5% less space, and took 200-700 MB more memory.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False, **options)


class RollingStates:
    """The full states in RUN/checkpoints: the latest few, and each phase's last.

    Saving is asynchronous: the arrays may be donated as soon as `save` returns.
    """

    ITEMS = ("params", "moments")

    def __init__(self, folder: Path, config: CheckpointConfig, keep: list[int]):
        preserved = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(config.keep_last), checkpoint_managers.CustomSteps(keep)])
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            item_handlers={**{item: _handler() for item in self.ITEMS}, "position": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(preservation_policy=preserved),
        )

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: dict[str, Any], position: dict[str, Any]) -> None:
        """Starts to save {params, moments} and the position as `step`; does nothing if that step is there."""
        if step in self._manager.all_steps():
            return
        args = {item: ocp.args.PyTreeSave(state[item]) for item in self.ITEMS}
        with _disk(self.folder):
            self._manager.save(step, args=ocp.args.Composite(**args, position=ocp.args.JsonSave(position)))

    def check(self) -> None:
        """Raises what went wrong in the background since the last call."""
        with _disk(self.folder):
            self._manager.check_for_errors()

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """({params, moments} in the layouts of `abstract`, position).

        Raises:
          UserError: a leaf that is missing, left over or of another shape or dtype, by its path; damaged files.
        """
        with _damage(self.folder / str(step), "move this folder away, and the run goes on from the state before it"):
            kept = self._manager.item_metadata(step)
            for item in self.ITEMS:
                check_tree(f"{self.folder}/{step}/{item}", kept[item].tree if kept[item] else {}, abstract[item])
            args = {
                item: ocp.args.PyTreeRestore(
                    abstract[item], restore_args=ocp.checkpoint_utils.construct_restore_args(abstract[item]))
                for item in self.ITEMS
            }
            found = self._manager.restore(step, args=ocp.args.Composite(**args, position=ocp.args.JsonRestore()))
            return {item: found[item] for item in self.ITEMS}, found["position"]

    def close(self) -> None:
        """Waits for the last save."""
        with _disk(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turns a full disk, also in a background save, into one line."""
    try:
        yield
    except Exception as error:
        if any(sign in str(error) for sign in ("No space left", "RESOURCE_EXHAUSTED", "ENOSPC")):
            raise UserError(f"{folder}: no space left on the device; the states saved before are whole: free some "
                            "space and give the same command again") from error
        raise


@contextmanager
def _damage(folder: Path, way_out: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for damaged files, a dozen types, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder}: missing or damaged files ({lines[0][:300]}); {way_out}") from error


def check_tree(path: str, found: Any, expected: Any) -> None:
    """Refuses a tree whose paths, shapes or dtypes differ from what is expected.

    Raises:
      UserError: the first difference, by path.
    """
    kept, wanted = _flat(found), _flat(expected)
    for name in sorted(kept.keys() | wanted.keys()):
        have, want = kept.get(name), wanted.get(name)
        if have is None:
            raise UserError(f"{path}: no leaf {name}, which the model has as {want}; the checkpoint is of another "
                            "model, or damaged")
        if want is None:
            raise UserError(f"{path}: leaf {name} {have} is not in the model: the checkpoint is of another model")
        if have != want:
            raise UserError(f"{path}: leaf {name} is {have}, but the model wants {want}; see config.model")


def _flat(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[0]
    return {_dotted(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves}


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)


def save_weights(folder: Path, params: Params, model: ModelConfig, tokenizer: Path | None,
                 info: dict[str, Any]) -> None:
    """Writes a checkpoint of weights, whole or not at all, and once: a folder that is one is left as it is.

    The arrays are read back and compared bit for bit before the folder gets its name.

    Raises:
      UserError: a folder that holds something else, a full disk, or bytes that come back changed.
    """
    folder = Path(folder).absolute()
    if (folder / INFO).exists():
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is no checkpoint; name another folder, or move it away")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _disk(folder):
            _write_weights(folder, partial, params, tokenizer)
            files.write_json(partial / INFO, {"format": FORMAT, "model": to_dict(model), **info})
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(folder: Path, partial: Path, params: Params, tokenizer: Path | None) -> None:
    # By itself Orbax copies all arrays of the host before it writes; only a save in the background needs that.
    arrays = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()))
    with ocp.Checkpointer(_handler(type_handler_registry=arrays)) as writer:
        writer.save(partial / WEIGHTS, args=ocp.args.PyTreeSave(params))
    _compare(folder, params, partial / WEIGHTS)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, partial / "tokenizer.json")


def _compare(folder: Path, params: Params, written: Path) -> None:
    with _damage(written, "the disk or its memory is faulty"):
        tree = stream.Tree(written)
        for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
            name = _dotted(path)
            if name not in tree.arrays or not tree.holds(tree.arrays[name], np.asarray(value)):
                raise UserError(f"{folder}: {name} read back differs from what was written; the disk or its memory is "
                                "faulty")


def _restore_numpy(folder: Path) -> Params:
    with ocp.Checkpointer(_handler()) as reader:
        tree = reader.metadata(folder).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree,
                            is_leaf=lambda node: hasattr(node, "shape"))
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))


def load_weights(path: str | Path) -> Weights:
    """The weights of a run's folder (its newest state), of RUN/checkpoints/STEP or of a permanent checkpoint.

    Raises:
      UserError: a folder that is none of these, a newer format, or weights that don't fit its model.
    """
    check_local("--checkpoint", path)
    weights, tokenizer, model, info = _locate(Path(path))
    with _damage(weights, "take another checkpoint"):
        params = _restore_numpy(weights.absolute())
    _check_model(weights, params, model)
    return Weights(params, model, tokenizer if tokenizer.exists() else None, info)


def open_weights(path: str | Path, scratch: Path) -> Weights:
    """`load_weights`, also from gs://, with arrays mapped from files in `scratch`, which is the caller's to remove.

    What an earlier call has finished there isn't read again.

    Raises:
      UserError: as load_weights; too little space for the arrays.
    """
    tree, outlined = _open_tree(path)
    with _damage(tree.folder, "take another checkpoint"):
        arrays = stream.map_arrays(tree, scratch)
    tokenizer = outlined.tokenizer
    if tokenizer and files.is_remote(tokenizer):
        files.write_bytes(scratch / tokenizer.name, files.read_bytes(tokenizer))
        tokenizer = scratch / tokenizer.name
    return dataclasses.replace(outlined, params=_nested(arrays, outlined.model), tokenizer=tokenizer)


def outline(path: str | Path) -> Weights:
    """`open_weights` without values: arrays of zeros that take no memory.

    Raises:
      UserError: as load_weights.
    """
    return _open_tree(path)[1]


def _open_tree(path: str | Path) -> tuple[stream.Tree, Weights]:
    weights, tokenizer, model, info = _locate(files.as_path(path))
    with _damage(weights, "take another checkpoint"):
        tree = stream.Tree(weights)
    _check_model(weights, tree.arrays, model)
    zeros = {name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in tree.arrays.items()}
    return tree, Weights(_nested(zeros, model), model, tokenizer if tokenizer.exists() else None, info)


def _nested(arrays: dict[str, np.ndarray], model: ModelConfig) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_dotted(path)], Crystal(model).specs())


def _check_model(weights: Path, params: Params, model: ModelConfig) -> None:
    dtype = jax.tree.leaves(params, is_leaf=lambda node: hasattr(node, "shape"))[0].dtype
    check_tree(str(weights), params,
               map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), Crystal(model).specs()))


def _locate(folder: Path) -> tuple[Path, Path, ModelConfig, dict[str, Any]]:
    """(folder of the arrays, where the tokenizer would be, model, info) of a checkpoint."""
    if (folder / INFO).exists():
        info = files.read_json(folder / INFO)
        if info.get("format") != FORMAT:
            raise UserError(f"{folder / INFO}: format {info.get('format')}, but this version reads {FORMAT}; use the "
                            "version that wrote it, or a newer one")
        tokenizer, weights = folder / "tokenizer.json", folder / WEIGHTS
    else:
        folder = _rolling(folder)
        info = files.read_json(folder / "position" / "metadata")
        tokenizer, weights = folder.parent.parent / "tokenizer.json", folder / "params"
    return weights, tokenizer, from_dict(ModelConfig, info.pop("model", None), f"{folder}: model"), info


def _rolling(folder: Path) -> Path:
    """The state's folder in a run, or the folder itself if it is one."""
    if (folder / "position" / "metadata").exists():
        return folder
    newest = newest_state(folder)
    if newest is None:
        raise UserError(f"{folder}: neither a run with a saved state, nor RUN/checkpoints/STEP, nor a permanent "
                        f"checkpoint (a folder with {INFO})")
    return folder / "checkpoints" / str(newest)


def newest_state(run_dir: Path) -> int | None:
    """Step of a run's newest rolling state; one that is still being written has another kind of name."""
    return max((int(entry.name) for entry in run_dir.glob("checkpoints/*") if entry.name.isdigit()), default=None)


def fingerprint(params: Params) -> str:
    """Of all bits of weights on the host."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


class Calendar:
    """The permanent checkpoints of a run, RUN/exports, and manifest.json, which lists those that are whole."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def write(self, name: str, params: Params, model: ModelConfig, dtype: str, info: dict[str, Any]) -> None:
        """Writes one if it isn't there, then the manifest."""
        cast = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.dtype(dtype))), params)
        save_weights(self.run_dir / "exports" / name, cast, model, self.run_dir / "tokenizer.json", info)
        self.refresh(info["plan_hash"])

    def refresh(self, plan_hash: str) -> None:
        """manifest.json anew from the folders: what they say is the truth."""
        entries = []
        for found in sorted(self.run_dir.glob(f"exports/*/*/{INFO}")):
            info = files.read_json(found)
            entries.append({key: value for key, value in info.items() if key not in ("format", "model", "config")}
                           | {"exported": True})
        entries.sort(key=lambda entry: entry["step"])
        manifest = {"format": FORMAT, "plan_hash": plan_hash, "checkpoints": entries}
        files.write_json(self.run_dir / "manifest.json", manifest)
