"""Conversion without PyTorch: the tables of forms, exported folders, what is refused, and the way back."""

import json
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from crystal_jax.config import ModelConfig
from crystal_jax.convert import calendar, command, export, folder, forms, importer
from crystal_jax.convert.forms import CRYSTAL, DTYPES, LEAVES, LLM360
from crystal_jax.errors import UserError

FORMS = {form.name: form for form in (CRYSTAL, LLM360)}
TINY = ModelConfig(vocab_size=61, embed_dim=24, num_layers=2, num_heads=3, mlp_dim=37, max_length=96, rotary_dim=4,
                   mup_base_width=6)
INFO = {"name": "phase2/step_000120", "phase": "phase2", "phase_step": 120, "step": 320, "tokens": 655_360,
        "tokens_per_source": {"text": 229_376, "code": 425_984}, "lr": 0.0042, "plan_hash": "abc123", "config": {}}


@dataclass
class Checkpoint:
    """What checkpoint.load_weights returns, built by hand."""

    params: dict[str, Any]
    model: ModelConfig
    tokenizer: Path | None = None
    info: dict[str, Any] = field(default_factory=dict)


def random_params(model: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """Parameters of a trained model's size, no bias zero and no norm's scale one."""
    rng = np.random.default_rng(seed)
    flat = {}
    for leaf in forms.leaves(model):
        values = rng.standard_normal(forms.leaf_shape(leaf, model))
        spread, mean = (0.2, 1.0) if leaf.endswith(".scale") else (0.073, 0.0) if leaf == "embed" else (0.15, 0.0)
        flat[leaf] = (mean + spread * values).astype(dtype)
    return forms.unflatten(flat)


def tiny(**changes: Any) -> Checkpoint:
    return replace(Checkpoint(random_params(TINY), TINY, None, dict(INFO)), **changes)


def write_tokenizer(path: Path, size: int = 61) -> Path:
    """A tokenizer.json in Crystal's manner with `size` ids."""
    special = ["<unk>", "<s>", "</s>", "<|fim_prefix|>", "<|sys_end|>"]
    pieces = [*special[:3], *(chr(0x21 + i) for i in range(size - 5)), *special[3:]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    added = [{"id": vocab[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for text in special]
    path.write_text(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                                "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
                                "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": []}}))
    return path


def assert_same_params(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal paths, dtypes and bits."""
    a, b = forms.flatten(a), forms.flatten(b)
    assert a.keys() == b.keys()
    for leaf in a:
        assert (a[leaf].dtype, a[leaf].shape) == (b[leaf].dtype, b[leaf].shape), leaf
        assert a[leaf].tobytes() == b[leaf].tobytes(), leaf


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    """The one line with which a call ends."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def exported(place: Path, form: str, **options: Any) -> Path:
    export.export(tiny(), form, place, **options)
    return place


# The tables


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_every_leaf_is_in_exactly_one_tensor(form: forms.Form) -> None:
    used = [(leaf, tensor.layer) for tensor in forms.tensors(form, TINY) for leaf in tensor.leaves]
    there = [(leaf, i) for leaf in forms.leaves(TINY) for i in (range(2) if "L:" in LEAVES[leaf] else [None])]
    assert sorted(used, key=str) == sorted(there, key=str)


def test_llm360_names_are_the_published_index(reference: Path) -> None:
    index = json.loads((reference / "crystalcoder_hf" / "pytorch_model.bin.index.json").read_text())
    model = ModelConfig()
    names = {tensor.name for tensor in forms.tensors(LLM360, model)} | {LLM360.head}
    assert len(names) == 14 * 32 + 4
    assert names | forms.ignored_names(LLM360, model) == set(index["weight_map"])
    # The size settles the shapes: float32 tensors, boolean 2048 x 2048 masks, a float32 masked_bias per layer.
    numbers = sum(int(np.prod(forms.tensor_shape(tensor, model))) for tensor in forms.tensors(LLM360, model))
    head, buffers = 4 * model.vocab_size * model.embed_dim, 32 * (2048 * 2048 + 4)
    assert numbers == 6_575_278_720
    assert 4 * numbers + head + buffers == index["metadata"]["total_size"]


def test_config_of_the_7b_model_is_the_published_one(reference: Path) -> None:
    published = json.loads((reference / "crystalcoder_hf" / "config.json").read_text())
    ours = forms.make_config(LLM360, ModelConfig()) | {"bos_token_id": 1, "eos_token_id": 2}
    assert ours == published
    assert forms.parse_config(LLM360, published, "config.json") == ModelConfig()


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@given(heads=st.integers(1, 6), half=st.integers(1, 8), base=st.integers(1, 64), scale=st.floats(0.1, 50))
def test_config_round_trip(form: forms.Form, heads: int, half: int, base: int, scale: float) -> None:
    model = replace(TINY, num_heads=heads, embed_dim=2 * heads * half, rotary_dim=2 * (half // 2), mup_base_width=base,
                    embed_scale=scale)
    config = json.loads(json.dumps(forms.make_config(form, model)))
    assert forms.parse_config(form, config, "config.json") == model


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@given(heads=st.integers(1, 3), size=st.integers(1, 4), mlp=st.integers(1, 9), layers=st.integers(1, 3),
       dtype=st.sampled_from(list(DTYPES)))
def test_tensors_keep_every_bit(form: forms.Form, heads: int, size: int, mlp: int, layers: int, dtype: str) -> None:
    model = replace(TINY, num_heads=heads, embed_dim=heads * size, mlp_dim=mlp, num_layers=layers, rotary_dim=0)
    params = forms.flatten(random_params(model, dtype=DTYPES[dtype]))
    back = {leaf: np.full_like(value, 9) for leaf, value in params.items()}
    for tensor in forms.tensors(form, model):
        stored = forms.read_tensor(params, tensor, model)
        assert stored.shape == forms.tensor_shape(tensor, model)
        forms.write_tensor(back, tensor, model, stored)
    assert_same_params(params, back)


def test_layout_of_fused_and_transposed_matrices() -> None:
    params = forms.flatten(random_params(TINY))
    stored = {form.name: {tensor.name: forms.read_tensor(params, tensor, TINY) for tensor in forms.tensors(form, TINY)}
              for form in FORMS.values()}
    fused = stored["llm360"]["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (24, 72)
    np.testing.assert_array_equal(fused[:, 24 + 8 : 24 + 16], params["layers.attn.k"][1][:, 1])  # head 1 of the keys
    key = stored["crystal"]["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(key, fused[:, 24:48].T)
    np.testing.assert_array_equal(stored["llm360"]["transformer.h.0.mlp.c_fc2.weight"], params["layers.mlp.gate"][0])
    np.testing.assert_array_equal(stored["crystal"]["model.layers.0.mlp.up_proj.weight"],
                                  stored["llm360"]["transformer.h.0.mlp.c_fc.weight"].T)


def test_what_a_form_cannot_say_is_refused() -> None:
    assert "rotary_base" in refused(forms.make_config, LLM360, replace(TINY, rotary_base=5e5))
    assert forms.make_config(CRYSTAL, replace(TINY, rotary_base=5e5))["rotary_base"] == 5e5
    assert "lama" in refused(forms.get_form, "lama", "--to")


@pytest.mark.parametrize(("key", "value", "part"), [
    ("model_type", "llama", "llama"), ("activation_function", "gelu", "swiglu"), ("n_inner", None, "n_inner"),
    ("n_layer", 2.5, "n_layer"), ("n_head", 0, "n_head"), ("n_head", 5, "multiple"), ("rotary_dim", 3, "even"),
    ("rotary_dim", 32, "head size"), ("mup_width_scale", 0.26, "whole"), ("tie_word_embeddings", False, "tie_word"),
    ("scale_attn_weights", False, "scale_attn"), ("layer_norm_epsilon", True, "layer_norm_epsilon"),
])
def test_another_architecture_is_refused(key: str, value: Any, part: str) -> None:
    config = forms.make_config(LLM360, TINY) | {key: value}
    message = refused(forms.parse_config, LLM360, config, "config.json")
    assert part in message
    assert message.startswith("config.json: ")


def test_a_missing_key_and_a_wrong_logit_scale_are_named() -> None:
    config = forms.make_config(CRYSTAL, TINY)
    assert "logit_scale" in refused(forms.parse_config, CRYSTAL, config | {"logit_scale": 1.0}, "config.json")
    del config["embed_scale"]
    assert "embed_scale is missing" in refused(forms.parse_config, CRYSTAL, config, "config.json")


# Export and the way back


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("max_shard_size", [export.MAX_SHARD_SIZE, 4000])
def test_import_of_export_is_bit_identical(form: str, dtype: str, max_shard_size: int, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    weights = tiny(params=random_params(TINY, 3, DTYPES[dtype]), tokenizer=tokenizer)
    summary = export.export(weights, form, tmp_path / "out", max_shard_size=max_shard_size)
    params, model, found = importer.read_torch_folder(tmp_path / "out", form)
    assert_same_params(params, weights.params)
    assert model == TINY
    assert found is not None
    assert found.read_bytes() == tokenizer.read_bytes()
    assert summary["dtype"] == dtype
    assert not summary["unchanged"]
    assert summary["tensors"] == {"crystal": 18 * 2 + 3, "llm360": 14 * 2 + 4}[form]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == summary["files"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    weights = tiny()
    export.export(weights, "crystal", tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    expected = weights.params["layers"]["mlp"]["down"][1].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored["model.layers.1.mlp.down_proj.weight"], expected)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_small_enough_and_indexed(tmp_path: Path) -> None:
    summary = export.export(tiny(), "llm360", tmp_path / "out", max_shard_size=8000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == summary["bytes"]
    for path in shards:
        stored = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in stored)
        assert sum(value.nbytes for value in stored.values()) <= 8000 or len(stored) == 1
    assert "lm_head.weight" in index["weight_map"]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), limit=st.integers(1, 100))
def test_shards_keep_the_order(sizes: list[int], limit: int) -> None:
    entries = [folder.Entry(str(i), (size,), np.dtype(np.float32)) for i, size in enumerate(sizes)]
    plan = folder.plan_files(entries, limit)
    assert [entry for shard in plan.values() for entry in shard] == entries
    assert all(sum(entry.nbytes for entry in shard) <= limit or len(shard) == 1 for shard in plan.values())


def test_companion_files(tmp_path: Path) -> None:
    weights = tiny(tokenizer=write_tokenizer(tmp_path / "tokenizer.json"))
    export.export(weights, "crystal", tmp_path / "out", command="crystal-jax convert export --to=crystal")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["logit_scale"], config["torch_dtype"]) == (TINY.logit_scale, "float32")
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_crystal.CrystalForCausalLM"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in settings
    assert settings["additional_special_tokens"] == ["<|fim_prefix|>", "<|sys_end|>"]
    assert settings["added_tokens_decoder"]["60"]["content"] == "<|sys_end|>"
    assert json.loads((out / "special_tokens_map.json").read_text())["bos_token"] == "<s>"
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    card = (out / "README.md").read_text()
    for part in ("phase2", "| 120 |", "655,360", "425,984", "0.0042", "crystal-jax convert export --to=crystal"):
        assert part in card
    assert "None" not in card


def test_the_card_of_llm360_says_whose_code_it_needs(tmp_path: Path) -> None:
    export.export(tiny(info={}), "llm360", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "configuration_crystalcoder.py and modeling_crystalcoder.py, are LLM360's" in card
    assert "no record of its training" in card
    assert not list((tmp_path / "out").glob("*.py"))
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_the_modelling_file_is_shipped_as_it_is(tmp_path: Path) -> None:
    export.export(tiny(), "crystal", tmp_path / "out")
    text = (tmp_path / "out" / "modeling_crystal.py").read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert "import crystal_jax" not in text
    assert "from crystal_jax" not in text
    assert "register_buffer" not in text


# Running again


def snapshot(place: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in place.iterdir()}


@pytest.mark.parametrize("form", list(FORMS))
def test_running_again_changes_nothing(form: str, tmp_path: Path) -> None:
    first = export.export(tiny(), form, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    second = export.export(tiny(), form, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    assert second == first | {"unchanged": True}


def test_an_empty_folder_is_filled_and_remains_of_a_killed_export_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    export.export(tiny(), "crystal", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_llm360_code_files_beside_the_export_are_no_difference(tmp_path: Path) -> None:
    export.export(tiny(), "llm360", tmp_path / "out")
    (tmp_path / "out" / "modeling_crystalcoder.py").write_text("# theirs\n")
    assert export.export(tiny(), "llm360", tmp_path / "out")["unchanged"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("spoil", "named"), [
    (lambda out: flip_a_bit(out / "model.safetensors"), "model.norm.bias"),
    (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt"),
    (lambda out: (out / "config.json").unlink(), "config.json"),
    (lambda out: (out / "config.json").write_text("{}"), "config.json"),
])
def test_a_folder_with_anything_else_is_refused_and_kept(spoil: Any, named: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export.export(tiny(), "crystal", out)
    spoil(out)
    before = snapshot(out)
    assert named in refused(export.export, tiny(), "crystal", out)
    assert snapshot(out) == before


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    export.export(tiny(), "crystal", tmp_path / "out")
    message = refused(export.export, tiny(params=random_params(TINY, 1)), "crystal", tmp_path / "out")
    assert "model.embed_tokens.weight has other values" in message


# The command line


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for checkpoint.py, which needs JAX: what was saved, and what a load gives."""
    state: dict[str, Any] = {"weights": tiny(), "saved": None}
    module = types.ModuleType("crystal_jax.checkpoint")
    module.save_weights = lambda *args: state.update(saved=args)  # type: ignore[attr-defined]
    monkeypatch.setattr(calendar, "open_weights", lambda path, scratch: state["weights"])
    monkeypatch.setattr(calendar, "outline", lambda path: state["weights"])
    monkeypatch.setitem(sys.modules, "crystal_jax.checkpoint", module)
    return state


def run(*argv: object) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.main(parser.parse_args([str(arg) for arg in argv]))


def test_commands_there_and_back(checkpoint: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    argv = ("export", "--to=crystal", "--checkpoint=my run", f"--output={out}", "--max_shard_size=8KB")
    run(*argv, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["form"], summary["dtype"], summary["unchanged"]) == ("crystal", "float32", False)
    assert "'--checkpoint=my run'" in (out / "README.md").read_text()
    run(*argv)
    assert "already holds exactly this export" in capsys.readouterr().out
    run("import", "--from=crystal", f"--input={out}", f"--output={tmp_path / 'back'}")
    place, params, model, tokenizer, info = checkpoint["saved"]
    assert (place, model, tokenizer) == (tmp_path / "back", TINY, None)
    assert_same_params(params, checkpoint["weights"].params)
    assert info.keys() >= INFO.keys()
    assert info["name"] == "out"
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'back'}: a checkpoint in float32")


def test_a_real_checkpoint_survives_both_ways(tmp_path: Path) -> None:
    store = pytest.importorskip("crystal_jax.checkpoint", reason="checkpoint.py isn't there")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    params = random_params(TINY, 5, ml_dtypes.bfloat16)
    store.save_weights(tmp_path / "first", params, TINY, tokenizer, INFO)
    export.export(store.load_weights(tmp_path / "first"), "llm360", tmp_path / "out")
    importer.import_checkpoint("llm360", tmp_path / "out", tmp_path / "second")
    again = store.load_weights(tmp_path / "second")
    assert_same_params(again.params, params)
    assert again.model == TINY
    assert again.tokenizer.read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("8 KB", 8000), ("7B", 7)])
def test_sizes(text: str, size: int) -> None:
    assert command.parse_size(text) == size
