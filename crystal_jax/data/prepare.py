"""The command `prepare`: raw documents to token stores.

This file owns the way from a source to its stores: OUTPUT/NAME, or OUTPUT/NAME/PART where the source has parts. Its
invariant: the bytes of a store are a pure function of the source, the tokenizer and the held-out share, whatever
processes on whatever machines prepared its inputs, however often they were killed; the manifest is written last.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

from crystal_jax import files
from crystal_jax.config import digest
from crystal_jax.data import readers, store
from crystal_jax.data.fast_tokenizer import ENGINES
from crystal_jax.data.manifests import Manifest, has_kept, read_records, summary, write_manifests
from crystal_jax.data.options import DEFAULTS, RESERVED, Options, check_name, check_options
from crystal_jax.data.packing import write_plan
from crystal_jax.data.readers import Input, SourceSpec
from crystal_jax.data.repair import check_inputs, damaged_shards, mend
from crystal_jax.data.runners import check_beam, run_beam, run_local
from crystal_jax.data.tasks import PROGRESS, Task, identity, record, scratch
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError, counted

MANY = 10_000
"""Inputs above which a store is slow to open: 5 s with 59,166."""
ARGUMENTS = "arguments"
"""Name, without .json, of what an unfinished store was begun with."""



RUNNERS: dict[str, Callable[[list[Task], Options], None]] = {
    "local": lambda tasks, options: run_local(tasks, options.workers),
    "beam": lambda tasks, options: run_beam(tasks, options.beam_options),
}


def prepare(source: SourceSpec, name: str, tokenizer: str | Path, output: str | Path,
            options: Options = DEFAULTS) -> list[Manifest]:
    """Writes the token store of each part of a source and returns their manifests.

    Goes on where an interrupted run stopped; of stores that are done it mends what is damaged. Where inputs of other
    shards are still missing, it returns an empty list: whichever run finds all of them finishes the stores. The workers
    are processes that import the script which calls this: it must do so under `if __name__ == "__main__":`.

    Raises:
      UserError: a wrong argument, a damaged input, a store there that was made from other arguments or files.
      OSError: a full disk.
    """
    if options.heldout is None:
        options = dataclasses.replace(options, heldout=readers.heldout(source))
    check_options(options, RUNNERS)
    job = _make_job(source, name, Tokenizer.load(tokenizer), files.as_path(output), options)
    _refuse_others(job)
    manifests = _finished(job)
    damaged = damaged_shards(list(job.stores.values()), manifests, options.repair) if manifests else {}
    if manifests and not damaged:
        print(f"{job.folder}: done already", file=sys.stderr)
    if not manifests or damaged or (job.folder / PROGRESS).exists():
        if options.runner == "beam":
            check_beam()
        with _locked(job), _withdrawing(job):
            manifests = manifests or _finished(job) or _prepare_inputs(job)
            if not manifests:
                return []
            if damaged:
                _mend(job, manifests, damaged)
            _clear(job)
    if options.packing == "best_fit":
        for path, manifest in zip(job.stores.values(), manifests, strict=True):
            with tqdm(total=manifest["documents"]["kept"], unit=" documents", desc=f"{job.name}: packing") as bar:
                write_plan(path, options.sequence_length, options.workers, bar.update)
    return manifests


@dataclass(frozen=True)
class Job:
    """All that a command is about, once its arguments have been looked at."""

    name: str
    folder: epath.Path
    stores: dict[str, epath.Path]
    """By part."""
    tokenizer: Tokenizer
    options: Options
    arguments: dict[str, Any]
    """What decides the contents; it opens each manifest."""
    tasks: list[Task]


def _make_job(source: SourceSpec, name: str, tokenizer: Tokenizer, output: epath.Path, options: Options) -> Job:
    check_name(name, output)
    folder = output / name
    inputs = readers.list_inputs(source)
    if len(inputs) > MANY:
        print(f"warning: {name} has {len(inputs):,} inputs, and each becomes {len(store.PARTS)} files per split of "
              "each store; --files_per_input=64 keeps stores small and quick to open", file=sys.stderr)
    arguments = _arguments(source, inputs, tokenizer, options)
    stores = {part: folder / part if part else folder for part in readers.parts(source)}
    if taken := RESERVED.intersection(stores):
        raise UserError(f"--split_names: {min(taken)!r} can't be a store's name, since it is a folder of stores; "
                        "choose another")
    # The same tokenizer may lie in another file.
    stamp = digest({**_names_only(arguments), "tokenizer": tokenizer.fingerprint})
    tasks = [
        Task(source, item, index, os.fspath(tokenizer.path), tokenizer.fingerprint, options.engine,
             arguments["heldout"], os.fspath(folder), stamp)
        for index, item in enumerate(inputs)
    ]  # fmt: skip
    return Job(name, folder, stores, tokenizer, options, arguments, tasks)


def _arguments(source: SourceSpec, inputs: list[Input], tokenizer: Tokenizer, options: Options) -> dict[str, Any]:
    return {
        "format": store.FORMAT,
        "source": source.kind,
        "inputs": [identity(item) for item in inputs],
        "text_key": source.text_key,
        "id_key": source.id_key,
        "split_by": source.split_by,
        "split_names": [list(pair) for pair in source.split_names],
        "tokenizer": store.describe_tokenizer(tokenizer),
        "heldout": options.heldout,
        "dtype": store.tokens_dtype(tokenizer.vocab_size),
    }


def _names_only(arguments: dict[str, Any]) -> dict[str, Any]:
    """An input that has changed is read again: a damaged file may have been fetched once more."""
    return {**arguments, "inputs": [item["name"] for item in arguments["inputs"]]}


# What is there already


def _refuse_others(job: Job) -> None:
    folder = job.folder
    for path in {folder, *job.stores.values()}:
        if files.exists(path / store.MANIFEST):
            found = files.read_json(path / store.MANIFEST)
            written = found.get("format") if isinstance(found, dict) else None
            if written != store.FORMAT:
                raise UserError(f"{path}: a token store of format {written}; this version writes format "
                                f"{store.FORMAT}: remove the folder and run the same command again")
    # In this order, since another shard's run may begin, or finish and clear up, meanwhile.
    others = sorted(path.name for path in folder.iterdir() if path.name != PROGRESS) if folder.exists() else []
    if others and not files.exists(record(os.fspath(folder), ARGUMENTS)) and not _is_finished(job):
        raise UserError(f"{folder}: holds {others[0]} but is no token store; choose another --name or remove it")


@contextlib.contextmanager
def _locked(job: Job) -> Iterator[None]:
    """Keeps a second run for the same inputs off this machine's folder; the lock dies with the process."""
    local = scratch(os.fspath(job.folder))
    index, count = job.options.shard
    # Runs for different shards share the first lock.
    locks = [("lock", fcntl.LOCK_EX)] if count == 1 else [("lock", fcntl.LOCK_SH),
                                                          (f"shard-{index}-of-{count}", fcntl.LOCK_EX)]
    with contextlib.ExitStack() as stack:
        for name, kind in locks:
            try:
                local.mkdir(parents=True, exist_ok=True)
                handle = os.open(local / name, os.O_RDWR | os.O_CREAT)
                stack.callback(os.close, handle)
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{job.folder}: another `prepare` is writing it; wait for it, or give each its own "
                                "--shard or --name") from error
            except OSError as error:
                raise UserError(f"--output: {local} can't be made ({error.strerror})") from error
        yield


