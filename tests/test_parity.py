"""The parity gate: right exports of every form and shape pass it, and each kind of mistake in a folder is caught."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_convert import Checkpoint, refused

from crystal_jax.config import ModelConfig
from crystal_jax.convert import export, forms, forwards, parity, stablelm
from crystal_jax.convert.forms import DTYPES
from crystal_jax.convert.made import Made, Options
from crystal_jax.convert.makers import MAKERS
from crystal_jax.model import Crystal, map_specs

MODELS = {
    "crystal": ModelConfig(vocab_size=61, embed_dim=24, num_layers=3, num_heads=3, mlp_dim=37, max_length=96,
                           rotary_dim=4, mup_base_width=6),
    "llama": ModelConfig(family="llama", vocab_size=61, embed_dim=24, num_layers=3, num_heads=6, num_kv_heads=2,
                         mlp_dim=37, max_length=96, rotary_dim=4, mup_base_width=24, embed_scale=1.0, output_scale=1.0),
    "starcoder": ModelConfig(family="starcoder", vocab_size=61, embed_dim=24, num_layers=3, num_heads=3, num_kv_heads=1,
                             mlp_dim=96, max_length=96, rotary_dim=0, mup_base_width=24, embed_scale=1.0,
                             output_scale=1.0),
}
FAMILY = {"crystal": "crystal", "llm360": "crystal", "stablelm": "crystal", "llama": "llama", "starcoder": "starcoder"}
"""Form to the family that it is for: all that are folders of safetensors."""

Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def drawn(model: ModelConfig, seed: int = 0, biases: float = 0.15) -> dict[str, Any]:
    """Parameters of a trained model's size, no bias zero (unless asked for) and no norm's scale one."""
    rng = np.random.default_rng(seed)

    def draw(spec: Any) -> np.ndarray:
        spread = 0.15 if spec.group == "matrix" else 0.073 if spec.group == "embedding" else biases
        return (spec.mean + spread * rng.standard_normal(spec.shape)).astype(np.float32)

    return map_specs(draw, Crystal(model).specs())


def checkpoint(form: str) -> Checkpoint:
    model = MODELS[FAMILY[form]]
    return Checkpoint(drawn(model), model)


def made(form: str, weights: Checkpoint, dtype: str | None = None) -> Made:
    return MAKERS[form](weights, Options(dtype=dtype))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Form to a folder in it, written once."""
    written: dict[str, Path] = {}

    def folder(form: str) -> Path:
        if form not in written:
            written[form] = tmp_path_factory.mktemp("right") / form
            export.export(checkpoint(form), form, written[form])
        return written[form]

    return folder


@pytest.mark.parametrize("form", FAMILY)
def test_a_right_export_passes(form: str, folders: Callable[[str], Path]) -> None:
    result = parity.check(made(form, checkpoint(form)), folders(form), checkpoint(form))
    assert 0 < result["relative_difference"] <= 3e-6
    assert result["same_top_token"] == result["tokens"] == MODELS[FAMILY[form]].max_length
    assert len(result["states"]) == 4 and max(result["states"].values()) <= 3e-6
    assert result["largest_logit"] > 0.1


