"""Exported folders in PyTorch: the original's values, an independent forward pass, generation, and loading alone."""

import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_convert import Checkpoint, assert_same_params, random_params, refused

from crystal_jax.config import ModelConfig
from crystal_jax.convert import export, forms, importer
from crystal_jax.convert.forms import LLM360

torch = pytest.importorskip("torch", reason="needs torch; install requirements/torch.txt")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of its own and others' deprecations
    transformers = pytest.importorskip("transformers", reason="needs transformers; install requirements/torch.txt")

pytestmark = pytest.mark.torch

# An odd inner size, a head of which only a part is rotated, a width that isn't the base width.
SMALL = ModelConfig(vocab_size=83, embed_dim=48, num_layers=3, num_heads=4, mlp_dim=67, max_length=128, rotary_dim=6,
                    mup_base_width=12, norm_eps=1e-4)


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One thread, no network, and a cache of its own for the code that a folder brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    patch = pytest.MonkeyPatch()
    modules = str(tmp_path_factory.mktemp("modules"))
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    patch.setenv("HF_HUB_OFFLINE", "1")
    path = list(sys.path)
    yield
    sys.path[:] = path
    patch.undo()
    torch.set_num_threads(threads)


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder in float32, once nothing is missing, unexpected or untied."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not list(model.buffers())
    return model.eval()


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(SMALL, 11)


@pytest.fixture(scope="module")
def folder(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported") / "crystal"
    export.export(Checkpoint(params, SMALL), "crystal", place)
    return place


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    return load(folder, attn_implementation=request.param)


def tokens(rows: int, length: int, seed: int = 0) -> Any:
    return torch.randint(3, SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Any, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits.double().numpy()


def generated(model: Any, ids: Any, count: int, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), **options}
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)


def reference_logits(params: dict[str, Any], model: ModelConfig, ids: np.ndarray) -> np.ndarray:
    """[B, T, V] in float64, straight from the published formulas, with loops where a library would be quicker."""
    p = {leaf: value.astype(np.float64) for leaf, value in forms.flatten(params).items()}
    head = model.head_dim

    def norm(x: np.ndarray, name: str, layer: Any = ...) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale, bias = p[f"{name}.scale"][layer], p[f"{name}.bias"][layer]
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.norm_eps) * scale + bias

    def turned(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        for t in range(x.shape[1]):
            for i in range(0, model.rotary_dim, 2):
                angle = t * model.rotary_base ** (-i / model.rotary_dim)
                pair = x[:, t, :, i] + 1j * x[:, t, :, i + 1]
                pair = pair * np.exp(1j * angle)
                x[:, t, :, i], x[:, t, :, i + 1] = pair.real, pair.imag
        return x

    h = p["embed"][ids] * model.embed_scale
    for layer in range(model.num_layers):
        x = norm(h, "layers.attn_norm", layer)
        q, k, v = (np.einsum("btd,dnh->btnh", x, p[f"layers.attn.{name}"][layer]) + p[f"layers.attn.{name}_bias"][layer]
                   for name in "qkv")
        scores = np.einsum("btnh,bsnh->bnts", turned(q), turned(k)) / head
        scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bnts,bsnh->btnh", weights, v)
        h = h + np.einsum("btnh,nhd->btd", mixed, p["layers.attn.o"][layer]) + p["layers.attn.o_bias"][layer]
        x = norm(h, "layers.mlp_norm", layer)
        gate = x @ p["layers.mlp.gate"][layer] + p["layers.mlp.gate_bias"][layer]
        up = x @ p["layers.mlp.up"][layer] + p["layers.mlp.up_bias"][layer]
        h = h + (up * gate / (1 + np.exp(-gate))) @ p["layers.mlp.down"][layer] + p["layers.mlp.down_bias"][layer]
    return norm(h, "final_norm") @ p["embed"].T * (model.output_scale * model.mup_base_width / model.embed_dim)


def oracle_folder(reference: Path, place: Path) -> tuple[Path, Any]:
    """The original's tiny model as LLM360 would publish it in one .bin with buffers and a duplicate head."""
    oracle = np.load(reference / "oracle_tiny_f32.npz")
    config = json.loads(str(oracle["config"])) | {"model_type": LLM360.model_type}
    state = {name[3:]: torch.from_numpy(oracle[name]) for name in oracle.files if name.startswith("sd/")}
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    write_bins(place, state | buffers(config["n_layer"], config["n_positions"]), shards=1)
    return place, oracle


def buffers(layers: int, length: int) -> dict[str, Any]:
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return {f"transformer.h.{i}.attn.{name}": value.clone() for i in range(layers)
            for name, value in (("bias", mask), ("masked_bias", torch.tensor(-1e9)))}


def write_bins(place: Path, state: dict[str, Any], shards: int) -> None:
    if shards == 1:
        torch.save(state, place / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-{1 + i % shards:05d}-of-{shards:05d}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: value for name, value in state.items() if files[name] == file}, place / file)
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_the_original(attention: str, reference: Path, tmp_path: Path) -> None:
    published, oracle = oracle_folder(reference, tmp_path / "published")
    params, config, _ = importer.read_torch_folder(published, "llm360")
    export.export(Checkpoint(params, config), "crystal", tmp_path / "crystal")
    ids = torch.from_numpy(oracle["input_ids"])
    found = logits(load(tmp_path / "crystal", attn_implementation=attention), ids)
    assert np.abs(found - oracle["logits"]).max() <= 1e-5
    assert np.abs(reference_logits(params, config, ids.numpy()) - oracle["logits"]).max() <= 1e-5


