"""Llama and StarCoder folders as transformers writes them: imported they compute the same, exported they load again."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree
from test_convert import Checkpoint, assert_same_params, random_params, refused
from test_families import GROUPED, LLAMA, STARCODER, ids

from crystal_jax.config import ModelConfig
from crystal_jax.convert import export, forms, importer
from crystal_jax.model import Crystal

torch = pytest.importorskip("torch", reason="needs torch; install requirements/torch.txt")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of its own and others' deprecations
    transformers = pytest.importorskip("transformers", reason="needs transformers; install requirements/torch.txt")

pytestmark = pytest.mark.torch

CODE_LLAMA = replace(LLAMA, vocab_size=84, rotary_base=1e6)
MODELS = {"llama": replace(LLAMA, rotary_base=1e4), "codellama": CODE_LLAMA, "llama-grouped": GROUPED,
          "starcoder": STARCODER}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """One thread and no network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    torch.set_num_threads(threads)


def theirs(model: ModelConfig) -> Any:
    """A model of transformers with every parameter random, also norms and biases."""
    if model.family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.embed_dim, intermediate_size=model.mlp_dim,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
            num_key_value_heads=model.kv_heads, max_position_embeddings=model.max_length, rms_norm_eps=model.norm_eps,
            initializer_range=model.init_std,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base})
    else:
        config = transformers.GPTBigCodeConfig(
            vocab_size=model.vocab_size, n_positions=model.max_length, n_embd=model.embed_dim,
            n_layer=model.num_layers, n_head=model.num_heads, n_inner=model.mlp_dim, initializer_range=model.init_std,
            layer_norm_epsilon=model.norm_eps, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.15 * torch.randn_like(value))
    return made.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=torch.ones(tokens.shape)).logits.double().numpy()


def in_jax(params: dict[str, Any], model: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    wide = tree.map(lambda value: jnp.asarray(value, jnp.float32), params)
    return np.asarray(Crystal(model).bind(wide)(jnp.asarray(tokens)))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_folder_of_transformers_computes_the_same_here(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    reference = theirs(model)
    reference.save_pretrained(tmp_path / "saved")
    params, found, _ = importer.read_torch_folder(tmp_path / "saved", model.family)
    assert found == model
    tokens = ids(model)
    expected = logits(reference, tokens)
    assert expected.std() > 0.1
    assert np.abs(in_jax(params, model, tokens) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", list(MODELS))
def test_an_export_loads_in_transformers_and_comes_back(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    params = random_params(model, 7)
    export.export(Checkpoint(params, model), model.family, tmp_path / "out", max_shard_size=50_000)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    tokens = ids(model)
    expected = in_jax(params, model, tokens)
    assert np.abs(logits(loaded.eval(), tokens) - expected).max() <= 1e-5 * np.abs(expected).max()
    options = {"attention_mask": torch.ones(3, 9), "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    prompts = torch.from_numpy(tokens[:, :9]).long()
    assert torch.equal(loaded.generate(prompts, **options), loaded.generate(prompts, use_cache=False, **options))
    loaded.save_pretrained(tmp_path / "again")
    again, found, _ = importer.read_torch_folder(tmp_path / "again", model.family)
    assert found == model
    assert_same_params(again, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "starcoder"])
def test_bin_shards_with_buffers_and_a_second_head(name: str, dtype: str, tmp_path: Path) -> None:
    model = MODELS[name]
    form, params = forms.FORMS[model.family], random_params(model, 4, forms.DTYPES[dtype])
    flat = forms.flatten(params)
    state = {tensor.name: torch.from_numpy(forms.read_tensor(flat, tensor, model).astype(np.float32))
             .to(getattr(torch, dtype)) for tensor in forms.tensors(form, model)}
    state |= {buffer: torch.ones(6) for buffer in forms.ignored_names(form, model)}
    state["lm_head.weight"] = state.get("lm_head.weight", state[form.tensors[0].name].clone())
    names = {key: f"pytorch_model-{1 + i % 3:05d}-of-00003.bin" for i, key in enumerate(state)}
    for file in set(names.values()):
        torch.save({key: value for key, value in state.items() if names[key] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text(json.dumps(forms.make_config(form, model)))
    found, config, _ = importer.read_torch_folder(tmp_path, model.family)
    assert config == model
    assert_same_params(found, params)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    message = refused(importer.read_torch_folder, tmp_path, model.family)
    assert "pytorch_model-00002-of-00003.bin: missing" in message
