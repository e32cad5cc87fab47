"""Any seqio Task, or each Task of a Mixture: an example is a document.

This file owns what is read of them: the text of the split `train`, each example once, unshuffled. Its invariant: a
Mixture becomes a store per Task, since its rates are the training's to apply, and exactly.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from crystal_jax.config import nearest
from crystal_jax.data.readers import records
from crystal_jax.data.readers.base import DEFAULT_TEXT_KEY, Document, Documents, Input, Reader, SourceSpec
from crystal_jax.data.readers.listing import DEALT_INPUTS, one_line
from crystal_jax.errors import UserError, install

SPLIT = "train"
TEXT_KEYS = ("targets", "text")
"""What the text is called, unless --text_key says."""
BEFORE_TOKENIZING = "_pretokenized"
"""seqio keeps the text of a feature that it tokenises under the feature's name with this behind it."""


def list_inputs(source: SourceSpec) -> list[Input]:
    """An input per shard of each Task, as far as it has shards."""
    inputs: list[Input] = []
    for task in _tasks(source):
        if SPLIT not in task.splits:
            raise UserError(f"--source: {task.name}: no split {SPLIT!r}; it has {', '.join(task.splits)}")
        count = min(DEALT_INPUTS, len(task.source.list_shards(SPLIT)))
        inputs += [Input(f"{task.name}/{index:02d}", ((task.name, f"{index}/{count}"),), 0, index)
                   for index in range(count)]  # fmt: skip
    return inputs


def parts(source: SourceSpec) -> tuple[str, ...]:
    """One store for a Task; for a Mixture the names of its Tasks."""
    names = tuple(task.name for task in _tasks(source))
    return ("",) if names == (source.dataset,) else names


def read(source: SourceSpec, item: Input) -> Documents:
    """Documents called by their input and number, from 0, or by the feature id_key."""
    ((name, share),) = item.files
    task = next(task for task in _tasks(source) if task.name == name)
    part = "" if name == source.dataset else name
    for number, example in enumerate(_examples(task, *map(int, share.split("/")))):
        place = f"{item.name}: example {number}"
        key = _text_key(source.text_key, example, place)
        spec = SourceSpec(source.kind, text_key=key, id_key=source.id_key)
        found = records.document(spec, example, place, item.name, f"{item.name}:{number}")
        yield dataclasses.replace(found, part=part) if isinstance(found, Document) else found


def _text_key(wanted: str, example: Mapping[str, Any], place: str) -> str:
    """The key of the text before seqio tokenised it, or of a text that it left alone."""
    keys = TEXT_KEYS if wanted == DEFAULT_TEXT_KEY else (wanted,)
    for key in keys:
        for name in (f"{key}{BEFORE_TOKENIZING}", key):
            if isinstance(example.get(name), bytes | str):
                return name
    raise UserError(f"{place}: no text in {' or '.join(keys)}; it has {', '.join(example)}; choose with --text_key, or "
                    "give a task that keeps its text (seqio.preprocessors.tokenize does)")


def _examples(task: Any, index: int, count: int) -> Iterator[Mapping[str, Any]]:
    seqio = _seqio()
    shard = seqio.ShardInfo(index, count)
    try:
        # A seed, for preprocessors that draw: the same documents in every run.
        yield from task.get_dataset(sequence_length=None, split=SPLIT, shuffle=False, seed=0, shard_info=shard,
                                    try_in_mem_cache=False).as_numpy_iterator()
    except Exception as error:  # of the task's own functions, of TensorFlow
        raise UserError(f"{task.name}: can't be read ({type(error).__name__}: {one_line(error)})") from error


def _tasks(source: SourceSpec) -> list[Any]:
    """The Task of this name, or the Tasks of the Mixture of this name, by name."""
    seqio = _seqio()
    for module in source.inputs:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"--input: {module}: can't be imported ({error}); name the modules that register "
                            f"{source.dataset}, as in a Python program's import") from error  # fmt: skip
    if source.dataset in seqio.MixtureRegistry.names():
        return sorted(seqio.MixtureRegistry.get(source.dataset).tasks, key=lambda task: task.name)
    if source.dataset in seqio.TaskRegistry.names():
        return [seqio.TaskRegistry.get(source.dataset)]
    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    others = nearest(source.dataset, known) if known else ", and none at all is registered"
    raise UserError(f"--source: {source.kind}: no Task or Mixture of this name{others}; --input names the modules that "
                    "register it")


def _seqio() -> Any:
    try:
        import seqio
    except Exception as error:  # also of packages that don't fit each other
        raise UserError(f"--source: seqio can't be imported ({type(error).__name__}: {one_line(error)}); "
                        f"{install('data')}") from error
    return seqio


READER = Reader(list_inputs, read, "the split train of a seqio Task or of each Task of a Mixture, registered by the "
                "modules that --input names", frozenset({"text_key", "id_key"}), parts)
