"""GGUF for llama.cpp: the tensors of the form stablelm, their quantisation, and the tokenizer, in one file.

Norms stay in float32, as llama.cpp wants them; what else there is takes the type asked for. The vocabulary's scores make
llama.cpp merge in the order of the tokenizer's own merges.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crystal_jax.convert.computed import Computed, rounded
from crystal_jax.errors import UserError

FILE = "model.gguf"
TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
"""--dtype to the format's names: of a tensor, and the number for the file (gguf.LlamaFileType)."""
WIDTHS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANTISED_BLOCK = 32
"""Values in a row that share a scale in q8_0; rows that aren't whole blocks are stored in float16."""
NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
FIM = {"pre": "<|fim_prefix|>", "mid": "<|fim_middle|>", "suf": "<|fim_suffix|>", "pad": "<|fim_pad|>"}
"""llama.cpp's names for the tokens of its /infill."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file."""

    name: str
    source: Computed
    kind: str
    """F32, F16, BF16 or Q8_0."""

    @property
    def row_bytes(self) -> int:
        values = self.source.shape[-1]
        return values // QUANTISED_BLOCK * 34 if self.kind == "Q8_0" else values * WIDTHS[self.kind].itemsize

    @property
    def nbytes(self) -> int:
        return self.row_bytes * (self.source.shape[0] if len(self.source.shape) > 1 else 1)

    def blocks(self) -> Iterator[np.ndarray]:
        """All its bytes, in order.

        Raises:
          UserError: a value that isn't finite, or beyond the range of the type.
        """
        for start, stop in self.source.ranges:
            wide = np.dtype(np.float32) if self.kind == "Q8_0" else WIDTHS[self.kind]
            values = rounded(self.name, self.source.rows(start, stop), wide)
            yield (_quantised(values) if self.kind == "Q8_0" else values).reshape(-1).view(np.uint8)


def _quantised(values: np.ndarray) -> np.ndarray:
    import gguf

    return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)


def check_installed() -> None:
    """Refuses where the package gguf is missing, before anything is read."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--to=gguf needs the package gguf, which isn't installed; pip install 'crystal-jax[gguf]'"
                        ) from None


def make_stored(tensors: dict[str, Computed], layers: int, dtype: str) -> list[Stored]:
    """The tensors of the form stablelm under llama.cpp's names.

    Raises:
      UserError: a dtype that isn't one of TYPES.
    """
    import gguf

    if dtype not in TYPES:
        raise UserError(f"--dtype={dtype}: must be one of {', '.join(TYPES)}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, layers)
    kind = TYPES[dtype][0]
    found = []
    for name, source in tensors.items():
        own = "F32" if len(source.shape) == 1 else kind
        if own == "Q8_0" and source.shape[-1] % QUANTISED_BLOCK:
            own = "F16"
        found.append(Stored(names.get_name(name, try_suffixes=(".weight", ".bias")), source, own))
    return found


def write(path: Path, stored: list[Stored], config: dict[str, Any], tokenizer: bytes, title: str, dtype: str) -> None:
    """Writes the file, one block of rows at a time, and waits until it is on the disk.

    `config`: config.json of the form stablelm; `tokenizer`: a tokenizer.json of Crystal's family.

    Raises:
      UserError: a tokenizer of another family; as Stored.blocks.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "stablelm")
    writer.add_name(title)
    writer.add_file_type(TYPES[dtype][1])
    _add_sizes(writer, config)
    _add_tokenizer(writer, tokenizer, config["vocab_size"])
    for tensor in stored:
        shape, quantised = tensor.source.shape, tensor.kind == "Q8_0"
        writer.add_tensor_info(tensor.name, (*shape[:-1], tensor.row_bytes) if quantised else shape,
                               np.dtype(np.uint8) if quantised else WIDTHS[tensor.kind], tensor.nbytes,
                               raw_dtype=gguf.GGMLQuantizationType[tensor.kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for tensor in stored:
            for block in tensor.blocks():
                file.write(block.data)
            writer.write_padding(file, tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def difference(path: Path, stored: list[Stored]) -> str:
    """The first way in which the file's tensors aren't these, bit by bit; "" if they are."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if names := sorted(set(found) ^ {tensor.name for tensor in stored}):
        return f"its tensors differ from the model's in {names[0]}"
    for tensor in stored:
        kept = found[tensor.name]
        if (kept.tensor_type.name, tuple(kept.shape[::-1].tolist())) != (tensor.kind, tensor.source.shape):
            return f"its tensor {tensor.name} isn't {tensor.kind} {tensor.source.shape}"
        data, offset = kept.data.reshape(-1).view(np.uint8), 0
        for block in tensor.blocks():
            if not np.array_equal(data[offset : offset + block.size], block):
                return f"its tensor {tensor.name} has other values"
            offset += block.size
    return ""


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
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


@dataclass(frozen=True)
class Vocabulary:
    """Per row of the embedding: the piece, its score and its type, in llama.cpp's terms."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    ids: dict[str, int]
    """Of the special tokens, by content."""


def make_vocabulary(tokenizer: bytes, rows: int) -> Vocabulary:
    """What llama.cpp's tokenizer "llama" needs for the same ids as a tokenizer.json of Crystal's family.

    It joins the neighbours whose piece has the highest score, so a score is minus the rank of the first merge that makes
    the piece.

    Raises:
      UserError: a tokenizer of another family.
    """
    from gguf import TokenType

    spec = json.loads(tokenizer)
    model = spec["model"]
    if (model.get("type") != "BPE" or not model.get("byte_fallback") or spec.get("normalizer") != NORMALIZER
            or spec.get("pre_tokenizer") is not None):
        raise UserError("tokenizer.json: of another family; --to=gguf takes BPE with byte_fallback, the normalizer "
                        "Prepend, Replace and no pre-tokenizer, as Crystal's and those of `tokenizer train`")
    rank: dict[str, int] = {}
    for index, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), index)
    last = len(model["merges"])
    pieces = [f"[PAD{row}]" for row in range(rows)]
    scores, kinds = [-float(last)] * rows, [int(TokenType.UNUSED)] * rows
    for piece, row in model["vocab"].items():
        pieces[row], scores[row], kinds[row] = piece, -float(rank.get(piece, last)), int(TokenType.NORMAL)
    for byte in range(256):
        kinds[model["vocab"][f"<0x{byte:02X}>"]] = int(TokenType.BYTE)
    for token in spec["added_tokens"]:
        special = TokenType.UNKNOWN if token["content"] == model.get("unk_token") else TokenType.CONTROL
        pieces[token["id"]] = token["content"]
        kinds[token["id"]] = int(special if token["special"] else TokenType.USER_DEFINED)
    return Vocabulary(pieces, scores, kinds, {token["content"]: token["id"] for token in spec["added_tokens"]})


def _add_tokenizer(writer: Any, tokenizer: bytes, rows: int) -> None:
    """Adds <s> in front, which the documents of training began with, unlike the tokenizer.json: as `generate` does."""
    vocabulary = make_vocabulary(tokenizer, rows)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    writer.add_unk_token_id(vocabulary.ids["<unk>"])
    writer.add_bos_token_id(vocabulary.ids["<s>"])
    writer.add_eos_token_id(vocabulary.ids["</s>"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    for name, content in FIM.items():
        if content in vocabulary.ids:
            writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", vocabulary.ids[content])
