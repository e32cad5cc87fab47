"""From a trained run to PyTorch and back, by the commands a user types: the same logits, text and bits."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import OUTER_ENVIRONMENT, RunCli
from world import write_config

from crystal_jax.checkpoint import load_weights
from crystal_jax.data.tokenizer import Tokenizer

PROMPT = "def total(x):\n    "
# Nothing of ours is on the path: -I, an empty folder, and crystal_jax must not be importable from the script.
SCRIPT = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, tokens, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
with torch.no_grad():
    np.save(logits, model(torch.tensor(np.load(tokens)).long()).logits.float().numpy())
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
assert not any(name.split(".")[0] in ("crystal_jax", "jax", "flax") for name in sys.modules)
print(json.dumps(out[0, ids.shape[1]:].tolist()))
"""


@pytest.fixture(scope="module")
def run(world: Path, run_cli: RunCli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(world, folder / "config.py")
    result = run_cli("train", f"--config={config}", f"--run_dir={folder / 'run'}")
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.torch
def test_a_trained_run_gives_the_same_logits_and_text_in_transformers(
        run: Path, run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("convert", "export", "--to=crystal", f"--checkpoint={run}", f"--output={tmp_path / 'hf'}")
    assert result.returncode == 0, result.stderr
    weights = load_weights(run)
    tokens = np.random.default_rng(0).integers(0, 420, (3, 24)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "empty").mkdir()
    clean = {key: value for key, value in OUTER_ENVIRONMENT.items() if key != "PYTHONPATH"}
    theirs = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(tmp_path / "hf"), PROMPT, str(tmp_path / "tokens.npy"),
         str(tmp_path / "logits.npy")], cwd=tmp_path / "empty", capture_output=True, text=True, check=False,
        env={**clean, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert theirs.returncode == 0, theirs.stderr
    logits = np.load(tmp_path / "logits.npy")

    scored = run_cli("score", f"--checkpoint={run}", f"--tokens={tmp_path / 'tokens.npy'}",
                     f"--output={tmp_path / 'scores.npy'}")
    assert scored.returncode == 0, scored.stderr
    expected = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    expected = np.take_along_axis(expected, tokens[:, 1:, None], -1)[..., 0]
    assert np.abs(np.load(tmp_path / "scores.npy") - expected).max() < 1e-5

    text = run_cli("generate", f"--checkpoint={run}", f"--prompt={PROMPT}", "--max_tokens=12", "--json")
    assert text.returncode == 0, text.stderr
    assert weights.tokenizer is not None
    ids = json.loads(theirs.stdout)
    tokenizer = Tokenizer.load(weights.tokenizer)
    ids = ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids
    assert json.loads(text.stdout)["text"] == tokenizer.decode_fragment(ids)


def test_exported_and_imported_again_every_bit_is_the_same(run: Path, run_cli: RunCli, tmp_path: Path) -> None:
    """A permanent checkpoint, through both forms and the command line."""
    original = load_weights(run / "exports" / "phase2" / "step_000008")
    for form in ("crystal", "llm360"):
        out, back = tmp_path / form, tmp_path / f"{form}-back"
        exported = run_cli("convert", "export", f"--to={form}", f"--output={out}",
                           f"--checkpoint={run / 'exports' / 'phase2' / 'step_000008'}")
        assert exported.returncode == 0, exported.stderr
        again = run_cli("convert", "export", f"--to={form}", f"--output={out}",
                        f"--checkpoint={run / 'exports' / 'phase2' / 'step_000008'}")
        assert again.returncode == 0, again.stderr
        imported = run_cli("convert", "import", f"--from={form}", f"--input={out}", f"--output={back}")
        assert imported.returncode == 0, imported.stderr
        found = load_weights(back)
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), found.params,
                            original.params)
        assert all(jax.tree.leaves(same))
        assert found.model == original.model


def test_the_report_of_a_real_run(run: Path, run_cli: RunCli) -> None:
    result = run_cli("report", f"--run_dir={run}")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip().splitlines()[-1]).name == "report.html"
    page = (run / "report" / "report.html").read_text()
    assert "phase3" in page and "unigram" in page and "http" not in page.replace("http://www.w3.org", "")


def test_infilling_and_sampling_from_the_command_line(run: Path, run_cli: RunCli) -> None:
    command = ("generate", f"--checkpoint={run}", "--prefix=def x(y):", "--suffix=    return result", "--max_tokens=6",
               "--temperature=1", "--num_samples=2", "--json")
    first, second = run_cli(*command), run_cli(*command)
    assert first.returncode == 0, first.stderr
    samples = [json.loads(line) for line in first.stdout.splitlines()]
    assert first.stdout == second.stdout and len(samples) == 2 and samples[0]["text"] != samples[1]["text"]
