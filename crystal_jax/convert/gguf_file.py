"""GGUF for llama.cpp: the tensors of the form stablelm, their quantisation, and the tokenizer, in one file.

Norms stay in float32, as llama.cpp wants them; all else has the type asked for. What is written is a function of the
checkpoint and the options alone, byte by byte.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crystal_jax.convert import stablelm
from crystal_jax.convert.computed import Computed, rounded
from crystal_jax.convert.forms import check_params
from crystal_jax.convert.made import MAX_SHARD_SIZE, Made, Options, Weights, stored_dtype
from crystal_jax.convert.vocabulary import Vocabulary, make_vocabulary
from crystal_jax.errors import UserError, install

FILE = "model.gguf"
QUANTISED = "Q8_0"
GROUP = 32
"""Values of a row that share a scale in q8_0; rows that aren't whole groups are stored in float16."""
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": QUANTISED}
"""--dtype to the format's name for it."""
WIDTHS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, QUANTISED: 7}
"""What the format says of a whole file (gguf.LlamaFileType)."""
ALIGNMENT = 32
"""Bytes; the format's default."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file."""

    name: str
    source: Computed
    kind: str
    """F32, F16, BF16 or Q8_0."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Its shape in values, or in bytes where rows are quantised: a scale in float16 and a byte per value."""
        *rows, values = self.source.shape
        return (*rows, values // GROUP * (GROUP + 2) if self.kind == QUANTISED else values)

    @property
    def dtype(self) -> np.dtype:
        """Of what `row_shape` counts."""
        return np.dtype(np.uint8) if self.kind == QUANTISED else WIDTHS[self.kind]

    @property
    def nbytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """All its bytes, in order.

        Raises:
          UserError: a value that isn't finite, or beyond the range of the type.
        """
        for start, stop in self.source.ranges:
            values = rounded(f"{self.name} (from {self.source.source})", self.source.rows(start, stop),
                             WIDTHS.get(self.kind, WIDTHS["F32"]))
            yield (_quantised(values) if self.kind == QUANTISED else values).reshape(-1).view(np.uint8)


def _quantised(values: np.ndarray) -> np.ndarray:
    import gguf

    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[QUANTISED])


def _padded(content: bytes, before: int = 0) -> bytes:
    """`content` with zeros up to where the next tensor begins, if `before` bytes are in front of it."""
    return content + bytes(-(before + len(content)) % ALIGNMENT)


@dataclass(frozen=True)
class Gguf:
    """One file for llama.cpp."""

    stored: list[Stored]
    config: dict[str, Any]
    """config.json of the form stablelm."""
    vocabulary: Vocabulary
    title: str
    kind: str
    """Of the matrices."""

    @property
    def names(self) -> list[str]:
        return [tensor.name for tensor in self.stored]

    @property
    def tensors(self) -> dict[str, Computed]:
        return {tensor.name: tensor.source for tensor in self.stored}

    @property
    def files(self) -> list[str]:
        return [FILE]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)

    def write(self, place: Path) -> None:
        with (place / FILE).open("wb") as file:
            for _, chunk in self._chunks():
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def difference(self, place: Path) -> str:
        with (place / FILE).open("rb") as file:
            for what, chunk in self._chunks():
                if file.read(len(chunk)) != chunk:
                    return f"{FILE}: {what} differs"
            return f"{FILE} is longer" if file.read(1) else ""

    def _chunks(self) -> Iterator[tuple[str, bytes]]:
        """(name of a part, its bytes) of the file, in order."""
        yield "what it says of model and tokenizer", _padded(self._header())
        for tensor in self.stored:
            for block in tensor.blocks():
                yield tensor.name, block.tobytes()
            yield tensor.name, _padded(b"", tensor.nbytes)

    def _header(self) -> bytes:
        import gguf

        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / FILE
            writer = gguf.GGUFWriter(path, "stablelm")
            self._describe(writer)
            for tensor in self.stored:
                writer.add_tensor_info(tensor.name, tensor.row_shape, tensor.dtype, tensor.nbytes,
                                       raw_dtype=gguf.GGMLQuantizationType[tensor.kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return path.read_bytes()

    def _describe(self, writer: Any) -> None:
        """The file's keys: what the model is, and its tokenizer."""
        config = self.config
        writer.add_name(self.title)
        writer.add_file_type(FILE_TYPES[self.kind])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        head = config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(int(head * config["partial_rotary_factor"]))
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_parallel_residual(config["use_parallel_residual"])
        self.vocabulary.describe(writer)


def make(weights: Weights, options: Options) -> Made:
    """The form gguf of a checkpoint: the form stablelm in one file.

    Raises:
      UserError: the package gguf isn't installed; no tokenizer, or one of another family; as stablelm.make.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"--to=gguf: needs the package gguf; {install('data')}") from None
    if options.max_shard_size != MAX_SHARD_SIZE:
        raise UserError(f"--max_shard_size={options.max_shard_size}: the form gguf is one file; leave the flag out")
    if options.dtype is not None and options.dtype not in KINDS:
        raise UserError(f"--dtype={options.dtype}: must be one of {', '.join(KINDS)}")
    model = weights.model
    wide = stablelm.widen(model, options.heads)
    params = check_params(weights.params, model, "the checkpoint")
    dtype = options.dtype if options.dtype == "q8_0" else stored_dtype(params, options.dtype)
    if weights.tokenizer is None:
        raise UserError("--to=gguf: the checkpoint names no tokenizer, and llama.cpp reads it from the same file; use "
                        "--to=stablelm")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, model.num_layers)
    stored = [Stored(str(names.get_name(name, (".weight", ".bias"))), source, _kind(source, KINDS[dtype]))
              for name, source in stablelm.make_tensors(params, wide).items()]
    vocabulary = make_vocabulary(weights.tokenizer, model.vocab_size)
    title = weights.info.get("name") or "Crystal checkpoint"
    return Made("gguf", dtype, Gguf(stored, stablelm.make_config(wide), vocabulary, title, KINDS[dtype]), {})


def _kind(source: Computed, kind: str) -> str:
    if len(source.shape) == 1:
        return "F32"
    return "F16" if kind == QUANTISED and source.shape[-1] % GROUP else kind
