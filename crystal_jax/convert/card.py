"""The files beside the weights of an exported folder: config.json, generation, tokenizer and the model card.

All of them are pure functions of the checkpoint and the command, so the same export writes the same bytes; what the
parity gate measured is added to the card later (parity.py).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from crystal_jax.convert.made import Made, Weights
from crystal_jax.errors import UserError

ROLES = ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
         dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))
"""Role to its token: in the tokenizers of Crystal and Llama, and in StarCoder's."""
IDS: dict[str, dict[str, int | None]] = {
    "crystal": {"bos_token_id": 1, "eos_token_id": 2},
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "starcoder": {"bos_token_id": None, "eos_token_id": None}}
"""Of a family's every tokenizer, for a checkpoint that names none; None where there are several, which keeps
transformers from its default."""


@dataclass(frozen=True)
class Special:
    """The tokens of a tokenizer.json that have a meaning of their own."""

    roles: dict[str, str]
    """One of ROLES."""
    ids: dict[str, int]
    """Role (bos_token, ...) to id."""
    tokens: list[dict[str, Any]]
    """added_tokens, as in tokenizer.json."""
    adds_start: bool
    """Whether it puts bos_token in front of a text by itself."""


def companion_files(weights: Weights, made: Made, dtype: str, command: str) -> dict[str, bytes]:
    """File name to content: all of a folder but the weights.

    Raises:
      UserError: a tokenizer that isn't the model's.
    """
    if not made.config:
        return {"README.md": card(weights, made, dtype, command, "").encode()}
    files: dict[str, bytes] = {}
    ids, note = IDS[weights.model.family], "The checkpoint names no tokenizer, so none is here."
    if weights.tokenizer is not None:
        content = _read(weights.tokenizer)
        special = _special_tokens(weights.tokenizer, content, weights.model.vocab_size)
        note = (START_NOTE if special.roles == ROLES[0] and not special.adds_start else "") + TOKENIZER_NOTE
        ids = {f"{role}_id": special.ids[role] for role in ("bos_token", "eos_token")}
        files["tokenizer.json"] = content
        files["tokenizer_config.json"] = _json(tokenizer_config(special, weights.model.max_length))
        files["special_tokens_map.json"] = _json(special.roles | _others(special))
    files["README.md"] = card(weights, made, dtype, command, note).encode()
    pad = {"pad_token_id": ids["eos_token_id"]}
    files["config.json"] = _json(made.config | ids | {"torch_dtype": dtype})
    files["generation_config.json"] = _json({"_from_model_config": True, **ids, **pad})
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
    roles = next((roles for roles in ROLES if set(roles.values()) <= by_text.keys()), None)
    if roles is None:
        raise UserError(f"{path}: has neither the special tokens <s>, </s> and <unk> nor <|endoftext|>; a tokenizer of "
                        "these families has the one or the other")
    if used > vocab_size:
        raise UserError(f"{path}: has {used} ids, but the model's vocabulary {vocab_size}; not this model's tokenizer")
    adds = json.dumps(roles["bos_token"]) in json.dumps(data.get("post_processor"))
    return Special(roles, {role: by_text[text] for role, text in roles.items()}, tokens, adds)


def _others(special: Special) -> dict[str, list[str]]:
    return {"additional_special_tokens": [
        token["content"] for token in special.tokens
        if token["special"] and token["content"] not in special.roles.values()
    ]}


