"""coord_check: it measures the model's own activations, passes muP, and fails whatever leaves out one of its rules."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from crystal_jax import cli, coord_check, mup, optimizer
from crystal_jax.config import FAMILIES, ModelConfig, OptimizerConfig
from crystal_jax.coord_check import BAR, PLACES, Result, activations
from crystal_jax.layers import project
from crystal_jax.model import Crystal
from crystal_jax.plots_mup import draw_coord_check

TINY = ModelConfig(vocab_size=64, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=172, max_length=32, rotary_dim=4,
                   mup_base_width=64)
FAMILY = {"crystal": TINY, "llama": replace(TINY, family="llama", rotary_dim=16, num_kv_heads=2),
          "starcoder": replace(TINY, family="starcoder", rotary_dim=0, num_kv_heads=1)}
WIDTHS = [32, 64, 128]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_are_the_activations_of_the_model(family: str) -> None:
    model = Crystal(FAMILY[family])
    bound = model.bind(jax.tree.map(jnp.asarray, oracle.random_params(model.specs(), std=0.1)))
    ids_BT = np.random.default_rng(0).integers(0, 64, (2, 32)).astype(np.int32)
    found = jax.jit(lambda ids: activations(bound, ids), compiler_options=oracle.QUICK)(ids_BT)
    assert set(found) == set(PLACES)
    np.testing.assert_allclose(found["logits"], bound(ids_BT), atol=2e-5)
    added = found["attention"].sum(0) + found["mlp"].sum(0)
    np.testing.assert_allclose(found["stream"], found["embedding"] + added, atol=2e-5)
    mixed_BNTH = jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(jnp.where(
        np.tri(32, dtype=bool)[None, None], found["scores"][0], -jnp.inf)), first_values(bound, found["embedding"]))
    block = jax.tree.map(lambda leaf: leaf[0], bound.layers)
    expected = project("bnth,nhd->btd", mixed_BNTH, block.attn, ("o",), ("batch", "length", "embed"))[0]
    np.testing.assert_allclose(found["attention"][0], expected, atol=2e-5)


def first_values(bound: Crystal, h_BTD: jax.Array) -> jax.Array:
    """v [B, N, S, H] of the first layer."""
    block = jax.tree.map(lambda leaf: leaf[0], bound.layers)
    v_BKSH, = project("btd,dnh->bnth", block.attn_norm(h_BTD), block.attn, ("v",), ("batch", None, "length", None))
    return jnp.repeat(v_BKSH, bound.config.num_heads // bound.config.kv_heads, axis=1)


def check(model: ModelConfig = TINY, use_standard: bool = False) -> Result:
    return coord_check.coord_check(model, OptimizerConfig(), 0.0015, WIDTHS, use_standard, steps=3, seeds=2)


def test_mup_is_flat() -> None:
    result = check()
    assert not result.problems
    assert result.sizes["stream"] and result.widths == WIDTHS and result.parametrisation == "muP"
    for place, initial in PLACES.items():
        sizes, changes = result.slopes(place)
        assert len(sizes) == 4 and len(changes) == 3
        assert abs(sizes[0] - initial) < 0.1, f"{place} begins with the slope that PLACES says"
    assert "flat over widths 32 to 128" in coord_check.render(result)


def test_the_standard_parametrisation_grows() -> None:
    result = check(use_standard=True)
    assert {"scores", "attention", "mlp", "stream", "logits"} <= result.problems.keys()
    assert {how for how, _ in result.problems.values()} == {"grows"}
    assert "not flat over widths 32 to 128: " in coord_check.render(result)


def wrong_rate(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setitem(optimizer.GROUPS, "matrix", (lambda model: 1.0, True))
    return TINY


def wrong_embedding_rate(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setitem(optimizer.GROUPS, "embedding", (lambda model: model.width_scale, True))
    return TINY


def wrong_logits(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setattr(ModelConfig, "logit_scale", property(lambda model: model.output_scale))
    return TINY


def wrong_initial_values(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setattr(ModelConfig, "matrix_std", property(lambda model: model.init_std))
    return TINY


def wrong_scores(_: pytest.MonkeyPatch) -> ModelConfig:
    return mup.StandardModelConfig(**vars(TINY))


@pytest.mark.drill
@pytest.mark.parametrize(("leave_out", "place"), [
    (wrong_rate, "mlp"), (wrong_embedding_rate, "embedding"), (wrong_logits, "logits"), (wrong_initial_values, "mlp"),
    (wrong_scores, "scores")])
def test_each_rule_that_is_left_out_shows(leave_out: Callable[[pytest.MonkeyPatch], ModelConfig], place: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    assert place in check(leave_out(monkeypatch)).problems


def made(size: float = 1.0, slope: float = 0.0, widths: tuple[int, ...] = (64, 128, 256)) -> Result:
    """A result whose every size is a power of the width, and whose changes are as large."""
    sizes = {place: [[size * width ** (initial + slope)] * 3 for width in widths] for place, initial in PLACES.items()}
    return Result("muP", 0.001, 2, list(widths), sizes, {place: [row[1:] for row in rows]
                                                         for place, rows in sizes.items()})


@pytest.mark.parametrize(("slope", "problems"), [
    (0.0, {}), (BAR - 0.01, {}), (-BAR + 0.01, {}), (-BAR - 0.01, dict.fromkeys(PLACES, "fades")),
    (BAR + 0.01, {place: "grows" for place in PLACES if not PLACES[place]}), (1.0, dict.fromkeys(PLACES, "grows"))])
def test_the_bar(slope: float, problems: dict[str, str]) -> None:
    """Products of what begins independent may keep their first slope, or lose it as they are learned."""
    assert {place: how for place, (how, _) in made(slope=slope).problems.items()} == problems


@pytest.mark.parametrize("size", [0.0, math.inf, math.nan])
def test_what_has_no_size_is_a_problem_and_can_be_drawn(size: float) -> None:
    result = made(size)
    assert {how for how, _ in result.problems.values()} == {"is zero or not finite"}
    assert "stream is zero or not finite" in coord_check.verdict(result)
    assert draw_coord_check(result).startswith(b"\x89PNG")


CONFIG = "--config=configs/mup_sweep.py"


def test_the_command_writes_table_numbers_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    asked = {}

    def check(*given: Any) -> Result:
        asked["given"] = given
        return made(slope=float(given[4]))

    monkeypatch.setattr(coord_check, "coord_check", check)
    monkeypatch.setattr(coord_check, "use_compilation_cache", lambda: None)
    arguments = [f"--output={tmp_path}", "--widths=64,128", "--config.model.num_layers=1"]
    assert cli.main(["coord_check", CONFIG, *arguments]) == 0
    model, _, lr, widths, use_standard, steps, seeds, _ = asked["given"]
    assert (model.num_layers, lr, widths, use_standard, steps, seeds) == (1, 0.0015, [64, 128], False, 4, 3)
    assert "flat over widths" in capsys.readouterr().out
    assert (tmp_path / "coord_check.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "coord_check.json").read_text())
    assert written["flat"] and written["slopes"]["mlp"]["changes"] == pytest.approx([0, 0])
    assert cli.main(["coord_check", CONFIG, "--standard", "--json", "--lr=0.01", "--steps=2", "--seeds=1"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["flat"] and "stream grows (slope +1.00)" in printed["verdict"]
    assert asked["given"][2:7] == (0.01, [64, 128, 256, 512], True, 2, 1)


@pytest.mark.parametrize(("argument", "said"), [
    ("--widths=64,wide", "--widths=64,wide: must be whole numbers with commas"), ("--widths=64", "give two or more"),
    ("--widths=8,64", "each 16 or more"), ("--steps=0", "--steps=0: must be 1 or more"),
    ("--seeds=-1", "--seeds=-1: must be 1 or more"), ("--lr=0", "--lr=0: must be above 0, such as 0.0015"),
    ("--lr=nan", "--lr=nan: must be above 0"), ("--config.model.width=3", "--config.model.width=3"),
])
def test_a_wrong_argument_is_one_line(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coord_check", CONFIG, argument]) == 1
    printed = capsys.readouterr().err
    assert said.split("=3")[0] in printed and printed.count("\n") == 1
