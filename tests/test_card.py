"""The model card of each form: what is known of the checkpoint, how it is loaded, and what the gate measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_convert import Checkpoint, write_tokenizer
from test_parity import FAMILY, MODELS, drawn

from crystal_jax.convert import card, export, parity
from crystal_jax.convert.export import make
from crystal_jax.convert.made import Options

INFO = {"name": "phase2/step_000120", "phase": "phase2", "phase_step": 120, "step": 320, "tokens": 655_360,
        "tokens_per_source": {"text": 229_376, "code": 425_984}, "lr": 0.0042, "plan_hash": "abc123",
        "heldout": {"code": {"loss": 3.62390801, "bits_per_byte": 1.60901, "tokens": 16384, "unigram_entropy": 5.7}},
        "config": {"phases": [{"name": "phase1", "mix": {"text": 1.0}},
                              {"name": "phase2", "mix": {"text": 0.35, "code": 0.65}}]}}


@pytest.mark.parametrize("form", FAMILY)
def test_a_card_says_what_is_known(form: str, tmp_path: Path) -> None:
    model = MODELS[FAMILY[form]]
    export.export(Checkpoint(drawn(model), model, None, INFO), form, tmp_path / "out", command="crystal-jax convert it")
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("# phase2/step_000120", "| Phase | phase2 |", "| Step of the run | 320 |", "| Tokens | 655,360 |",
                 "| Tokens of code | 425,984 |", "| Data of the phase | text 0.35, code 0.65 |",
                 "| code | 3.62391 | 1.60901 | 16,384 |", "crystal-jax convert it", "names no tokenizer"):
        assert part in text, part
    assert "None" not in text and "{" not in text
    assert ("trust_remote_code=True" in text) == (form in ("crystal", "llm360"))
    assert f"in {parity.read(tmp_path / 'out')['same_top_token']} of 96\nplaces" in text


def test_a_card_says_what_isnt_known(tmp_path: Path) -> None:
    model = MODELS["crystal"]
    info = {**INFO, "heldout": {"code": {"loss": 3.62390801, "tokens": 16384}}}
    export.export(Checkpoint(drawn(model), model, None, info), "crystal", tmp_path / "some")
    assert "| code | 3.62391 | - | 16,384 |" in (tmp_path / "some" / "README.md").read_text()
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


@pytest.mark.parametrize("adds", [False, True])
def test_the_note_on_the_start_is_for_tokenizers_that_add_none(adds: bool, tmp_path: Path) -> None:
    path, model = write_tokenizer(tmp_path / "tokenizer.json"), replace(MODELS["crystal"], vocab_size=61)
    added = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
             "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                      {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": added if adds else None}))
    export.export(Checkpoint(drawn(model), model, path), "crystal", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("adds no `<s>`" in text) != adds
    assert "There is no padding token" in text


@pytest.mark.parametrize("family", ["crystal", "llama", "starcoder"])
def test_ids_are_the_familys_where_no_tokenizer_is_named(family: str, tmp_path: Path) -> None:
    export.export(Checkpoint(drawn(MODELS[family]), MODELS[family]), family, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == ((None, None) if family == "starcoder" else (1, 2))


def test_starcoders_tokenizer_has_no_start_to_note(tmp_path: Path) -> None:
    path, model = tmp_path / "tokenizer.json", MODELS["starcoder"]
    path.write_text(write_tokenizer(path).read_text().replace("</s>", "<|endoftext|>").replace("<s>", "<|begin|>"))
    special = card._special_tokens(path, path.read_bytes(), 61)
    assert special.roles == card.ROLES[1]
    made = make(Checkpoint(drawn(model), model), "starcoder", Options(), "")[0]
    wide = replace(model, vocab_size=61)
    files = card.companion_files(Checkpoint({}, wide, path), made, "float32", "")
    assert "`<s>`" not in files["README.md"].decode()
    assert json.loads(files["config.json"])["eos_token_id"] == 2