def test_logits_of_the_formulas(model: Any, params: dict[str, Any]) -> None:
    ids = tokens(3, 70)
    expected = reference_logits(params, SMALL, ids.numpy())
    assert expected.std() > 0.1
    assert np.abs(logits(model, ids) - expected).max() <= 1e-5


def test_float64_is_exact(folder: Path, params: dict[str, Any]) -> None:
    ids = tokens(2, 50)
    found = logits(load(folder, attn_implementation="eager").double(), ids)
    assert np.abs(found - reference_logits(params, SMALL, ids.numpy())).max() <= 1e-12


def test_logits_of_jax(model: Any, params: dict[str, Any]) -> None:
    crystal = pytest.importorskip("crystal_jax.model", reason="the model isn't there")
    import jax.numpy as jnp
    from jax import tree

    ids = tokens(2, 40)
    expected = crystal.Crystal(SMALL).bind(tree.map(jnp.asarray, params))(jnp.asarray(ids.numpy(), jnp.int32))
    assert np.abs(logits(model, ids) - np.asarray(expected)).max() <= 1e-5


def test_cached_generation_is_uncached_generation(model: Any) -> None:
    ids = tokens(16, 9)
    cached = generated(model, ids, 64, use_cache=True)
    assert cached.shape == (16, 73)
    assert torch.equal(cached, generated(model, ids, 64, use_cache=False))
    assert len({tuple(row) for row in cached[:, 9:].tolist()}) > 8, "rows that all say the same would prove little"


def test_cached_logits_are_uncached_logits(model: Any) -> None:
    ids = tokens(2, 30)
    whole = logits(model, ids)
    with torch.no_grad():
        first = model(ids[:, :20], use_cache=True)
        cache = first.past_key_values
        parts = [first.logits, model(ids[:, 20:27], past_key_values=cache).logits]
        parts += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(27, 30)]
    assert np.abs(torch.cat(parts, 1).double().numpy() - whole).max() <= 1e-5


def test_left_padded_rows_are_unpadded_rows(model: Any) -> None:
    lengths, width = (5, 12, 1, 9), 12
    rows = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=2) for row in rows])
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    together = generated(model, ids, 24, attention_mask=mask)
    batch = logits(model, ids, attention_mask=mask)
    assert np.isfinite(batch).all()
    for row, length, padded, values in zip(rows, lengths, together, batch, strict=True):
        assert torch.equal(generated(model, row, 24)[0], padded[width - length :])
        assert np.abs(logits(model, row)[0] - values[width - length :]).max() <= 1e-5


def test_loss_states_and_gradients(folder: Path) -> None:
    model, ids = load(folder, attn_implementation="eager"), tokens(2, 16)
    output = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    shifted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, shifted)
    assert len(output.hidden_states) == SMALL.num_layers + 1
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, SMALL.num_heads, 16))
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, output.logits[:, -1:])
    assert isinstance(model(ids, return_dict=False), tuple)
    output.loss.backward()
    plain = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 5.23 renames this method
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, plain[name])


