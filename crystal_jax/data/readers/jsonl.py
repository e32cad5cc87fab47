"""JSON lines, plain or compressed: an object with a text per line.

This file owns what a line is. Its invariant: a line that isn't JSON is an error that names file and line, one whose
bytes aren't UTF-8 is dropped; only blank lines are passed over.
"""

import json
import re
from typing import Any

from crystal_jax.data.readers import records
from crystal_jax.data.readers.base import Documents, Dropped, Input, Reader, SourceSpec
from crystal_jax.data.readers.compressed import lines
from crystal_jax.data.readers.listing import group, list_files
from crystal_jax.errors import UserError

ENDING = ".jsonl"
FILES = re.compile(r"\.jsonl(\.gz|\.zst)?$")
CALLED = ".jsonl, .jsonl.gz or .jsonl.zst"
OPTIONS = frozenset({"text_key", "id_key", "split_by", "split_names", "files_per_input"})


def list_inputs(source: SourceSpec) -> list[Input]:
    """An input per file, or per files_per_input of them."""
    files = list_files(source, FILES, CALLED)
    return group(files, range(len(files)), source.files_per_input)


def read(source: SourceSpec, item: Input) -> Documents:
    """Documents called by file:line, from 1, or by their id_key."""
    for path, name in item.files:
        for number, line in enumerate(lines(path), start=1):
            if line.strip():
                place, identity = f"{path}:{number}", f"{name}:{number}"
                try:
                    record = _record(place, line)
                except UnicodeDecodeError:
                    yield Dropped(identity, "not_utf8")
                else:
                    yield records.document(source, record, place, name, identity)


def _record(place: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a line of JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON {type(record).__name__}, not an object with a text; mend the line")
    return record


READER = Reader(list_inputs, read, "an object with a text per line; also .gz, .zst", OPTIONS, records.parts)
