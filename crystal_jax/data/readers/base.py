"""What a source, an input and a document are: the words that every reader and `prepare` share.

This file owns these words. Its invariant: they are plain values that pickle, so that any process on any machine can
read an input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

DEFAULT_TEXT_KEY = "text"


@dataclass(frozen=True)
class SourceSpec:
    """What a user names as a source."""

    kind: str
    inputs: tuple[str, ...] = ()
    """Files, folders or globs, local or gs://; none for a kind that knows its own."""
    text_key: str = DEFAULT_TEXT_KEY
    """The column of the text; left at its default, a kind with another name for it takes that."""
    id_key: str | None = None
    """Without one a document is named by its file and its line or row."""
    split_by: str | None = None
    """A dotted key whose value says which part a document belongs to."""
    split_names: tuple[tuple[str, str], ...] = ()
    """(value of split_by, name of the part); any other value is an error."""
    languages: tuple[str, ...] = ()
    """Of starcoder: the folders to read; all without one."""
    files_per_input: int = 1

    @property
    def dataset(self) -> str:
        """What follows the colon in `tfds:NAME` and `seqio:TASK`."""
        return self.kind.partition(":")[2]


@dataclass(frozen=True)
class Input:
    """One task of `prepare`, which becomes one shard of each part and split."""

    name: str
    files: tuple[tuple[str, str], ...]
    """(path, name that doesn't depend on where the data lie)."""
    bytes: int
    ordinal: int = 0
    """What the even and the odd half of a source go by."""
    changed: int | None = field(default=None, compare=False)
    """When the last of its files changed, in nanoseconds since 1970; None where `files` are no files."""


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    source: str
    """The file it comes from."""
    group: str
    """Documents of one group are held out together."""
    part: str = ""
    """The store inside the source, one of `parts`."""
    tags: tuple[tuple[int, int, str], ...] = ()
    """(start, end, name): text[start:end] stands for the control token <|name|>; in order, apart from each other."""


@dataclass(frozen=True)
class Tokens:
    """A document that is tokenised already: its ids are written as they are, control ids included."""

    id: str
    ids: np.ndarray
    """int32 [n]."""
    source: str
    group: str
    part: str = ""


@dataclass(frozen=True)
class Dropped:
    id: str
    reason: str


Documents = Iterator[Document | Tokens | Dropped]


@dataclass(frozen=True)
class Reader:
    """How one kind is listed and read; `parts` names the stores that a source becomes."""

    list_inputs: Callable[[SourceSpec], list[Input]]
    read: Callable[[SourceSpec, Input], Documents]
    help: str
    options: frozenset[str] = frozenset()
    """Fields of SourceSpec, other than kind, that the kind takes."""
    parts: Callable[[SourceSpec], tuple[str, ...]] = lambda source: ("",)
    heldout: float = 0.02
    """Share of the documents that is kept out of training unless the user says."""
