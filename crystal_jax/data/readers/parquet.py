"""Parquet files: a row is a document.

This file owns reading rows. Its invariants: memory holds a few rows and pages, not a row group; checksums of pages
are compared where the file has them, and damage is an error that names the row group.
"""

import re
from collections.abc import Iterator
from typing import Any

from crystal_jax.data.readers import records
from crystal_jax.data.readers.base import Documents, Input, Reader, SourceSpec
from crystal_jax.data.readers.jsonl import OPTIONS
from crystal_jax.data.readers.listing import group, list_files, one_line, open_input
from crystal_jax.errors import UserError

FILES = re.compile(r"\.parquet$")
CALLED = ".parquet"
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20


def list_inputs(source: SourceSpec) -> list[Input]:
    """An input per file, or per files_per_input of them."""
    files = list_files(source, FILES, CALLED)
    return group(files, range(len(files)), source.files_per_input)


def read(source: SourceSpec, item: Input) -> Documents:
    """Documents called by file:row, from 0, or by their id_key."""
    keys = {"--text_key": source.text_key, "--id_key": source.id_key, "--split_by": source.split_by}
    for path, name in item.files:
        for row, record in enumerate(rows(path, keys)):
            yield records.document(source, record, f"{path}: row {row}", name, f"{name}:{row}")


def rows(path: str, keys: dict[str, str | None], optional: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a file as {column: value}, strings as bytes; only the columns that the keys name (by their flags)
    and the optional ones that it has.

    Raises:
      UserError: the file or one of its row groups is damaged, a column is missing.
    """
    import pyarrow
    import pyarrow.parquet

    failures = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    with open_input(path) as handle:
        try:
            file = pyarrow.parquet.ParquetFile(handle, page_checksum_verification=True, pre_buffer=False,
                                               buffer_size=BUFFER_BYTES)
        except failures as error:
            raise UserError(f"{path}: no whole parquet file ({one_line(error)}); fetch the file again") from error
        names = file.schema_arrow.names
        columns = [*_columns(path, names, keys), *(name for name in optional if name in names)]
        for index in range(file.num_row_groups):
            found = 0
            try:
                for batch in file.iter_batches(BATCH_ROWS, [index], columns, use_threads=False):
                    table = {name: _values(batch.column(name)) for name in columns}
                    found += batch.num_rows
                    for row in range(batch.num_rows):
                        yield {name: values[row] for name, values in table.items()}
            except failures as error:
                raise UserError(f"{path}: row group {index}: damaged ({one_line(error)}); fetch the file again"
                                ) from error  # fmt: skip
            if found != file.metadata.row_group(index).num_rows:
                raise UserError(f"{path}: row group {index}: {found} rows, not the "
                                f"{file.metadata.row_group(index).num_rows} that it says; fetch the file again")


def _columns(path: str, names: list[str], keys: dict[str, str | None]) -> list[str]:
    """The columns behind the keys: a key's own name, or the record that a dotted key goes into."""
    columns = []
    for flag, key in keys.items():
        if key is not None:
            column = key if key in names else key.partition(".")[0]
            if column not in names:
                raise UserError(f"{path}: no column {key!r}; it has {', '.join(names) or 'none'}; choose with {flag}")
            columns.append(column)
    return list(dict.fromkeys(columns))


def _values(column: Any) -> list[Any]:
    """Python values; strings stay bytes, so that one that isn't UTF-8 is dropped alone."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


READER = Reader(list_inputs, read, "a row is a document", OPTIONS, records.parts)
