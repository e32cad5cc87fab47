"""Any TFDS dataset: an example is a document.

This file owns its split into inputs: one per file of the split `train`. Its invariants: examples come in the files'
order; a file that holds fewer examples than the dataset's own metadata say is an error (a truncated ArrayRecord reads
as none, in silence). TensorFlow is only imported for datasets that aren't ArrayRecord.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from crystal_jax import files
from crystal_jax.config import nearest
from crystal_jax.data.readers import records
from crystal_jax.data.readers.base import Documents, Input, Reader, SourceSpec
from crystal_jax.data.readers.listing import one_line
from crystal_jax.errors import UserError, install

SPLIT = "train"


def list_inputs(source: SourceSpec) -> list[Input]:
    """An input per file of the split."""
    builder = _builder(source)
    split = _split(builder, source)
    inputs = []
    for index, (path, count) in enumerate(zip(split.filepaths, split.shard_lengths, strict=True)):
        name = f"{source.dataset}/{os.path.basename(path)}"
        size = split.num_bytes * count // max(split.num_examples, 1)
        inputs.append(Input(name, ((os.fspath(path), name),), size, index, _changed(path)))
    return inputs


def _changed(path: epath.PathLike) -> int:
    try:
        return files.modified(files.as_path(path))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({one_line(error)}); fetch it again") from error


def read(source: SourceSpec, item: Input) -> Documents:
    """Documents called by their file and number, from 0, or by the feature id_key."""
    ((path, name),) = item.files
    builder = _builder(source)
    lengths = _split(builder, source).shard_lengths
    start, end = list(itertools.accumulate([0, *lengths]))[item.ordinal : item.ordinal + 2]
    found = 0
    for example in _examples(builder, f"{SPLIT}[{start}:{end}]", path, end - start):
        place = f"{path}: example {found}"
        yield records.document(source, example, place, name, f"{name}:{found}")
        found += 1
    _check_count(path, found, end - start)


def _check_count(path: str, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{path}: holds {found} examples, not the {expected} that the dataset says; fetch it again")


def _examples(builder: Any, split: str, path: str, count: int) -> Iterator[dict[str, Any]]:
    from tensorflow_datasets.core.file_adapters import FileFormat

    with _errors(path):
        if builder.info.file_format == FileFormat.ARRAY_RECORD:
            _check_count(path, _count_records(path), count)
            data = builder.as_data_source(split=split)
            examples = (data[index] for index in range(len(data)))
        else:
            import tensorflow_datasets

            in_order = tensorflow_datasets.ReadConfig(interleave_cycle_length=1)
            examples = iter(tensorflow_datasets.as_numpy(builder.as_dataset(split=split, read_config=in_order)))
    while True:
        with _errors(path):
            example = next(examples, None)
        if example is None:
            return
        yield example


def _count_records(path: str) -> int:
    """Asked of the file: TFDS goes by its metadata, and reads what a truncated one lacks as examples of nulls."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path)
    try:
        return reader.num_records()
    finally:
        reader.close()


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of TFDS, of ArrayRecord, of TensorFlow
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {one_line(error)}); fetch it again"
                        ) from error  # fmt: skip


def _split(builder: Any, source: SourceSpec) -> Any:
    splits = builder.info.splits
    if SPLIT not in splits:
        if not splits:
            raise UserError(f"--source: {source.kind}: isn't prepared in {builder.data_dir}; prepare it with TFDS "
                            "(download_and_prepare, file_format='array_record'), or give its data_dir with --input")
        raise UserError(f"--source: {source.kind}: no split {SPLIT!r}; it has {', '.join(splits)}")
    return splits[SPLIT]


@functools.lru_cache(maxsize=1)
def _builder(source: SourceSpec) -> Any:
    if len(source.inputs) > 1:
        raise UserError(f"--input: {','.join(source.inputs)}: --source={source.kind} takes one, its data_dir")
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"--source: {source.kind}: needs tensorflow_datasets; {install('data')}") from error
    data_dir = epath.Path(source.inputs[0] if source.inputs else tensorflow_datasets.core.constants.DATA_DIR)
    try:
        return tensorflow_datasets.builder(source.dataset, data_dir=data_dir)
    except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
        raise UserError(f"--source: {source.kind}: isn't in {data_dir}{_prepared(source.dataset, data_dir)}") from error
    except Exception as error:  # an unknown config or version: ValueError, AssertionError and others
        raise UserError(f"--source: {source.kind}: {one_line(error)}") from error


def _prepared(dataset: str, data_dir: epath.Path) -> str:
    """What the folder has instead: the nearest dataset, or the configs and versions of this one."""
    name = dataset.partition("/")[0].partition(":")[0]
    for folder, wanted in ((data_dir / name, dataset), (data_dir, name)):
        if folder.is_dir():
            return nearest(wanted, (path.name for path in folder.iterdir()))
    return ", which is no folder; give the data_dir with --input"


READER = Reader(list_inputs, read, "the split train of a TFDS dataset, prepared in the data_dir that --input names",
                frozenset({"text_key", "id_key", "split_by", "split_names"}), records.parts)
