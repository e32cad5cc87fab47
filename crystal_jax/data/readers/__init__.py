"""Readers of raw documents: one table from a source's kind to what lists its inputs and what reads one.

This package owns what a document of each kind is and how it is named; each format is a file of its own. Its
invariants: the inputs of a source come in the same order on every machine, and a damaged input is never read as a
shorter one.
"""

import dataclasses
import os
from collections.abc import Iterable

from crystal_jax.config import nearest
from crystal_jax.data.readers import (
    crystal_h5,
    jsonl,
    parquet,
    pystd,
    seqio_tasks,
    slimpajama,
    starcoder,
    text,
    tfds_datasets,
)
from crystal_jax.data.readers.base import Document, Documents, Dropped, Input, Reader, SourceSpec, Tokens
from crystal_jax.errors import UserError

__all__ = ["READERS", "Document", "Documents", "Dropped", "Input", "Reader", "SourceSpec", "Tokens", "guess_source",
           "heldout", "list_inputs", "options", "parts", "read_input", "split_commas", "split_inputs"]

READERS: dict[str, Reader] = {
    "pystd-code": pystd.CODE,
    "pystd-text": pystd.TEXT,
    "text": text.READER,
    "jsonl": jsonl.READER,
    "slimpajama": slimpajama.READER,
    "parquet": parquet.READER,
    "starcoder": starcoder.READER,
    "crystal-h5": crystal_h5.READER,
    "tfds:NAME": tfds_datasets.READER,
    "seqio:TASK": seqio_tasks.READER,
}
"""Kind to its reader; a new kind is a file and a line here."""


def list_inputs(source: SourceSpec) -> list[Input]:
    """The inputs of a source, in order.

    Raises:
      UserError: an unknown kind, an option that the kind doesn't have, a missing file, the same file twice, nothing
        to read.
    """
    return _reader(source).list_inputs(source)


def read_input(source: SourceSpec, item: Input) -> Documents:
    """The documents of one input, in order; those that can't be read but are no damage come as Dropped.

    Raises:
      UserError: a damaged file, by name and, where it has them, line, row or row group.
    """
    return _reader(source).read(source, item)


def parts(source: SourceSpec) -> tuple[str, ...]:
    """Names of the stores that the source becomes, in order; ("",) when it is one."""
    return _reader(source).parts(source)


def heldout(source: SourceSpec) -> float:
    """The share of the documents that is kept out of training unless the user says; none of published rows."""
    return _reader(source).heldout


def options(kind: str) -> frozenset[str]:
    """Fields of SourceSpec, other than kind and inputs, that a source of this kind takes."""
    return _reader(SourceSpec(kind)).options


def _reader(source: SourceSpec) -> Reader:
    kinds = {name.partition(":")[0] + ":" * (":" in name): reader for name, reader in READERS.items()}
    kind, colon, _ = source.kind.partition(":")
    reader = kinds.get(kind + colon)
    if reader is None:
        raise UserError(f"--source: {source.kind!r} must be one of {', '.join(READERS)}{nearest(kind + colon, kinds)}")
    if colon and not source.dataset:
        raise UserError(f"--source: {source.kind!r} names no dataset; write it behind the colon")
    for field in dataclasses.fields(SourceSpec):
        value = getattr(source, field.name)
        if field.name not in ("kind", "inputs", *reader.options) and value != field.default:
            raise UserError(f"--{field.name}: {value!r}: --source={source.kind} has no such option; leave it out")
    if source.files_per_input < 1:
        raise UserError(f"--files_per_input: {source.files_per_input} must be 1 or more")
    return reader


def split_commas(values: Iterable[str]) -> list[str]:
    """The values of an argument that may be repeated and have commas."""
    return [part for value in values for part in value.split(",") if part]


def split_inputs(values: Iterable[str]) -> list[str]:
    """The same for --input; a path that exists is taken literally, commas and all."""
    return [part for value in values for part in ([value] if os.path.exists(value) else split_commas([value]))]


def guess_source(item: str, text_key: str) -> SourceSpec:
    """The source that one --input of `tokenizer train` names: a kind without inputs, JSON lines or text."""
    if item.startswith("pystd") and not os.path.exists(item):
        return SourceSpec(item)
    lines = item.removesuffix(".gz").removesuffix(".zst").endswith(jsonl.ENDING)
    return SourceSpec("jsonl", (item,), text_key=text_key) if lines else SourceSpec("text", (item,))
