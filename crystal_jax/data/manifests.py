"""From the records of a source's inputs to the manifests of its stores.

This file owns which inputs are done, and the sums. Its invariant: what was read is what was kept and what was dropped,
by reason, in each manifest.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from crystal_jax import files
from crystal_jax.data import readers, store
from crystal_jax.data.tasks import CONTROL, DROPPED, PROGRESS, Task, input_sha256, place, record
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError, counted

REQUESTS = 16
"""Records that are read at once: on gs:// each waits for an answer."""
COUNTED = ("read", "kept", "replaced_surrogates", "duplicate_ids_within_inputs", "text_bytes")

Record = dict[str, Any]
Manifest = dict[str, Any]


def read_records(tasks: Sequence[Task], compare: Collection[int] = ()) -> dict[int, Record]:
    """By index, the records of the tasks that are done: about the same input and arguments, with all their shards.

    The files of the inputs of `compare`, by index, are read where they seem to have changed since: those of a corpus
    that was copied haven't.
    """
    root = tasks[0].folder
    present = files.list_files(files.as_path(root))

    def read(task: Task) -> Record | None:
        if f"{PROGRESS}/{task.name}.json" not in present:
            return None
        try:
            found: Record = files.read_json(record(root, task.name))
        except UserError:  # damaged, or removed meanwhile by another shard's run that finished
            return None
        shards = [f"{folder}/{entry['name']}.{part}" for folder, entry in found["shards"].items()
                  for part in entry["bytes"]]  # fmt: skip
        same = "sha256" in found and all(found[key] == value for key, value in task.stamp.items())
        if not same or not present.issuperset(shards):
            return None
        if task.index in compare and found["changed"] != task.item.changed:
            if found["sha256"] != input_sha256(task.item):
                return None
            files.write_json(record(root, task.name), {**found, "changed": task.item.changed})
        return found

    with ThreadPoolExecutor(REQUESTS) as pool:
        found = zip(tasks, pool.map(read, tasks), strict=True)
        return {task.index: about for task, about in found if about is not None}


def has_kept(folder: epath.Path) -> bool:
    """Whether a record of an unfinished store tells of a document that was kept, or of an input that failed."""
    for name in files.list_files(folder / PROGRESS):
        if name.removesuffix(".json").partition(".")[0].isdigit():
            with contextlib.suppress(UserError):  # a damaged record is none
                found = files.read_json(folder / PROGRESS / name)
                if "error" in found or any(counts["kept"] for counts in found["counts"].values() if "kept" in counts):
                    return True
    return False


def write_manifests(stores: dict[str, epath.Path], name: str, arguments: dict[str, Any], records: Sequence[Record],
                    tokenizer: Tokenizer) -> list[Manifest]:
    """Completes the store of each part; `records` are those of all inputs, in order.

    Raises:
      UserError: not one document was kept.
    """
    counts = {part: _sum(records, part) for part in {*stores, ""}}
    whole: Counter[str] = Counter()
    for found in counts.values():
        whole.update(found)
    if not whole["kept"]:
        flags = "--input and --text_key" if "text_key" in readers.options(arguments["source"]) else "--input"
        raise UserError(f"{name}: {counted(whole['read'], 'document')} read, none kept; look at {flags}")
    inputs = [{**item, "sha256": found["sha256"]} for item, found in zip(arguments["inputs"], records, strict=True)]
    manifests = []
    for part, path in stores.items():
        manifest = {**arguments, "inputs": inputs, "name": f"{name}/{part}" if part else name, "part": part,
                    "documents": _documents(counts[part], tokenizer)}  # fmt: skip
        if part:  # what was dropped before its part was known shows here only
            manifest["documents_of_all_parts"] = _documents(whole, tokenizer)
        manifest["control_ids"] = _control_ids(counts[part])
        manifest["splits"] = {split: _split(records, place(part, split)) for split in store.SPLITS}
        manifests.append(store.write_manifest(path, manifest))
    return manifests


def _sum(records: Sequence[Record], part: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for found in records:
        counts.update(found["counts"].get(part, {}))
    return counts


def _documents(counts: Counter[str], tokenizer: Tokenizer) -> dict[str, Any]:
    dropped = {key.removeprefix(DROPPED): counts[key] for key in sorted(counts) if key.startswith(DROPPED)}
    assert counts["read"] == counts["kept"] + sum(dropped.values()), counts
    return {
        **{field: counts[field] for field in COUNTED},
        "dropped": dropped,
        "control_tokens": {tokenizer.decode([token]): counts[f"{CONTROL}{token}"] for token in _control_ids(counts)},
    }


def _control_ids(counts: Counter[str]) -> list[int]:
    return sorted(int(key.removeprefix(CONTROL)) for key in counts if key.startswith(CONTROL))


def _split(records: Sequence[Record], folder: str) -> dict[str, Any]:
    shards = [found["shards"][folder] for found in records]
    return {**{field: sum(shard[field] for shard in shards) for field in ("tokens", "documents")}, "shards": shards}


def summary(manifest: Manifest) -> str:
    """One line about a finished store."""
    documents, splits = manifest["documents"], manifest["splits"]
    tokens = sum(split["tokens"] for split in splits.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in documents["dropped"].items())
    ratio = f"{documents['text_bytes'] / max(tokens, 1):.2f} bytes/token, " if documents["text_bytes"] else ""
    duplicates = documents["duplicate_ids_within_inputs"]
    twice = f"; {duplicates:,} ids came again within an input" if duplicates else ""
    return (
        f"{manifest['name']}: {counted(documents['kept'], 'document')}, {tokens:,} tokens "
        f"({splits['heldout']['tokens']:,} held out), {ratio}"
        f"dropped {sum(documents['dropped'].values()):,}" + (f" ({reasons})" if reasons else "") + twice
    )
