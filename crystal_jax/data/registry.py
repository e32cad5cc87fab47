"""A recipe as seqio knows it: a Vocabulary over its tokenizer, a Task per source, a Mixture per phase.

This file owns their names. Its invariants: a Mixture's rates are the phase's quotas, and a Task's targets are the ids
that training reads, never text that is tokenised again. Training doesn't import this file: seqio imports TensorFlow.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from crystal_jax.config import Config, Subset
from crystal_jax.data.documents import count_documents, read_documents
from crystal_jax.data.pipeline import Stores
from crystal_jax.data.store import SPLITS, ShardSpan, TokenStore, TokenView
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError, install
from crystal_jax.phases import make_plan

WHOLE = Subset()


def task_name(config: Config, source: str, subset: Subset = WHOLE) -> str:
    """crystal_7b.C4 for the whole source; crystal_7b.C4.even, crystal_7b.C4.first0.1 for what a phase reads of it."""
    files = [subset.files] if subset.files != "all" else []
    first = [f"first{subset.first:g}"] if subset.first != 1 else []
    return ".".join([config.name, source, *files, *first])


def rates(config: Config) -> dict[str, dict[str, int]]:
    """Mixture (crystal_7b.phase2) to {Task: sequences that it gives to the phase}; needs neither seqio nor a store."""
    return {
        f"{config.name}.{placed.phase.name}": {
            task_name(config, source, placed.phase.subset.get(source, WHOLE)): quota
            for source, quota in placed.quotas.items()
        }
        for placed in make_plan(config).phases
    }


def register(config: Config, stores: Stores | None = None) -> list[str]:
    """Registers the Tasks and Mixtures of a validated config with seqio, in place of earlier ones, by the names given.

    A Task's example is a document: `targets` int32 [n] (its ids, with <s> and </s>), `targets_pretokenized` (its text),
    `id`, `source`. Asked for `sequence_length={"targets": T}` it is a window of T tokens of the documents one after the
    other, so that a Mixture's rates are shares of tokens. Splits are train and, whole in every Task, heldout.

    Raises:
      UserError: seqio isn't installed, a name that it refuses, a missing store or tokenizer, an empty subset.
    """
    _check_installed()
    import seqio

    stores = stores or Stores(config)
    mixtures = rates(config)
    tasks = {task_name(config, source): (source, WHOLE) for source in stores.by_source}
    for phase in config.phases:
        for source in phase.mix:
            subset = phase.subset.get(source, WHOLE)
            tasks[task_name(config, source, subset)] = (source, subset)
    _check_names(config, [*tasks, *mixtures])
    vocabulary = make_vocabulary(stores.tokenizer)
    for name, (source, subset) in tasks.items():
        seqio.TaskRegistry.remove(name)
        _add_task(name, stores.by_source[source], subset, vocabulary)
    for name, parts in mixtures.items():
        seqio.MixtureRegistry.remove(name)
        seqio.MixtureRegistry.add(name, list(parts.items()))
    return [*tasks, *mixtures]


def _check_names(config: Config, names: list[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[\w.:#]+", name):
            raise UserError(f"config {config.name}: {name!r} can't be a name in seqio, which takes letters, digits and "
                            "_.:# only; rename the config, source or phase")
        if names.count(name) > 1:
            raise UserError(f"config {config.name}: {name!r} would be a source and a phase in seqio; rename one")


def make_vocabulary(tokenizer: Tokenizer) -> Any:
    """A seqio.Vocabulary that encodes as `Tokenizer.encode_document` and decodes without <s>, </s> and padding.

    Raises:
      UserError: seqio isn't installed.
    """
    _check_installed()
    return _vocabulary_class()(tokenizer)


@functools.cache
def _vocabulary_class() -> type:
    import seqio
    import tensorflow as tf

    class CrystalVocabulary(seqio.Vocabulary):
        """Equal to every other one of the same tokenizer, as Mixtures demand. The tf ops run Python: not for export."""

        def __init__(self, tokenizer: Tokenizer) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self._left_out = {tokenizer.bos_id, tokenizer.eos_id, self.pad_id}

        bos_id = property(lambda self: self.tokenizer.bos_id)
        eos_id = property(lambda self: self.tokenizer.eos_id)
        unk_id = property(lambda self: self.tokenizer.unk_id)
        _base_vocab_size = property(lambda self: self.tokenizer.vocab_size)

        def _encode(self, s: str) -> list[int]:
            return self.tokenizer.encode_document(s)

        def _decode(self, ids: Any) -> str:
            return self.tokenizer.decode(int(token) for token in ids if token not in self._left_out)

        def _encode_tf(self, s: Any) -> Any:
            ids = tf.numpy_function(self._encode_bytes, [s], tf.int32)
            ids.set_shape([None])
            return ids

        def _encode_bytes(self, text: bytes | np.ndarray) -> np.ndarray:
            data = text.item() if isinstance(text, np.ndarray) else text  # an array when eager
            return np.asarray(self._encode(data.decode()), np.int32)

        def text(self, ids: Any) -> Any:
            """The text of ids [..., n]; `decode_tf` ends at the first </s>, but a stored row may hold several."""
            text = tf.numpy_function(self._decode_rows, [ids], tf.string)
            text.set_shape(ids.shape[:-1])
            return text

        _decode_tf = text

        def _decode_rows(self, ids: np.ndarray) -> np.ndarray:
            rows = ids.reshape(-1, ids.shape[-1]) if ids.size else ids.reshape(int(np.prod(ids.shape[:-1])), 0)
            texts = [self._decode(row.tolist()).encode() for row in rows]
            return np.array(texts, object).reshape(ids.shape[:-1])

        def __eq__(self, other: object) -> bool:
            return isinstance(other, type(self)) and other.tokenizer.fingerprint == self.tokenizer.fingerprint

        def __hash__(self) -> int:
            return hash(self.tokenizer.fingerprint)

    return CrystalVocabulary


@functools.cache
def _source_class() -> type:
    import seqio
    import tensorflow as tf

    class StoreSource(seqio.DataSource):
        """What is read of a store, as documents; its shards are the store's, which are put in another order to shuffle.

        views: by split.
        """

        supports_arbitrary_sharding = False

        def __init__(self, store: TokenStore, views: dict[str, TokenView]) -> None:
            counts = {split: sum(count_documents(store, split, span) for span in view.shards)
                      for split, view in views.items()}
            super().__init__(tuple(views), counts)
            self._store, self._views = store, views

        def list_shards(self, split: str) -> list[str]:
            return [span.name for span in self._views[split].shards]

        def get_dataset(self, split: str = "train", shuffle: bool = True, seed: int | None = None,
                        shard_info: Any = None, **_: Any) -> Any:
            spans = self._views[split].shards
            spans = spans[shard_info.index :: shard_info.num_shards] if shard_info else spans
            if shuffle:
                spans = [spans[index] for index in np.random.default_rng(seed).permutation(len(spans))]
            return tf.data.Dataset.from_generator(lambda: self._examples(split, spans), output_signature={
                "targets": tf.TensorSpec([None], tf.int32),
                "id": tf.TensorSpec([], tf.string),
                "source": tf.TensorSpec([], tf.string),
            })

        def _examples(self, split: str, spans: list[ShardSpan]) -> Iterator[dict[str, Any]]:
            for span in spans:
                for document in read_documents(self._store, self._views[split], split, span):
                    # A file's name may hold bytes that no UTF-8 has.
                    yield {"targets": document.ids, "id": document.id.encode(errors="backslashreplace"),
                           "source": document.source.encode(errors="backslashreplace")}

    return StoreSource


def _add_task(name: str, store: TokenStore, subset: Subset, vocabulary: Any) -> None:
    import seqio

    def documents_or_windows(dataset: Any, sequence_length: Any) -> Any:
        if length := (sequence_length or {}).get("targets"):
            return dataset.map(lambda example: {"targets": example["targets"]}).rebatch(length, drop_remainder=True)
        return dataset.map(lambda example: {**example, "targets_pretokenized": vocabulary.text(example["targets"])})

    read = {split: subset if split == "train" else WHOLE for split in SPLITS if store.splits[split]["tokens"]}
    views = {split: store.view(split, part.files, part.first) for split, part in read.items()}
    seqio.TaskRegistry.add(
        name,
        source=_source_class()(store, views),
        output_features={"targets": seqio.Feature(vocabulary, add_eos=False)},
        preprocessors=[documents_or_windows],
    )


def _check_installed() -> None:
    try:
        import seqio  # noqa: F401
    except Exception as error:  # protobuf raises one of its own where sentencepiece was made for another version
        raise UserError(f"seqio: can't be imported ({error}), and the registry needs it; {install('data')}") from error
