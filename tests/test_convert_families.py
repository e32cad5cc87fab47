"""The forms of the other families, both ways: Llama 2 and Code Llama as LlamaForCausalLM, StarCoder as GPTBigCode."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_convert import TINY, Checkpoint, assert_same_params, random_params, refused
from test_families import ALL, GROUPED, STARCODER
from test_families import LLAMA as LLAMA_MODEL

from crystal_jax import recipe
from crystal_jax.config import ModelConfig
from crystal_jax.convert import export, forms, importer
from crystal_jax.convert.forms import DTYPES, LEAVES, LLAMA
from crystal_jax.convert.forms import STARCODER as STARCODER_FORM
from crystal_jax.model import Crystal

MODELS = {"llama": LLAMA_MODEL, "llama-grouped": GROUPED, "starcoder": STARCODER}


def form_of(model: ModelConfig) -> forms.Form:
    return forms.FORMS[model.family]


LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000}
CODE_LLAMA = {**LLAMA_2, "max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016}
STARCODER_15B = {
    "activation_function": "gelu", "architectures": ["GPTBigCodeForCausalLM"], "attn_pdrop": 0.1,
    "attention_softmax_in_fp32": True, "bos_token_id": 0, "embd_pdrop": 0.1, "eos_token_id": 0,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt_bigcode", "multi_query": True,
    "n_embd": 6144, "n_head": 48, "n_inner": 24576, "n_layer": 40, "n_positions": 8192, "resid_pdrop": 0.1,
    "scale_attn_weights": True, "use_cache": True, "vocab_size": 49152}


# The tables


@pytest.mark.parametrize("model", [TINY, *ALL.values()], ids=["crystal", *ALL])
def test_leaves_are_those_of_the_model(model: ModelConfig) -> None:
    specs = forms.flatten(Crystal(model).specs())
    assert {leaf: tuple(spec.shape) for leaf, spec in specs.items()} == {
        leaf: forms.leaf_shape(leaf, model) for leaf in forms.leaves(model)}


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_every_leaf_is_in_exactly_one_tensor(model: ModelConfig) -> None:
    used = [(leaf, tensor.layer) for tensor in forms.tensors(form_of(model), model) for leaf in tensor.leaves]
    there = [(leaf, layer) for leaf in forms.leaves(model)
             for layer in (range(model.num_layers) if LEAVES[leaf].startswith("L:") else [None])]
    assert sorted(used, key=str) == sorted(there, key=str)


@pytest.mark.parametrize(("name", "config"), [("llama2", LLAMA_2), ("codellama", CODE_LLAMA),
                                              ("starcoder", STARCODER_15B)])
def test_the_published_models(name: str, config: dict[str, Any]) -> None:
    from configs import compared

    model = compared.MODELS[name]
    form = form_of(model)
    assert forms.parse_config(form, config, "config.json") == model
    ours = forms.make_config(form, model)
    assert {key: value for key, value in ours.items() if config.get(key, value) != value and "pdrop" not in key} == {}
    numbers = sum(int(np.prod(forms.tensor_shape(tensor, model))) for tensor in forms.tensors(form, model))
    assert numbers == recipe.parameter_count(model)


@given(kv_heads=st.integers(1, 3), shared=st.integers(1, 3), half=st.integers(1, 6), base=st.floats(10, 1e7),
       eps=st.floats(1e-7, 1e-2))
def test_config_round_trip_of_llama(kv_heads: int, shared: int, half: int, base: float, eps: float) -> None:
    heads = kv_heads * shared
    model = replace(LLAMA_MODEL, num_heads=heads, num_kv_heads=kv_heads if shared > 1 else None, norm_eps=eps,
                    embed_dim=2 * half * heads, rotary_dim=2 * half, mup_base_width=2 * half * heads, rotary_base=base)
    config = json.loads(json.dumps(forms.make_config(LLAMA, model)))
    assert forms.parse_config(LLAMA, config, "config.json") == model


@settings(max_examples=25)
@given(family=st.sampled_from(["llama", "starcoder"]), kv_heads=st.integers(1, 2), shared=st.integers(2, 3),
       half=st.integers(1, 3), mlp=st.integers(1, 9), layers=st.integers(1, 3), dtype=st.sampled_from(list(DTYPES)))
def test_tensors_keep_every_bit(family: str, kv_heads: int, shared: int, half: int, mlp: int, layers: int,
                                dtype: str) -> None:
    heads = kv_heads * shared
    model = replace(MODELS[family], num_heads=heads, num_kv_heads=kv_heads if family == "llama" else 1,
                    embed_dim=2 * half * heads, mlp_dim=mlp, num_layers=layers)
    params = forms.flatten(random_params(model, dtype=DTYPES[dtype]))
    back = {leaf: np.full_like(value, 9) for leaf, value in params.items()}
    for tensor in forms.tensors(form_of(model), model):
        stored = forms.read_tensor(params, tensor, model)
        assert stored.shape == forms.tensor_shape(tensor, model)
        forms.write_tensor(back, tensor, model, stored)
    assert_same_params(params, back)


def test_layout_of_queries_with_one_head_of_keys_and_values() -> None:
    params = forms.flatten(random_params(STARCODER))
    stored = {tensor.name: forms.read_tensor(params, tensor, STARCODER)
              for tensor in forms.tensors(STARCODER_FORM, STARCODER)}
    fused = stored["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (48 + 2 * 12, 48)
    np.testing.assert_array_equal(fused[12:24], params["layers.attn.q"][1][:, 1].T)
    np.testing.assert_array_equal(fused[48:60], params["layers.attn.k"][1][:, 0].T)
    np.testing.assert_array_equal(fused[60:], params["layers.attn.v"][1][:, 0].T)
    bias = stored["transformer.h.1.attn.c_attn.bias"]
    np.testing.assert_array_equal(bias[48:60], params["layers.attn.k_bias"][1][0])


# Folders


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("max_shard_size", [export.MAX_SHARD_SIZE, 20_000])
def test_import_of_export_is_bit_identical(name: str, dtype: str, max_shard_size: int, tmp_path: Path) -> None:
    model = MODELS[name]
    params = random_params(model, 3, DTYPES[dtype])
    summary = export.export(Checkpoint(params, model), model.family, tmp_path / "out", max_shard_size=max_shard_size)
    found, again, _ = importer.read_torch_folder(tmp_path / "out", model.family)
    assert_same_params(found, params)
    assert again == model
    assert summary["tensors"] == {"llama": 9 * 3 + 3, "starcoder": 12 * 3 + 4}[model.family]


def exported(place: Path, model: ModelConfig) -> Path:
    export.export(Checkpoint(random_params(model), model), model.family, place)
    return place


def rewrite_config(place: Path, **changes: Any) -> None:
    """Changes keys of config.json; those given as ... are removed."""
    config = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def add_tensors(place: Path, **added: np.ndarray) -> None:
    """Names are given with : for a dot."""
    path = place / "model.safetensors"
    save_file(load_file(path) | {name.replace(":", "."): value for name, value in added.items()}, path)


@pytest.mark.parametrize(("model", "changes"), [
    (LLAMA_MODEL, {"num_key_value_heads": ...}),
    (LLAMA_MODEL, {"num_key_value_heads": None, "mlp_bias": ..., "rope_scaling": ..., "tie_word_embeddings": ...}),
    (LLAMA_MODEL, {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    (GROUPED, {"rope_parameters": None, "head_dim": 12}),
    (LLAMA_MODEL, {"rope_scaling": {"rope_type": "default"}}),
    (LLAMA_MODEL, {"rope_scaling": {"type": "default"}}),
    (STARCODER, {"activation_function": "gelu_new", "multi_query": ..., "tie_word_embeddings": ...}),
    (replace(STARCODER, mlp_dim=192), {"n_inner": None}),
    (replace(STARCODER, mlp_dim=192), {"n_inner": ..., "layer_norm_epsilon": ...}),
])
def test_other_releases_say_it_otherwise(model: ModelConfig, changes: dict[str, Any], tmp_path: Path) -> None:
    place = exported(tmp_path / "out", model)
    rewrite_config(place, **changes)
    params, found, _ = importer.read_torch_folder(place, model.family)
    assert found == model
    assert_same_params(params, random_params(model))


def test_buffers_and_a_second_head_are_passed_over(tmp_path: Path) -> None:
    place = exported(tmp_path / "llama", LLAMA_MODEL)
    add_tensors(place, **{f"model:layers:{i}:self_attn:rotary_emb:inv_freq": np.ones(6, np.float32) for i in range(3)})
    assert_same_params(importer.read_torch_folder(place, "llama")[0], random_params(LLAMA_MODEL))
    place = exported(tmp_path / "starcoder", STARCODER)
    embed = random_params(STARCODER)["embed"]
    add_tensors(place, **{"lm_head:weight": embed}, **{f"transformer:h:{i}:attn:bias": np.ones((1, 1), bool)
                                                       for i in range(3)})
    assert_same_params(importer.read_torch_folder(place, "starcoder")[0], random_params(STARCODER))
    add_tensors(place, **{"lm_head:weight": embed + 1})
    assert "lm_head.weight differs" in refused(importer.read_torch_folder, place, "starcoder")


# What is refused


@pytest.mark.parametrize(("model", "changes", "part"), [
    (LLAMA_MODEL, {"model_type": "mistral"}, "model_type 'mistral'"),
    (LLAMA_MODEL, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (LLAMA_MODEL, {"attention_bias": True}, "attention_bias is True"),
    (LLAMA_MODEL, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    (LLAMA_MODEL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'; this model"),
    (LLAMA_MODEL, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling is 'yarn'; this model"),
    (LLAMA_MODEL, {"rope_scaling": {"rope_type": "default", "partial": 0.5}}, "rope_scaling is {'rope_type'"),
    (LLAMA_MODEL, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_scaling is 'llama3'"),
    (LLAMA_MODEL, {"rope_parameters": 3}, "rope_scaling is 3"),
    (LLAMA_MODEL, {"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
    (LLAMA_MODEL, {"num_attention_heads": 16}, "the head size 3 must be even"),
    (LLAMA_MODEL, {"num_attention_heads": ...}, "num_attention_heads is missing"),
    (LLAMA_MODEL, {"rope_theta": "1e6"}, "rope_theta '1e6' must be a number"),
    (LLAMA_MODEL, {"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
    (LLAMA_MODEL, {"vocab_size": 84}, "model.embed_tokens.weight has shape (83, 48), config.json says (84, 48)"),
    (GROUPED, {"num_key_value_heads": 4}, "k_proj.weight has shape (24, 48), config.json says (48, 48)"),
    (STARCODER, {"activation_function": "relu"}, "activation_function is 'relu'"),
    (STARCODER, {"multi_query": False}, "multi_query is False"),
    (STARCODER, {"scale_attn_weights": False}, "scale_attn_weights is False"),
    (STARCODER, {"n_positions": 65}, "transformer.wpe.weight has shape (64, 48), config.json says (65, 48)"),
    (STARCODER, {"n_embd": ...}, "n_embd is missing"),
    (STARCODER, {"n_head": 5}, "n_embd 48 must be a multiple of n_head 5"),
])
def test_another_architecture_is_refused(model: ModelConfig, changes: dict[str, Any], part: str,
                                         tmp_path: Path) -> None:
    place = exported(tmp_path / "out", model)
    rewrite_config(place, **changes)
    message = refused(importer.read_torch_folder, place, model.family)
    assert part in message
    assert str(place) in message


@pytest.mark.parametrize(("model", "form", "part"), [
    (LLAMA_MODEL, "crystal", "model.family: 'llama' can't be said in the form crystal, which is for 'crystal'; use "
     "--to=llama"),
    (STARCODER, "llama", "use --to=starcoder"),
    (ALL["crystal-grouped"], "crystal", "model.num_kv_heads: 2 can't be said in the form crystal"),
    (replace(LLAMA_MODEL, embed_scale=14.6), "llama", "model.embed_scale: 14.6"),
    (replace(LLAMA_MODEL, mup_base_width=24), "llama", "model.mup_base_width: 24"),
    (replace(LLAMA_MODEL, rotary_dim=6), "llama", "model.rotary_dim: 6"),
    (replace(STARCODER, num_kv_heads=2), "starcoder", "model.num_kv_heads: 2"),
])
def test_a_model_that_the_form_cannot_say_is_refused(model: ModelConfig, form: str, part: str, tmp_path: Path) -> None:
    weights = Checkpoint(random_params(model), model)
    assert part in refused(export.export, weights, form, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_of_starcoder_has_one_token_for_all(tmp_path: Path) -> None:
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, text in enumerate(("<|endoftext|>", "<fim_prefix>"))]
    tokenizer = {"added_tokens": added, "model": {"type": "BPE", "vocab": {"a": 2}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = Checkpoint(random_params(STARCODER), STARCODER, tmp_path / "tokenizer.json")
    export.export(weights, "starcoder", tmp_path / "out")
    written = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text())
               for name in ("config", "tokenizer_config", "special_tokens_map")}
    assert (written["config"]["bos_token_id"], written["config"]["eos_token_id"]) == (0, 0)
    assert written["tokenizer_config"]["eos_token"] == "<|endoftext|>"
    assert written["special_tokens_map"]["additional_special_tokens"] == ["<fim_prefix>"]
    _, _, found = importer.read_torch_folder(tmp_path / "out", "starcoder")
    assert found is not None
    assert found.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
