"""Devices of a TPU slice that isn't there, as its compiler describes them.

Invariant: libtpu is loaded here and nowhere else, in a process that `ENVIRONMENT` keeps from looking for a TPU.
"""

import importlib.metadata
import importlib.util
import os

import jax
from jax.experimental import topologies

from crystal_jax.errors import UserError, first_line, install
from crystal_jax.generations import Slice

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # libtpu asks for a host's place in its pod before it describes one.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_TRACEBACK_FILTERING": "off",
}
"""Of a process that describes devices: set before it imports JAX."""

MISSING = f"libtpu isn't installed, which holds the TPU compiler; no TPU is needed: {install('tpu')}"


def is_installed() -> bool:
    """Whether libtpu is here, without loading it."""
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None


def libtpu_version() -> str:
    """That of the package, or the file that TPU_LIBRARY_PATH names instead."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return os.environ.get("TPU_LIBRARY_PATH", "none")


def described(piece: Slice, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` equal slices: enough to lay out a mesh and to compile for, not to compute on.

    Raises:
      UserError: libtpu is missing, or knows no such slice.
    """
    if not is_installed():
        raise UserError(MISSING)
    generation = piece.generation
    # libtpu counts in three dims. A torus that is said to be a mesh compiles to other collectives.
    flat = (1,) * (3 - len(piece.topology))
    bounds = {1: (1, 1, 1), 8: (2, 4, 1)}.get(piece.chips if piece.hosts == 1 else 0, (2, 2, 1))
    shape = "x".join(map(str, piece.topology))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation.name}:{shape}", chip_config_name=generation.chip_config,
            chips_per_host_bounds=bounds, num_slices=slices, wrap=(*piece.wrap, *(False,) * len(flat)))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"--topology={generation.name}:{shape}: the compiler knows no such slice "
                        f"({first_line(error)})") from error
    assert len(found.devices) == piece.devices * slices, (len(found.devices), piece)
    return list(found.devices)
