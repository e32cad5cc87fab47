"""Weights without optimizer state, of any run, state or permanent checkpoint, local or on gs://.

Its invariant: weights that were loaded have the model's paths and shapes and the fingerprints they were saved with.
"""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from crystal_jax import files, storage, stream, trees
from crystal_jax.config import ModelConfig, from_dict, to_dict
from crystal_jax.errors import UserError
from crystal_jax.exports import INFO, WEIGHTS
from crystal_jax.fingerprint import Leaves, dotted, fingerprint
from crystal_jax.layers import PADDED, ParamSpec
from crystal_jax.model import Crystal, Params, is_spec, map_specs, unpadded
from crystal_jax.states import FOLDER, FORMAT, POSITION, check_format, newest_state, read_position


@dataclass
class Weights:
    """Parameters without optimizer state, on the host."""

    params: Params
    """Nested dict of numpy arrays, in the dtype they were kept in."""
    model: ModelConfig
    tokenizer: Path | epath.Path | None
    info: dict[str, Any] = field(default_factory=dict)
    """Phase, step, tokens per source and the like; see `describe` in train.py."""


@dataclass(frozen=True)
class _Place:
    """Where the weights of a checkpoint lie, and what it says of itself."""

    weights: epath.Path
    tokenizer: epath.Path
    model: ModelConfig
    fingerprint: Leaves
    info: dict[str, Any]

    def check(self, params: Params) -> None:
        trees.check_fingerprint(str(self.weights), self.fingerprint, fingerprint(params))

    def loaded(self, params: Params) -> Weights:
        tokenizer = self.tokenizer if files.is_remote(self.tokenizer) else Path(self.tokenizer)
        params = map_specs(unpadded, Crystal(self.model).specs(), params)
        return Weights(params, self.model, tokenizer if files.exists(tokenizer) else None, self.info)


def save_weights(folder: Path, params: Params, model: ModelConfig, tokenizer: Path | None,
                 info: dict[str, Any]) -> None:
    """Writes a local checkpoint of weights of the host, whole or not at all; a folder that is one is left as it is.

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
        with trees.saving(epath.Path(folder)):
            trees.write(epath.Path(partial / WEIGHTS), params)
            _compare(folder, params, epath.Path(partial / WEIGHTS))
            if tokenizer is not None:
                shutil.copyfile(tokenizer, partial / "tokenizer.json")
            files.write_json(partial / INFO, {"format": FORMAT, "model": to_dict(model), **info,
                                              "fingerprint": fingerprint(params)})
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _compare(folder: Path, params: Params, written: epath.Path) -> None:
    with trees.damage(written):
        tree = stream.Tree(written)
        for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
            name = dotted(path)
            if name not in tree.arrays or not tree.holds(tree.arrays[name], np.asarray(value)):
                raise UserError(f"{folder}: {name} read back differs from what was written; the disk or its memory is "
                                "faulty")


def load_weights(path: files.Location) -> Weights:
    """The weights of a run's folder (its newest state), of RUN/checkpoints/STEP or of a permanent checkpoint.

    Raises:
      UserError: a folder that is none of these, a newer format, weights that don't fit its model, damaged ones.
    """
    place = _locate(files.as_path(path))
    params = trees.read_numpy(place.weights)
    _check_model(place, params)
    place.check(params)
    return place.loaded(params)


def open_weights(path: files.Location, scratch: Path) -> Weights:
    """`load_weights` with arrays mapped from files in `scratch`, which is the caller's to remove.

    What an earlier call has finished there isn't read again.

    Raises:
      UserError: as load_weights; too little space for the arrays.
    """
    place, tree = _open_tree(path)
    with trees.damage(place.weights):
        params = _nested(stream.map_arrays(tree, scratch), place.model)
    place.check(params)
    weights = place.loaded(params)
    if weights.tokenizer and files.is_remote(weights.tokenizer):
        copy = scratch / weights.tokenizer.name
        files.write_bytes(copy, files.read_bytes(weights.tokenizer))
        weights = dataclasses.replace(weights, tokenizer=copy)
    return weights


def outline(path: files.Location) -> Weights:
    """`open_weights` without values: arrays of zeros that take no memory, and no look at the stored ones.

    Raises:
      UserError: as load_weights, but for damaged values.
    """
    place, tree = _open_tree(path)
    zeros = {name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in tree.arrays.items()}
    return place.loaded(_nested(zeros, place.model))


def _open_tree(path: files.Location) -> tuple[_Place, stream.Tree]:
    place = _locate(files.as_path(path))
    with trees.damage(place.weights):
        tree = stream.Tree(place.weights)
    _check_model(place, tree.arrays)
    return place, tree


def _nested(arrays: dict[str, np.ndarray], model: ModelConfig) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[dotted(path)], Crystal(model).specs())


def _check_model(place: _Place, params: Params) -> None:
    """What the model has, by name and shape, but that padded dims may be longer: a run keeps its padding."""
    dtype = jax.tree.leaves(params, is_leaf=lambda node: hasattr(node, "shape"))[0].dtype
    shapes = {dotted(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: hasattr(node, "shape"))[0]}

    def expected(path: Any, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        found = shapes.get(dotted(path), ())
        if len(found) == len(spec.shape):
            pairs = zip(spec.shape, found, spec.axes, strict=True)
            return jax.ShapeDtypeStruct([max(n, m) if axis in PADDED else n for n, m, axis in pairs], dtype)
        return jax.ShapeDtypeStruct(spec.shape, dtype)

    trees.check_tree(str(place.weights), params, jax.tree_util.tree_map_with_path(
        expected, Crystal(place.model).specs(), is_leaf=is_spec))


def _locate(folder: epath.Path) -> _Place:
    storage.check(folder)
    folder = folder if files.is_remote(folder) else epath.Path(folder).absolute()
    if files.exists(folder / INFO):
        info = files.read_json(folder / INFO)
        check_format(folder / INFO, info)
        weights, tokenizer, prefix = folder / WEIGHTS, folder / "tokenizer.json", ""
    else:
        folder = _rolling(folder)
        info = read_position(folder)
        weights, tokenizer, prefix = folder / "params", folder.parent.parent / "tokenizer.json", "params."
    model = from_dict(ModelConfig, info.pop("model", None), f"{folder}: model")
    found = info.pop("fingerprint", None)
    if not isinstance(found, dict):
        raise UserError(f"{folder}: no fingerprints beside it; the checkpoint is damaged")
    kept = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    del info["format"]
    return _Place(weights, tokenizer, model, kept, info)


def _rolling(folder: epath.Path) -> epath.Path:
    """The state's folder in a run, or the folder itself if it is one."""
    if files.exists(folder / POSITION):
        return folder
    newest = newest_state(folder)
    if newest is None:
        raise UserError(f"{folder}: neither a run with a saved state, nor RUN/checkpoints/STEP, nor a permanent "
                        f"checkpoint (a folder with {INFO}){_nearby(folder)}")
    return folder / FOLDER / str(newest)


def _nearby(folder: epath.Path) -> str:
    """The checkpoints in a folder that holds none itself, or beside one that isn't there."""
    for place in (folder, folder.parent):
        if place.is_dir():
            found = sorted(path.name for path in place.iterdir()
                           if files.exists(path / INFO) or files.exists(path / POSITION))
            return f"; in {place} there are {', '.join(found)}" if found else ""
    return ""
