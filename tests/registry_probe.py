"""What seqio makes of the registered recipes, as JSON on stdout: a process of its own, since seqio imports TensorFlow.

    python tests/registry_probe.py WORLD
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import seqio
import tensorflow as tf
from world import make_config

from crystal_jax.data import readers, registry
from crystal_jax.data.pipeline import Stores
from crystal_jax.rules import validate

from configs import crystal_7b, crystal_tiny

TEXTS = ("", " ", "two  spaces", " leading", "trailing \n", "naïve café 日本", "a\tb\n\nc", "<s>literal</s><unk>", "▁",
         "🦀", "e\u0301 \u200b", "def f(x):\n    return x\n")
LENGTH = 32


def examples(name: str, **options: Any) -> list[dict[str, Any]]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(**{"shuffle": False, "num_epochs": 1, **options})
    return list(dataset.as_numpy_iterator())


def documents(name: str, split: str) -> dict[str, Any]:
    found = examples(name, split=split)
    return {"ids": [example["id"].decode() for example in found],
            "sources": [example["source"].decode() for example in found],
            "texts": [example["targets_pretokenized"].decode() for example in found],
            "targets": [example["targets"].tolist() for example in found]}


def windows(name: str, **options: Any) -> list[list[int]]:
    found = examples(name, sequence_length={"targets": LENGTH}, **options)
    assert all(set(example) == {"targets"} for example in found), found[0]
    return [example["targets"].tolist() for example in found]


def as_read(name: str) -> list[list[Any]]:
    """(input, id, text) of each document that `prepare` reads of a Task."""
    source = readers.SourceSpec(f"seqio:{name}", id_key="id")
    return [[item.name, document.id, document.text] for item in readers.list_inputs(source)
            for document in readers.read_input(source, item)]


def vocabulary_facts(stores: Stores) -> dict[str, Any]:
    vocabulary = registry.make_vocabulary(stores.tokenizer)
    encoded = [vocabulary.encode(text) for text in TEXTS]
    whole = [[vocabulary.bos_id, *ids, vocabulary.eos_id] for ids in encoded]
    width = max(map(len, whole))
    batch = tf.constant([ids + [vocabulary.pad_id] * (width - len(ids)) for ids in whole], tf.int32)
    mapped = tf.data.Dataset.from_tensor_slices(list(TEXTS)).map(vocabulary.encode_tf)
    return {
        "texts": TEXTS,
        "encoded": encoded,
        "decoded": [vocabulary.decode(ids) for ids in whole],
        "encoded_tf": [vocabulary.encode_tf(tf.constant(text)).numpy().tolist() for text in TEXTS],
        "encoded_by_map": [ids.tolist() for ids in mapped.as_numpy_iterator()],
        "element": str(mapped.element_spec),
        "decoded_tf": [vocabulary.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() for ids in whole],
        "decoded_batch": [text.decode() for text in vocabulary.decode_tf(batch).numpy()],
        "decoded_nothing": vocabulary.decode_tf(tf.zeros([0], tf.int32)).numpy().decode(),
        "out_of_range": vocabulary.decode([10**6, *encoded[5]]),
        "sizes": [vocabulary.vocab_size, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id],
        "equal": vocabulary == registry.make_vocabulary(stores.tokenizer) and len({
            vocabulary, registry.make_vocabulary(stores.tokenizer)}) == 1,
        "unlike": vocabulary != seqio.PassThroughVocabulary(8),
    }


def registered_rates(config: Any, stores: Any) -> dict[str, Any]:
    """Rates as seqio states them; the stores of a world stand in for those of a recipe at full size."""
    by_source = {name: stores.by_source[source.domain] for name, source in config.sources.items()}
    registry.register(config, SimpleNamespace(tokenizer=stores.tokenizer, by_source=by_source))
    found = {}
    for phase in config.phases:
        mixture = seqio.get_mixture_or_task(f"{config.name}.{phase.name}")
        found[phase.name] = {"rates": {task.name: mixture.get_rate(task) for task in mixture.tasks},
                             "stated": dict(mixture.rate_per_task_name), "total": mixture.total_rate}
    return found


def sample(mixture: str, count: int) -> dict[str, int]:
    """How many of the first windows of a mixture each Task gave; few enough that none begins anew."""
    tasks = [task.name for task in seqio.get_mixture_or_task(mixture).tasks]
    of_source = {tuple(row): name for name in tasks for row in windows(name, split="train")}
    dataset = seqio.get_mixture_or_task(mixture).get_dataset({"targets": LENGTH}, "train", seed=3, shuffle=False)
    drawn = dataset.take(count).as_numpy_iterator()
    return dict(Counter(of_source.get(tuple(example["targets"].tolist()), "unknown") for example in drawn))


def main(world: Path) -> None:
    config = make_config(world)
    stores = Stores(config)
    names = registry.register(config)
    tasks = [name for name in names if name in seqio.TaskRegistry.names()]
    feature = seqio.DecoderFeatureConverter(pack=False)
    model = seqio.get_dataset("world.phase2", {"targets": LENGTH}, feature, shuffle=True, seed=0)
    shards = [seqio.ShardInfo(index, 2) for index in range(2)]
    orders = [[example["id"].decode() for example in examples("world.text", split="train", shuffle=True, seed=seed)]
              for seed in (1, 1, 2)]
    print(json.dumps({
        "names": names,
        "again": registry.register(config, stores) == names,
        "documents": {name: {split: documents(name, split) for split in ("train", "heldout")} for name in tasks},
        "windows": {name: windows(name, split="train") for name in tasks},
        "counts": {name: seqio.get_mixture_or_task(name).num_input_examples("train") for name in names},
        "by_shard": [[example["id"].decode() for example in examples("world.text", split="train", shard_info=shard)]
                     for shard in shards],
        "mixed_texts": [example["targets_pretokenized"].decode() for example in examples(
            "world.phase2", split="heldout", copy_pretokenized=True)],
        "orders": orders,
        "as_read": as_read("world.text.even"),
        "model_features": {key: list(value.shape) for key, value in next(model.as_numpy_iterator()).items()},
        "sample": sample("world.phase2", 1000),
        "vocabulary": vocabulary_facts(stores),
        "recipes": {name: registered_rates(validate(module.get_config()), stores)
                    for name, module in (("crystal_tiny", crystal_tiny), ("crystal_7b", crystal_7b))},
        "world_rates": registered_rates(config, stores),
    }))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
