"""Generation against the plainest loop there is: the whole text through the model, again for each token."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from crystal_jax import cli, generate, sampling
from crystal_jax.checkpoint import Weights, save_weights
from crystal_jax.config import ModelConfig
from crystal_jax.data.fim import fim_prompt
from crystal_jax.data.tokenizer import train_tokenizer
from crystal_jax.errors import UserError
from crystal_jax.generate import Generator, Sampling
from crystal_jax.model import Crystal
from crystal_jax.sampling import BUCKET, draw

VOCAB = 400
MODEL = ModelConfig(vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=2 * BUCKET + 12,
                    rotary_dim=4, mup_base_width=8, embed_scale=0.1)
GREEDY = Sampling(max_tokens=12)
DRAWN = Sampling(max_tokens=12, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A random model, sharp enough that no rounding changes its choices, and a tokenizer of a few words."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["def total(values): return sum(values) # the total of the values " * 5], VOCAB).save(str(path))
    params = oracle.random_params(Crystal(MODEL).specs(), std=0.8)
    # No token and no direction is favoured, so that it doesn't say one token again and again.
    params["embed"] *= 3 / np.linalg.norm(params["embed"], axis=1, keepdims=True)
    params["final_norm"] = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    return Weights(params, MODEL, path)


@pytest.fixture(scope="module")
def generator(weights: Weights) -> Iterator[Generator]:
    """It and whatever else generates in this file is compiled quickly."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_admit", "_decode", "_prefill"):
            quick = jax.jit(getattr(sampling, name).__wrapped__, static_argnums=0, compiler_options=oracle.QUICK)
            patch.setattr(sampling, name, quick)
        yield Generator(weights)


def with_params(generator: Generator, **params: Any) -> Generator:
    """The same generator, and compiled programs, with other parameters."""
    other = copy.copy(generator)
    other.params = {**generator.params, **params}
    return other


Loop = Callable[[Generator, list[int], int], list[int]]


@pytest.fixture(scope="module")
def loop() -> Loop:
    """loop(generator, prompt, n) -> n ids: argmax of the logits after all tokens so far, without a cache."""

    @functools.partial(jax.jit, static_argnums=0, compiler_options=oracle.QUICK)
    def logits(model: Crystal, params: Any, ids: jax.Array) -> jax.Array:
        return model.bind(params)(ids)[0]

    def run(generator: Generator, prompt: list[int], tokens: int) -> list[int]:
        ids = np.zeros((1, MODEL.max_length), np.int32)
        ids[0, : len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + tokens):
            row = np.asarray(logits(generator.model, generator.params, ids))[end - 1]
            ids[0, end] = row.argmax()
            assert np.diff(np.sort(row)[-2:]) > 1e-3, "a choice that rounding doesn't make"
        return ids[0, len(prompt) : len(prompt) + tokens].tolist()

    return run


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """<s> and ordinary tokens."""
    return [1, *np.random.default_rng(seed).integers(3, 300, length - 1).tolist()]


# Greedy


@pytest.mark.parametrize("length", [1, 5, BUCKET - 1, BUCKET, BUCKET + 1, 2 * BUCKET])
def test_the_cache_changes_nothing(generator: Generator, loop: Loop, length: int) -> None:
    """Around each size that prompts are filled up to, and up to the very end of the context."""
    prompt = prompt_of(length)
    expected = loop(generator, prompt, GREEDY.max_tokens)
    assert len(set(expected)) > 6, "a model that says one thing would hide mistakes"
    assert generator.tokens(prompt, GREEDY) == [expected]


def test_it_stops_at_the_end_of_the_document(generator: Generator, loop: Loop) -> None:
    """Swapping two rows of the tied embedding swaps two tokens: the fifth token found becomes </s>."""
    prompt = prompt_of(9)
    found = loop(generator, prompt, GREEDY.max_tokens)
    first = next(i for i in range(1, len(found)) if found[i] not in found[:i])
    embed = np.array(generator.params["embed"])
    end = generator.tokenizer.eos_id
    embed[[end, found[first]]] = embed[[found[first], end]]
    assert end not in prompt and found[first] not in prompt
    assert with_params(generator, embed=jnp.asarray(embed)).tokens(prompt, GREEDY) == [found[:first]]


