"""Small stores and runs for the tests of `inspect`: several epochs in 18 steps, each kind of subset, two packings."""

import json
import random
from pathlib import Path

from world import code, make_config
from world import text as prose

from crystal_jax.config import Config, Subset, to_dict
from crystal_jax.data.pipeline import Batches, Stores, batch_hash
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.history import Record
from crystal_jax.run_dir import results_depend_on

STEPS, BATCH, LENGTH = 18, 8, 32


def make_small(world: Path, root: Path) -> Path:
    """Stores so small that 18 steps read some sources several times: four files of five documents each."""
    rng = random.Random(5)
    (root / "tokenizer.json").write_bytes((world / "tokenizer.json").read_bytes())
    for name, make in (("text", prose), ("code", code)):
        raw = root / "raw" / name
        raw.mkdir(parents=True)
        for shard in range(4):
            texts = [make(rng)[: rng.choice((20, 60, 400))] for _ in range(5)]
            lines = [json.dumps({"text": text, "key": f"{name}/{shard}-{line}"}) for line, text in enumerate(texts)]
            (raw / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
        prepare(SourceSpec("jsonl", (str(raw),), id_key="key"), name, root / "tokenizer.json", root,
                Options(heldout=0.2, packing="best_fit", sequence_length=LENGTH))
    return root


def small_config(root: Path, packing: str) -> Config:
    """Even, odd and first subsets, a cursor that goes on and one that begins afresh, FIM in two phases."""
    config = make_config(root)
    config.data.packing = packing
    config.phases[2].subset["code"] = Subset(first=0.6, cursor="fresh")
    return config


def write_run(folder: Path, config: Config, reached: int = 13, every: int = 3) -> Path:
    """What `train` leaves after `reached` steps that `inspect` reads."""
    stores = Stores(config)
    batches, plan = Batches(config, stores), results_depend_on(config, stores, None)
    lines = [{"kind": "start", "step": 0, "resumed": False, "time": 0.0}]
    lines += [{"kind": "train", "step": step, "tokens": batches.plan.tokens(step), "loss": 3.5, "grad_norm": 0.5,
               "loss_per_source": {"text": 4.0}, "batch_hash": batch_hash(batches[step - 1]), "time": 0.0}
              for step in range(every, reached + 1, every)]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config) | {"versions": {}}))
    (folder / "plan.json").write_text(json.dumps({"hash": Record(plan, []).hash, "plan": plan, "amendments": []}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
