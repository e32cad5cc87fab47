"""The command `store export`: a token store as a TFDS dataset in ArrayRecord files, without TensorFlow.

This file owns the dataset's layout. Its invariants: examples come in the store's order, a file of the dataset per shard
that has any; a file is there only when it is whole, and dataset_info.json comes last, so that what TFDS opens is whole.

    OUTPUT/NAME/1.0.0/
        export.json                                      what it was exported from; written first
        NAME-SPLIT.array_record-NNNNN-of-NNNNN           tf.train.Example records, one to a group: random access
        features.json, dataset_info.json
"""

import argparse
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from crystal_jax import files
from crystal_jax.data.documents import count_documents, read_documents
from crystal_jax.data.store import SPLITS, ShardSpan, TokenStore, TokenView
from crystal_jax.errors import UserError, install

VERSION = "1.0.0"
ORIGIN, FEATURES, INFO = "export.json", "features.json", "dataset_info.json"
MODULE = "crystal_jax.data.tfds_export"

Values = dict[str, str | int | np.ndarray]


@dataclass(frozen=True)
class Part:
    """One file of the dataset: the documents of one shard, or the windows that begin in it."""

    split: str
    view: TokenView
    span: ShardSpan
    first: int
    """Number of its first window in the split; 0 for documents."""
    count: int
    """Of its examples."""


@dataclass(frozen=True)
class Exported:
    name: str
    folder: epath.Path
    examples: dict[str, int]
    """By split."""


def export_tfds(path: str | os.PathLike[str], output: str | os.PathLike[str],
                sequence_length: int | None = None) -> Exported:
    """Writes the store as the TFDS dataset output/NAME/1.0.0, local or on gs://; goes on where a killed run stopped.

    Examples are documents (id, source, tokens) or, with a sequence length T, the windows of T + 1 tokens that overlap
    by one (start, tokens), as `concat` packing reads them. A split without examples is left out.

    Raises:
      UserError: no store, a store too short for one window, something else in the folder, TFDS isn't installed.
    """
    if sequence_length is not None and sequence_length < 1:
        raise UserError(f"--sequence_length: {sequence_length} must be 1 or more")
    tfds = _import_tfds()
    store = TokenStore.open(path)
    name = dataset_name(store.name, sequence_length)
    folder = files.as_path(output) / name / VERSION
    parts = _parts(store, sequence_length)
    result = Exported(name, folder, {split: sum(part.count for part in found) for split, found in parts.items()})
    origin = {"store": store.name, "store_digest": store.fingerprint, "tokenizer": store.tokenizer_fingerprint,
              "sequence_length": sequence_length}
    if _begin(folder, origin):
        return result
    names = {split: [f"{name}-{split}.array_record-{index:05d}-of-{len(found):05d}" for index in range(len(found))]
             for split, found in parts.items()}
    with tqdm(total=sum(part.span.tokens for found in parts.values() for part in found), unit="tok", unit_scale=True,
              desc=name, mininterval=1) as bar:
        for split, found in parts.items():
            for part, file in zip(found, names[split], strict=True):
                if not (folder / file).exists():
                    _write_part(store, part, sequence_length, folder / file)
                bar.update(part.span.tokens)
    sizes = {split: sum(files.file_size(folder / file) for file in found) for split, found in names.items()}
    _write_info(tfds, store, result, parts, sizes, sequence_length)
    return result


def dataset_name(store: str, sequence_length: int | None = None) -> str:
    """slimpajama/C4 becomes slimpajama_c4, or slimpajama_c4_windows_2048: TFDS takes lower case, digits and _."""
    name = re.sub(r"[^a-z0-9]+", "_", store.lower()).strip("_")
    name = name if name[:1].isalpha() else f"store_{name}".rstrip("_")
    return name if sequence_length is None else f"{name}_windows_{sequence_length}"


def _begin(folder: epath.Path, origin: dict[str, Any]) -> bool:
    """Whether the same dataset is there already, whole; otherwise makes the folder, or checks that it is this one."""
    if (folder / ORIGIN).exists():
        before = files.read_json(folder / ORIGIN)
        for field, value in origin.items():
            if before.get(field) != value:
                raise UserError(f"{folder}: exported with {field} {before.get(field)}, now it is {value}; remove the "
                                "folder or choose another OUTPUT")
        for leftover in () if files.is_remote(folder) else folder.glob(f"{files.PARTIAL}*"):  # of a run that was killed
            leftover.rmtree()
        return (folder / INFO).exists()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds something that no export began; remove it or choose another OUTPUT")
    files.write_json(folder / ORIGIN, origin)
    return False


