"""The form stablelm: the fold to 1e-12, transformers' own StableLmForCausalLM, sizes, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_convert import Checkpoint, random_params, refused
from test_convert_torch import SMALL, _alone, generated, logits, reference_logits, tokens, torch, transformers

from crystal_jax.config import ModelConfig
from crystal_jax.convert import computed, export, forms, stablelm

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures(_alone.__name__)]


def stablelm_logits(tensors: dict[str, np.ndarray], config: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """[B, T, V] in float64 by the formulas of transformers' modeling_stablelm.py."""
    N, eps = config["num_attention_heads"], config["layer_norm_eps"]
    H, T = config["hidden_size"] // N, ids.shape[1]
    R = int(H * config["partial_rotary_factor"])
    angles = np.arange(T)[:, None] * config["rope_theta"] ** (-np.arange(0, R, 2) / R)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        return (x @ tensors[f"{name}.weight"].T).reshape(*ids.shape, N, H).transpose(0, 2, 1, 3)

    def turned(x: np.ndarray) -> np.ndarray:
        a, b, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    h = tensors["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        x = norm(h, at + "input_layernorm")
        q, k, v = (heads(x, f"{at}self_attn.{name}_proj") for name in "qkv")
        scores = turned(q) @ turned(k).swapaxes(2, 3) / math.sqrt(H)
        scores[..., np.triu(np.ones((T, T), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(*ids.shape, -1)
        h = h + mixed @ tensors[f"{at}self_attn.o_proj.weight"].T
        x = norm(h, at + "post_attention_layernorm")
        gate, up = (x @ tensors[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        h = h + (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{at}mlp.down_proj.weight"].T
    return norm(h, "model.norm") @ tensors["lm_head.weight"].T


def folded(params: dict[str, Any], model: ModelConfig, heads: int | None = None) -> dict[str, np.ndarray]:
    found = stablelm.make_tensors(forms.check_params(params, model, "test"), stablelm.widen(model, heads))
    return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in found.items()}


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv, shared, head = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 17))
    heads = kv * shared
    return replace(
        SMALL, vocab_size=draw(st.integers(5, 40)), embed_dim=head * heads, num_heads=heads,
        num_kv_heads=draw(st.sampled_from([kv, None])), num_layers=draw(st.integers(1, 3)),
        mlp_dim=draw(st.integers(1, 70)), rotary_dim=2 * draw(st.integers(1, head // 2)),
        mup_base_width=draw(st.integers(1, 64)), norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        embed_scale=draw(st.floats(0.1, 20)), output_scale=draw(st.floats(0.1, 5)))


def with_all_heads(params: dict[str, Any], model: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The same model with a head of keys and values for each head of queries."""
    flat = forms.flatten(params)
    for name in ("k", "v"):
        for leaf in (f"layers.attn.{name}", f"layers.attn.{name}_bias"):
            flat[leaf] = np.repeat(flat[leaf], model.num_heads // model.kv_heads, axis=-2)
    return forms.unflatten(flat), replace(model, num_kv_heads=None)


@settings(max_examples=40)
@given(model=models(), further=st.integers(1, 3), biased=st.booleans(), seed=st.integers(0, 99))
def test_the_fold_is_exact(model: ModelConfig, further: int, biased: bool, seed: int) -> None:
    params = forms.flatten(random_params(model, seed, np.float64))
    if not biased:
        params = {leaf: value * (0 if leaf.endswith("bias") else 1) for leaf, value in params.items()}
    nested = forms.unflatten(params)
    wide = stablelm.widen(model, model.num_heads + further)
    ids = np.random.default_rng(seed).integers(0, model.vocab_size, (2, 9))
    expected = reference_logits(*with_all_heads(nested, model), ids)
    found = stablelm_logits(folded(nested, model, wide.heads), stablelm.make_config(wide), ids)
    assert np.abs(found - expected).max() <= 1e-12 * max(1, np.abs(expected).max())


def test_blocks_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    params = forms.check_params(random_params(SMALL), SMALL, "test")
    whole = folded(random_params(SMALL), SMALL)
    monkeypatch.setattr(computed, "BLOCK", 7 * 96)
    for name, tensor in stablelm.make_tensors(params, stablelm.widen(SMALL, None)).items():
        blocks = [tensor.rows(start, stop) for start, stop in tensor.ranges]
        assert len(blocks) > 1 or len(tensor.shape) == 1
        assert np.array_equal(np.concatenate(blocks), whole[name])


def test_what_writes_to_the_stream_has_mean_zero_and_leaves_further_channels_alone() -> None:
    for name, values in folded(random_params(SMALL), SMALL).items():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            stream = values if "embed" in name else values.T
            assert np.abs(stream.mean(1)).max() < 1e-16 and np.abs(stream).max() > 0.1
            assert not stream[:, SMALL.embed_dim :].any()


# Transformers


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(SMALL, 11)


@pytest.fixture(scope="module")
def folder(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported") / "stablelm"
    export.export(Checkpoint(params, SMALL), "stablelm", place)
    return place


def load(folder: Path, code: bool = False, **options: Any) -> Any:
    """A folder's model, once nothing is missing or unexpected; without code of ours unless asked."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=code, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    return load(folder, attn_implementation=request.param)


def test_transformers_gives_the_same_logits(model: Any, params: dict[str, Any]) -> None:
    assert type(model).__name__ == "StableLmForCausalLM"
    ids = tokens(4, 60)
    expected = reference_logits(params, SMALL, ids.numpy())
    assert np.abs(logits(model, ids) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_left_padded_rows_are_right(model: Any) -> None:
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, :3] = 0
    alone = [logits(model, ids[row : row + 1, skip:])[0, -1] for row, skip in ((0, 7), (1, 3), (2, 0))]
    together = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[:, -1]
    assert np.abs(together - np.array(alone)).max() <= 1e-5


def test_greedy_tokens_are_those_of_the_form_crystal(model: Any, params: dict[str, Any], tmp_path: Path) -> None:
    export.export(Checkpoint(params, SMALL), "crystal", tmp_path / "crystal")
    ids = tokens(16, 8)
    expected = generated(load(tmp_path / "crystal", code=True), ids, 64)
    assert torch.equal(generated(model, ids, 64), expected)
    assert torch.equal(generated(model, ids, 64, use_cache=False), expected)


def test_bfloat16_loses_no_more_than_the_form_crystal(tmp_path: Path) -> None:
    ids, errors = tokens(8, 60), {}
    model = replace(SMALL, embed_dim=256, mlp_dim=301, rotary_dim=16)
    params = random_params(model, 2)
    for leaf in ("q", "k", "v", "o"):
        params["layers"]["attn"][leaf] *= 0.4
    expected = reference_logits(params, model, ids.numpy())
    for form in ("crystal", "stablelm"):
        export.export(Checkpoint(params, model), form, tmp_path / form, dtype="bfloat16")
        loaded = load(tmp_path / form, code=form == "crystal", dtype=torch.bfloat16)
        errors[form] = np.sqrt(((logits(loaded, ids) - expected) ** 2).mean()) / expected.std()
    assert errors["crystal"] < 0.1
    assert errors["stablelm"] <= 1.25 * errors["crystal"], errors


def test_a_saved_model_is_the_same(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


# Sizes and settings


def test_the_7b_model_has_34_heads() -> None:
    config = stablelm.make_config(wide := stablelm.widen(ModelConfig(), None))
    assert (config["num_attention_heads"], config["hidden_size"], config["intermediate_size"]) == (34, 4352, 11008)
    assert config["layer_norm_eps"] == pytest.approx(1e-5 * 4096 / 4352)
    assert config["partial_rotary_factor"] == config["rope_pct"] == 0.25
    D, F = wide.embed_dim, wide.mlp_dim
    numbers = 32 * (4 * D * D + 3 * D * F + 4 * D) + 2 * D + 2 * 32032 * D
    assert numbers / 6_575_278_720 == pytest.approx(1.111, abs=1e-3)
    assert [stablelm.widen(ModelConfig(), heads).embed_dim for heads in (33, 36)] == [4224, 4608]


def test_every_reader_finds_the_rotary_dims() -> None:
    for head in range(2, 257):
        for rotary in range(2, head + 1, 2):
            config = stablelm.make_config(stablelm.widen(
                ModelConfig(embed_dim=3 * head, num_heads=3, rotary_dim=rotary), None))
            assert int(head * config["partial_rotary_factor"]) == rotary


def test_the_folder_says_what_was_asked(tmp_path: Path) -> None:
    summary = export.export(Checkpoint(random_params(SMALL), SMALL), "stablelm", tmp_path / "out", heads=7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["hidden_size"], config["intermediate_size"]) == (7, 84, 96)
    assert "auto_map" not in config and not list((tmp_path / "out").glob("*.py"))
    assert summary["tensors"] == 11 * SMALL.num_layers + 4
    assert summary["parity"]["relative_difference"] <= 3e-6


@pytest.mark.parametrize(("changes", "heads", "message"), [
    ({}, 4, "--heads=4: must be above the model's 4"),
    ({"rotary_dim": 0}, None, "model.rotary_dim: 0 can't be said"),
    ({"family": "llama"}, None, "--to=llama"),
])
def test_refused(changes: dict[str, Any], heads: int | None, message: str, tmp_path: Path) -> None:
    found = refused(export.export, Checkpoint({}, replace(SMALL, **changes)), "stablelm", tmp_path / "out", heads=heads)
    assert message in found


def test_values_that_do_not_fit_are_named(tmp_path: Path) -> None:
    params = random_params(SMALL)
    params["layers"]["mlp"]["gate"][1, 3, 3] = 1e5
    checkpoint = Checkpoint(params, SMALL)
    found = refused(export.export, checkpoint, "stablelm", tmp_path / "out", dtype="float16")
    assert "model.layers.1.mlp.gate_proj.weight (from layers.mlp.gate, layers.mlp.gate_bias): 1 of" in found
    assert "range of float16" in found
    params["layers"]["attn"]["o"][0, 1, 2, 3] = np.nan
    assert "model.layers.0.self_attn.o_proj.weight" in refused(
        export.export, checkpoint, "stablelm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
