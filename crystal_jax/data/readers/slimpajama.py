"""SlimPajama-627B as published: chunkN/example_train_M.jsonl.zst, seven sources told apart by a key.

This file owns the names of its files and sources. Its invariant: a file's ordinal is the number in its name, since the
published halves are the even and the odd numbers; holdout files never come in.
"""

import dataclasses
import re

from crystal_jax.data.readers import jsonl
from crystal_jax.data.readers.base import Documents, Input, Reader, SourceSpec
from crystal_jax.data.readers.listing import group, list_files
from crystal_jax.errors import UserError

FILES = re.compile(r"/chunk\d+/example_(?:train_)?(\d+)\.jsonl\.zst$")
CALLED = "chunkN/example_train_M.jsonl.zst"
SPLIT_BY = "meta.redpajama_set_name"
PARTS = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
SPLIT_NAMES = tuple((f"RedPajama{part}", part) for part in PARTS)


def list_inputs(source: SourceSpec) -> list[Input]:
    """An input per training file; its ordinal is the number in the file's name."""
    files = list_files(source, FILES, CALLED)
    ordinals = []
    for file in files:
        match = FILES.search(file.path)
        if match is None:
            raise UserError(f"--input: {file.path}: SlimPajama's training files are called {CALLED}; use "
                            "--source=jsonl for others")
        ordinals.append(int(match[1]))
    return group(files, ordinals, source.files_per_input)


def read(source: SourceSpec, item: Input) -> Documents:
    """Documents called by file:line, each of one of the seven parts."""
    return jsonl.read(dataclasses.replace(source, split_by=SPLIT_BY, split_names=SPLIT_NAMES), item)


READER = Reader(list_inputs, read, "its chunkN/example_train_M.jsonl.zst, which become seven stores",
                frozenset({"files_per_input"}), lambda source: PARTS)