def changed(form: str, right: Path, place: Path, change: Change) -> str:
    """What the gate says of a folder after a change to its tensors and its config.json."""
    shutil.copytree(right, place)
    tensors = load_file(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    change(tensors, config)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(config))
    return refused(parity.check, made(form, checkpoint(form)), place, checkpoint(form))


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def swapped(one: str, other: str) -> Change:
    def apply(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        for kind in ("weight", "bias"):
            if f"{one}.{kind}" in tensors:
                tensors[f"{one}.{kind}"], tensors[f"{other}.{kind}"] = (
                    tensors[f"{other}.{kind}"], tensors[f"{one}.{kind}"])

    return apply


def setting(key: str, factor: float) -> Change:
    def apply(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        assert key in config
        config[key] *= factor

    return apply


def halved(values: np.ndarray) -> np.ndarray:
    """Rows of the first 4 dims of each head from pairs (0, 1), (2, 3) to pairs (0, 2), (1, 3)."""
    heads = values.reshape(-1, 8, *values.shape[1:]).copy()
    heads[:, :4] = heads[:, [0, 2, 1, 3]]
    return heads.reshape(values.shape)


LLAMA_LIKE = {
    "a transposed matrix": (tensor("model.layers.1.self_attn.o_proj.weight", np.transpose), "layer 1"),
    "gate and up swapped": (swapped("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"), "layer 1"),
    "norms swapped": (swapped("model.layers.2.input_layernorm", "model.layers.2.post_attention_layernorm"), "layer 2"),
    "layers swapped": (swapped("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"), "layer 0"),
    "another row of the embedding": (tensor("model.embed_tokens.weight", lambda x: np.roll(x, 1, 0)), "the embedding"),
    "a final norm that was lost": (tensor("model.norm.weight", np.ones_like), "the final norm or the head"),
    "a head of keys in another's place": (
        tensor("model.layers.0.self_attn.k_proj.weight", lambda x: np.roll(x, 4, 0)), "layer 0"),
}
MISTAKES: dict[str, dict[str, tuple[Change, str]]] = {
    "crystal": LLAMA_LIKE | {
        "a bias lost": (tensor("model.layers.1.mlp.up_proj.bias", np.zeros_like), "layer 1"),
        "a norm's bias lost": (tensor("model.layers.2.post_attention_layernorm.bias", np.zeros_like), "layer 2"),
        "pairs of halves": (tensor("model.layers.0.self_attn.q_proj.weight", halved), "layer 0"),
        "eps": (setting("layer_norm_eps", 0.1), "layer 0"),
        "embed_scale": (setting("embed_scale", 1.01), "the embedding"),
        "logit_scale": (setting("logit_scale", 1.01), "the final norm or the head"),
        "rotary_base": (setting("rotary_base", 10), "layer 0"),
        "rotary_dim": (setting("rotary_dim", 2), "layer 0"),
    },
    "llm360": {
        "gate and up swapped": (swapped("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_fc2"), "layer 1"),
        "q, k and v a head at a time": (tensor(
            "transformer.h.0.attn.c_attn.weight",
            lambda x: x.reshape(24, 3, 3, 8).swapaxes(1, 2).reshape(24, 72)), "layer 0"),
        "a transposed matrix": (tensor("transformer.h.2.attn.c_proj.weight", np.transpose), "layer 2"),
        "the gate's bias lost": (tensor("transformer.h.1.mlp.c_fc2.bias", np.zeros_like), "layer 1"),
        "another head": (tensor("lm_head.weight", lambda x: np.roll(x, 1, 0)), "the final norm or the head"),
        "eps": (setting("layer_norm_epsilon", 10), "layer 0"),
        "mup_width_scale": (setting("mup_width_scale", 2), "the final norm or the head"),
    },
    "llama": {name: found for name, found in LLAMA_LIKE.items() if not name.startswith("a final")} | {
        "eps": (setting("rms_norm_eps", 0.1), "layer 0"),
        "rope_theta": (setting("rope_theta", 10), "layer 0"),
        "the head is the embedding": (
            lambda tensors, config: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
            "the final norm or the head"),
    },
    "starcoder": {
        "k before q": (tensor("transformer.h.0.attn.c_attn.weight", lambda x: np.roll(x, 8, 0)), "layer 0"),
        "positions lost": (tensor("transformer.wpe.weight", np.zeros_like), "the embedding"),
        "a bias lost": (tensor("transformer.h.2.mlp.c_proj.bias", np.zeros_like), "layer 2"),
        "eps": (setting("layer_norm_epsilon", 0.1), "layer 0"),
    },
    "stablelm": LLAMA_LIKE | {
        "eps that wasn't rescaled": (setting("layer_norm_eps", 5 / 3), "layer 0"),
        "the constant lost": (tensor("model.layers.1.input_layernorm.bias", lambda x: x * (np.arange(x.size) < 39)),
                              "layer 1"),
        "the head is the embedding": (
            lambda tensors, config: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
            "the final norm or the head"),
    },
}


@pytest.mark.parametrize(("form", "mistake"), [(form, name) for form, found in MISTAKES.items() for name in found])
def test_a_mistake_is_caught_where_it_is(
        form: str, mistake: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    change, where = MISTAKES[form][mistake]
    message = changed(form, folders(form), tmp_path / "wrong", change)
    assert f"first in {where}; " in message, message


def test_a_missing_tensor_is_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    message = changed("crystal", folders("crystal"), tmp_path / "wrong",
                      lambda tensors, config: tensors.__delitem__("model.layers.1.mlp.up_proj.bias"))
    assert "model.layers.1.mlp.up_proj.bias is missing" in message


def test_values_that_are_no_numbers_fail(folders: Callable[[str], Path], tmp_path: Path) -> None:
    message = changed("crystal", folders("crystal"), tmp_path / "wrong",
                      tensor("model.layers.1.mlp.up_proj.bias", lambda x: x * np.float32("nan")))
    assert "differ by nan" in message and "first in layer 1; " in message


@pytest.mark.parametrize("form", FAMILY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_compared_with_the_weights_as_stored(form: str, dtype: str, tmp_path: Path) -> None:
    export.export(checkpoint(form), form, tmp_path / "half", dtype=dtype)
    result = parity.check(made(form, checkpoint(form), dtype), tmp_path / "half", checkpoint(form))
    assert result["relative_difference"] <= (parity.ROUNDED[dtype] / 3 if form == "stablelm" else 3e-6)


def for_gguf(world: Path) -> Checkpoint:
    model = replace(MODELS["crystal"], vocab_size=448, embed_dim=48, num_heads=3, mlp_dim=67, rotary_dim=6)
    return Checkpoint(drawn(model), model, world / "tokenizer.json")


@pytest.mark.parametrize("dtype", [*DTYPES, "q8_0"])
def test_a_gguf_file(dtype: str, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    right = for_gguf(world)
    export.export(right, "gguf", tmp_path / "out", dtype=dtype)
    result = parity.check(made("gguf", right, dtype), tmp_path / "out", right)
    assert result["real_tokens"] and result["relative_difference"] <= parity.ROUNDED[dtype] / 3
    assert result["unrounded"]["dtype"] == dtype and result["unrounded"]["relative_difference"] <= 3e-6
    other = replace(right, params=copy.deepcopy(right.params))
    other.params["layers"]["attn"]["o_bias"][1] = 0
    assert "first in layer 1; " in refused(parity.check, made("gguf", right, dtype), tmp_path / "out", other)


COARSE = [("stablelm", "bfloat16"), ("stablelm", "float16"),
          *(("gguf", dtype) for dtype in ("bfloat16", "float16", "q8_0"))]
WRONG_SETTINGS = {"layer_norm_eps": 5 / 3, "rope_theta": 10}
"""The first as if it weren't rescaled for the 5 heads where the model has 3."""
LOST_BIASES = ("attn.q", "attn.k", "attn.o", "mlp.up", "mlp.down")


@pytest.mark.parametrize("mistake", [*WRONG_SETTINGS, *LOST_BIASES])
@pytest.mark.parametrize(("form", "dtype"), COARSE)
def test_rounding_hides_no_mistake(form: str, dtype: str, mistake: str, world: Path, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the conversion: what is written is what was meant, and read back as such."""
    if form == "gguf":
        pytest.importorskip("gguf")
    make_config, make_tensors = stablelm.make_config, stablelm.make_tensors

    def wrong_config(wide: stablelm.Widened) -> dict[str, Any]:
        config = make_config(wide)
        return config | {mistake: config[mistake] * WRONG_SETTINGS[mistake]}

    def wrong_tensors(params: dict[str, np.ndarray], wide: stablelm.Widened) -> dict[str, Any]:
        leaf = f"layers.{mistake}_bias"
        return make_tensors(params | {leaf: np.zeros_like(params[leaf])}, wide)

    if mistake in WRONG_SETTINGS:
        monkeypatch.setattr(stablelm, "make_config", wrong_config)
    else:
        monkeypatch.setattr(stablelm, "make_tensors", wrong_tensors)
    weights = for_gguf(world) if form == "gguf" else checkpoint(form)
    message = refused(export.export, weights, form, tmp_path / "out", dtype=dtype)
    assert "where 1e-04 is allowed; first in layer 0; the conversion" in message
    assert not (tmp_path / "out").exists()


def test_a_file_that_rounding_has_spoilt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.ROUNDED, "bfloat16", 2e-4)
    message = refused(export.export, checkpoint("stablelm"), "stablelm", tmp_path / "out", dtype="bfloat16")
    assert "where 2e-04 is allowed; first in " in message and message.endswith("for it: use --dtype=float32")


@pytest.mark.parametrize("form", ["crystal", "stablelm"])
def test_logits_that_are_all_zero_pass(form: str, tmp_path: Path) -> None:
    weights = checkpoint(form)
    weights.params["embed"] *= 0
    result = export.export(weights, form, tmp_path / "out")["parity"]
    assert result["largest_logit"] == result["relative_difference"] == result["states"]["the embedding"] == 0


def test_the_text_is_real_and_long_enough(reference: Path) -> None:
    model = replace(MODELS["crystal"], vocab_size=32032, max_length=2048)
    tokenizer = reference / "crystalcoder_hf" / "tokenizer.json"
    ids, real = parity._tokens(Checkpoint({}, model, tokenizer))
    assert real and len(ids) == 256 and ids[0] == 1 and len(set(ids.tolist())) > 120
    assert len(parity._tokens(Checkpoint({}, replace(model, max_length=16), tokenizer))[0]) == 16


PARTS = {"crystal": MODELS["crystal"], "starcoder": replace(MODELS["starcoder"], embed_dim=48, num_heads=6),
         "grouped": replace(MODELS["llama"], embed_dim=96, num_heads=12, rotary_dim=8, mup_base_width=96)}


@pytest.mark.parametrize("block", [1, 2000, 7000, 1 << 22])
@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_the_model_are_the_model(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many heads, units and rows of the vocabulary are taken at a time."""
    monkeypatch.setattr(parity, "BLOCK", block)
    model = PARTS[name]
    params, ids = drawn(model), np.arange(40) * 7 % model.vocab_size
    ours = parity.Reference(Checkpoint(params, model), None)
    h = ours.embed(ids)
    for layer in range(model.num_layers):
        h = ours.layer(h, layer)
    x, step = ours.final(h), 1 + block // 100
    found = np.concatenate([ours.logits(x, slice(at, at + step)) for at in range(0, model.vocab_size, step)], axis=1)
    expected = np.asarray(Crystal(model).bind(jax.tree.map(jnp.asarray, params))(ids[None]))[0]
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


def test_the_most_probable_token_over_blocks_of_rows() -> None:
    logits, top = np.random.default_rng(0).integers(0, 5, (30, 20)).astype(np.float32), parity.Top()
    for start in range(0, 20, 7):
        top.add(logits[:, start : start + 7], start)
    np.testing.assert_array_equal(top.token_T, logits.argmax(-1))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, ModelConfig, float]:
    """A form, a model that it can say, and how large its biases are."""
    form = draw(st.sampled_from(list(FAMILY)))
    family, heads = FAMILY[form], draw(st.integers(1, 5))
    head = 2 * draw(st.integers(4 if heads == 1 else 2, 6))  # in fewer than 8 channels a norm is nearly a sign function
    rotary = {"crystal": 2 * draw(st.integers(0 if form != "stablelm" else 1, head // 2)), "llama": head}.get(family, 0)
    kv_heads = draw(st.sampled_from({"starcoder": [1], "crystal": [None]}.get(
        family, [n for n in range(1, heads + 1) if heads % n == 0])))
    model = ModelConfig(
        family=family, vocab_size=draw(st.integers(40, 130)), embed_dim=heads * head, num_heads=heads,
        num_kv_heads=kv_heads, num_layers=draw(st.integers(1, 3)), mlp_dim=draw(st.integers(3, 50)),
        max_length=draw(st.sampled_from([9, 17, 64, 80])), rotary_dim=rotary, mup_base_width=heads * head,
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])), embed_scale=1.0, output_scale=1.0)
    if family == "crystal":
        model = replace(model, embed_scale=draw(st.floats(0.5, 20)), output_scale=draw(st.floats(0.5, 3)),
                        mup_base_width=draw(st.integers(1, 40)))
    return form, model, draw(st.sampled_from([0.0, 0.2]))


@settings(max_examples=15)
@given(shapes(), st.integers(0, 99), st.sampled_from(list(DTYPES)))
def test_any_shape_passes(tmp_path_factory: pytest.TempPathFactory, shape: tuple[str, ModelConfig, float], seed: int,
                          dtype: str) -> None:
    form, model, biases = shape
    weights = Checkpoint(drawn(model, seed, biases), model)
    place = tmp_path_factory.mktemp("shape") / "out"
    export.export(weights, form, place, dtype=dtype)
    parity.check(made(form, weights, dtype), place, weights)


def test_a_result_is_written_and_read_again(tmp_path: Path) -> None:
    result = {"tokens": 64, "real_tokens": True, "relative_difference": 2.5e-7, "bar": 1e-4, "same_top_token": 63}
    files = parity.files(result, b"# Card\n")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert parity.read(tmp_path) == result
    assert "at most\n2.5e-07 of the largest (1e-04" in files["README.md"].decode()
    (tmp_path / parity.FILE).write_text("{}")
    assert "parity.json: missing or not ours" in refused(parity.read, tmp_path)


def test_forms_have_a_forward_pass_of_their_own() -> None:
    assert set(forms.FORMS) | {"stablelm", "gguf"} <= set(forwards.FORWARDS)
