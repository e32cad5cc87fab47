"""The rolling full states of a run, RUN/checkpoints/STEP: parameters, moments and position, to go on from.

Its invariant: a state is whole if it has position.json, which is written last and removed first, and it is gone on from
only if every leaf has the fingerprint it was saved with. One that hasn't is moved to RUN/damaged, never removed.
"""

import itertools
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from crystal_jax import files, trees
from crystal_jax.config import CheckpointConfig, digest
from crystal_jax.errors import FatalError, UserError
from crystal_jax.fingerprint import Sums, dispatch
from crystal_jax.trees import DamageError, StructureError

FORMAT = 1
POSITION = "position.json"
FOLDER = "checkpoints"
TRIED = 3
"""States that are tried, the newest first, before a run gives up."""
GIVEN_UP = 10
"""A save has failed after so many times slow_save_seconds."""

State = dict[str, Any]
"""{params, moments}."""


def saved_states(run_dir: files.Location) -> list[int]:
    """Steps of a run's whole rolling states, in order.

    Raises:
      UserError: gs:// that can't be reached.
    """
    return _whole(files.list_files(files.as_path(run_dir) / FOLDER))


def newest_state(run_dir: files.Location) -> int | None:
    """Step of a run's newest whole rolling state."""
    return max(saved_states(run_dir), default=None)


def _whole(names: set[str]) -> list[int]:
    found = (name.split("/") for name in names if name.count("/") == 1)
    return sorted(int(step) for step, file in found if file == POSITION and step.isdigit())


def read_position(state: epath.Path) -> dict[str, Any]:
    """position.json of a state's folder.

    Raises:
      UserError: a format that this version doesn't know; as trees.damage.
      DamageError: it is missing or damaged.
    """
    path = state / POSITION
    with trees.damage(path):
        position = json.loads(files.read_bytes(path))
        said = position.pop("digest", None)
    if said is None:
        check_format(path, position)
    if said != digest(position):
        raise DamageError(f"{path}: doesn't have the digest that it states; it is damaged")
    check_format(path, position)
    return position


def write_position(state: epath.Path, position: dict[str, Any]) -> None:
    """position.json, which makes a state's folder whole."""
    position = {"format": FORMAT, **position}
    files.write_json(state / POSITION, {**position, "digest": digest(position)})


def check_format(path: epath.Path, found: dict[str, Any]) -> None:
    """Refuses what another version wrote.

    Raises:
      UserError: the format of the file and ours.
    """
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: format {found.get('format')}, but this version reads {FORMAT}; use the version that "
                        "wrote it, or a newer one")