@contextlib.contextmanager
def _withdrawing(job: Job) -> Iterator[None]:
    """Leaves nothing of a run that fails before it has kept anything: a corrected one finds the name free."""
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError, UserError):  # what can't be looked at is left alone
            finished = any(files.exists(path / store.MANIFEST) for path in job.stores.values())
            if job.options.shard[1] == 1 and not finished and not has_kept(job.folder):
                _clear(job)
                _remove_shards(job)
        raise


def _remove_shards(job: Job) -> None:
    """By their names, and the folders that are empty then: nothing else that lies there is ours."""
    ours = {f"{task.name}.{part}" for task in job.tasks for part in store.PARTS}
    splits = [path / split for path in job.stores.values() for split in store.SPLITS]
    for folder in splits:
        for name in ours.intersection(files.list_files(folder)):
            (folder / name).unlink(missing_ok=True)
    if not files.is_remote(job.folder):
        parents = itertools.islice(job.folder.parents, job.name.count("/"))
        for path in (*splits, *job.stores.values(), job.folder, *parents):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _begin(job: Job) -> None:
    """Writes down the arguments, or checks that the run that has records began with the same."""
    arguments = _names_only(job.arguments)
    path = record(os.fspath(job.folder), ARGUMENTS)
    names = files.list_files(job.folder / PROGRESS)
    if path.name in names and any(name.removesuffix(".json").isdigit() for name in names):
        _check_same(job.folder, arguments, files.read_json(path))
    else:
        files.write_json(path, arguments)


