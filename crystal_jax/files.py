"""Files, local or on gs://: whole small ones through epath, byte ranges of large ones through TensorStore.

Its invariant: a file that has its name is whole. Local files are written under another name, synced and renamed; an
object on gs:// appears when its upload is complete.
"""

import errno
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from crystal_jax.errors import UserError, first_line, install, reason

PARTIAL = ".partial-"
"""In the name of a file that is still being written; a kill leaves it behind."""
LOCAL_BLOCK = 1 << 20
"""Bytes that are read at once where a whole local file is: fits a core's cache."""
REMOTE_BLOCK = 1 << 23
"""The same on gs://, where each read is a request."""
IN_FLIGHT = 4
"""Requests that are under way ahead of the reader of a whole remote file."""

Numbers = Sequence[int] | np.ndarray
Location = str | os.PathLike[str]
Range = tuple[Location, int, int]
"""A file, the first byte and the number of bytes."""


def as_path(value: Location) -> epath.Path:
    """A path with pathlib's methods, wherever it lies.

    Raises:
      UserError: storage that isn't known; gs:// without the package that it needs.
    """
    text = os.fspath(value)
    if is_remote(text):
        if not text.startswith("gs://"):
            raise UserError(f"{text}: storage of another kind; give a local path or gs://BUCKET/...")
        if not _can_gs():
            raise UserError(f"{text}: gs:// needs the package gcsfs; {install('data')}")
    return epath.Path(text)


@functools.cache
def _can_gs() -> bool:
    if importlib.util.find_spec("gcsfs") is None:
        return False
    import fsspec

    # A listing kept from before doesn't show what other machines have written since.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return True


def gcsfs() -> Any:
    """The client that epath uses: an object appears when its last byte is there."""
    import fsspec

    return fsspec.filesystem("gcs")


def is_remote(path: Location) -> bool:
    return "://" in os.fspath(path)


def write_bytes(path: Location, data: bytes) -> None:
    """Writes the whole file or leaves the old one; folders are made."""
    target = as_path(path)
    if is_remote(target):
        gcsfs().pipe_file(os.fspath(target), data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _partial(path: epath.Path) -> epath.Path:
    """Beside the file, hidden, and another one for each process on each machine."""
    return path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(4)}")


def read_bytes(path: Location) -> bytes:
    """A whole file.

    Raises:
      OSError: it is missing, or can't be reached.
    """
    place = as_path(path)
    if not is_remote(place):
        return place.read_bytes()
    store, key = kvstore(place)
    try:
        found = store.read(key).result()
    except ValueError as error:
        raise OSError(first_line(error)) from error
    if found.state == "missing":
        raise FileNotFoundError(errno.ENOENT, "no such object", os.fspath(place))
    return found.value


def end_last_line(path: Location) -> None:
    """Puts what is appended next to a local file of lines on a line of its own, after a kill in mid-line."""
    if os.path.exists(path):
        with open(path, "r+b") as file:
            if file.seek(0, 2):
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def write_json(path: Location, data: Any) -> None:
    """Writes the whole file or leaves the old one; folders are made."""
    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())


def read_json(path: Location) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return json.loads(read_bytes(path))
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error})") from error


def remove(path: Location) -> None:
    """Removes a file, if it is there."""
    place = as_path(path)
    if not is_remote(place):
        place.unlink(missing_ok=True)
        return
    store, key = kvstore(place)
    store.write(key, None).result()


