"""The tokenizer of a GGUF file: pieces and scores with which llama.cpp gives the ids of a tokenizer.json.

llama.cpp (its tokenizer "llama") joins any neighbours that make a piece, the one with the highest score first; a
tokenizer.json joins only the pairs of its list, in the list's order. With scores of minus the place in the list the two
agree if each piece's own text becomes that piece and the pairs that make it stand together: neighbours that make a
piece are then such a pair. Both are checked, so that no other tokenizer gets into a file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_jax.errors import UserError

NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
FIM = {"pre": "<|fim_prefix|>", "mid": "<|fim_middle|>", "suf": "<|fim_suffix|>", "pad": "<|fim_pad|>"}
"""llama.cpp's names for the tokens of its /infill."""


@dataclass(frozen=True)
class Vocabulary:
    """Per row of the embedding: the piece, its score and its type, in llama.cpp's terms."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    ids: dict[str, int]
    """Of the added tokens, by content."""

    def describe(self, writer: Any) -> None:
        """Adds the tokenizer's keys; <s> goes in front, as in training and `generate`, unlike in the tokenizer.json."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.pieces)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)
        writer.add_unk_token_id(self.ids["<unk>"])
        writer.add_bos_token_id(self.ids["<s>"])
        writer.add_eos_token_id(self.ids["</s>"])
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(True)
        for name, content in FIM.items():
            if content in self.ids:
                writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", self.ids[content])


def make_vocabulary(path: Path, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json of Crystal's family for a model with `rows` rows.

    Raises:
      UserError: a tokenizer of another family, one that llama.cpp would not follow, or one with more ids than rows.
    """
    from gguf import TokenType

    try:
        spec = json.loads(path.read_bytes())
        model, added, normalizer = spec["model"], spec["added_tokens"], spec["normalizer"]
        pieces, unknown = model["vocab"], model["unk_token"]
        merges = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
        ids = {token["content"]: token["id"] for token in added}
        family = model["type"] == "BPE" and model["byte_fallback"] and not spec.get("pre_tokenizer")
        single = {pieces[f"<0x{byte:02X}>"] for byte in range(256)}
        _ = [ids[token] for token in ("<unk>", "<s>", "</s>")]
        used = 1 + max(*ids.values(), *pieces.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer.json of Crystal's family ({error!r}); use --to=stablelm") from None
    if not family or normalizer != NORMALIZER:
        raise UserError(f"{path}: of another family; --to=gguf takes BPE with byte_fallback, the normalizer Prepend, "
                        "Replace and no pre-tokenizer, as Crystal's and those of `tokenizer train`; use --to=stablelm")
    if used > rows:
        raise UserError(f"{path}: has {used} ids, but the model's vocabulary {rows}; not this model's tokenizer")
    _check_merges(path, spec, merges, single | set(ids.values()))
    rank = {piece: index for index, piece in reversed(list(enumerate(merges)))}
    found = {row: (f"[PAD{row}]", TokenType.UNUSED) for row in range(rows)}
    found |= {row: (piece, TokenType.BYTE if row in single else TokenType.NORMAL) for piece, row in pieces.items()}
    for token in added:
        kind = TokenType.UNKNOWN if token["content"] == unknown else TokenType.CONTROL
        found[token["id"]] = (token["content"], kind if token["special"] else TokenType.USER_DEFINED)
    return Vocabulary([piece for piece, _ in found.values()],
                      [-float(rank.get(piece, len(merges))) for piece, _ in found.values()],
                      [int(kind) for _, kind in found.values()], ids)


def _check_merges(path: Path, spec: dict[str, Any], merges: list[str], apart: set[int]) -> None:
    from tokenizers import Tokenizer

    done: set[str] = set()
    for piece, last in zip(merges, ["", *merges], strict=False):
        if piece != last and piece in done:
            raise UserError(f"{path}: the merges that make {piece!r} don't stand together, so that llama.cpp would "
                            "give other ids; use --to=stablelm")
        done.add(piece)
    plain = Tokenizer.from_str(json.dumps(spec | {"normalizer": None, "added_tokens": []}))
    pieces = [piece for piece, row in spec["model"]["vocab"].items() if row not in apart]
    for piece, found in zip(pieces, plain.encode_batch(pieces, add_special_tokens=False), strict=True):
        if found.tokens != [piece]:
            raise UserError(f"{path}: the text of the piece {piece!r} becomes {found.tokens}, so that llama.cpp would "
                            "give other ids; use --to=stablelm")
