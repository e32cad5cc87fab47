"""What conversion refuses, in one line each that names the tensor or file: nothing is left behind or overwritten."""

import argparse
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import TINY, assert_same_params, exported, flip_a_bit, random_params, refused, tiny, write_tokenizer

from crystal_jax.convert import command, export, folder, forms, importer
from crystal_jax.convert.forms import LLM360

# What an export refuses


def without(params: dict[str, Any], leaf: str) -> dict[str, Any]:
    return forms.unflatten({key: value for key, value in forms.flatten(params).items() if key != leaf})


def with_leaf(params: dict[str, Any], leaf: str, value: Any) -> dict[str, Any]:
    return forms.unflatten(forms.flatten(params) | {leaf: value})


@pytest.mark.parametrize(("params", "part"), [
    (without(random_params(TINY), "layers.mlp.gate_bias"), "layers.mlp.gate_bias is missing"),
    (with_leaf(random_params(TINY), "layers.mlp.gates", np.zeros(3)), "layers.mlp.gates is not a parameter"),
    (with_leaf(random_params(TINY), "final_norm.scale", np.ones(23)), "final_norm.scale has shape (23,)"),
    (with_leaf(random_params(TINY), "final_norm.scale", np.ones(24)), "final_norm.scale has dtype float64"),
])
def test_parameters_that_are_not_the_models(params: dict[str, Any], part: str, tmp_path: Path) -> None:
    assert part in refused(export.export, tiny(params=params), "crystal", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_value_that_is_not_finite_is_named(value: float, dtype: str | None, tmp_path: Path) -> None:
    params = random_params(TINY)
    params["layers"]["attn"]["o"][1, 2, 3, 4] = value
    message = refused(export.export, tiny(params=params), "crystal", tmp_path / "out", dtype=dtype)
    assert "model.layers.1.self_attn.o_proj.weight" in message
    assert "1 of 576 values are NaN or inf" in message
    assert not list(tmp_path.iterdir())


def test_a_value_beyond_float16_is_named(tmp_path: Path) -> None:
    params = random_params(TINY)
    params["embed"][3, 3] = 1e6
    message = refused(export.export, tiny(params=params), "crystal", tmp_path / "out", dtype="float16")
    assert "model.embed_tokens.weight" in message
    assert "range of float16" in message
    export.export(tiny(params=params), "crystal", tmp_path / "out", dtype="bfloat16")


def test_options_are_checked(tmp_path: Path) -> None:
    assert "--dtype=int8" in refused(export.export, tiny(), "crystal", tmp_path / "out", dtype="int8")
    assert "--to=gguf" in refused(export.export, tiny(), "gguf", tmp_path / "out")
    assert "--max_shard_size=0" in refused(export.export, tiny(), "crystal", tmp_path / "out", max_shard_size=0)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(export.export, tiny(), "crystal", tmp_path / "file")


def test_tokenizers_of_another_model_are_refused(tmp_path: Path) -> None:
    large = write_tokenizer(tmp_path / "large.json", 62)
    assert "62 ids" in refused(export.export, tiny(tokenizer=large), "crystal", tmp_path / "out")
    missing = tmp_path / "missing.json"
    assert "missing.json" in refused(export.export, tiny(tokenizer=missing), "crystal", tmp_path / "out")
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    assert "broken.json" in refused(export.export, tiny(tokenizer=broken), "crystal", tmp_path / "out")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"added_tokens": [], "model": {"vocab": {"a": 0}}}))
    assert "<s>" in refused(export.export, tiny(tokenizer=other), "crystal", tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_safetensors", full)
        assert "No space left on device" in refused(export.export, tiny(), "crystal", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "1,000 bytes free" in refused(export.export, tiny(), "crystal", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_writer_meets_a_full_disk() -> None:
    entry = folder.Entry("x", (4,), np.dtype(np.float32))
    with pytest.raises(OSError, match="No space left"):
        folder.write_safetensors(Path("/dev/full"), [entry], lambda _: np.zeros(4, np.float32))


def test_what_reads_back_changed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = folder.write_safetensors

    def spoiled(path: Path, *args: Any) -> None:
        write(path, *args)
        flip_a_bit(path)

    monkeypatch.setattr(folder, "write_safetensors", spoiled)
    assert "model.norm.bias has other values" in refused(export.export, tiny(), "crystal", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bits_differ_between_the_two_zeros() -> None:
    assert not folder.same_bits(np.zeros(2, np.float32), -np.zeros(2, np.float32))
    assert not folder.same_bits(np.zeros(2, np.float32), np.zeros(2, np.float16))
    assert not folder.same_bits(np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float32))
    rows = np.zeros((5, folder.BLOCK // 2), np.float32)  # two rows at a time
    other = rows.copy()
    assert folder.same_bits(rows, other)
    other[4, -1] = 1
    assert not folder.same_bits(rows, other)
    assert folder.same_bits(np.zeros(2, ml_dtypes.bfloat16), np.zeros(2, ml_dtypes.bfloat16))


# What an import refuses


def rewrite(place: Path, **changes: Any) -> None:
    """Changes tensors of a one-file folder; None removes one. Names are given with : for a dot."""
    path = place / "model.safetensors"
    stored = load_file(path) | {name.replace(":", "."): value for name, value in changes.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in stored.items() if value is not None}, path)


@pytest.mark.parametrize(("changes", "part"), [
    ({"model:norm:bias": None}, "model.norm.bias is missing"),
    ({"model:layers:2:mlp:up_proj:bias": np.zeros(37, np.float32)}, "model.layers.2.mlp.up_proj.bias is not part"),
    ({"model:norm:bias": np.zeros(25, np.float32)}, "model.norm.bias has shape (25,), config.json says (24,)"),
    ({"model:norm:bias": np.full(24, np.nan, np.float32)}, "model.norm.bias has values that are NaN"),
    ({"model:norm:bias": np.zeros(24, np.int32)}, "model.norm.bias is int32"),
    ({"model:layers:1:mlp:up_proj:bias": np.zeros(37, np.float16)}, "is float16, but model.embed_tokens"),
    ({"lm_head:weight": np.zeros((61, 24), np.float32)}, "lm_head.weight differs"),
])
def test_tensors_that_are_not_the_models(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    place = exported(tmp_path / "out", "crystal")
    rewrite(place, **changes)
    assert part in refused(importer.read_torch_folder, place, "crystal")


def test_a_head_equal_to_the_embedding_and_buffers_are_passed_over(tmp_path: Path) -> None:
    place = exported(tmp_path / "out", "llm360")
    buffers = {f"transformer:h:{i}:attn:bias": np.tril(np.ones((1, 1, 96, 96), bool)) for i in range(2)}
    rewrite(place, **buffers, **{"transformer:h:0:attn:masked_bias": np.float32([-1e9])})
    assert_same_params(importer.read_torch_folder(place, "llm360")[0], random_params(TINY))
    rewrite(place, **{"lm_head:weight": None})
    assert_same_params(importer.read_torch_folder(place, "llm360")[0], random_params(TINY))


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    assert "config.json: missing" in refused(importer.read_torch_folder, tmp_path / "none", "crystal")
    place = exported(tmp_path / "out", "crystal", max_shard_size=8000)
    assert "model_type 'crystal'" in refused(importer.read_torch_folder, place, "llm360")
    shard = sorted(place.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    assert f"{shard}: missing" in refused(importer.read_torch_folder, place, "crystal")
    shard.write_bytes(content[:-8])
    assert str(shard) in refused(importer.read_torch_folder, place, "crystal")
    shutil.copy(sorted(place.glob("model-*.safetensors"))[0], shard)
    assert "also in another file" in refused(importer.read_torch_folder, place, "crystal")
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    assert "same folder" in refused(importer.read_torch_folder, place, "crystal")
    index.write_text("{}")
    assert "not an index" in refused(importer.read_torch_folder, place, "crystal")
    for path in place.glob("model*safetensors*"):
        path.unlink()
    assert "no weights" in refused(importer.read_torch_folder, place, "crystal")
    (place / "config.json").write_text("{")
    assert "config.json: damaged (Expecting property name" in refused(importer.read_torch_folder, place, "crystal")


def test_bin_files_without_torch_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = exported(tmp_path / "out", "llm360")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs torch" in refused(importer.read_torch_folder, place, "llm360")


def test_an_import_touches_no_folder_that_exists(tmp_path: Path) -> None:
    place, mine = exported(tmp_path / "out", "crystal"), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    assert "exists" in refused(importer.import_checkpoint, "crystal", place, mine)
    assert "exists" in refused(importer.import_checkpoint, "crystal", place, mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years"
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1.5GB", "5TB"])
def test_sizes_that_are_none(text: str) -> None:
    assert "--max_shard_size" in refused(command.parse_size, text)


@pytest.mark.parametrize("argv", [
    ("export", "--to=crystal", "--checkpoint=run", "--output=gs://bucket/out"),
    ("import", "--from=crystal", "--input=gs://bucket/in", "--output=out"),
    ("import", "--from=crystal", "--input=in", "--output=s3://bucket/out"),
])
def test_addresses_are_no_folders(argv: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    message = refused(command.main, parser.parse_args(argv))
    assert "://bucket" in message and "must be a local folder" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["crystal", "llm360"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 10**400], ids=["nan", "inf", "-inf", "huge"])
def test_numbers_of_a_config_that_are_not_finite(form: str, value: float) -> None:
    config = forms.make_config(forms.FORMS[form], TINY)
    key = "mup_width_scale" if form == "llm360" else forms.FORMS[form].config_keys["norm_eps"]
    assert key in refused(forms.parse_config, forms.FORMS[form], config | {key: value}, "config.json")


def test_a_width_scale_beyond_all_widths() -> None:
    config = forms.make_config(LLM360, TINY) | {"mup_width_scale": 1e308}
    assert "mup_width_scale 1e+308" in refused(forms.parse_config, LLM360, config, "config.json")


class Unsafe:
    """What torch reads only where it runs a file's code."""


@pytest.mark.parametrize(("change", "part"), [
    (lambda torch, state: list(state.values()), "holds a list"),
    (lambda torch, state: state | {"x": Unsafe()}, "more than tensors"),
    (lambda torch, state: {name: value.to(torch.float8_e4m3fn) for name, value in state.items()},
     "transformer.wte.weight is float8_e4m3fn"),
    (lambda torch, state: state | {"transformer.ln_f.bias": state["transformer.ln_f.bias"].to_sparse()},
     "transformer.ln_f.bias is sparse_coo"),
])
def test_bin_files_of_another_kind(change: Any, part: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    place = exported(tmp_path / "out", "llm360")
    state = {name: torch.from_numpy(value) for name, value in load_file(place / "model.safetensors").items()}
    (place / "model.safetensors").unlink()
    torch.save(change(torch, state), place / "pytorch_model.bin")
    message = refused(importer.read_torch_folder, place, "llm360")
    assert part in message and "pytorch_model.bin" in message and "weights_only" not in message


def test_a_safetensors_dtype_that_numpy_has_not(tmp_path: Path) -> None:
    place = exported(tmp_path / "out", "crystal")
    path = place / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"U32"'))
    assert "model.embed_tokens.weight is U32" in refused(importer.read_torch_folder, place, "crystal")
