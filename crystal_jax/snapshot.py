"""The exact code and the versions that each process of a run ran with, in RUN/code.

Invariant: a file there is named by what it holds and never changes, so that a run that other code has continued keeps
both.
"""

import functools
import hashlib
import io
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from etils import epath

from crystal_jax import files
from crystal_jax.config import digest

PACKAGE = Path(__file__).parent
FOLDER = "code"
FLAGS = ("XLA_", "LIBTPU_", "TPU_", "JAX_", "CRYSTAL_", "NCCL_")
"""Environment variables that change what the same code does, by how their names begin."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of each file in an archive, so that equal code is equal bytes."""


@functools.cache
def _sources() -> dict[str, bytes]:
    """Every file of the package, by its path below the package's parent."""
    found = (path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(PACKAGE.parent).as_posix(): path.read_bytes() for path in found}


@functools.cache
def code_hash() -> str:
    """Names the package's content: 16 hex digits, the same on each machine that has the same code."""
    hashes = [[name, hashlib.sha256(data).hexdigest()] for name, data in _sources().items()]
    return digest(hashes)


def packages() -> dict[str, str]:
    """Installed packages and their versions, from the names of their folders: reading their metadata takes long."""
    found: dict[str, str] = {}
    for folder in sys.path:
        for entry in sorted(Path(folder).glob("*.dist-info")):
            name, _, version = entry.name.removesuffix(".dist-info").partition("-")
            found.setdefault(name.lower().replace("_", "-"), version)
    return dict(sorted(found.items()))


def commit() -> dict[str, Any]:
    """The checkout's commit, and the package's files that aren't as committed; nulls where it is no checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "--no-optional-locks", "-C", PACKAGE, *arguments], capture_output=True,
                                  text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout

    # A package that is installed somewhere below another project's checkout isn't of that project's commits.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "changed": None}
    changed = git("status", "--porcelain", "--", ".") or ""
    return {"commit": (git("rev-parse", "HEAD") or "").strip() or None, "changed": changed.splitlines()}


def record_code(run_dir: epath.Path) -> None:
    """Writes RUN/code/HASH.zip, the package as it runs, and environment-HASH.json: commit, packages, flags."""
    archive = run_dir / FOLDER / f"{code_hash()}.zip"
    if not files.exists(archive):
        files.write_bytes(archive, _archive())
    found = {"code": code_hash(), **commit(), "python": sys.version, "platform": platform.platform(),
             "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(FLAGS)},
             "packages": packages()}
    described = run_dir / FOLDER / f"environment-{digest(found)}.json"
    if not files.exists(described):
        files.write_json(described, found)


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in _sources().items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
