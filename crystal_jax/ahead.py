"""A train step compiled for TPUs that aren't there: what the compiler wrote of it.

Invariant: each compilation is a process of its own, so that the caller loads no libtpu, a compiler that aborts takes
nothing with it, and one that has said enough (a scheduled program with its buffers) is stopped: machine code takes ten
times as long and only adds its own size and the compiler's cycles.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_jax.config import Config, from_dict, to_dict
from crystal_jax.errors import UserError, first_line
from crystal_jax.generations import Slice, find_slice
from crystal_jax.topology import ENVIRONMENT, described

SCHEDULED = "after_optimizations_after_buffer_assignment"
BUFFERS = "after_optimizations-buffer-assignment"
LIVE = "after_optimizations-live-range"
CODE = "after_codegen"
UNBOUGHT = "after_optimizations"
"""The program that didn't fit: written before its buffers are judged."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler wrote."""

    program: str
    """The scheduled program, with the compiler's cycles if machine code was made."""
    buffers: str
    """Its buffer assignment, of one device."""
    live_ranges: str
    mesh: dict[str, int]
    """Sizes of the mesh's axes."""
    places: list[list[int]]
    """Slice, coordinates and core of each device, in the mesh's order."""
    code_bytes: int | None
    """None without machine code."""
    refused: str
    """Why the compiler refused it: out of memory; empty if it fits."""
    seconds: float


class Refused(UserError):
    """A step that can't be compiled as asked for, by a mistake in the config or the flags."""


def compile_step(config: Config, piece: Slice, slices: int = 1, flags: dict[str, Any] | None = None,
                 machine_code: bool = True, note: Callable[[float], None] = lambda seconds: None) -> Compiled:
    """Compiles phase 1's train step; `note` hears every second how long it has taken.

    Raises:
      UserError: libtpu is missing, the mesh or the batch doesn't fit the devices, an unknown flag.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crystal-plan-") as name:
        folder = Path(name)
        job = {"config": to_dict(config), "slices": slices, "flags": flags or {}, "folder": name,
               "topology": f"{piece.generation.name}:{'x'.join(map(str, piece.topology))}"}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        with open(folder / "log", "wb") as log:
            child = subprocess.Popen([sys.executable, "-m", "crystal_jax.ahead", name], stdin=subprocess.PIPE,
                                     stdout=log, stderr=log, env=_environment())
            try:
                _wait(child, folder, machine_code, lambda: note(time.monotonic() - began))
            finally:
                child.kill()
                child.communicate()
        return _read(folder, child.returncode, time.monotonic() - began)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "LIBTPU_"))}
    here = str(Path(__file__).parents[1])
    return {**kept, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, [here, kept.get("PYTHONPATH", "")]))}


def _wait(child: subprocess.Popen, folder: Path, machine_code: bool, note: Callable[[], None]) -> None:
    """Until the child is done, or has written a whole scheduled program and no machine code is wanted."""
    size, told = -1, time.monotonic()
    while child.poll() is None:
        time.sleep(0.1)
        if time.monotonic() - told >= 1:
            told = time.monotonic()
            note()
        if not machine_code and (file := _dumped(folder, SCHEDULED)):
            before, size = size, file.stat().st_size
            if before == size > 0 and file.read_bytes()[-16:].rstrip().endswith(b"}"):
                return


def _dumped(folder: Path, kind: str) -> Path | None:
    return next((folder / "dump").glob(f"*.jit_train_step.*.{kind}.txt"), None)


def _read(folder: Path, code: int, seconds: float) -> Compiled:
    def text(kind: str) -> str:
        file = _dumped(folder, kind)
        return file.read_text(encoding="utf-8", errors="replace") if file else ""

    said = json.loads(file.read_text(encoding="utf-8")) if (file := folder / "said.json").exists() else {}
    if "mistake" in said:
        raise Refused(said["mistake"])
    program = text(CODE) or text(SCHEDULED) or text(UNBOUGHT)
    if not program or "mesh" not in said:
        log = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no word"]
        raise RuntimeError(f"the compiler ended with exit code {code}: {log[-1]}")
    return Compiled(program, text(BUFFERS), text(LIVE), said["mesh"], said["places"], said.get("code_bytes"),
                    said.get("refused", ""), seconds)


def main(argv: list[str]) -> int:
    """The child: compiles the job of a folder, and leaves the compiler's files and `said.json` there."""
    import jax

    from crystal_jax import sharding
    from crystal_jax.update import lower_step

    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(argv[0])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = from_dict(Config, job["config"])
    said: dict[str, Any] = {}
    try:
        devices = described(find_slice(job["topology"]), job["slices"])
        mesh = sharding.make_mesh(config.training.mesh, devices)
        sharding.check_divisible(config, mesh)
        places = [[getattr(device, "slice_index", 0), *device.coords, device.core_on_chip]
                  for device in mesh.devices.flat]
        said |= {"mesh": dict(mesh.shape), "places": places}
        _write(folder, said)
        lowered = lower_step(config, mesh)
        options = {"xla_dump_to": str(folder / "dump"), "xla_dump_hlo_as_text": True, **job["flags"]}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise UserError(f"the compiler refuses the step: {first_line(error)}") from error
            said["refused"] = first_line(error, 400).removeprefix("RESOURCE_EXHAUSTED: ")
        else:
            analysis = compiled.memory_analysis()
            said["code_bytes"] = analysis.generated_code_size_in_bytes if analysis else None
    except UserError as error:
        said["mistake"] = str(error)
    _write(folder, said)
    return 0


def _end_with_parent() -> None:
    """Whose end closes the pipe, however it came about: an orphan would compile on for minutes."""
    sys.stdin.buffer.read()
    os._exit(1)


def _write(folder: Path, said: dict[str, Any]) -> None:
    (folder / "said.tmp").write_text(json.dumps(said), encoding="utf-8")
    (folder / "said.tmp").rename(folder / "said.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
