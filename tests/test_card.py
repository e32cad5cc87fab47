"""The model card of each form: what is known of the checkpoint, how it is loaded, and what the gate measured."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_convert import Checkpoint
from test_parity import FAMILY, MODELS, drawn

from crystal_jax.convert import export, parity

INFO = {"name": "phase2/step_000120", "phase": "phase2", "phase_step": 120, "step": 320, "tokens": 655_360,
        "tokens_per_source": {"text": 229_376, "code": 425_984}, "lr": 0.0042, "plan_hash": "abc123",
        "heldout": {"code": {"loss": 3.62390801, "tokens": 16384, "unigram_entropy": 5.7}},
        "config": {"phases": [{"name": "phase1", "mix": {"text": 1.0}},
                              {"name": "phase2", "mix": {"text": 0.35, "code": 0.65}}]}}


@pytest.mark.parametrize("form", FAMILY)
def test_a_card_says_what_is_known(form: str, tmp_path: Path) -> None:
    model = MODELS[FAMILY[form]]
    export.export(Checkpoint(drawn(model), model, None, INFO), form, tmp_path / "out", command="crystal-jax convert it")
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("# phase2/step_000120", "| Phase | phase2 |", "| Step of the run | 320 |", "| Tokens | 655,360 |",
                 "| Tokens of code | 425,984 |", "| Data of the phase | text 0.35, code 0.65 |",
                 "| code | 3.62391 | 16,384 |", "crystal-jax convert it", "names no tokenizer"):
        assert part in text, part
    assert "None" not in text and "{" not in text
    assert ("trust_remote_code=True" in text) == (form in ("crystal", "llm360"))
    assert f"in {parity.read(tmp_path / 'out')['same_top_token']} of 64\nplaces" in text


def test_a_card_says_what_isnt_known(tmp_path: Path) -> None:
    model = MODELS["crystal"]
    export.export(Checkpoint(drawn(model), model), "crystal", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Crystal checkpoint" in text
    assert "no record of its training" in text and "no evaluation of this step on record" in text


def test_a_gguf_file_comes_with_a_card_only(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs gguf: pip install -r requirements/data.txt")
    model = replace(MODELS["crystal"], vocab_size=448)
    export.export(Checkpoint(drawn(model), model, world / "tokenizer.json"), "gguf", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf", "parity.json"]
    assert "llama-cli --model" in (tmp_path / "out" / "README.md").read_text()
