"""The files beside the weights of an exported folder: config.json, generation, tokenizer and the model card.

All of them are pure functions of the checkpoint and the command, so the same export writes the same bytes.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from crystal_jax.convert.made import Made, Weights
from crystal_jax.errors import UserError

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Special:
    """The tokens of a tokenizer.json that have a meaning of their own."""

    ids: dict[str, int]
    """Role (bos_token, ...) to id."""
    tokens: list[dict[str, Any]]
    """added_tokens, as in tokenizer.json."""


def companion_files(weights: Weights, made: Made, dtype: str, command: str) -> dict[str, bytes]:
    """File name to content: all of a folder but the weights.

    Raises:
      UserError: a tokenizer that isn't the model's.
    """
    files: dict[str, bytes] = {}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if weights.tokenizer is not None:
        content = _read(weights.tokenizer)
        special = _special_tokens(weights.tokenizer, content, weights.model.vocab_size)
        ids = {f"{role}_id": special.ids[role] for role in ("bos_token", "eos_token")}
        files["tokenizer.json"] = content
        files["tokenizer_config.json"] = _json(tokenizer_config(special, weights.model.max_length))
        files["special_tokens_map.json"] = _json(ROLES | _others(special))
    config = made.config | ids | {"torch_dtype": dtype}
    files["config.json"] = _json(config)
    files["generation_config.json"] = _json({"_from_model_config": True, **ids, "pad_token_id": ids["eos_token_id"]})
    files["README.md"] = card(weights, made, dtype, command).encode()
    if made.ships_code:
        for name in made.code_files:
            files[name] = (resources.files("crystal_jax.convert") / name).read_bytes()
    return files


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the checkpoint's tokenizer can't be read: {error.strerror}") from None


def _special_tokens(path: Path, content: bytes, vocab_size: int) -> Special:
    try:
        data = json.loads(content)
        tokens, vocab = data["added_tokens"], data["model"]["vocab"]
        by_text = {token["content"]: token["id"] for token in tokens}
        used = 1 + max([*by_text.values(), *vocab.values()])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({error!r})") from None
    for text in ROLES.values():
        if text not in by_text:
            raise UserError(f"{path}: has no special token {text}, which every Crystal tokenizer has")
    if used > vocab_size:
        raise UserError(f"{path}: has {used} ids, but the model's vocabulary {vocab_size}; not this model's tokenizer")
    return Special({role: by_text[text] for role, text in ROLES.items()}, tokens)


def _others(special: Special) -> dict[str, list[str]]:
    roles = set(ROLES.values())
    return {"additional_special_tokens": [
        token["content"] for token in special.tokens if token["special"] and token["content"] not in roles
    ]}


def tokenizer_config(special: Special, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json for the plain fast class: a tokenizer class of one's own gives wrong ids in 5.x."""
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in special.tokens
    }
    return {
        "added_tokens_decoder": decoder,
        **ROLES,
        **_others(special),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "pad_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def card(weights: Weights, made: Made, dtype: str, command: str) -> str:
    """README.md: what the folder holds, where it comes from, how to load it, what isn't known about it."""
    info, model = weights.info, weights.model
    name = info.get("name") or "Crystal checkpoint"
    rows = [(label, _shown(info.get(key))) for key, label in RECORD.items() if info.get(key) is not None]
    per_source = info.get("tokens_per_source") or {}
    rows += [(f"Tokens of {source}", _shown(count)) for source, count in per_source.items()]
    table = "| | |\n|---|---|\n" + "\n".join(f"| {label} | {value} |" for label, value in rows)
    shape = (
        f"{model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads of {model.head_dim}, "
        f"MLP inner size {model.mlp_dim}, context {model.max_length}, {model.vocab_size} vocabulary rows, "
        f"weights in {dtype}"
    )
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}",
        f"A base language-and-code model of the Crystal architecture: {shape}.",
        "## Where it stands in training",
        table if rows else "The checkpoint has no record of its training.",
        f"Made with:\n\n```\n{command}\n```" if command else "",
        "## Loading",
        USAGE,
        f"The model's code is {made.code_files[0]}; read it before you trust it." if made.ships_code else LLM360_NOTE,
        TOKENIZER_NOTE if weights.tokenizer is not None else "The checkpoint names no tokenizer, so none is here.",
        "## What to know",
        HONEST,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


RECORD = {
    "phase": "Phase",
    "phase_step": "Step of the phase",
    "step": "Step of the run",
    "lr": "Learning rate",
    "plan_hash": "Plan",
    "imported_from": "Imported from",
    "tokens": "Tokens",
}
"""Key of a checkpoint's info to its line in the card."""

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this/folder", trust_remote_code=True)
```

Transformers 4 loads the weights in float32 unless from_pretrained is given `torch_dtype="auto"`."""

LLM360_NOTE = """The tensors and config.json have LLM360's published names. The two code files that config.json names,
configuration_crystalcoder.py and modeling_crystalcoder.py, are LLM360's and not part of this export: put them here from
LLM360's own release. That code runs with transformers 4.46; it fails to import in 5.x, where the form `crystal` is the
one to use."""

TOKENIZER_NOTE = """The tokenizer adds no `<s>`. Documents in training began with it, so put it in front of a prompt
yourself. There is no padding token: for batches set `tokenizer.pad_token = tokenizer.eos_token` and
`tokenizer.padding_side = "left"`, and pass the attention mask."""

HONEST = """These are weights after pretraining, or from the midst of it. They haven't been tuned to follow instructions
or filtered for safety, and they repeat what their data says, true or not. Code that the model writes must be reviewed
before it is run. This card was filled in from the checkpoint's own record; nothing in it was measured by an evaluation.
No license is stated here, since it is the owner's to choose."""