def tokenizer_config(special: Special, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json for the plain fast class: a tokenizer class of one's own gives wrong ids in 5.x."""
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in special.tokens
    }
    return {
        "added_tokens_decoder": decoder,
        **special.roles,
        **_others(special),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "pad_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def card(weights: Weights, made: Made, dtype: str, command: str, note: str) -> str:
    """README.md: what the folder holds, where it comes from, how to load it, what isn't known about it.

    note: on its tokenizer.
    """
    info, model = weights.info, weights.model
    architecture, library = ARCHITECTURES[model.family], "gguf" if made.form == "gguf" else "transformers"
    shape = (
        f"{model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads of {model.head_dim}, "
        f"MLP inner size {model.mlp_dim}, context {model.max_length}, {model.vocab_size} vocabulary rows, "
        f"weights in {dtype}"
    )
    record, heldout = _record(info), info.get("heldout")
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n---",
        f"# {info.get('name') or 'Crystal checkpoint'}",
        f"A base language-and-code model of the {architecture} architecture: {shape}.",
        "## Where it stands in training",
        _table(("", ""), record) if record else "The checkpoint has no record of its training.",
        f"Made with:\n\n```\n{command}\n```" if command else "",
        "## Evaluation",
        _table(("Held-out text", "Loss in nats per token", "Bits per byte", "Tokens"),
               [(domain, *(_shown(found.get(name, "-")) for name in ("loss", "bits_per_byte", "tokens")))
                for domain, found in heldout.items()])
        if heldout else "The checkpoint has no evaluation of this step on record.",
        "## Loading",
        USAGE[made.form],
        note,
        "## What to know",
        HONEST,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _record(info: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table of training: what is known of RECORD, and the data."""
    rows: list[tuple[str, ...]] = [
        (label, _shown(info[key])) for key, label in RECORD.items() if info.get(key) is not None]
    rows += [(f"Tokens of {source}", _shown(count)) for source, count in (info.get("tokens_per_source") or {}).items()]
    phases = (info.get("config") or {}).get("phases") or []
    mix: dict[str, float] = next((phase["mix"] for phase in phases if phase["name"] == info.get("phase")), {})
    if mix:
        rows.append(("Data of the phase", ", ".join(f"{source} {share:.3g}" for source, share in mix.items())))
    return rows


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


ARCHITECTURES = {"crystal": "Crystal", "llama": "Llama 2", "starcoder": "StarCoder (gpt_bigcode)"}

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

WITH_CODE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this/folder")
```

Transformers 4 loads the weights in float32 unless from_pretrained is given `torch_dtype="auto"`."""

NATIVE = WITH_CODE.replace(", trust_remote_code=True", "") + """

No code comes with the weights: transformers and the serving engines that know `{model_type}` load them as they are."""

USAGE = {
    "crystal": f"{WITH_CODE} The model's code is modeling_crystal.py; read it before you trust it.",
    "llm360": f"""{WITH_CODE}

The tensors and config.json have LLM360's published names. The two code files that config.json names,
configuration_crystalcoder.py and modeling_crystalcoder.py, are LLM360's and not part of this export: put them here from
LLM360's own release. That code runs with transformers 4.46; it fails to import in 5.x, where the form `crystal` is the
one to use.""",
    "stablelm": NATIVE.format(model_type="stablelm") + """

This is the same model, written as a StableLM: a few channels and heads wider, with the biases that StableLM lacks as
columns of its matrices. It computes the same logits, and can't be turned back.""",
    "llama": NATIVE.format(model_type="llama"),
    "starcoder": NATIVE.format(model_type="gpt_bigcode"),
    "gguf": """```
llama-cli --model this/folder/model.gguf --prompt "def main(" --n-predict 64
```

One file for llama.cpp and what builds on it, with the tokenizer inside, which puts `<s>` in front of a prompt. To
llama.cpp the model is a StableLM.""",
}
"""How each form is loaded."""

START_NOTE = """The tokenizer adds no `<s>`. Documents in training began with it, so put it in front of a prompt
yourself. """

TOKENIZER_NOTE = """There is no padding token: for batches set `tokenizer.pad_token = tokenizer.eos_token` and
`tokenizer.padding_side = "left"`, and pass the attention mask."""

HONEST = """These are weights after pretraining, or from the midst of it. They haven't been tuned to follow instructions
or filtered for safety, and they repeat what their data says, true or not. Code that the model writes must be reviewed
before it is run. This card was filled in from the checkpoint's own record; its only evaluation is the one above.
No license is stated here, since it is the owner's to choose."""