def test_a_context_that_is_too_short(generator: Generator) -> None:
    prompt = prompt_of(MODEL.max_length - 11)
    with pytest.raises(UserError) as error:
        generator.tokens(prompt, GREEDY)
    assert str(error.value) == (
        "--max_tokens: 12 after a prompt of 129 tokens is more than the model's context of 140; at most 11 fit")
    with pytest.raises(UserError, match="at most 0 fit"):
        generator.tokens(prompt_of(200), GREEDY)


# Sampling


def test_samples(generator: Generator) -> None:
    """A sample depends on the seed and its number only; samples and seeds differ; the same again is the same."""
    prompt = prompt_of(7)
    three = generator.tokens(prompt, Sampling(**{**vars(DRAWN), "num_samples": 3}))
    assert generator.tokens(prompt, DRAWN) == three[:1]
    assert len({tuple(row) for row in three}) == 3
    assert generator.tokens(prompt, Sampling(**{**vars(DRAWN), "seed": 4})) != three[:1]


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str)
def test_what_comes_to_the_most_probable_token(generator: Generator, change: dict[str, float]) -> None:
    prompt = prompt_of(7)
    expected = generator.tokens(prompt, GREEDY)
    assert generator.tokens(prompt, DRAWN) != expected
    assert generator.tokens(prompt, Sampling(**{**vars(DRAWN), **change})) == expected


P = np.array([0.5, 0.25, 0.12, 0.08, 0.04, 0.01])
ORDER = [3, 0, 5, 1, 4, 2]
DRAWS = 4000


@pytest.fixture(scope="module")
def frequencies() -> Callable[[float, float], np.ndarray]:
    """frequencies(temperature, top_p) -> share of each of six tokens in 4000 draws from P."""
    logits = np.empty(6)
    logits[ORDER] = np.log(P) + 7.0
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = jnp.asarray(np.tile(logits, (DRAWS, 1)), jnp.float32)
    quick = jax.jit(draw, compiler_options=oracle.QUICK)

    def compute(temperature: float, top_p: float) -> np.ndarray:
        settings = (jnp.full(DRAWS, value, jnp.float32) for value in (temperature, top_p))
        ids = np.asarray(quick(rows, keys, *settings))
        return np.bincount(ids, minlength=6)[ORDER] / DRAWS

    return compute


@pytest.mark.parametrize(("temperature", "top_p", "kept"), [
    (1.0, 1.0, 6), (2.0, 1.0, 6), (0.5, 1.0, 6), (1.0, 0.9, 4), (1.0, 0.8, 3), (1.0, 0.4, 1), (2.0, 0.6, 3)])
def test_frequencies(frequencies: Callable[[float, float], np.ndarray], temperature: float, top_p: float,
                     kept: int) -> None:
    """P to the power of 1/temperature, cut to the smallest set with top_p, within what 4000 draws can say."""
    expected = P ** (1 / temperature)
    expected /= expected.sum()
    assert (np.cumsum(expected) - expected < top_p).sum() == kept
    expected[kept:] = 0
    expected /= expected.sum()
    found = frequencies(temperature, top_p)
    assert not found[kept:].any(), "nothing outside the nucleus"
    chi_square = DRAWS * ((found - expected)[:kept] ** 2 / expected[:kept]).sum()
    assert chi_square <= 20.5, "five degrees of freedom: once in 1000"


def test_temperature_zero_takes_the_first_of_the_most_probable() -> None:
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, -1.0, 5.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert draw(logits, keys, jnp.zeros(2), jnp.ones(2)).tolist() == [1, 0]


@pytest.mark.parametrize(("field", "value", "rule"), [
    ("max_tokens", 0, "above 0"), ("temperature", -0.5, "0 or more"), ("temperature", float("nan"), "0 or more"),
    ("top_p", 0.0, "in (0, 1]"), ("top_p", 1.5, "in (0, 1]"), ("num_samples", 0, "above 0"),
    ("seed", -1, "from 0 to 2147483647"), ("seed", 2**31, "from 0 to 2147483647")])
def test_settings_that_make_no_sense(generator: Generator, field: str, value: float, rule: str) -> None:
    with pytest.raises(UserError) as error:
        generator.tokens([1], Sampling(**{field: value}))
    assert str(error.value) == f"--{field}: {value} must be {rule}"


# Text


