"""Importing many branches, what stands beside the weights, and training that goes on from an imported folder."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_convert import TINY, assert_same_params, exported, random_params, refused, tiny, write_tokenizer
from test_families import LLAMA, STARCODER
from world import make_config

from benchmarks.measure import peak_anonymous
from crystal_jax import cli
from crystal_jax.checkpoint import load_weights
from crystal_jax.config import Config, LearningRate, ModelConfig, Phase, digest
from crystal_jax.convert import export, forms, importer
from crystal_jax.fingerprint import fingerprint
from crystal_jax.history import read_metrics
from crystal_jax.rules import validate
from crystal_jax.train import train

NAMES = {"phase1/step_079721": "CrystalCoder_phase1_checkpoint_079721",
         "phase2/step_003000": "CrystalCoder_phase2_checkpoint_003000",
         "phase3/step_027728": "CrystalCoder_phase3_checkpoint_027728"}


@pytest.fixture
def branches(tmp_path: Path) -> Path:
    """A folder as a download of three branches leaves it, each with weights of its own."""
    place = tmp_path / "hub"
    for seed, name in enumerate(NAMES.values()):
        export.export(tiny(params=random_params(TINY, seed)), "llm360", place / name)
    (place / ".cache").mkdir()
    (place / "CrystalCoder_phase1_checkpoint_1500").mkdir()
    (place / "README.md").write_text("notes")
    return place


def command(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


# Many branches


def test_each_branch_becomes_a_checkpoint(branches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ("import", "--from=llm360", f"--input={branches}", f"--output={out}")
    assert command(*arguments) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(out / name) for name in NAMES]
    for seed, (name, branch) in enumerate(NAMES.items()):
        weights = load_weights(out / name)
        assert_same_params(weights.params, random_params(TINY, seed))
        assert weights.model == TINY
        phase, step = name.split("/step_")
        assert (weights.info["phase"], weights.info["phase_step"]) == (phase, int(step))
        assert (weights.info["name"], weights.info["step"]) == (branch, None)
    assert sorted(path.name for path in out.iterdir()) == ["phase1", "phase2", "phase3"]
    assert [path.name for path in (out / "phase1").iterdir()] == ["step_079721"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert command(*arguments, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["passed_over"] for entry in found] == [True, True, True]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_damaged_branch_stops_the_import_and_the_same_command_goes_on(branches: Path, tmp_path: Path) -> None:
    broken = branches / NAMES["phase2/step_003000"] / "model.safetensors"
    content = broken.read_bytes()
    broken.write_bytes(content[:-4])
    out = tmp_path / "out"
    assert str(broken) in refused(lambda: list(importer.import_all("llm360", branches, out)))
    assert [path.name for path in out.glob("*/*")] == ["step_079721"]
    broken.write_bytes(content)
    (out / "phase2" / ".step_003000.scratch").mkdir(parents=True)  # left by a kill
    (out / "phase2" / ".step_003000.scratch" / "embed").write_bytes(b"half")
    found = list(importer.import_all("llm360", branches, out))
    assert ["passed_over" in summary for summary in found] == [True, False, False]
    assert sorted(path.name for path in out.glob("*/*")) == ["step_003000", "step_027728", "step_079721"]


def test_another_branch_in_the_place_is_refused(branches: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "phase1" / "step_079721"
    importer.import_checkpoint("crystal", exported(tmp_path / "mine", "crystal"), place)
    message = refused(lambda: list(importer.import_all("llm360", branches, tmp_path / "out")))
    assert message.startswith(f"{place}: is mine, not CrystalCoder_phase1_checkpoint_079721")


def test_a_folder_without_any_branch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "CrystalCoder_main").mkdir()
    assert "config.json: missing" in refused(lambda: list(importer.import_all("llm360", tmp_path, tmp_path / "out")))


# Beside the weights


def test_a_tokenizer_that_does_not_fit_the_rows_is_refused(tmp_path: Path) -> None:
    place = exported(tmp_path / "out", "crystal")
    write_tokenizer(place / "tokenizer.json", 62)
    message = refused(importer.import_checkpoint, "crystal", place, tmp_path / "in")
    assert "tokenizer.json: has 62 ids, but config.json says 61 rows" in message
    (place / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": null}')
    importer.read_torch_folder(place, "crystal")
    for broken in ("[]", "{}", '{"model": {"vocab": {"a": "b"}}}', "{"):
        (place / "tokenizer.json").write_text(broken)
        assert "tokenizer.json: " in refused(importer.import_checkpoint, "crystal", place, tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = exported(tmp_path / "out", "crystal")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert "no space left" in refused(importer.import_checkpoint, "crystal", place, tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(importer, "new_file", None)
    assert "1,000 bytes free" in refused(importer.import_checkpoint, "crystal", place, tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_refused_import_leaves_nothing(tmp_path: Path) -> None:
    place = exported(tmp_path / "out", "crystal")
    stored = load_file(place / "model.safetensors")
    stored["model.norm.bias"] = np.full(24, np.nan, np.float32)
    save_file(stored, place / "model.safetensors")
    assert "model.norm.bias has values that are NaN" in refused(importer.import_checkpoint, "crystal", place,
                                                               tmp_path / "many" / "folders" / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_is_bounded_whatever_the_model(tmp_path: Path) -> None:
    model = replace(TINY, vocab_size=4096, embed_dim=768, mlp_dim=2048, num_layers=4)
    rng = np.random.default_rng(0)
    stored = {tensor.name: rng.standard_normal(forms.tensor_shape(tensor, model), np.float32)
              for tensor in forms.tensors(forms.CRYSTAL, model)}
    place = exported(tmp_path / "out", "crystal")
    importer.import_checkpoint("crystal", place, tmp_path / "warm")
    (place / "config.json").write_text(json.dumps(forms.make_config(forms.CRYSTAL, model)))
    save_file(stored, place / "model.safetensors")
    size = sum(values.nbytes for values in stored.values()) / 2**20
    del stored
    gc.collect()
    with peak_anonymous() as peak:
        importer.import_checkpoint("crystal", place, tmp_path / "in")
    assert size > 120
    assert peak.highest - peak.before < 60, f"MiB, for a model of {size:.0f}"


# The vocabulary


@settings(max_examples=15)
@given(form=st.sampled_from(["crystal", "llm360", "llama", "starcoder"]), rows=st.integers(40, 90),
       padding=st.integers(1, 70), where=st.sampled_from(["both", "embedding", "head"]))
def test_rows_of_padding(form: str, rows: int, padding: int, where: str,
                         tmp_path_factory: pytest.TempPathFactory) -> None:
    """An export has the vocabulary's rows, no more; a folder with more than its config.json says is refused."""
    model = replace({"llama": LLAMA, "starcoder": STARCODER}.get(form, TINY), vocab_size=rows)
    place, table = tmp_path_factory.mktemp("rows") / "out", forms.FORMS[form]
    export.export(tiny(params=random_params(model), model=model), form, place)
    stored = load_file(place / "model.safetensors")
    tables = [name for name in (table.tensors[0].name, table.head or "lm_head.weight") if name in stored]
    assert {stored[name].shape[0] for name in tables} == {rows}
    chosen = {"embedding": tables[:1], "head": tables[-1:]}.get(where, tables)
    for name in chosen:
        stored[name] = np.pad(stored[name], ((0, padding), (0, 0)))
    save_file(stored, place / "model.safetensors")
    message = refused(importer.read_torch_folder, place, form)
    if chosen == [table.head]:  # a copy that isn't one
        assert f"{table.head} differs from {tables[0]}" in message
    else:
        assert f"the tensor {chosen[0]} has {rows + padding} rows, config.json says vocab_size {rows}" in message
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"vocab_size": rows + padding}))
    if where == "both":
        assert importer.read_torch_folder(place, form)[0]["embed"].shape[0] == rows + padding
    elif len(tables) > 1:
        refused(importer.read_torch_folder, place, form)