def _parts(store: TokenStore, sequence_length: int | None) -> dict[str, list[Part]]:
    """The files of each split that has any, in order."""
    result = {}
    for split in SPLITS:
        if not store.splits[split]["tokens"]:
            continue
        view = store.view(split)
        found = [Part(split, view, span, 0, count_documents(store, split, span)) if sequence_length is None
                 else _window_part(split, view, span, sequence_length) for span in view.shards]
        if kept := [part for part in found if part.count]:
            result[split] = kept
    if not result:
        raise UserError(f"{store.path}: no example to export; it is shorter than --sequence_length={sequence_length}")
    return result


def _window_part(split: str, view: TokenView, span: ShardSpan, length: int) -> Part:
    windows = max(view.num_tokens - 1, 0) // length
    first, end = (min(-(-token // length), windows) for token in (span.start, span.start + span.tokens))
    return Part(split, view, span, first, end - first)


def _write_part(store: TokenStore, part: Part, sequence_length: int | None, target: epath.Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    # The writer knows local files only.
    beside = None if files.is_remote(target) else target.parent
    with tempfile.TemporaryDirectory(prefix=files.PARTIAL, dir=beside) as temporary:
        local = pathlib.Path(temporary) / target.name
        writer = ArrayRecordWriter(str(local), "group_size:1")
        count = 0
        for values in _windows(part, sequence_length) if sequence_length else _documents(store, part):
            writer.write(_serialise(values))
            count += 1
        writer.close()
        assert count == part.count, (count, part.count, target)
        files.publish(local, target)


def _documents(store: TokenStore, part: Part) -> Iterator[Values]:
    for document in read_documents(store, part.view, part.split, part.span):
        yield {"id": document.id, "source": document.source, "tokens": document.ids}


def _windows(part: Part, length: int, block: int = 1024) -> Iterator[Values]:
    for first in range(part.first, part.first + part.count, block):
        starts = np.arange(first, min(first + block, part.first + part.count)) * length
        for start, tokens in zip(starts, part.view.rows(starts, length + 1), strict=True):
            yield {"start": int(start), "tokens": tokens}


def _serialise(values: Values) -> bytes:
    """A tf.train.Example. TFDS's own serialiser takes numpy's integers one by one: half as fast."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def feature(value: str | int | np.ndarray) -> Any:
        if isinstance(value, str):
            # A file's name may hold bytes that no UTF-8 has.
            data = value.encode(errors="backslashreplace")
            return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[data]))
        whole = value.tolist() if isinstance(value, np.ndarray) else [value]
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=whole))

    features = tf_feature_pb2.Features(feature={key: feature(value) for key, value in values.items()})
    return tf_example_pb2.Example(features=features).SerializeToString(deterministic=True)


def _write_info(tfds: Any, store: TokenStore, result: Exported, parts: dict[str, list[Part]], sizes: dict[str, int],
                sequence_length: int | None) -> None:
    from tensorflow_datasets.core.dataset_info import DatasetIdentity, DatasetInfo
    from tensorflow_datasets.core.splits import SplitDict, SplitInfo

    features = {"id": tfds.features.Text(), "source": tfds.features.Text(),
                "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32)}
    if sequence_length is not None:
        features = {"start": np.int64, "tokens": tfds.features.Tensor(shape=(sequence_length + 1,), dtype=np.int32)}
    kind = "Documents" if sequence_length is None else f"Windows of {sequence_length} + 1 tokens"
    info = DatasetInfo(
        builder=DatasetIdentity(result.name, tfds.core.Version(VERSION), str(result.folder), MODULE),
        description=f"{kind} of the token store {store.name} ({store.fingerprint}), in its order; ids of the tokenizer "
                    f"{store.tokenizer_fingerprint}.",
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    info.set_splits(SplitDict([
        SplitInfo(name=split, shard_lengths=[part.count for part in found], num_bytes=sizes[split])
        for split, found in parts.items()
    ]))
    with tempfile.TemporaryDirectory() as temporary:
        info.write_to_directory(temporary)
        for file in (FEATURES, INFO):
            files.write_bytes(result.folder / file, (pathlib.Path(temporary) / file).read_bytes())


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{error.name}: not installed, and `store export` needs it; {install('data')}") from error
    return tfds


TARGETS: dict[str, Callable[..., Exported]] = {"tfds": export_tfds}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    about = "write a token store in a form that other trainers read"
    export = actions.add_parser("export", help=about, description=about, allow_abbrev=False)
    export.add_argument("--to", required=True, choices=TARGETS, help="tfds: a TFDS dataset in ArrayRecord files")
    export.add_argument("--sequence_length", type=int, metavar="T",
                        help="export windows of T + 1 tokens instead of documents")
    export.add_argument("store", help="the folder that holds the store's manifest.json")
    export.add_argument("output", help="the dataset is written to OUTPUT/NAME/1.0.0")


def main(args: argparse.Namespace) -> int:
    result = TARGETS[args.to](args.store, args.output, args.sequence_length)
    counts = ", ".join(f"{count:,} {split}" for split, count in result.examples.items())
    print(f"{result.folder}: {counts}; tfds.data_source({result.name!r}, data_dir={args.output!r})")
    return 0
