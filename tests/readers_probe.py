"""What the readers make of seqio tasks and of a TFDS dataset that needs TensorFlow, as JSON on stdout.

    python tests/readers_probe.py FOLDER

A process of its own, since both import TensorFlow. FOLDER must hold lines-0.txt, lines-1.txt and lines-2.txt.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from corpora import write_tfds

from crystal_jax.data.readers import SourceSpec, list_inputs, parts, read_input
from crystal_jax.errors import UserError

TEXTS = ("first é", "", "third\nline", "a" * 5000)


def function(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    assert split == "train" and not shuffle_files
    return tf.data.Dataset.from_tensor_slices({"targets": list(TEXTS), "key": ["k0", "k1", "k2", "k3"]})


def bad_function(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices({"targets": [b"\xff", b"fine"]})


def failing(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda example: {"targets": tf.strings.as_string(tf.strings.to_number(example["targets"]))})


def register(folder: Path) -> None:
    text = {"targets": seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)}
    ids = {"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)}
    source = seqio.FunctionDataSource(function, splits=["train"])
    lines = seqio.TextLineDataSource({"train": str(folder / "lines-*.txt")})
    to_text = [lambda dataset: dataset.map(lambda line: {"text": line, "targets": line})]
    to_ids = [lambda dataset: dataset.map(lambda example: {"targets": tf.strings.length(example["targets"])[None]})]
    for name, data, preprocessors, features in (
        ("plain", source, [], text),
        ("tokenized", source, [seqio.preprocessors.tokenize], ids),
        ("ids_only", source, to_ids, ids),
        ("lines", lines, to_text, text),
        ("bad", seqio.FunctionDataSource(bad_function, splits=["train"]), [], text),
        ("failing", source, [failing], text),
        ("no_train", seqio.FunctionDataSource(function, splits=["validation"]), [], text),
    ):
        seqio.TaskRegistry.add(name, source=data, preprocessors=preprocessors, output_features=features)
    seqio.MixtureRegistry.add("both", [("tokenized", 3), ("lines", 1)])


def tell(kind: str, *inputs: str, **keys: Any) -> dict[str, Any]:
    """parts, inputs and documents of a source, or the error."""
    source = SourceSpec(kind, inputs, **keys)
    try:
        listed = list_inputs(source)
        found = [[dataclasses.asdict(document) for document in read_input(source, item)] for item in listed]
        return {"parts": parts(source), "inputs": [dataclasses.asdict(item) for item in listed], "documents": found}
    except UserError as error:
        return {"error": str(error)}


def main(folder: Path) -> None:
    found = {"none registered": tell("seqio:plain")}
    register(folder)
    write_tfds(folder / "tfds", [{"text": text, "number": index} for index, text in enumerate(TEXTS)], shards=2,
               file_format="tfrecord")  # fmt: skip
    kinds = ("plain", "tokenized", "ids_only", "lines", "bad", "failing", "no_train", "both", "plane")
    found |= {kind: tell(f"seqio:{kind}") for kind in kinds}
    found["by key"] = tell("seqio:plain", id_key="key")
    found["by text_key"] = tell("seqio:plain", text_key="key")
    found["without module"] = tell("seqio:plain", "no.such.module")
    found["with module"] = tell("seqio:plain", "json")
    found["tfrecord"] = tell("tfds:small_text", str(folder / "tfds"), id_key="number")
    (cut, *_) = sorted(folder.glob("tfds/**/*.tfrecord-*"))
    data = np.fromfile(cut, np.uint8)
    data[len(data) // 2] ^= 16
    data.tofile(cut)
    found["tfrecord flipped"] = tell("tfds:small_text", str(folder / "tfds"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
