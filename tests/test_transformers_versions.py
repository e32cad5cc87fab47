"""Exported folders in each supported transformers: this environment's, and the older ones of `make test-transformers`.

A folder is loaded by an interpreter that has nothing of ours (transformers_probe.py), and all that it gives is compared
with the model in JAX.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from test_convert import Checkpoint
from test_parity import MODELS, drawn

from crystal_jax.config import ModelConfig
from crystal_jax.convert import export, importer
from crystal_jax.model import Crystal

pytestmark = pytest.mark.torch

VERSIONS = ("4.46.3", "4.57.6")
ELSEWHERE = dict(each.split("=", 1) for each in os.environ.get("CRYSTAL_TRANSFORMERS_PYTHON", "").split())
"""Version to an interpreter: CRYSTAL_TRANSFORMERS_PYTHON="4.46.3=/some/bin/python 4.57.6=/other/bin/python"."""
INTERPRETERS = {"installed": Path(sys.executable)} | {
    version: Path(ELSEWHERE.get(version, ROOT / f".venv-transformers-{version}" / "bin" / "python"))
    for version in VERSIONS}
SMALL = ModelConfig(vocab_size=448, embed_dim=48, num_layers=3, num_heads=4, mlp_dim=67, max_length=128, rotary_dim=6,
                    mup_base_width=12, norm_eps=1e-4)
FOLDERS = {"crystal": ("crystal", True), "stablelm": ("crystal", False), "llama": ("llama", False),
           "starcoder": ("starcoder", True)}
"""Form to its family's model, and whether its head is tied."""
TEXTS = ["def f(n):\n    return n * 2  # double\n", "  two spaces", "", "naïve café 語", "<s>x</s>",
         "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", *(f"total_{i} = {i * 7919}" for i in range(100))]
WIDTH = 12
LENGTHS = (5, WIDTH, 1, 9, *[WIDTH] * 12)
"""Tokens of each of 16 prompts that count, the last ones."""


@dataclass
class Case:
    """An exported folder and what it must give."""

    weights: Checkpoint
    job: dict[str, Any]

    def logits(self, ids: Any) -> np.ndarray:
        """[B, T, V] in JAX."""
        return np.array(_logits(self.weights.model, self.weights.params, np.asarray(ids, np.int32)))


@partial(jax.jit, static_argnums=0)
def _logits(model: ModelConfig, params: dict[str, Any], ids: jax.Array) -> jax.Array:
    return Crystal(model).bind(params)(ids)