@pytest.fixture
def asked(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `tokens` is asked for; it answers with "_sum" and "x"."""
    seen: dict[str, Any] = {}
    answers = [generator.tokenizer.encode_fragment(text) for text in (" sum", "x")]

    def tokens(prompt: list[int], sampling: Sampling) -> list[list[int]]:
        seen.update(prompt=prompt, sampling=sampling)
        return answers

    monkeypatch.setattr(generator, "tokens", tokens)
    return seen


def test_a_completion_goes_on_where_the_prompt_ends(generator: Generator, asked: dict[str, Any]) -> None:
    """<s> first, special tokens in the prompt recognised, the space before the first word kept."""
    tokenizer = generator.tokenizer
    assert generator.complete("def total(<|fim_middle|>", GREEDY) == [" sum", "x"]
    assert asked["sampling"] == GREEDY
    assert asked["prompt"] == [tokenizer.bos_id, *tokenizer.encode_document("def total("), tokenizer.fim_middle_id]


def test_the_prompt_for_a_middle(generator: Generator, asked: dict[str, Any]) -> None:
    """<s> P prefix S suffix M, the suffix without a space of its own: the layout of training."""
    tokenizer = generator.tokenizer
    assert generator.infill("def total(", "): return 1", GREEDY) == [" sum", "x"]
    assert asked["prompt"] == fim_prompt(tokenizer, "def total(", "): return 1") == [
        tokenizer.bos_id, tokenizer.fim_prefix_id, *tokenizer.encode_document("def total("),
        tokenizer.fim_suffix_id, *tokenizer.encode_fragment("): return 1"), tokenizer.fim_middle_id]


def test_rows_of_the_model_without_a_piece_are_no_text(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published model has 32,032 rows, its tokenizer 32,022 ids."""
    monkeypatch.setattr(generator, "tokens", lambda prompt, sampling: [[VOCAB + 7, 300, VOCAB]])
    assert generator.complete("x", GREEDY) == [generator.tokenizer.decode_fragment([300])]


def test_weights_without_a_tokenizer(weights: Weights) -> None:
    with pytest.raises(UserError, match=r"^--checkpoint: it has no tokenizer.json beside it"):
        Generator(Weights(weights.params, weights.model, None))


def test_weights_in_half_precision_are_accepted(generator: Generator) -> None:
    """Exports are bfloat16: computed in float32 all the same."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), generator.params)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    found, expected = (with_params(generator, **params).tokens(prompt_of(5), GREEDY) for params in (half, single))
    assert found == expected


# The command


@pytest.fixture(scope="module")
def checkpoint(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_weights(folder, weights.params, weights.model, weights.tokenizer, {"step": 1})
    return folder


def test_the_command_completes(checkpoint: Path, generator: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", f"--checkpoint={checkpoint}", "--max_tokens=12", "--prompt=def"]) == 0
    assert capsys.readouterr().out == f"def{generator.complete('def', GREEDY)[0]}\n"


@pytest.fixture
def command(checkpoint: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's first arguments, with the generator that is already compiled."""
    monkeypatch.setattr(generate, "Generator", lambda weights: generator)
    return ["generate", f"--checkpoint={checkpoint}", "--max_tokens=12", "--temperature=1", "--seed=3"]


def test_the_command_fills_in_and_prints_json(command: list[str], generator: Generator,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    texts = generator.infill("def ", "(x)", Sampling(12, 1.0, seed=3, num_samples=3))
    assert cli.main([*command, "--num_samples=3", "--prefix=def ", "--suffix=(x)", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"sample": number, "prefix": "def ", "text": text, "suffix": "(x)"} for number, text in enumerate(texts)]


def test_the_command_numbers_several_samples(command: list[str], generator: Generator,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    texts = generator.complete("def", Sampling(12, 1.0, seed=3, num_samples=3))
    assert cli.main([*command, "--num_samples=3", "--prompt=def"]) == 0
    assert capsys.readouterr().out == "".join(f"--- {i} of 3\ndef{text}\n" for i, text in enumerate(texts, start=1))


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "--prompt: give either --prompt=TEXT or --prefix=TEXT --suffix=TEXT"),
    (["--prompt=a", "--suffix=b"], "--prompt: give either --prompt=TEXT or --prefix=TEXT --suffix=TEXT"),
    (["--prompt=a", "--top_p=2"], "--top_p: 2.0 must be in (0, 1]"),
    (["--prompt=a", "--seed=3000000000"], "--seed: 3000000000 must be from 0 to 2147483647"),
    (["--prompt=a"], "nowhere: neither a run with a saved state, nor RUN/checkpoints/STEP, nor a permanent checkpoint"),
])
def test_mistakes_of_the_command_are_one_line(arguments: list[str], message: str, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", f"--checkpoint={tmp_path / 'nowhere'}", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("crystal-jax generate: ")
    assert message in error
    assert error.count("\n") == 1
