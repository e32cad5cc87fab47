"""The command `prepare`: raw documents to a token store.

This file owns the way from an input to its shards. Its invariant: the store is a pure function of the source, the
tokenizer and the held-out share. Each input becomes one shard per split, written to temporary names, then renamed,
then recorded; so after a kill at any moment the same command finishes with the same bytes, whatever --workers is.
"""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crystal_jax.config import digest
from crystal_jax.data import readers, store
from crystal_jax.data.readers import Document, Dropped, Input, SourceSpec
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError

BATCH_CHARS = 1 << 20
"""Text that is tokenised in one call."""
PROGRESS = "progress"
"""Folder inside an unfinished store: arguments.json and a record per finished input."""
DROPPED = "dropped:"
"""Before the reason, in the counts of an input."""
SURROGATE = re.compile("[\ud800-\udfff]")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """One input on its way to shard number `index`."""

    source: SourceSpec
    item: Input
    index: int
    tokenizer: Path
    fingerprint: str
    heldout: float
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / PROGRESS / f"{self.index:05d}.json"


def prepare(source: SourceSpec, name: str, tokenizer: str | Path, output: str | Path, workers: int = 1,
            heldout: float = 0.02) -> dict[str, Any]:
    """Writes the token store output/name with `workers` processes and returns its manifest.

    Does nothing when the store is done; goes on where an interrupted run stopped.

    Raises:
      UserError: a wrong argument, a damaged input, a store there that was made from other arguments, a full disk.
    """
    folder = _check_name(name, Path(output))
    if not 0 <= heldout < 1:
        raise UserError(f"--heldout: {heldout} must be a share from 0 up to, not including, 1")
    if workers < 1:
        raise UserError(f"--workers: {workers} must be 1 or more")
    loaded = Tokenizer.load(tokenizer)
    inputs = readers.list_inputs(source)
    arguments = _arguments(source, inputs, loaded, heldout)
    with _locked(folder), _disk_errors(folder):
        if (folder / store.MANIFEST).exists():
            manifest = store.read_manifest(folder)
            _check_same(folder, arguments, manifest)
            store.TokenStore.open(folder)
            print(f"{name}: done already in {folder}", file=sys.stderr)
        else:
            _begin(folder, arguments)
            tasks = [
                Task(source, item, index, Path(tokenizer), loaded.fingerprint, heldout, folder)
                for index, item in enumerate(inputs)
            ]
            _run([task for task in tasks if not _is_done(task)], workers)
            manifest = _finish(folder, name, arguments, tasks)
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return manifest


def _check_name(name: str, output: Path) -> Path:
    if not name or Path(name).is_absolute() or {"", ".", ".."} & set(name.split("/")):
        raise UserError(f"--name: {name!r} must be a path below --output, such as slimpajama/C4")
    return output / name


def _arguments(source: SourceSpec, inputs: list[Input], tokenizer: Tokenizer, heldout: float) -> dict[str, Any]:
    """What decides the store's contents; it opens the manifest."""
    return {
        "format": store.FORMAT,
        "source": source.kind,
        "inputs": [_identity(item) for item in inputs],
        "text_key": source.text_key,
        "id_key": source.id_key,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "file": tokenizer.path.name,
        },
        "heldout": heldout,
        "packing": "concat",
        "dtype": store.tokens_dtype(tokenizer.vocab_size),
    }


def _identity(item: Input) -> dict[str, Any]:
    return {"name": item.name, "files": len(item.files), "bytes": item.bytes}


def _is_done(task: Task) -> bool:
    if not task.record.exists():
        return False
    return json.loads(task.record.read_text(encoding="utf-8"))["input"] == _identity(task.item)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second `prepare` out of the folder; the lock dies with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--output: {folder} can't be made ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"{folder}: another `prepare` is writing it; wait for it or choose another --name") from error
    finally:
        os.close(handle)


