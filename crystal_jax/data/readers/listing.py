"""The files of a source, local or gs://: found, named, put in order, opened, and dealt or grouped into inputs.

This file owns order and names. Its invariants: they depend on the files' names alone (numbers in them compare as
numbers), never on where the data lie; a file is read once; an input of several files holds files of one parity.
"""

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crystal_jax.data.readers.base import Input, SourceSpec
from crystal_jax.errors import UserError
from crystal_jax.files import as_path, changed, is_remote

DEALT_INPUTS = 16
"""Inputs that a corpus without numbered files is dealt into, so that its even and odd halves exist."""
NUMBER = re.compile("([0-9]+)")


@dataclass(frozen=True)
class File:
    path: str
    name: str
    """Relative to the folder that all files of the source share."""
    bytes: int
    changed: int
    """When it changed last: nanoseconds since 1970, 0 where the storage doesn't tell."""


def list_files(source: SourceSpec, pattern: re.Pattern[str], called: str) -> list[File]:
    """Every file that the source names, in natural order of the names; in folders, those whose path fits.

    called: the pattern in words, for errors.

    Raises:
      UserError: no file is named or found, one is named twice.
    """
    if not source.inputs:
        raise UserError(f"--input: --source={source.kind} needs at least one file, folder or glob")
    found: dict[str, tuple[int, int]] = {}
    seen: dict[str, str] = {}
    for item in source.inputs:
        for path, looked_at in _expand(item, pattern, called):
            real = path if is_remote(path) else os.path.realpath(path)
            if real in seen:
                raise UserError(f"--input: {path} is listed twice (also as {seen[real]}); name it once")
            seen[real], found[path] = path, looked_at
    if len({is_remote(path) for path in found}) > 1:
        raise UserError(f"--input: {','.join(source.inputs)}: some local and some remote; prepare them one by one")
    common = os.path.commonpath([os.path.dirname(path) for path in found])
    files = [File(path, os.path.relpath(path, common), *looked_at) for path, looked_at in found.items()]
    return sorted(files, key=lambda file: natural(file.name))


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key: example_2 before example_10."""
    return [(int(piece), piece) if odd else (-1, piece)
            for piece, odd in zip(NUMBER.split(name), itertools.cycle((False, True)))]  # fmt: skip


def _expand(item: str, pattern: re.Pattern[str], called: str) -> list[tuple[str, tuple[int, int]]]:
    """(path, (bytes, time of change)) of the files behind a file, a folder or a glob; hidden files are left out."""
    folder, found = _expand_remote(item) if is_remote(item) else _expand_local(item)
    if folder:
        found = {path: looked_at for path, looked_at in found.items() if pattern.search(path)}
    if not found:
        state = f"holds no file to read ({called})" if folder else "no such file"
        raise UserError(f"--input: {item}: {state}; give an existing file, folder or glob")
    return sorted(found.items())


def _expand_local(item: str) -> tuple[bool, dict[str, tuple[int, int]]]:
    folder = os.path.isdir(item)
    if folder:
        found = glob.glob(os.path.join(glob.escape(item), "**"), recursive=True)
    else:
        found = [item] if os.path.exists(item) else glob.glob(item, recursive=True)
    return folder, {os.path.abspath(path): look_at(path) for path in found if os.path.isfile(path)}


def look_at(path: str) -> tuple[int, int]:
    """(bytes, time of change) of a local file."""
    found = os.stat(path)
    return found.st_size, changed(found)


def _expand_remote(item: str) -> tuple[bool, dict[str, tuple[int, int]]]:
    """One listing gives names and sizes; a request per file would take minutes for a published corpus."""
    scheme, _, root = item.rstrip("/").partition("://")
    with _remote_errors(item):
        system = _remote(item)
        found = system.glob(root, detail=True) if glob.has_magic(root) else system.find(root, detail=True)
    folder = bool(found) and not glob.has_magic(root) and root not in found
    visible = {f"{scheme}://{path}": (info["size"], _time(info)) for path, info in found.items()
               if info["type"] == "file" and "/." not in path.removeprefix(root if folder else "")}  # fmt: skip
    return folder, visible


def _time(info: dict[str, Any]) -> int:
    return int(info["mtime"].timestamp() * 1e9) if "mtime" in info else 0


def _remote(path: str) -> Any:
    """The file system of a path; epath has no listing with sizes."""
    as_path(path)  # says what is missing
    import fsspec

    return fsspec.filesystem(path.partition("://")[0])


@contextlib.contextmanager
def _remote_errors(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each file system has its own
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {one_line(error)})") from error


def one_line(error: Exception) -> str:
    """The error on one line, as every message is."""
    return " ".join(str(error).split())


def open_input(path: str) -> Any:
    """A file, local or gs://, opened for reading bytes.

    Raises:
      UserError: it can't be, by name.
    """
    if is_remote(path):
        with _remote_errors(path):
            return _remote(path).open(path, "rb")
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error


def deal(kind: str, files: Sequence[File]) -> list[Input]:
    """Files dealt in turn into at most DEALT_INPUTS inputs."""
    count = min(DEALT_INPUTS, len(files))
    return [_input(f"{kind}/{index:02d}", files[index::count], index) for index in range(count)]


def group(files: Sequence[File], ordinals: Sequence[int], size: int) -> list[Input]:
    """An input per `size` files whose ordinals have the same parity, which the input's own ordinal keeps."""
    if size == 1:
        return [_input(file.name, [file], ordinal) for file, ordinal in zip(files, ordinals, strict=True)]
    inputs = []
    for parity in (0, 1):
        same = [file for file, ordinal in zip(files, ordinals, strict=True) if ordinal % 2 == parity]
        for index in range(0, len(same), size):
            some = same[index : index + size]
            inputs.append(_input(f"{some[0].name}+{len(some) - 1}", some, 2 * (index // size) + parity))
    return sorted(inputs, key=lambda item: item.ordinal)


def _input(name: str, files: Sequence[File], ordinal: int) -> Input:
    return Input(name, tuple((file.path, file.name) for file in files), sum(file.bytes for file in files), ordinal,
                 max(file.changed for file in files))
