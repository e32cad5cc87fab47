"""Scores against log_softmax of the model's logits, and every way to ask for them wrongly."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from crystal_jax import cli
from crystal_jax import score as score_module
from crystal_jax.checkpoint import Weights, save_weights
from crystal_jax.config import ModelConfig
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal
from crystal_jax.score import BATCH, score

MODEL = ModelConfig(vocab_size=40, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=12, rotary_dim=4,
                    mup_base_width=8)
T = MODEL.max_length + 1


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(oracle.random_params(Crystal(MODEL).specs()), MODEL, None)


def tokens_of(rows: int, length: int = T, dtype: Any = np.int64) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, MODEL.vocab_size, (rows, length)).astype(dtype)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """More than one batch, the last one not full, rows as long as the context allows."""
    return tokens_of(2 * BATCH + 3)


@pytest.fixture(scope="module")
def scored(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    return score(weights, tokens)


# Values


def definition(params: Any, tokens: np.ndarray) -> np.ndarray:
    model = Crystal(MODEL)
    logits = jax.jit(lambda params, ids: model.bind(params)(ids), compiler_options=oracle.QUICK)(
        params, tokens[:, :-1].astype(np.int32))
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, tokens[:, 1:, None].astype(np.int64), -1)[..., 0]


def test_scores_are_log_probabilities_of_the_next_token(weights: Weights, tokens: np.ndarray,
                                                        scored: np.ndarray) -> None:
    expected = definition(weights.params, tokens)
    assert scored.shape == (len(tokens), T - 1)
    assert scored.dtype == np.float32
    assert np.abs(scored - expected).max() <= 2e-5
    assert expected.std() > 1
    assert scored.max() <= 0


def test_a_row_does_not_depend_on_its_batch(weights: Weights, tokens: np.ndarray, scored: np.ndarray) -> None:
    """Neither on its place nor on what fills a batch up."""
    assert np.abs(score(weights, tokens[::-1][:5]) - scored[::-1][:5]).max() <= 1e-6


def test_half_precision_weights_and_small_integers(weights: Weights) -> None:
    """Exports are bfloat16, computed in float32; token files are often uint16."""
    half = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16)), weights.params)
    tokens = tokens_of(2, 5, np.uint16)
    found = score(Weights(half, MODEL, None), tokens)
    assert np.abs(found - definition(jax.tree.map(lambda leaf: leaf.astype(np.float32), half), tokens)).max() <= 2e-5


# Mistakes


@pytest.mark.parametrize(("array", "message"), [
    (tokens_of(2)[0], "--tokens: int64[13] must be integers [B, T], B of 1 and T of 2 or more"),
    (tokens_of(2)[None], "--tokens: int64[1, 2, 13] must be integers"),
    (tokens_of(2, dtype=np.float32), "--tokens: float32[2, 13] must be integers"),
    (tokens_of(2) > 3, "--tokens: bool[2, 13] must be integers"),
    (tokens_of(2, 1), "--tokens: int64[2, 1] must be integers"),
    (np.zeros((0, 5), np.int32), "--tokens: int32[0, 5] must be integers"),
    (tokens_of(2, T + 1), "--tokens: rows of 14 tokens; the model's context takes at most 13"),
    (np.array([[1, 40]]), "--tokens: ids from 1 to 40; the model has 0 to 39"),
    (np.array([[-1, 4]]), "--tokens: ids from -1 to 4; the model has 0 to 39"),
    (np.array([[2**63, 4]], np.uint64), "--tokens: ids from 4 to 9223372036854775808; the model has 0 to 39"),
])
def test_tokens_that_cannot_be_scored(weights: Weights, array: np.ndarray, message: str) -> None:
    with pytest.raises(UserError) as error:
        score(weights, array)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# The command


@pytest.fixture(scope="module")
def checkpoint(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_weights(folder, weights.params, weights.model, None, {"step": 1})
    return folder


def run(checkpoint: Path, tokens: Path, output: Path) -> int:
    return cli.main(["score", f"--checkpoint={checkpoint}", f"--tokens={tokens}", f"--output={output}"])


def test_the_command_writes_what_the_function_gives(checkpoint: Path, tokens: np.ndarray, scored: np.ndarray,
                                                    tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No tokenizer is needed; the output's folder is made; a file from before is replaced, nothing else left."""
    np.save(tmp_path / "tokens.npy", tokens)
    output = tmp_path / "a" / "b" / "scores.npy"
    output.parent.mkdir(parents=True)
    output.write_bytes(b"old")
    assert run(checkpoint, tmp_path / "tokens.npy", output) == 0
    assert np.array_equal(np.load(output), scored)
    assert [file.name for file in output.parent.iterdir()] == ["scores.npy"]
    assert capsys.readouterr().out == f"{output}: float32[19, 12], mean {scored.mean():.4f} nats\n"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("crystal-jax score: ")
    assert error.count("\n") == 1
    return error


FILES = {
    "missing": None,
    "empty": b"",
    "text": b"1 2 3\n4 5 6\n",
    "damaged": b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (2, 13), }".ljust(128) + b"\n",
    "zip": b"PK\x03\x04 not a zip after all",
}


@pytest.mark.parametrize("kind", FILES)
def test_token_files_that_are_none(checkpoint: Path, kind: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    path, content = tmp_path / "tokens.npy", FILES[kind]
    if content is not None:
        path.write_bytes(content)
    assert run(checkpoint, path, tmp_path / "scores.npy") == 1
    error = one_line(capsys)
    assert f"--tokens={path}: " in error
    assert error.endswith("; give a .npy file of integers [B, T]\n")
    assert not (tmp_path / "scores.npy").exists()


def test_token_files_with_something_else_in_them(checkpoint: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "several.npz", a=tokens_of(1), b=tokens_of(2))
    np.save(tmp_path / "objects.npy", np.array([[1, "a"]], object), allow_pickle=True)
    messages = {"several.npz": "the magic string is not correct", "objects.npy": "Object arrays cannot be loaded"}
    for name, message in messages.items():
        assert run(checkpoint, tmp_path / name, tmp_path / "scores.npy") == 1
        assert message in one_line(capsys)


def test_a_checkpoint_that_is_none(tokens: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "tokens.npy", tokens)
    assert run(tmp_path, tmp_path / "tokens.npy", tmp_path / "scores.npy") == 1
    assert "neither a run with a saved state" in one_line(capsys)


def test_outputs_that_cannot_be_written(checkpoint: Path, tokens: np.ndarray, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the work: a folder, below a file."""
    np.save(tmp_path / "tokens.npy", tokens)
    monkeypatch.setattr(score_module, "score", lambda *args: pytest.fail("nothing is computed in vain"))
    outputs = {tmp_path: "a folder", tmp_path / "tokens.npy" / "x.npy": "name a file in a folder"}
    for output, message in outputs.items():
        assert run(checkpoint, tmp_path / "tokens.npy", output) == 1
        assert f"--output={output}: " in (error := one_line(capsys))
        assert message in error
