"""A small world for tests: a tokenizer, two token stores and a three-phase config, made by the real commands."""

import dataclasses
import json
import random
from pathlib import Path

from crystal_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LearningRate,
    ModelConfig,
    Phase,
    Source,
    Subset,
    TrainingConfig,
)
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.data.tokenizer import train_tokenizer
from crystal_jax.rules import validate

from configs import crystal_tiny

WORDS = ("the", "crystal", "grows", "in", "phases", "of", "light", "and", "code", "naïve", "café", "日本", "under")
NAMES = ("x", "y", "total", "item", "row", "value", "result")


def tiny_600() -> Config:
    """The demo's recipe over 600 steps of 8 sequences: 1,228,800 tokens in phases of 148, 400 and 52 steps."""
    config = crystal_tiny.get_config("600")
    for phase in config.phases:
        phase.global_batch_size = 8
    return config


def text(rng: random.Random) -> str:
    return ". ".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(rng.randint(2, 12))) + ".\n"


def code(rng: random.Random) -> str:
    lines = [f"    {rng.choice(NAMES)} = {rng.choice(NAMES)} + {rng.randint(0, 99)}" for _ in range(rng.randint(2, 12))]
    return f"def {rng.choice(NAMES)}({rng.choice(NAMES)}):\n" + "\n".join(lines) + "\n    return result\n"


def make_world(root: Path, documents: int = 400, vocab_size: int = 420) -> Path:
    """root/tokenizer.json and the stores root/text and root/code of four shards each."""
    rng = random.Random(0)
    made = {"text": [text(rng) for _ in range(documents)], "code": [code(rng) for _ in range(documents)]}
    root.mkdir(parents=True, exist_ok=True)
    train_tokenizer([*made["text"], *made["code"]], vocab_size).save(str(root / "tokenizer.json"))
    for name, found in made.items():
        raw = root / "raw" / name
        raw.mkdir(parents=True)
        for shard in range(4):
            lines = [json.dumps({"text": document}) for document in found[shard::4]]
            (raw / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
        prepare(SourceSpec("jsonl", (str(raw),)), name, root / "tokenizer.json", root,
                Options(heldout=0.1))
    return root


def make_config(root: Path, **training: object) -> Config:
    """Three phases of 6, 8 and 4 steps with the marks of the full recipe: subsets, FIM, carried and fresh moments."""
    phases = [
        Phase("phase1", steps=6, mix={"text": 0.9, "code": 0.1}, subset={"text": Subset("even")},
              lr=LearningRate(0.01, 2, 0.001, 20), checkpoint_every=3),
        Phase("phase2", steps=8, mix={"text": 0.35, "code": 0.65}, subset={"text": Subset("odd")},
              fim_rate={"code": 0.9}, lr=LearningRate(0.008, 2, 0.001, 6), checkpoint_every=5),
        Phase("phase3", tokens=4 * 8 * 32, mix={"text": 0.2, "code": 0.8}, subset={"text": Subset(first=0.5)},
              fim_rate={"code": 0.3}, lr=LearningRate(0.002, 1, 0.001, 3), optimizer="carried", checkpoint_every=100),
    ]
    settings = {"dtype": "float32", "remat": "none", "log_every": 2, "eval_every": 7, "eval_sequences": 8, **training}
    return validate(Config(
        name="world",
        model=ModelConfig(vocab_size=448, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=48, max_length=32,
                          rotary_dim=4, mup_base_width=16),
        sources={"text": Source("text", "text"), "code": Source("code", "code")},
        phases=phases,
        data=DataConfig(str(root), "tokenizer.json", 32),
        training=dataclasses.replace(TrainingConfig(), **settings),
        checkpoints=CheckpointConfig(every_steps=5, keep_last=2),
    ))


def write_config(root: Path, file: Path) -> Path:
    """A config file for the command line that returns `make_config(root)`."""
    file.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                    f"from pathlib import Path\nfrom world import make_config\n\n\n"
                    f"def get_config():\n    return make_config(Path({str(root)!r}))\n")
    return file
