"""`train` as processes that drills disturb, and the comparison of what two runs left behind.

Knows a run's folder from outside, as files: what it finds there isn't what the product says of itself. A folder may be
local or on gs://, through the emulator.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from conftest import OUTER_ENVIRONMENT, ROOT

from crystal_jax import files
from crystal_jax.metrics import BY_THE_CLOCK, OF_PROCESSES

CLOCK = (*BY_THE_CLOCK, "digest")
"""What two equal runs may differ in."""
STATE, EXPORT = r"checkpoints/\d+", r"exports/[^/]+/[^/]+"
END_SECONDS = 300


class Trainer:
    """A `train` under way; its stderr goes to a file, so that it never waits for a reader."""

    def __init__(self, command: list[str], environment: Mapping[str, str]):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by end()
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL,
                                        stderr=self._said, text=True)

    def running(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, come: Callable[[], object], seconds: float = END_SECONDS) -> bool:
        """Whether it came to pass while the process ran."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            if come():
                return True
            time.sleep(0.05)
        return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = END_SECONDS) -> tuple[int, str]:
        """Waits for its end; its exit code and what it said."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._said.seek(0)
            said = self._said.read()
        self._said.close()
        return self.process.returncode, said

    def kill(self) -> str:
        """SIGKILL; what it had said."""
        self.process.kill()
        return self.end()[1]


@dataclass(frozen=True)
class Recipe:
    """A run that can be given again: the same command, and the environment that it needs."""

    config: Path
    environment: Mapping[str, str]
    """Beside a clean one: the compilation cache, the way to gs://."""
    arguments: tuple[str, ...] = ()
    program: tuple[str, ...] = ("-m", "crystal_jax")

    def using(self, environment: Mapping[str, str] = {}, *arguments: str) -> "Recipe":
        """The same with another environment and further arguments."""
        return replace(self, environment={**self.environment, **environment}, arguments=(*self.arguments, *arguments))

    def start(self, run_dir: Path | str) -> Trainer:
        environment = {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu",
                       "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **self.environment}
        command = [sys.executable, *self.program, "train", f"--config={self.config}", *self.arguments,
                   f"--run_dir={run_dir}"]
        return Trainer(command, environment)

    def finish(self, run_dir: Path | str) -> str:
        """Runs it to the end; what it said."""
        code, said = self.start(run_dir).end()
        assert code == 0, f"exit code {code}: {said}"
        return said


def records(run_dir: Path | str) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none where there is no such file."""
    try:
        lines = files.read_bytes(files.as_path(run_dir) / "metrics.jsonl").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill
    return found


def reached(run_dir: Path | str) -> int:
    """The last step that was logged by the last process."""
    found = records(run_dir)
    starts = [at for at, record in enumerate(found) if record["kind"] == "start"]
    return max((record["step"] for record in found[starts[-1]:]), default=0) if starts else 0


def starts(run_dir: Path | str) -> list[int]:
    """The step from which each process went on."""
    return [record["step"] for record in records(run_dir) if record["kind"] == "start"]


def whole(names: Iterable[str]) -> set[str]:
    """The folders of states and permanent checkpoints that have the file that is written last."""
    last = re.compile(f"({STATE}/position|{EXPORT}/checkpoint)[.]json")
    return {name.rpartition("/")[0] for name in names if last.fullmatch(name)}


def committed(run_dir: Path | str) -> list[int]:
    """The steps of whole states."""
    found = whole(files.list_files(files.as_path(run_dir)))
    return sorted(int(name.split("/")[1]) for name in found if name.startswith("checkpoints/"))


def under_way(run_dir: Path | str) -> list[str]:
    """States and permanent checkpoints that are being written, or removed."""
    names = files.list_files(files.as_path(run_dir))
    found = {match[0] for name in names if (match := re.match(f"(checkpoints/[^/]+|{EXPORT})(?=/)", name))}
    return sorted(found - whole(names))


def arrays(folder: Path | str) -> dict[str, bytes]:
    """Every leaf of an Orbax tree, by its path."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        place = files.as_path(folder)
        place = place if files.is_remote(place) else place.resolve()
        tree = reader.metadata(place).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree,
                           is_leaf=lambda node: hasattr(node, "shape"))
        found = reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=how))
    return {".".join(map(str, path)): np.asarray(leaf).tobytes() for path, leaf in ocp.tree.to_flat_dict(found).items()}


def left_behind(run_dir: Path | str) -> dict[str, Any]:
    """Everything by which a run is judged: states, permanent checkpoints, the manifest and the log, by name."""
    root = files.as_path(run_dir)
    names = files.list_files(root)
    found: dict[str, Any] = {}
    finished = whole(names)
    for name in sorted(names):
        tree, _, file = name.rpartition("/")
        if file == "_METADATA" and tree.rpartition("/")[0] in finished:
            found |= {f"{tree}/{leaf}": value for leaf, value in arrays(root / tree).items()}
        elif name == "manifest.json" or (tree in finished and file in ("position.json", "checkpoint.json")):
            found[name] = _timeless(files.read_json(root / name))
    for record in records(run_dir):
        if record["kind"] not in OF_PROCESSES:
            found[f"metrics.jsonl {record['kind']} {record['step']}"] = _timeless(record)
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in CLOCK}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def lasting(left: dict[str, Any], ends: Sequence[int]) -> dict[str, Any]:
    """Of states those of phase ends: a run that was stopped kept others, of the steps at which it was saved last."""
    return {name: value for name, value in left.items()
            if not name.startswith("checkpoints/") or int(name.split("/")[1]) in ends}


def assert_same(run_dir: Path | str, expected: dict[str, Any], ends: Sequence[int] | None = None) -> None:
    """It left what `left_behind` found of an undisturbed run, bit for bit; with `ends` the `lasting` states only."""
    found = left_behind(run_dir)
    if ends is not None:
        found, expected = lasting(found, ends), lasting(expected, ends)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    said = [f"{name}: {_short(found[name])}, but {_short(expected[name])} undisturbed" for name in other[:3]]
    assert not (missing or extra or other), f"{run_dir}: lacks {missing[:5]}; has also {extra[:5]}; {len(other)} " \
                                            f"differ: {said}"


def _short(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)[:300]


def copied(source: Path, target: Path | str) -> Path | str:
    """Copies a run's folder, also to gs://; its lock isn't of the copy."""
    for name in files.list_files(files.as_path(source)) - {".lock"}:
        place, data = files.as_path(target) / name, (source / name).read_bytes()
        if files.is_remote(place):
            _upload(str(place), data)
        else:
            files.write_bytes(place, data)
    return target


def _upload(place: str, data: bytes) -> None:
    """In one request of plain bytes: of one in several parts, the emulator reads data as text, and cuts line ends."""
    bucket, _, key = place.removeprefix("gs://").partition("/")
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key)}"
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/octet-stream"})):
        pass


def seeded(name: str) -> random.Random:
    """For moments of kills; the seed is printed, and can be given again as CRYSTAL_DRILL_SEED."""
    seed = int(os.environ.get("CRYSTAL_DRILL_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"{name}: CRYSTAL_DRILL_SEED={seed}")
    return random.Random(seed)
