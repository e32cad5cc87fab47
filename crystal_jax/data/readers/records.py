"""From a record (a line of JSON, a row of parquet, an example) to a document.

This file owns what a record's keys mean. Its invariants: a record becomes a document, is dropped with a reason, or is
an error that names its place; a value that a key doesn't have is never made up.
"""

from collections.abc import Mapping
from typing import Any

from crystal_jax.config import nearest
from crystal_jax.data.readers.base import Document, Dropped, SourceSpec
from crystal_jax.errors import UserError


def document(source: SourceSpec, record: Mapping[str, Any], place: str, file: str, identity: str) -> Document | Dropped:
    """The document of a record of `file`; without an id_key it is called `identity`. `place` is for errors.

    Raises:
      UserError: a key is missing, the text isn't one, the part isn't in split_names.
    """
    if source.id_key is not None:
        identity = str(plain(value(record, source.id_key, "--id_key", place)))
    try:
        text = text_of(record, source.text_key, place)
    except UnicodeDecodeError:
        return Dropped(identity, "not_utf8")
    if text is None:
        return Dropped(identity, "no_text")
    part = "" if source.split_by is None else _part(source, record, place)
    return Document(identity, text, file, identity, part)


def text_of(record: Mapping[str, Any], key: str, place: str) -> str | None:
    """The text of a record; None for a null.

    Raises:
      UnicodeDecodeError: its bytes aren't UTF-8.
      UserError: the key is missing or holds something else.
    """
    found = value(record, key, "--text_key", place)
    if isinstance(found, bytes):
        return found.decode("utf-8")
    if found is None or isinstance(found, str):
        return found
    raise UserError(f"{place}: {key!r} holds {type(found).__name__}, not a string; choose another --text_key")


def value(record: Mapping[str, Any], key: str, flag: str, place: str) -> Any:
    """The value under a key; dots go into records inside records."""
    if key in record:
        return record[key]
    inner: Any = record
    for name in key.split("."):
        if not isinstance(inner, Mapping) or name not in inner:
            raise UserError(f"{place}: no key {key!r}; it has {', '.join(record) or 'none'}; choose with {flag}")
        inner = inner[name]
    return inner


def plain(found: Any) -> Any:
    """Bytes as text, for names; what isn't UTF-8 in them is escaped."""
    return found.decode("utf-8", errors="backslashreplace") if isinstance(found, bytes) else found


def _part(source: SourceSpec, record: Mapping[str, Any], place: str) -> str:
    assert source.split_by is not None
    names, found = dict(source.split_names), str(plain(value(record, source.split_by, "--split_by", place)))
    if found not in names:
        raise UserError(f"{place}: {source.split_by} is {found!r}, which --split_names lacks{nearest(found, names)}")
    return names[found]


def parts(source: SourceSpec) -> tuple[str, ...]:
    """Names of the parts, in the order of split_names; ("",) for a source that isn't split.

    Raises:
      UserError: one of split_by and split_names without the other.
    """
    if (source.split_by is None) != (not source.split_names):
        raise UserError(f"--split_by: {source.split_by} and --split_names: {dict(source.split_names)} need each other")
    return tuple(dict.fromkeys(name for _, name in source.split_names)) or ("",)