@pytest.mark.parametrize("form", ["stablelm", "gguf"])
def test_computed_forms_have_the_rows_of_the_vocabulary(form: str, world: Path, tmp_path: Path) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    model = replace(TINY, vocab_size=451)
    weights = tiny(params=random_params(model), model=model, tokenizer=world / "tokenizer.json")
    made, _ = export.make(weights, form, export.Options(), "")
    tables = [tensor for name, tensor in made.storage.tensors.items() if tensor.source == "embed"]
    assert [tensor.shape[0] for tensor in tables] == [451, 451]


# Training goes on


FORMS = {"llm360": None, "llama": LLAMA, "starcoder": STARCODER}


def short(world: Path, model: ModelConfig | None) -> Config:
    """Ten steps over the world's stores, with a model of another family if one is given."""
    config = make_config(world)
    if model is not None:
        config.model = replace(model, vocab_size=448, max_length=32)
    config.phases = [Phase("phase1", steps=10, mix={"text": 0.5, "code": 0.5}, lr=LearningRate(0.003, 2, 0.001, 20),
                           checkpoint_every=10)]
    config.training = dataclasses.replace(config.training, log_every=1, eval_every=10)
    return validate(config)


@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_from_an_imported_folder_and_is_exported_again(form: str, world: Path, tmp_path: Path) -> None:
    config = short(world, FORMS[form])
    params = random_params(config.model, 5)
    export.export(tiny(params=params, model=config.model, tokenizer=world / "tokenizer.json"), form,
                  tmp_path / "published")
    assert command("import", f"--from={form}", f"--input={tmp_path / 'published'}", f"--output={tmp_path / 'in'}") == 0
    train(config, tmp_path / "run", tmp_path / "in")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert digest(fingerprint(params)) in json.dumps(plan)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")
              if record["kind"] == "train"]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    trained = tmp_path / "run" / "exports" / "phase1" / "step_000010"
    shutil.rmtree(tmp_path / "published")
    export.export(load_weights(trained), form, tmp_path / "published")
    assert_same_params(importer.read_torch_folder(tmp_path / "published", form)[0], load_weights(trained).params)
