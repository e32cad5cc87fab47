"""Lines of a file, decompressed by its ending.

This file owns decompression. Its invariant: damage and truncation are errors, never a shorter file; zstandard's own
stream reader ends a truncated file in silence.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

import zstandard

from crystal_jax.data.readers.listing import open_input
from crystal_jax.errors import UserError

READ_BYTES = 1 << 18
"""Small, since it is decompressed at once."""


def lines(path: str) -> Iterator[bytes]:
    """Lines without their newline; memory holds the longest one and a few megabytes.

    Raises:
      UserError: the file can't be read, is damaged or truncated.
    """
    parts: list[bytes] = []
    try:
        with open_input(path) as file:
            blocks = iter(lambda: file.read(READ_BYTES), b"")
            for data in DECOMPRESS.get(PurePath(path).suffix, _plain)(blocks):
                *whole, rest = data.split(b"\n")
                for line in whole:
                    yield b"".join([*parts, line]) if parts else line
                    parts = []
                parts.append(rest)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error
    except EOFError as error:
        raise UserError(f"{path}: truncated, the compressed data end too early; fetch the file again") from error
    except (zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged compressed data ({error}); fetch the file again") from error
    if last := b"".join(parts):
        yield last


def _plain(blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield from blocks


def _decompressed(blocks: Iterable[bytes], make: Callable[[], Any], padding: bytes = b"") -> Iterator[bytes]:
    """The contents of one compressed frame after another, which bytes of `padding` may follow; EOFError when the last
    one isn't complete.
    """
    frame, complete = make(), False  # an empty file isn't a frame
    for block in blocks:
        while block:
            if complete and not (block := block.lstrip(padding)):
                break
            yield frame.decompress(block)
            complete, block = frame.eof, frame.unused_data
            if complete:
                frame = make()
    if not complete:
        raise EOFError


DECOMPRESS: dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {
    ".gz": lambda blocks: _decompressed(blocks, lambda: zlib.decompressobj(wbits=31), padding=b"\0"),
    ".zst": lambda blocks: _decompressed(blocks, lambda: zstandard.ZstdDecompressor().decompressobj()),
}
