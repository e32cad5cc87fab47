"""A model that we trained says the same in JAX, in transformers and in llama.cpp, by the commands that a user types."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OUTER_ENVIRONMENT, RunCli
from llama_cpp import LlamaCpp

from crystal_jax.checkpoint import load_weights
from crystal_jax.generate import Generator, Sampling

PROMPTS = ("the crystal grows", "def total(x):\n    ", "naïve light")
NEW_TOKENS = 16
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from crystal_jax.config import LearningRate, Phase
from world import make_config


def get_config():
    config = make_config(Path({world!r}), log_every=100, eval_every=1000)
    config.phases = [Phase("phase1", steps=300, global_batch_size=16, mix={{"text": 0.5, "code": 0.5}},
                           lr=LearningRate(0.01, 20, 0.001, 300), checkpoint_every=1000)]
    config.checkpoints.every_steps = 1000
    return config
"""
# Nothing of ours is on the path: -I, an empty folder.
TRANSFORMERS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, code, count, *prompts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code == "True").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = []
for prompt in prompts:
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(count), do_sample=False)
    texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
print("\\n" + json.dumps(texts))
"""


@pytest.fixture(scope="module")
def run(world: Path, run_cli: RunCli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is long enough for words and lines of code."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.py").write_text(CONFIG.format(tests=str(Path(__file__).parent), world=str(world)))
    result = run_cli("train", f"--config={folder / 'config.py'}", f"--run_dir={folder / 'run'}")
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def in_jax(run: Path) -> list[str]:
    generator = Generator(load_weights(run))
    texts = [prompt + generator.complete(prompt, Sampling(max_tokens=NEW_TOKENS))[0] for prompt in PROMPTS]
    for text in texts:
        assert len(set(text[-16:])) > 4, "a text that only repeats itself would prove little"
    return texts


def test_the_checkpoint_knows_its_held_out_losses(run: Path) -> None:
    info = load_weights(run).info
    assert {domain: found["loss"] < found["unigram_entropy"] for domain, found in info["heldout"].items()} == {
        "text": True, "code": True}


def exported(run: Path, form: str, place: Path, run_cli: RunCli) -> Path:
    result = run_cli("convert", "export", f"--to={form}", f"--checkpoint={run}", f"--output={place}", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parity"]["same_top_token"] == json.loads(result.stdout)["parity"]["tokens"]
    return place


@pytest.mark.torch
@pytest.mark.parametrize("form", ["crystal", "stablelm"])
def test_transformers(form: str, run: Path, in_jax: list[str], run_cli: RunCli, tmp_path: Path) -> None:
    folder = exported(run, form, tmp_path / form, run_cli)
    clean = {key: value for key, value in OUTER_ENVIRONMENT.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", TRANSFORMERS, folder, str(form == "crystal"), str(NEW_TOKENS), *PROMPTS],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**clean, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == in_jax


def test_llama_cpp(run: Path, in_jax: list[str], run_cli: RunCli, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements/data.txt")
    server = LlamaCpp(exported(run, "gguf", tmp_path / "gguf", run_cli) / "model.gguf", 64)
    assert [prompt + server.greedy(prompt, NEW_TOKENS)[0] for prompt in PROMPTS] == in_jax
