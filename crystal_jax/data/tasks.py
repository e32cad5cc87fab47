"""One input of a source to its shards: the unit of work of `prepare`, whichever process on whichever machine does it.

This file owns what is read, kept and dropped. Its invariants: the shards of an input are a pure function of the input,
the tokenizer and the held-out share; every document read is kept, or dropped for a reason that is counted; the record
of an input is written after all its shards are in place, so what has a record is done.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from etils import epath

from crystal_jax import files
from crystal_jax.config import digest
from crystal_jax.data import readers, store
from crystal_jax.data.encoding import DocumentEncoder
from crystal_jax.data.readers import Document, Dropped, Input, SourceSpec, Tokens
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError

BATCH_BYTES = 1 << 20
"""Text that is tokenised in one call."""
UPLOADS = 8
"""Files of one input that are published at once: on gs:// each waits for an answer."""
PROGRESS = "progress"
"""Folder of an unfinished store: arguments.json and a record per finished input."""
DROPPED, CONTROL = "dropped:", "control:"
"""Before a reason, and before the id of a control token, in the counts of an input."""
SURROGATE = re.compile("[\ud800-\udfff]")

Counts = dict[str, Counter[str]]
"""By part; "" for what is dropped before its part is known."""
Report = Callable[[int, int], Any]
"""Is told the bytes and the tokens of each batch."""


@dataclass(frozen=True)
class Task:
    """One input on its way to shard number `index` of each part and split; it pickles."""

    source: SourceSpec
    item: Input
    index: int
    tokenizer: str
    fingerprint: str
    engine: str
    heldout: float
    folder: str
    """OUTPUT/NAME, local or gs://."""
    arguments: str
    """Digest of what decides the store's contents."""

    @property
    def name(self) -> str:
        return f"{self.index:05d}"

    @property
    def stamp(self) -> dict[str, Any]:
        """What a record begins with if it is about this task: a changed input, of the same name, is read again."""
        return {"input": identity(self.item), "arguments": self.arguments}


def identity(item: Input) -> dict[str, Any]:
    return {"name": item.name, "files": len(item.files), "bytes": item.bytes}


def input_sha256(item: Input) -> dict[str, str]:
    """Of each of its files, by the name that doesn't depend on where they lie; of none if they are no files.

    Raises:
      UserError: one can't be read any more.
    """
    try:
        return {name: files.sha256(path) for path, name in item.files} if item.changed is not None else {}
    except OSError as error:
        raise UserError(f"{item.name}: can't be read ({error.strerror or error}); give the same command again"
                        ) from error  # fmt: skip


def scratch(folder: str) -> pathlib.Path:
    """The local folder for what isn't finished: inside a local store, so that publishing is a rename.

    It is the same for every run on a machine, so that a run clears away what one that was killed had left.
    """
    if not files.is_remote(folder):
        return pathlib.Path(folder) / PROGRESS
    return pathlib.Path(tempfile.gettempdir()) / f"crystal-jax-prepare-{digest(folder)}"


def prepare_input(task: Task, report: Report = lambda size, tokens: None) -> int:
    """Writes the shards of one input, then its record; returns the bytes of the documents that were kept.

    Raises:
      UserError: the input is damaged; the tokenizer was changed meanwhile, or lacks a token that the input needs.
    """
    encoder = _make_encoder(task.tokenizer, task.fingerprint, task.engine)
    counts: Counts = defaultdict(Counter)
    with _workspace(task) as local:
        shards, size = _write_shards(task, local, encoder, counts, report)
        _publish(task, local)
    found = {part: dict(sorted(found.items())) for part, found in sorted(counts.items())}
    about = {**task.stamp, "changed": task.item.changed, "sha256": input_sha256(task.item), "engine": encoder.engine}
    files.write_json(record(task.folder, task.name), {**about, "counts": found, "shards": shards})
    return size


def record(folder: str, name: str) -> epath.Path:
    """The file of an unfinished store that says what `name`, an input's number, has led to."""
    return files.as_path(folder) / PROGRESS / f"{name}.json"


@functools.lru_cache(maxsize=1)
def _make_encoder(path: str, fingerprint: str, engine: str) -> DocumentEncoder:
    """One per process."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"{path}: was changed while `prepare` ran; run it again")
    return DocumentEncoder(tokenizer, engine)


@contextlib.contextmanager
def _workspace(task: Task) -> Iterator[pathlib.Path]:
    folder = scratch(task.folder) / f"{task.name}{files.PARTIAL}shards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_shards(task: Task, local: pathlib.Path, encoder: DocumentEncoder, counts: Counts,
                  report: Report) -> tuple[dict[str, Any], int]:
    """(entries of the manifest, by folder, of the shards that are now in `local`; bytes of their documents)."""
    whole = 0
    dtype = store.tokens_dtype(encoder.tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        shards = {}
        for part in readers.parts(task.source):
            for split in store.SPLITS:
                folder = local / place(part, split)
                folder.mkdir(parents=True)
                shards[place(part, split)] = stack.enter_context(store.ShardWriter(folder, task.name, dtype))
        for number, batch in enumerate(_batches(task, counts)):
            if number == 0:
                encoder.prove(batch)
            encoded = encoder.encode(batch)
            for document, ids in zip(batch, encoded, strict=True):
                split = "heldout" if held_out(document.group, task.heldout) else "train"
                shards[place(document.part, split)].add(ids, {"id": document.id, "source": document.source})
                for token, times in encoder.controls(document).items():
                    counts[document.part][f"{CONTROL}{token}"] += times
            size = sum(map(_size, batch))
            whole += size
            report(size, sum(map(len, encoded)))
        head = {"input": task.item.name, "ordinal": task.item.ordinal}
        return {folder: {**head, **shard.close()} for folder, shard in shards.items()}, whole


def place(part: str, split: str) -> str:
    """The folder of shards below OUTPUT/NAME."""
    return f"{part}/{split}" if part else split


def _publish(task: Task, local: pathlib.Path) -> None:
    target = files.as_path(task.folder)
    found = [path for path in local.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(lambda path: files.publish(path, target / path.relative_to(local).as_posix()), found))


def _batches(task: Task, counts: Counts) -> Iterator[list[Document | Tokens]]:
    """Documents that are kept, about BATCH_BYTES at a time; `counts` takes them and, per reason, the others."""
    batch: list[Document | Tokens] = []
    size = 0
    seen: set[str] = set()
    for document in readers.read_input(task.source, task.item):
        found = counts["" if isinstance(document, Dropped) else document.part]
        found["read"] += 1
        if isinstance(document, Dropped) or not _length(document):
            found[DROPPED + (document.reason if isinstance(document, Dropped) else "empty")] += 1
            continue
        if isinstance(document, Document):
            text, replaced = SURROGATE.subn("\ufffd", document.text)
            document = dataclasses.replace(document, text=text) if replaced else document
            found["replaced_surrogates"] += replaced
            found["text_bytes"] += _size(document)
        found["kept"] += 1
        found["duplicate_ids_within_inputs"] += document.id in seen
        seen.add(document.id)
        batch.append(document)
        size += _length(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _length(document: Document | Tokens) -> int:
    """Characters, or ids."""
    return len(document.text if isinstance(document, Document) else document.ids)


def _size(document: Document | Tokens) -> int:
    """Bytes of a document's text, or of the ids that it came as."""
    return len(document.text.encode()) if isinstance(document, Document) else document.ids.nbytes


def held_out(group: str, share: float) -> bool:
    """Whether the documents of a group are held out: a fixed hash of its name, the same on every machine."""
    value = hashlib.sha256(b"heldout:" + group.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(value[:8], "big") < share * 2**64
