"""Trees of arrays in folders, local or on gs://, each process writing and reading its own shards.

The only file that knows Orbax. Its invariant: what `read` returns has the paths, shapes and dtypes that were asked for;
whether it has the bits that were written is for fingerprints to say, since Orbax restores damaged ones in silence.
"""

import asyncio
import errno
import re
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from crystal_jax import files
from crystal_jax.errors import RestartError, UserError, first_line, refusal
from crystal_jax.fingerprint import dotted

FULL = ("No space left", "Disk quota exceeded")
"""In what Orbax and TensorStore raise on a full disk."""
PASSING = "UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|CANCELLED|Too many open files|Cannot allocate memory"
"""In what they and JAX raise for want of memory or of an answer, which says nothing of what is stored."""
DENIED = "PERMISSION_DENIED|Permission denied"
T = TypeVar("T")


class DamageError(UserError):
    """Files that are missing or don't hold what was written."""


class StructureError(UserError):
    """A tree of other paths, shapes or dtypes."""


async def _to_the_end(work: Awaitable[T]) -> T:
    """Its result; if it fails, that is raised once all that it has started has ended.

    Orbax closes its event loop on the first error, and other reads that end later complain of that on stderr.
    """
    before = asyncio.all_tasks()
    try:
        return await work
    except BaseException:
        while left := asyncio.all_tasks() - before:
            await asyncio.gather(*left, return_exceptions=True)
        raise


class _Patient:
    """Of a type handler, the reads."""

    async def deserialize(self, *args: Any, **options: Any) -> Any:
        return await _to_the_end(super().deserialize(*args, **options))  # type: ignore[misc]

    async def metadata(self, *args: Any, **options: Any) -> Any:
        return await _to_the_end(super().metadata(*args, **options))  # type: ignore[misc]


class _Arrays(_Patient, ocp.type_handlers.ArrayHandler):
    pass


class _HostArrays(_Patient, ocp.type_handlers.NumpyHandler):
    pass


def _handler() -> ocp.PyTreeCheckpointHandler:
    # By itself Orbax copies all arrays of the host before it writes; only a save in the background needs that, and ours
    # are of devices.
    arrays = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _HostArrays(deepcopy_host_arrays=False)), (jax.Array, _Arrays()))
    # Compression made saves 5 to 10 times slower for 7.5% less space, and took 200-700 MB more memory.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False,
                                       type_handler_registry=arrays)


class Writer:
    """Writes trees in the background, one folder of them at a time."""

    def __init__(self, items: tuple[str, ...], timeout: float):
        """items: names of the trees of a folder. timeout: seconds after which a save has failed."""
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**{item: _handler() for item in items}),
            async_options=ocp.options.AsyncOptions(timeout_secs=int(timeout)))

    def start(self, folder: epath.Path, trees: Mapping[str, Any]) -> None:
        """Starts to write FOLDER/ITEM for each tree, in place of what is there; their arrays may be donated then."""
        items = {item: ocp.args.PyTreeSave(tree) for item, tree in trees.items()}
        self._checkpointer.save(folder, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Until all processes have written; raises what went wrong."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        self._checkpointer.close()


def write(folder: epath.Path, tree: Any) -> None:
    """Writes a tree of arrays, of devices or of this process's host, in place of what is there."""
    with ocp.Checkpointer(_handler()) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(tree), force=True)


def read(folder: epath.Path, abstract: Any) -> Any:
    """A tree in the layouts of `abstract`; doesn't wait for other processes.

    Raises:
      StructureError: as check_tree.
      UserError: as damage.
    """
    handler = _handler()
    with damage(folder):
        check_tree(str(folder), handler.metadata(folder).tree, abstract)
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(abstract, restore_args=how))


def read_numpy(folder: epath.Path) -> Any:
    """A tree as it was written, on the host.

    Raises:
      UserError: as damage.
    """
    handler = _handler()
    with damage(folder):
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree,
                           is_leaf=lambda node: hasattr(node, "shape"))
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=how))


@contextmanager
def saving(folder: epath.Path) -> Iterator[None]:
    """Turns a full disk, also in a background save, and storage that refuses into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if any(sign in str(error) for sign in FULL):
            raise UserError(f"{folder}: no space left on the device; the states saved before are whole: free some "
                            "space and give the same command again") from error
        if files.is_remote(folder) and (line := refusal(error)):
            raise RestartError(f"{folder}: {line}; the states saved before are whole") from error
        raise


@contextmanager
def damage(folder: epath.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for files that can't be read, a dozen types, into one line.

    Raises:
      DamageError: missing or damaged files.
      RestartError: too little memory, storage that doesn't answer.
      UserError: no permission, no valid credentials.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # of another disk, to which it is copied
        if files.is_remote(folder) and (line := refusal(error)):
            raise UserError(f"{folder}: {line}") from error
        said = first_line(error, 300)
        if isinstance(error, MemoryError) or re.search(PASSING, str(error)):
            raise RestartError(f"{folder}: can't be read now ({said}); nothing is changed: give the same "
                               "command again") from error
        if re.search(DENIED, str(error)):
            raise UserError(f"{folder}: no permission to read it ({said}); change its mode or owner, or "
                            "run as another user") from error
        raise DamageError(f"{folder}: missing or damaged files ({said})") from error


def check_tree(path: str, found: Any, expected: Any) -> None:
    """Refuses a tree whose paths, shapes or dtypes differ from what is expected.

    Raises:
      StructureError: the first difference, by path.
    """
    kept, wanted = _flat(found), _flat(expected)
    for name in sorted(kept.keys() | wanted.keys()):
        have, want = kept.get(name), wanted.get(name)
        if have is None:
            raise StructureError(f"{path}: no leaf {name}, which the model has as {want}; the checkpoint is of another "
                            "model, or damaged")
        if want is None:
            raise StructureError(f"{path}: leaf {name} {have} is not in the model: the checkpoint is of another model")
        if have != want:
            raise StructureError(f"{path}: leaf {name} is {have}, but the model wants {want}; see config.model "
                                 "and config.training.pad_to")


def check_fingerprint(path: str, kept: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compares what was read with what was written.

    Raises:
      DamageError: the first leaf that differs.
    """
    for name in sorted({**kept, **found}):
        if kept.get(name) != found.get(name):
            raise DamageError(f"{path}: {name} has fingerprint {found.get(name)}, {kept.get(name)} was written; its "
                              "files are damaged")


def _flat(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[0]
    return {dotted(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves}