class RollingStates:
    """Saves and restores. Saving is asynchronous: the arrays may be donated as soon as `save` returns."""

    ITEMS = ("params", "moments")

    def __init__(self, folder: files.Location, config: CheckpointConfig, keep: list[int]):
        """keep: steps whose states stay, beside the latest few."""
        # An absolute path, since Orbax writes and TensorStore reads below it.
        self.folder = files.as_path(folder) if files.is_remote(folder) else epath.Path(folder).absolute()
        self._config, self.keep = config, {*keep}
        self._writer = trees.Writer(self.ITEMS, max(60.0, GIVEN_UP * config.slow_save_seconds))
        self._thread: threading.Thread | None = None
        self._began, self._step = 0.0, -1
        self._error: BaseException | None = None
        self._notes: list[str] = []

    def steps(self) -> list[int]:
        """Of the whole states, in order."""
        return _whole(files.list_files(self.folder))

    def save(self, step: int, state: State, position: dict[str, Any], sums: Sums | None = None) -> None:
        """Starts to save the state and the position as `step`; does nothing if that step is there.

        sums: of the state, where they are computed already.

        Raises:
          Exception: what went wrong with the save before, for which it waits.
        """
        self.wait()
        if files.exists(self.folder / str(step) / POSITION):
            return
        self._began, self._step = time.monotonic(), step
        with trees.saving(self.folder):
            self._writer.start(self.folder / str(step), state)
        sums = sums or dispatch(state)  # behind the start, whose threads it would keep from the cores of a host
        self._thread = threading.Thread(target=self._finish, args=(step, position, sums), name="save")
        self._thread.start()

    def _finish(self, step: int, position: dict[str, Any], sums: Sums) -> None:
        """In the background: waits for the arrays, makes the state whole, removes those that are kept no longer."""
        try:
            self._writer.wait()
            fingerprint = sums.leaves()
            if jax.process_index() == 0:
                write_position(self.folder / str(step), {**position, "fingerprint": fingerprint})
                self._remove_old()
        except BaseException as error:
            self._error = error

    def _remove_old(self) -> None:
        """What isn't kept, and what a kill left unfinished; what can't be removed is tried again the next time."""
        names = files.list_files(self.folder)
        whole = _whole(names)
        kept = {*whole[-self._config.keep_last :], *self.keep.intersection(whole)}
        for name in sorted({name.split("/")[0] for name in names if "/" in name} - {str(step) for step in kept}):
            if name.split(".")[0].isdigit():  # also Orbax's STEP.orbax-checkpoint-tmp
                try:
                    remove_folder(self.folder / name, POSITION)
                except Exception as error:
                    self._notes.append(f"{self.folder / name}: can't be removed ({str(error)[:200]}); it will be "
                                       "tried again after the next save")

    def check(self) -> list[str]:
        """What there is to say of the background: a save that takes long, a state that can't be removed.

        Raises:
          Exception: what went wrong there since the last call.
        """
        self._raise()
        notes, self._notes = self._notes, []
        seconds = time.monotonic() - self._began
        if self._thread is not None and self._thread.is_alive() and seconds > self._config.slow_save_seconds:
            notes.append(f"{self.folder}/{self._step}: being saved since {seconds:.0f} s, more than config.checkpoints."
                         f"slow_save_seconds = {self._config.slow_save_seconds:g}; storage is slow or failing")
        return notes

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            with trees.saving(self.folder):
                raise error

    def wait(self) -> None:
        """Until no save is under way.

        Raises:
          Exception: what went wrong with it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def close(self) -> None:
        """Waits for the last save.

        Raises:
          Exception: what went wrong with it.
        """
        self.wait()
        self._writer.close()

    def restore_newest(self, abstract: State,
                       accept: Callable[[int, dict[str, Any]], None]) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state in the layouts of `abstract`, position) of the newest state, or of one before if it is damaged.

        accept: raises for the position of a state that isn't this run's.

        Raises:
          UserError: as accept; a newer format; as trees.damage.
          FatalError: states, but none of the newest few can be used.
        """
        damaged: dict[int, DamageError] = {}
        for step in itertools.islice(reversed(self.steps()), TRIED):
            try:
                state, position = self.restore(step, abstract, accept)
            except DamageError as error:
                damaged[step] = error
                _say(f"DAMAGED STATE: {error}")
                continue
            self._set_aside(damaged, step)
            return step, state, position
        if damaged:
            raise FatalError(f"{self.folder}: none of the newest states {', '.join(map(str, damaged))} can be used "
                             f"({next(iter(damaged.values()))}); put back a copy of one, or start a new run in another "
                             "--run_dir, with --init_from=CHECKPOINT if you have one")
        return None

    def restore(self, step: int, abstract: State,
                accept: Callable[[int, dict[str, Any]], None] = lambda step, position: None,
                ) -> tuple[State, dict[str, Any]]:
        """(state, position) of one step, of the items and in the layouts of `abstract`.

        Raises:
          DamageError: missing or damaged files; leaves that are missing, left over, of another shape, dtype or value.
          UserError: as accept; a newer format; as trees.damage.
        """
        folder = self.folder / str(step)
        state, position, problem = None, {}, None
        try:
            position = read_position(folder)
            accept(step, position)
            try:
                state = {item: trees.read(folder / item, tree) for item, tree in abstract.items()}
            except StructureError as error:  # the plan is the run's, so it is damage too
                raise DamageError(str(error)) from error
        except DamageError as error:
            problem = error
        if not _everywhere(problem is None):
            raise problem or DamageError(f"{folder}: another process can't read its part of it")
        assert state is not None
        kept = {name: value for name, value in position["fingerprint"].items() if name.split(".")[0] in abstract}
        trees.check_fingerprint(str(folder), kept, dispatch(state).leaves())
        return state, position

    def _set_aside(self, damaged: dict[int, DamageError], used: int) -> None:
        for step in damaged:
            target = self.folder.parent / "damaged" / str(step)
            for number in itertools.count(2):
                if not files.list_files(target):
                    break
                target = target.with_name(f"{step}-{number}")
            if jax.process_index() == 0:
                files.move_folder(self.folder / str(step), target, first=POSITION)
            _say(f"moved to {target}; going on from step {used}")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def _everywhere(fine: bool) -> bool:
    """Whether it is so in every process; all of them ask."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def remove_folder(folder: epath.Path, first: str) -> None:
    """Removes the file `first`, then all others: what an interruption leaves isn't taken for whole."""
    files.remove(folder / first)
    if not files.is_remote(folder):
        shutil.rmtree(folder)
        return
    for name in sorted(files.list_files(folder)):
        files.remove(folder / name)
