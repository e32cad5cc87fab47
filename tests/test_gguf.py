"""GGUF in llama.cpp: the model's probabilities and greedy text, the tokenizer's ids, and what is refused."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llama_cpp import LlamaCpp
from test_convert import Checkpoint, random_params, refused
from tokenizers import Tokenizer

from crystal_jax.config import ModelConfig
from crystal_jax.convert import export
from crystal_jax.convert.gguf_file import FILE, KINDS
from crystal_jax.convert.vocabulary import make_vocabulary
from crystal_jax.model import Crystal

gguf = pytest.importorskip("gguf", reason="needs gguf; install requirements/data.txt")

# 5 heads of 32 in the file, so that every row is whole groups of q8_0; 28 rows more than the tokenizer has ids.
MODEL = ModelConfig(vocab_size=448, embed_dim=96, num_layers=3, num_heads=3, mlp_dim=67, max_length=256, rotary_dim=10,
                    mup_base_width=24, norm_eps=1e-4)
BARS = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2, "q8_0": 5e-2}
"""Of log-probabilities in nats."""
IDS = [1, *np.random.default_rng(0).integers(3, 420, 40).tolist()]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(world: Path) -> Checkpoint:
    return Checkpoint(random_params(MODEL, 5), MODEL, world / "tokenizer.json", {"name": "tiny"})


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """dtype to an export in it, written once."""
    made: dict[str, Path] = {}

    def exported(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("gguf") / dtype
            export.export(checkpoint, "gguf", made[dtype], dtype=dtype)
        return made[dtype]

    return exported


@pytest.fixture(scope="module")
def llama(folder: Callable[[str], Path]) -> Iterator[LlamaCpp]:
    yield LlamaCpp(folder("float32") / FILE, MODEL.max_length)


@partial(jax.jit, static_argnums=0)
def forward(model: ModelConfig, params: dict[str, Any], ids: jax.Array) -> jax.Array:
    return Crystal(model).bind(params)(ids)


def log_probabilities(params: dict[str, Any], ids: list[int], model: ModelConfig = MODEL) -> np.ndarray:
    """[V] after the last of `ids`, in JAX."""
    padded = np.zeros((1, 72), np.int32)  # one shape, compiled once
    padded[0, : len(ids)] = ids
    logits = np.asarray(forward(model, params, padded), np.float64)[0, len(ids) - 1]
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.mark.parametrize("dtype", KINDS)
def test_llama_cpp_gives_the_models_probabilities(dtype: str, folder: Callable[[str], Path],
                                                  checkpoint: Checkpoint) -> None:
    found = LlamaCpp(folder(dtype) / FILE, MODEL.max_length).next_token(IDS, 20)
    expected = log_probabilities(checkpoint.params, IDS)
    assert len(found) == 20
    assert max(abs(value - expected[token]) for token, value in found.items()) <= BARS[dtype]
    assert max(found, key=lambda token: found[token]) == expected.argmax()


@settings(max_examples=6)
@given(heads=st.integers(1, 4), kv=st.sampled_from([1, None]), head=st.integers(3, 24), part=st.floats(0, 1),
       mlp=st.integers(1, 70), further=st.integers(1, 3))
def test_any_shape_runs(tmp_path_factory: pytest.TempPathFactory, world: Path, heads: int, kv: int | None, head: int,
                        part: float, mlp: int, further: int) -> None:
    model = replace(MODEL, embed_dim=head * heads, num_heads=heads, num_kv_heads=kv, num_layers=2, mlp_dim=mlp,
                    rotary_dim=2 * max(1, int(part * (head // 2))))
    params, place = random_params(model, head), tmp_path_factory.mktemp("shape") / "out"
    export.export(Checkpoint(params, model, world / "tokenizer.json"), "gguf", place, heads=heads + further)
    expected = log_probabilities(params, IDS, model)
    # Where a byte is the most probable, llama.cpp waits for the rest of the character and gives no probabilities.
    assume(not 3 <= expected.argmax() < 259)
    found = LlamaCpp(place / FILE, MODEL.max_length).next_token(IDS, 20)
    assert max(abs(value - expected[token]) for token, value in found.items()) <= BARS["float32"]


def test_greedy_tokens_are_the_models(llama: LlamaCpp, checkpoint: Checkpoint) -> None:
    expected = list(IDS)
    for _ in range(24):
        expected.append(int(log_probabilities(checkpoint.params, expected).argmax()))
    assert llama.greedy(IDS, 24)[1] == expected[len(IDS):]


def test_a_prompt_begins_as_documents_did(llama: LlamaCpp, checkpoint: Checkpoint) -> None:
    assert checkpoint.tokenizer
    ids = Tokenizer.from_file(str(checkpoint.tokenizer)).encode("def total(x):", add_special_tokens=False).ids
    assert llama.tokenize("def total(x):", bos=True) == [1, *ids]
    assert llama.greedy("def total(x):", 8) == llama.greedy([1, *ids], 8)


# The tokenizer

WORDS = ("the", "crystal", "grows", "return", "self.x", "+=", "3.14", "日本語", "naïve", "café", "🙂", "👍🏽", "<s>",
         "</s>", "<|fim_prefix|>", "<unk>", "\n", "\t", "    ", "\r\n", "==", "{}", "İstanbul", "ß", "Ω", "\u200b",
         "\u3000", "▁", "<0x0A>", "\\n", "lambda", "x**2", "'''", "</", "s>", "[PAD430]")


def strings() -> list[str]:
    """Code, prose, mixtures of what is hard to tell apart, and random characters: about 1100."""
    rng = random.Random(0)
    found = ["", " ", "  ", "\n", " a", "a ", "</s>", "x</s>y"]
    lines = [line for path in sorted(ROOT.glob("crystal_jax/*.py")) for line in path.read_text("utf-8").split("\n")]
    found += rng.sample(lines, 400)
    found += [text * length for text in (" ", "-", "=", "\n", "a", "日", "()") for length in range(1, 21)]
    found += [rng.choice([" ", "", "\n", "  "]).join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(400)]
    found += ["".join(chr(rng.choice([rng.randrange(1, 0x250), rng.randrange(0x250, 0xD7FF), rng.randrange(
        0x1F300, 0x1F700)])) for _ in range(rng.randint(1, 20))) for _ in range(200)]
    return found


def assert_same_ids(llama: LlamaCpp, path: Path) -> None:
    tokenizer, texts = Tokenizer.from_file(str(path)), strings()
    assert len(texts) >= 800
    for special in (True, False):
        tokenizer.encode_special_tokens = not special
        differing = [text for text in texts
                     if llama.tokenize(text, special) != tokenizer.encode(text, add_special_tokens=False).ids]
        assert differing == []


def test_ids_are_those_of_a_tokenizer_trained_here(llama: LlamaCpp, checkpoint: Checkpoint) -> None:
    assert checkpoint.tokenizer
    assert_same_ids(llama, checkpoint.tokenizer)


def test_ids_are_those_of_the_published_tokenizer(reference: Path, tmp_path: Path) -> None:
    model = replace(MODEL, vocab_size=32032, num_layers=1)
    path = reference / "crystalcoder_hf" / "tokenizer.json"
    export.export(Checkpoint(random_params(model), model, path), "gguf", tmp_path / "out", dtype="q8_0")
    assert_same_ids(LlamaCpp(tmp_path / "out" / FILE, MODEL.max_length), path)
    vocabulary = make_vocabulary(path, 32032)
    kinds = [gguf.TokenType(kind).name for kind in vocabulary.kinds]
    assert kinds[:3] == ["UNKNOWN", "CONTROL", "CONTROL"]
    assert set(kinds[3:259]) == {"BYTE"} and set(kinds[259:32000]) == {"NORMAL"}
    assert set(kinds[32000:32022]) == {"CONTROL"} and set(kinds[32022:]) == {"UNUSED"}
    assert len(set(vocabulary.pieces)) == 32032


# The file


def test_what_the_file_says(folder: Callable[[str], Path]) -> None:
    reader = gguf.GGUFReader(folder("q8_0") / FILE)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert (said["general.architecture"], said["general.name"], said["general.file_type"]) == ("stablelm", "tiny", 7)
    assert (said["stablelm.attention.head_count"], said["stablelm.embedding_length"]) == (5, 160)
    assert (said["stablelm.rope.dimension_count"], said["stablelm.feed_forward_length"]) == (10, 96)
    assert said["stablelm.attention.layer_norm_epsilon"] == pytest.approx(1e-4 * 96 / 160)
    assert [said[f"tokenizer.ggml.fim_{part}_token_id"] for part in ("pre", "mid", "suf", "pad")] == [
        398, 399, 400, 401]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(kinds) == 11 * MODEL.num_layers + 4
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}


def test_rows_that_are_not_whole_groups_are_kept_in_float16(world: Path, tmp_path: Path) -> None:
    model = replace(MODEL, embed_dim=30, rotary_dim=4)
    weights = Checkpoint(random_params(model), model, world / "tokenizer.json")
    export.export(weights, "gguf", tmp_path / "out", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")
    assert LlamaCpp(tmp_path / "out" / FILE, MODEL.max_length).next_token(IDS, 1)


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_a_finished_export_is_left_and_a_changed_one_refused(dtype: str, folder: Callable[[str], Path], tmp_path: Path,
                                                             checkpoint: Checkpoint) -> None:
    place = tmp_path / "out"
    export.export(checkpoint, "gguf", place, dtype=dtype)
    assert export.export(checkpoint, "gguf", place, dtype=dtype)["unchanged"]
    assert (place / FILE).read_bytes() == (folder(dtype) / FILE).read_bytes()
    whole = bytearray((place / FILE).read_bytes())
    for place_of_bit, what in ((-1, "model.gguf: output.weight differs"),
                               (whole.find(b"general.name") + 25, "what it says of model and tokenizer differs")):
        damaged = bytearray(whole)
        damaged[place_of_bit] ^= 1
        (place / FILE).write_bytes(damaged)
        assert what in refused(export.export, checkpoint, "gguf", place, dtype=dtype)
    (place / FILE).write_bytes(whole + b"x")
    assert "model.gguf is longer" in refused(export.export, checkpoint, "gguf", place, dtype=dtype)
    (place / FILE).write_bytes(whole[:-1])
    assert "model.gguf: output.weight differs" in refused(export.export, checkpoint, "gguf", place, dtype=dtype)


def changed_tokenizer(path: Path, place: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    spec = json.loads(path.read_text("utf-8"))
    change(spec)
    place.write_text(json.dumps(spec), "utf-8")
    return place


def test_refused(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(weights: Checkpoint = checkpoint, to: str = "gguf", **options: Any) -> str:
        found = refused(export.export, weights, to, tmp_path / "out", **options)
        assert list(tmp_path.glob("*out*")) == []
        return found

    def other(change: Callable[[dict[str, Any]], Any]) -> str:
        assert checkpoint.tokenizer
        return message(replace(checkpoint, tokenizer=changed_tokenizer(
            checkpoint.tokenizer, tmp_path / "tokenizer.json", change)))

    assert "names no tokenizer" in message(replace(checkpoint, tokenizer=None))
    assert "--dtype=int8: must be one of float32, float16, bfloat16, q8_0" in message(dtype="int8")
    assert "--dtype=q8_0" in message(to="stablelm", dtype="q8_0")
    assert "--max_shard_size=9: the form gguf is one file" in message(max_shard_size=9)
    assert "of another family" in other(lambda spec: spec.update(normalizer=None))
    assert "of another family" in other(lambda spec: spec["model"].update(byte_fallback=False))
    assert "'<0x41>'" in other(lambda spec: spec["model"]["vocab"].pop("<0x41>"))
    assert "has 449 ids" in other(lambda spec: spec["added_tokens"][-1].update(id=448))
    assert "not a tokenizer.json" in other(lambda spec: spec.pop("model"))
    assert "the merges that make" in other(lambda spec: spec["model"]["merges"].append(spec["model"]["merges"][0]))
    assert "becomes ['" in other(lambda spec: spec["model"]["merges"].pop())
    params = random_params(MODEL)
    params["layers"]["mlp"]["up"][1, 0, 0] = np.inf
    assert "blk.1.ffn_up.weight (from layers.mlp.up, layers.mlp.up_bias)" in message(replace(checkpoint, params=params))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the package gguf" in message()