def _begin(folder: Path, arguments: dict[str, Any]) -> None:
    """Makes the folders, or checks that an earlier run began them with the same arguments.

    An input that has changed since is only read again: a damaged file may have been fetched once more.
    """
    arguments = {**arguments, "inputs": [item["name"] for item in arguments["inputs"]]}
    file = folder / PROGRESS / "arguments.json"
    strangers = sorted(path.name for path in folder.iterdir() if path.name != PROGRESS)
    if any(path != file for path in file.parent.glob("*.json")):
        _check_same(folder, arguments, json.loads(file.read_text(encoding="utf-8")))
    elif strangers and not file.exists():
        raise UserError(f"{folder}: holds {strangers[0]} but is no token store; choose another --name or remove it")
    else:
        file.parent.mkdir(exist_ok=True)
        _write(file, arguments)
    for split in store.SPLITS:
        (folder / split).mkdir(exist_ok=True)


def _check_same(folder: Path, arguments: dict[str, Any], earlier: dict[str, Any]) -> None:
    for field, value in arguments.items():
        before: Any = earlier.get(field)
        if before == value:
            continue
        if field == "tokenizer" and before["fingerprint"] == value["fingerprint"]:
            continue  # the same tokenizer under another file name
        if field == "inputs":
            pairs = [(old, new) for old, new in zip(before, value, strict=False) if old != new]
            before, value = pairs[0] if pairs else (f"{len(before)} inputs", f"{len(value)} inputs")
        raise UserError(f"{folder}: {field} is {_plain(value)}, but the store there was made with {_plain(before)}; "
                        "give the same, choose another --name, or remove the folder")


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _run(tasks: list[Task], workers: int) -> None:
    """Prepares each task's input in a pool of processes, with a progress bar on stderr."""
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    done: Any = context.Array("Q", 2)  # bytes read, tokens written
    with (
        ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (done,)) as pool,
        tqdm(unit="B", unit_scale=True, desc=tasks[0].folder.name, mininterval=1) as bar,
    ):
        waiting: set[Future[None]] = {pool.submit(_prepare_input, task) for task in tasks}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                read, tokens = done
                bar.update(read - bar.n)
                bar.set_postfix(tokens=f"{tokens:,}", inputs_left=len(waiting), refresh=False)
                for future in finished:
                    future.result()
        except BrokenProcessPool as error:
            raise UserError(f"{tasks[0].folder}: a worker was killed, perhaps for lack of memory; run the same command "
                            "again, with fewer --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_done: Any = None
"""In a worker: bytes read and tokens written by all workers together."""


def _start_worker(done: Any) -> None:
    global _done
    _done = done
    os.environ["RAYON_NUM_THREADS"] = "1"  # a process per input is the parallelism
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    """An orphan would write on for hours beside the command that was started again."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _prepare_input(task: Task) -> None:
    with _disk_errors(task.folder):
        prepare_input(task, _count_progress)


def _count_progress(read: int, tokens: int) -> None:
    with _done.get_lock():
        _done[0] += read
        _done[1] += tokens


def prepare_input(task: Task, progress: Any = lambda read, tokens: None) -> None:
    """Writes the shards of one input, then its record.

    Raises:
      UserError: the input is damaged or the tokenizer was changed meanwhile.
    """
    tokenizer = Tokenizer.load(task.tokenizer)
    if tokenizer.fingerprint != task.fingerprint:
        raise UserError(f"{task.tokenizer}: was changed while `prepare` ran; run it again")
    counts: Counter[str] = Counter()
    dtype = store.tokens_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        name = f"{task.index:05d}"
        shards = {
            split: stack.enter_context(store.ShardWriter(task.folder / split, name, dtype)) for split in store.SPLITS
        }
        for batch in _batches(task, counts):
            encoded = tokenizer.encode_documents([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                split = "heldout" if held_out(document.group, task.heldout) else "train"
                identity = {"id": document.id, "source": document.source}
                shards[split].add([tokenizer.bos_id, *ids, tokenizer.eos_id], identity)
            progress(sum(len(document.text.encode()) for document in batch), sum(map(len, encoded)))
        splits = {split: {"input": task.item.name, **shard.close()} for split, shard in shards.items()}
    _write(task.record, {"input": _identity(task.item), "splits": splits, "counts": dict(counts)})


def _batches(task: Task, counts: Counter[str]) -> Iterator[list[Document]]:
    """Documents that are kept, about BATCH_CHARS at a time; `counts` takes them and, per reason, the others."""
    batch: list[Document] = []
    chars = 0
    for document in readers.read_input(task.source, task.item):
        counts["read"] += 1
        reason = document.reason if isinstance(document, Dropped) else None if document.text else "empty"
        if reason is not None:
            counts[DROPPED + reason] += 1
            continue
        assert isinstance(document, Document)
        text, replaced = SURROGATE.subn("\ufffd", document.text)
        counts["kept"] += 1
        counts["replaced_surrogates"] += replaced
        counts["text_bytes"] += len(text.encode())
        batch.append(dataclasses.replace(document, text=text))
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def held_out(group: str, share: float) -> bool:
    """Whether the documents of a group are held out: a fixed hash of its name, the same on every machine."""
    value = hashlib.sha256(b"heldout:" + group.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(value[:8], "big") < share * 2**64


def _finish(folder: Path, name: str, arguments: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
    """Writes the manifest from the records of all inputs."""
    records = [json.loads(task.record.read_text(encoding="utf-8")) for task in tasks]
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record["counts"])
    dropped = {key.removeprefix(DROPPED): counts[key] for key in sorted(counts) if key.startswith(DROPPED)}
    assert counts["read"] == counts["kept"] + sum(dropped.values())
    if not counts["kept"]:
        raise UserError(f"{folder}: {counts['read']} documents read, none kept; look at --input and --text_key")
    fields = ("read", "kept", "replaced_surrogates", "text_bytes")
    splits = {}
    for split in store.SPLITS:
        shards = [record["splits"][split] for record in records]
        totals = {field: sum(shard[field] for shard in shards) for field in ("tokens", "documents")}
        splits[split] = {**totals, "shards": shards}
        for leftover in (folder / split).glob(f"*{store.PARTIAL}*"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    documents = {**{field: counts[field] for field in fields}, "dropped": dropped}
    manifest = {**arguments, "name": name, "documents": documents, "splits": splits}
    manifest["digest"] = digest(manifest)
    _write(folder / store.MANIFEST, manifest)
    return manifest


def _write(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}{store.PARTIAL}{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: the disk is full; free some space and run the same command again, which goes on "
                        "where this one stopped") from error


def summary(manifest: dict[str, Any]) -> str:
    """One line about a finished store."""
    documents, splits = manifest["documents"], manifest["splits"]
    tokens = sum(split["tokens"] for split in splits.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in documents["dropped"].items())
    return (
        f"{manifest['name']}: {documents['kept']:,} documents, {tokens:,} tokens "
        f"({splits['heldout']['tokens']:,} held out), {documents['text_bytes'] / max(tokens, 1):.2f} bytes/token, "
        f"dropped {sum(documents['dropped'].values()):,}" + (f" ({reasons})" if reasons else "")
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "; ".join(f"{kind}: {reader.help}" for kind, reader in readers.READERS.items())
    parser.add_argument("--source", required=True, metavar="KIND", help=kinds)
    parser.add_argument("--input", action="append", default=[], help="files, folders or globs; commas or repeated")
    parser.add_argument("--name", required=True, help="of the store: it is written to OUTPUT/NAME")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--output", required=True, help="folder of all stores (data.root of a config)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; each takes one input at a time")
    parser.add_argument("--heldout", type=float, default=0.02, help="share of the documents kept out of training")
    parser.add_argument("--text_key", default="text", help="of JSON lines")
    parser.add_argument("--id_key", help="of JSON lines; without it a document is named by file and line")


def main(args: argparse.Namespace) -> int:
    source = SourceSpec(args.source, tuple(readers.split_commas(args.input)), args.text_key, args.id_key)
    manifest = prepare(source, args.name, args.tokenizer, args.output, args.workers, args.heldout)
    print(summary(manifest))
    return 0