@pytest.fixture(scope="module")
def cases(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    place, rng = tmp_path_factory.mktemp("versions"), np.random.default_rng(0)
    made = {}
    for form, (family, tied) in FOLDERS.items():
        model = SMALL if form == "crystal" else MODELS[family]
        weights = Checkpoint(drawn(model, 5), model, world / "tokenizer.json" if form == "crystal" else None)
        export.export(weights, form, place / form, max_shard_size=60_000)
        job = {"folder": str(place / form), "code": form == "crystal", "tied": tied,
               "ids": rng.integers(3, model.vocab_size, (3, 40)).tolist()}
        if form == "crystal":
            job |= {"prompts": rng.integers(3, model.vocab_size, (16, WIDTH)).tolist(), "lengths": LENGTHS,
                    "texts": TEXTS}
        made[form] = Case(weights, job)
    if (ROOT.parent / "shared" / "reference").is_dir():
        made["original"] = original(ROOT.parent / "shared" / "reference", place)
    return made


def original(reference: Path, place: Path) -> Case:
    """The published model in one .bin, imported and exported as crystal; its ids are those of the known logits."""
    from test_convert_torch import oracle_folder

    published, oracle = oracle_folder(reference, place / "published")
    params, model, _ = importer.read_torch_folder(published, "llm360")
    weights = Checkpoint(params, model)
    export.export(weights, "crystal", place / "original")
    return Case(weights, {"folder": str(place / "original"), "code": True, "tied": True,
                          "ids": oracle["input_ids"].tolist()})


Found = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def found(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Version to what it gave for each case, asked once."""
    results: dict[str, Found] = {}

    def ask(version: str) -> Found:
        if version not in results:
            place = tmp_path_factory.mktemp("probe")
            results[version] = probe(INTERPRETERS[version], {name: case.job for name, case in cases.items()}, place)
        return results[version]

    return ask


def probe(interpreter: Path, jobs: dict[str, Any], place: Path) -> Found:
    if not interpreter.exists():
        pytest.skip(f"needs {interpreter.parents[1].name}: make test-transformers")
    (place / "job.json").write_text(json.dumps(jobs))
    clean = {key: value for key, value in OUTER_ENVIRONMENT.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [interpreter, "-I", ROOT / "tests" / "transformers_probe.py", place / "job.json", place / "result.npz"],
        cwd=place, capture_output=True, text=True, check=False,
        env={**clean, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(np.load(place / "result.npz"))


@pytest.mark.parametrize("version", INTERPRETERS)
def test_the_interpreter_is_that_version_and_has_nothing_of_ours(
        version: str, found: Callable[[str], Found]) -> None:
    assert str(found(version)["version"]) == version or version == "installed"
    assert found(version)["ours"].size == 0


def close(values: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(values - expected).max() <= 1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("form", FOLDERS)
@pytest.mark.parametrize("version", INTERPRETERS)
def test_logits_are_those_of_jax(version: str, form: str, found: Callable[[str], Found],
                                 cases: dict[str, Case]) -> None:
    values, expected = found(version), cases[form].logits(cases[form].job["ids"])
    assert expected.std() > 0.03
    for kind in ("eager.logits", "sdpa.logits", "again.logits"):
        assert close(values[f"{form}.{kind}"], expected), kind


def assert_greedy(logits: np.ndarray, tokens: np.ndarray) -> None:
    """Each token [B, T] is the most probable of its row of logits [B, T, V]; </s> was forbidden."""
    chosen = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    logits[..., 2] = -np.inf
    assert np.abs(logits.max(-1) - chosen).max() <= 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("version", INTERPRETERS)
def test_generation_cached_and_uncached(version: str, attention: str, found: Callable[[str], Found],
                                        cases: dict[str, Case]) -> None:
    values, case = found(version), cases["crystal"]
    cached = values[f"crystal.{attention}.generated"]
    assert cached.shape == (16, WIDTH + 64)
    for kind in ("uncached", "static"):
        np.testing.assert_array_equal(cached, values[f"crystal.{attention}.{kind}"], kind)
    assert close(values[f"crystal.{attention}.cached_logits"], case.logits(case.job["ids"]))
    assert_greedy(case.logits(cached)[:, WIDTH - 1 : -1], cached[:, WIDTH:])
    assert len({tuple(row) for row in cached[:, WIDTH:].tolist()}) > 8, "rows that all say the same would prove little"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("version", INTERPRETERS)
def test_left_padded_rows(version: str, attention: str, found: Callable[[str], Found], cases: dict[str, Case]) -> None:
    values, case = found(version), cases["crystal"]
    padded, generated = values[f"crystal.{attention}.padded_logits"], values[f"crystal.{attention}.padded_generated"]
    assert np.isfinite(padded).all()
    np.testing.assert_array_equal(generated, values[f"crystal.{attention}.padded_static"])
    # Without the padding, and filled up on the right, where it changes nothing.
    expected = case.logits([np.roll(row, length - WIDTH) for row, length in zip(generated, LENGTHS, strict=True)])
    for row, length in enumerate(LENGTHS):
        assert close(padded[row, WIDTH - length :], expected[row, :length]), row
        assert_greedy(expected[row, length - 1 : length + 63], generated[row, WIDTH:])


@pytest.mark.parametrize("version", INTERPRETERS)
def test_the_tokenizer_is_the_tokenizers_librarys(version: str, found: Callable[[str], Found], world: Path) -> None:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(world / "tokenizer.json"))
    expected = [id for text in TEXTS for id in [*plain.encode(text).ids, -1]]
    np.testing.assert_array_equal(found(version)["crystal.ids"], expected)


@pytest.mark.parametrize("version", INTERPRETERS)
def test_the_original_through_our_form(version: str, reference: Path, found: Callable[[str], Found]) -> None:
    expected = np.load(reference / "oracle_tiny_f32.npz")["logits"]
    for kind in ("eager", "sdpa", "again"):
        assert np.abs(found(version)[f"original.{kind}.logits"] - expected).max() <= 1e-5