def _check_same(folder: epath.Path, arguments: dict[str, Any], earlier: dict[str, Any]) -> None:
    for field, value in arguments.items():
        before: Any = earlier.get(field)
        if before == value:
            continue
        if field == "tokenizer":
            if before["fingerprint"] == value["fingerprint"]:
                continue  # under another file name
            before, value = (f"fingerprint {found['fingerprint']}, file {found['file']}" for found in (before, value))
        if field == "inputs":
            pairs = [(old, new) for old, new in zip(before, value, strict=False) if old != new]
            before, value = pairs[0] if pairs else (counted(len(before), "input"), counted(len(value), "input"))
        raise UserError(f"{folder}: {field} is {_plain(value)}, but the store there was made with {_plain(before)}; "
                        "give the same, choose another --name, or remove the folder")


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _is_finished(job: Job) -> bool:
    return all(files.exists(path / store.MANIFEST) for path in job.stores.values())


def _finished(job: Job) -> list[Manifest]:
    """The manifests, when all of them are there and were made from these arguments."""
    if not _is_finished(job):
        return []
    manifests = [store.read_manifest(path) for path in job.stores.values()]
    for path, manifest in zip(job.stores.values(), manifests, strict=True):
        inputs = [{key: value for key, value in item.items() if key != "sha256"} for item in manifest["inputs"]]
        _check_same(path, job.arguments, {**manifest, "inputs": inputs})
    path = next(iter(job.stores.values()))  # all parts are of the same inputs
    check_inputs([task.item for task in job.tasks], path / store.MANIFEST, manifests[0])
    return manifests


def _mend(job: Job, manifests: list[Manifest], damaged: dict[str, str]) -> None:
    name, problem = next(iter(damaged.items()))
    print(f"{problem}; preparing {len(damaged)} of {len(job.tasks)} inputs once more", file=sys.stderr)
    if job.options.shard[1] != 1:
        raise UserError(f"{job.folder}: shard {name} is damaged; run the same command without --shard to mend it")
    tasks = [task for task in job.tasks if task.name in damaged]
    mend(tasks, job.stores, manifests, lambda found: RUNNERS[job.options.runner](found, job.options))


# What is left to do


def _prepare_inputs(job: Job) -> list[Manifest]:
    """Prepares those inputs of this shard that have no record yet; completes the stores if all have one then."""
    _begin(job)
    index, count = job.options.shard
    done = read_records(job.tasks, range(index, len(job.tasks), count))
    if left := [task for task in job.tasks[index::count] if task.index not in done]:
        RUNNERS[job.options.runner](left, job.options)
        done = read_records(job.tasks)
    if len(done) == len(job.tasks):
        records = [done[task.index] for task in job.tasks]
        with contextlib.suppress(FileNotFoundError):  # another shard's run finished meanwhile, and cleared up
            return write_manifests(job.stores, job.name, job.arguments, records, job.tokenizer)
    if finished := _finished(job):
        return finished
    if lost := [task for task in job.tasks[index::count] if task.index not in done]:
        raise UserError(f"{job.folder}: {counted(len(lost), 'input')} prepared but not there, the first "
                        f"{lost[0].item.name}; can all workers write to --output? Run the same command again")
    print(f"{job.folder}: shard {index}/{count} is done; {len(done)} of {len(job.tasks)} inputs are there; the last "
          "shard finishes the store, or the same command without --shard", file=sys.stderr)
    return []