def move_folder(source: epath.Path, target: epath.Path, first: str) -> None:
    """Moves a folder to where there is none.

    On gs:// all is copied, `first` at the end, then removed, `first` before the rest: the file without which a folder
    isn't taken for whole. So a kill leaves one whole folder, or two, and it may be done again.
    """
    if not is_remote(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    others = sorted(list_files(source) - {first})
    for name in [*others, first]:
        gcsfs().copy(os.fspath(source / name), os.fspath(target / name))
    for name in [first, *others]:
        remove(source / name)


def publish(local: pathlib.Path, target: Location) -> None:
    """A finished local file becomes `target`: moved, or copied and then removed; folders are made."""
    place = as_path(target)
    if is_remote(place):
        gcsfs().put_file(os.fspath(local), os.fspath(place))  # in chunks; the last one makes it exist
        local.unlink()
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(local, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_across(local, place)


def _copy_across(local: pathlib.Path, target: epath.Path) -> None:
    """To another file system."""
    partial = _partial(target)
    try:
        with open(local, "rb") as source, open(partial, "wb") as copy:
            shutil.copyfileobj(source, copy, LOCAL_BLOCK)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    local.unlink()


def list_files(folder: epath.Path) -> set[str]:
    """The names, relative to it, of all files in a folder and in the folders inside it; one listing on gs://.

    Raises:
      UserError: no such bucket, or it can't be reached.
    """
    if not is_remote(folder):
        root = os.fspath(folder)
        # Not rglob, which raises when another process removes a folder meanwhile.
        found = (os.path.join(at, name) for at, _, names in os.walk(root) for name in names)
        return {pathlib.PurePath(os.path.relpath(path, root)).as_posix() for path in found}
    import tensorstore as ts

    store, prefix = kvstore(folder)
    prefix = prefix.rstrip("/") + "/"
    try:
        found = store.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()  # "0" follows "/"
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: can't be listed ({line}); is there such a bucket, and may you read it?") from error
    keys = [key.decode() for key in found]
    return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}  # the emulator ignores the end


def read_ranges(path: epath.Path, starts: Numbers, lengths: Numbers) -> list[bytes]:
    """The bytes [start, start + length) for each pair, all requests under way at once.

    Raises:
      UserError: the file is missing, or shorter than that.
    """
    return read_many((path, int(start), int(length)) for start, length in zip(starts, lengths, strict=True))


def read_many(ranges: Iterable[Range]) -> list[bytes]:
    """`read_ranges` of several files together."""
    futures = [_Read(*found) for found in ranges]
    return [future.result() for future in futures]


class _Read:
    """A request for a byte range."""

    def __init__(self, path: Location, start: int, length: int) -> None:
        self._range = path, start, length
        store, key = kvstore(path)
        self._future = store.read(key, byte_range=slice(start, start + length))

    def result(self) -> bytes:
        path, start, length = self._range
        asked = f"bytes {start} to {start + length}"
        try:
            found = self._future.result()
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: {asked} can't be read ({first_line(error)}); the file is shorter, or can't be "
                            "reached") from error
        if found.state == "missing":
            raise UserError(f"{path}: missing, {asked} were asked for; put back the file")
        if len(found.value) != length:
            raise UserError(f"{path}: {asked} were asked for, {len(found.value)} came; the file is too short")
        return found.value


def kvstore(path: Location) -> tuple[Any, str]:
    """The store that a path lies in, and its key there."""
    if not is_remote(path):
        return _open_kvstore("file"), os.path.abspath(path).removeprefix("/")
    bucket, key = split(path)
    return _open_kvstore(bucket), key


def split(path: Location) -> tuple[str, str]:
    """(bucket, name in it) of an object on gs://."""
    bucket, _, key = os.fspath(path).removeprefix("gs://").partition("/")
    return bucket, key


@functools.cache
def _open_kvstore(bucket: str) -> Any:
    import tensorstore as ts  # 0.1 s that most commands needn't wait for

    spec = {"driver": "file", "path": "/"} if bucket == "file" else {"driver": "gcs", "bucket": bucket}
    return ts.KvStore.open(spec).result()


def exists(file: Location) -> bool:
    """Whether there is such a file; asks the storage itself, epath may answer from a listing on gs:// that it kept."""
    try:
        read_bytes(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def modified(path: epath.Path) -> int:
    """When a file's contents changed last, in nanoseconds since 1970; a copy that keeps its date counts as a change."""
    if is_remote(path):
        return int((path.stat().mtime or 0) * 1e9)
    return changed(os.stat(path))


def changed(found: os.stat_result) -> int:
    """The same of a local file that has been looked at."""
    return max(found.st_mtime_ns, found.st_ctime_ns)


def file_size(path: epath.Path) -> int:
    """In bytes.

    Raises:
      OSError: it isn't there, or is a folder.
    """
    if is_remote(path):
        return path.stat().length
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    return found.st_size


def read_blocks(path: epath.Path) -> Iterator[memoryview]:
    """A whole file, block by block; a block is valid until the next one is asked for.

    Blocks have a multiple of 64 KiB, but for the last.
    """
    if is_remote(path):
        yield from _read_remote_blocks(path)
        return
    buffer = memoryview(bytearray(LOCAL_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := _fill(file, buffer):
            yield buffer[:size]


def _fill(file: Any, buffer: memoryview) -> int:
    """Reads until the buffer is full or the file at its end: a pipe or a network file system may give less at once."""
    size = 0
    while size < len(buffer) and (found := file.readinto(buffer[size:])):
        size += found
    return size


def _read_remote_blocks(path: epath.Path) -> Iterator[memoryview]:
    size = file_size(path)
    pending: deque[_Read] = deque()
    for start in range(0, size, REMOTE_BLOCK):
        pending.append(_Read(path, start, min(REMOTE_BLOCK, size - start)))
        if len(pending) > IN_FLIGHT:
            yield memoryview(pending.popleft().result())
    for read in pending:
        yield memoryview(read.result())


def sha256(path: Location, progress: Callable[[int], Any] = lambda read: None) -> str:
    """Of a whole file, in hex; `progress` is told the number of bytes of each block."""
    value = hashlib.sha256()
    for block in read_blocks(as_path(path)):
        value.update(block)
        progress(len(block))
    return value.hexdigest()
