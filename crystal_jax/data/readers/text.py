"""Folders of text: a file is a document.

This file owns reading a whole file. Its invariant: bytes that aren't UTF-8 are dropped and counted, never guessed at.
"""

import re

from crystal_jax.data.readers.base import Document, Documents, Dropped, Input, Reader, SourceSpec
from crystal_jax.data.readers.listing import deal, list_files, open_input
from crystal_jax.errors import UserError

ANY = re.compile("")


def list_inputs(source: SourceSpec) -> list[Input]:
    """All files, dealt into a few inputs."""
    return deal(source.kind, list_files(source, ANY, "of any name"))


def read(_: SourceSpec, item: Input) -> Documents:
    """A document per file, called by its name."""
    for path, name in item.files:
        yield whole_file(path, name)


def whole_file(path: str, name: str) -> Document | Dropped:
    """A file as one document, or dropped when it isn't UTF-8."""
    try:
        with open_input(path) as file:
            data = file.read()
        return Document(name, data.decode("utf-8"), name, group=name)
    except UnicodeDecodeError:
        return Dropped(name, "not_utf8")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error


READER = Reader(list_inputs, read, "a file is a document")