def _clear(job: Job) -> None:
    """Removes all that isn't part of the finished stores."""
    for path in job.stores.values():
        for leftover in path.glob(f".{store.MANIFEST}{files.PARTIAL}*"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another shard's run, which finished too, removes it
        (job.folder / PROGRESS).rmtree()
    shutil.rmtree(scratch(os.fspath(job.folder)), ignore_errors=True)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "; ".join(f"{kind}: {reader.help}" for kind, reader in readers.READERS.items())
    add = parser.add_argument
    add("--source", required=True, metavar="KIND", help=kinds)
    add("--input", action="append", default=[], help="files, folders or globs, local or gs://; commas or repeated")
    add("--name", required=True, help="of the store: it is written to OUTPUT/NAME, its parts to OUTPUT/NAME/PART")
    add("--tokenizer", required=True, help="a tokenizer.json")
    add("--output", required=True, help="folder of all stores (data.root of a config), local or gs://")
    add("--workers", type=int, default=os.cpu_count(), help="processes; each takes one input at a time")
    add("--heldout", type=float, help="share of the documents kept out of training; by default 0.02, of crystal-h5 0")
    add("--text_key", default=SourceSpec.text_key, help="column or key of the text")
    add("--id_key", help="column or key of a document's name; without it file and line name it")
    add("--split_by", help="dotted key whose value says which store a document goes to")
    add("--split_names", action="append", default=[], metavar="VALUE=STORE", help="its values; commas or repeated")
    add("--languages", action="append", default=[], help="of starcoder: the folders to read; commas or repeated")
    add("--files_per_input", type=int, default=SourceSpec.files_per_input, help="files that become one shard")
    add("--engine", default=Options.engine, help=f"of tokenising: {', '.join(ENGINES)}; all give the same ids")
    add("--shard", default="0/1", metavar="I/N", help="take every N-th input, from the I-th (from 0) on")
    add("--runner", default=Options.runner, help=f"where the inputs are prepared: {', '.join(RUNNERS)}")
    add("--beam_options", default="", help="of --runner=beam, in quotes: Beam's own arguments")
    add("--packing", default=Options.packing, help="best_fit: also plan rows, for config.data.packing=best_fit")
    add("--repair", action="store_true", help="of a finished store: compare every file's sha256, and mend it")
    add("--sequence_length", type=int, default=Options.sequence_length, help="tokens of a row of that plan")


def main(args: argparse.Namespace) -> int:
    source = SourceSpec(
        args.source, tuple(readers.split_inputs(args.input)), args.text_key, args.id_key, args.split_by,
        tuple(_pair(item) for item in readers.split_commas(args.split_names)),
        tuple(readers.split_commas(args.languages)), args.files_per_input,
    )  # fmt: skip
    options = Options(args.workers, args.heldout, args.engine, args.runner, args.beam_options, _shard(args.shard),
                      args.packing, args.sequence_length, args.repair)
    for manifest in prepare(source, args.name, args.tokenizer, args.output, options):
        print(summary(manifest))
    return 0


def _pair(item: str) -> tuple[str, str]:
    value, equals, name = item.partition("=")
    if not (value and equals and name):
        raise UserError(f"--split_names: {item!r} must be VALUE=STORE")
    return value, name


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UserError(f"--shard: {text!r} must be I/N with I from 0 to N-1, such as 0/4")
    return int(index), int(count)