def test_saving_again_keeps_the_model(folder: Path, tmp_path: Path) -> None:
    model, ids = load(folder), tokens(2, 20)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_crystal.py").exists()
    np.testing.assert_array_equal(logits(load(tmp_path / "again"), ids), logits(model, ids))
    original, _, _ = importer.read_torch_folder(folder, "crystal")
    assert_same_params(importer.read_torch_folder(tmp_path / "again", "crystal")[0], original)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, folder: Path, params: dict[str, Any], tmp_path: Path) -> None:
    export.export(Checkpoint(params, SMALL), "crystal", tmp_path / "half", dtype=dtype, max_shard_size=30_000)
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    model, ids = load(tmp_path / "half"), tokens(2, 40)
    assert model.dtype == getattr(torch, dtype)
    assert 0 < np.abs(logits(model, ids) - logits(load(folder), ids)).max() < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_shards_with_buffers_and_a_second_head(dtype: str, shards: int, tmp_path: Path) -> None:
    params = random_params(SMALL, 4, forms.DTYPES[dtype])
    flat = forms.flatten(params)
    state = {tensor.name: torch.from_numpy(forms.read_tensor(flat, tensor, SMALL).astype(np.float32))
             .to(getattr(torch, dtype)) for tensor in forms.tensors(LLM360, SMALL)}
    state |= {LLM360.head: state["transformer.wte.weight"].clone(), **buffers(SMALL.num_layers, SMALL.max_length)}
    (tmp_path / "config.json").write_text(json.dumps(forms.make_config(LLM360, SMALL)))
    write_bins(tmp_path, state, shards)
    found, config, tokenizer = importer.read_torch_folder(tmp_path, "llm360")
    assert_same_params(found, params)
    assert (config, tokenizer) == (SMALL, None)
    state[LLM360.head][1, 1] += 1
    write_bins(tmp_path, state, shards)
    assert "lm_head.weight differs" in refused(importer.read_torch_folder, tmp_path, "llm360")


def test_bin_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(forms.make_config(LLM360, SMALL)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    assert "pytorch_model.bin" in refused(importer.read_torch_folder, tmp_path, "llm360")
    torch.save({"transformer.wte.weight": subprocess.Popen}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(importer.read_torch_folder, tmp_path, "llm360")
    gc.collect()


STRINGS = [
    "def f(n):\n    return n * 2  # double\n", "  two spaces", "", " ", "naïve café 🙂 语言", "a\tb\r\nc",
    "<s> literal </s>", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "x" * 300,
    *(f"value_{i} = {i * 7919} # {chr(0x3B1 + i % 24)}" for i in range(110)),
]


def test_the_tokenizer_is_the_tokenizers_librarys(reference: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = reference / "crystalcoder_hf" / "tokenizer.json"
    config = replace(SMALL, vocab_size=32032)
    export.export(Checkpoint(random_params(config), config, path), "crystal", tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = tokenizers.Tokenizer.from_file(str(path))
    for text in STRINGS:
        ids = plain.encode(text).ids
        assert found(text)["input_ids"] == ids, text
        assert found.decode(ids, skip_special_tokens=False) == plain.decode(ids, skip_special_tokens=False), text
    assert (found.bos_token_id, found.eos_token_id, found.unk_token_id) == (1, 2, 0)
    assert {"<|fim_prefix|>", "<|sys_end|>"} <= set(found.all_special_tokens)


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(3, 11)[None]
options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
print(model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist())
print([name for name in sys.modules if name.split(".")[0] in ("crystal_jax", "jax", "flax")])
"""


def test_a_folder_needs_nothing_of_ours(folder: Path, tmp_path: Path) -> None:
    alone, empty = tmp_path / "alone", tmp_path / "empty"
    shutil.copytree(folder, alone)
    empty.mkdir()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(alone)], cwd=empty, capture_output=True, text=True, check=False,
        env={**clean, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    output, ours = result.stdout.splitlines()
    assert ours == "[]"
    assert json.loads(output) == generated(load(folder), torch.arange(3, 11)[None], 8).tolist()
