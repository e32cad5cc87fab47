"""A run whose MLP and vocabulary are padded in memory: what leaves it is the model's own size, whole and equal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from world import write_config

from crystal_jax import checkpoint
from crystal_jax.config import ModelConfig
from crystal_jax.model import Crystal, map_specs

ODD = ("--config.model.mlp_dim=45", "--config.model.vocab_size=443")
SPLIT = ("--config.training.pad_to=16", "--config.training.mesh.fsdp=2", "--config.training.mesh.tensor=2")
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


@pytest.fixture(scope="module")
def config(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(world, tmp_path_factory.mktemp("config") / "world_config.py")


@pytest.fixture(scope="module")
def runs(config: Path, run_cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same recipe on one device, and padded on four."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags, env in (("whole", (), {}), ("padded", SPLIT, FOUR)):
        done = run_cli("train", f"--config={config}", f"--run_dir={folder / name}", *ODD, *flags, env=env)
        assert done.returncode == 0, done.stderr
    return folder / "whole", folder / "padded"


def losses(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_losses_and_weights_are_those_of_the_unpadded_run(runs: tuple[Path, Path]) -> None:
    whole, padded = runs
    assert losses(padded) == pytest.approx(losses(whole), rel=1e-5)
    specs = Crystal(ModelConfig(vocab_size=443, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=45, max_length=32,
                                rotary_dim=4, mup_base_width=16)).specs()
    for place in ("", "exports/phase2/step_000008"):
        ours, theirs = (checkpoint.load_weights(run / place).params for run in (padded, whole))
        map_specs(lambda spec, leaf: np.testing.assert_array_equal(leaf.shape, spec.shape), specs, ours)
        if not place:  # exports are rounded to bfloat16
            far = oracle.worst(ours, theirs)
            del far["layers.attn.k_bias"]
            assert max(far.values()) <= 1e-3, far


def test_a_padded_state_is_exported_and_continued(runs: tuple[Path, Path], config: Path, run_cli: Callable[..., Any],
                                                  tmp_path: Path) -> None:
    """To PyTorch from the state, streamed; and as the beginning of another padded run."""
    whole, padded = runs
    done = run_cli("convert", "export", "--to=crystal", f"--checkpoint={padded}", f"--output={tmp_path / 'hf'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 443
    done = run_cli("train", f"--config={config}", f"--run_dir={tmp_path / 'next'}", *ODD, *SPLIT,
                   f"--init_from={whole}", env=FOUR)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "next")[2] < losses(whole)[2]


def test_it_is_replayed_to_the_bits_of_its_exports(runs: tuple[Path, Path], run_cli: Callable[..., Any]) -> None:
    done = run_cli("replay", f"--run_dir={runs[1]}", "--from=6", "--steps=8", env=FOUR)
    assert done.returncode == 0 and "2 exports" in done.stdout, done.stdout + done.stderr


def test_another_padding_is_refused_in_one_line(runs: tuple[Path, Path], config: Path,
                                                run_cli: Callable[..., Any]) -> None:
    _, padded = runs
    before = {path: path.read_bytes() for path in (padded / "exports").rglob("*.json")}
    done = run_cli("train", f"--config={config}", f"--run_dir={padded}", *ODD, *SPLIT,
                   "--config.training.pad_to=32", "--config.phases[2].tokens=2048", "--amend_from=18", env=FOUR)
    assert done.returncode == 1
    assert "config.training.pad_to: 32" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert before == {path: path.read_bytes() for path in (padded / "exports").rglob("*.json")}


def test_leaves_are_cut_where_they_are_padded() -> None:
    model = Crystal(ModelConfig(vocab_size=10, embed_dim=8, num_layers=1, num_heads=1, mlp_dim=6, max_length=8,
                                rotary_dim=4), pad_to=4)
    specs = model.specs()
    assert jax.tree.leaves(specs["embed"].shape) == [12, 8]
    assert specs["embed"].true_shape == (10, 8)
    assert specs["layers"]["mlp"]["down"].padding == (0, 2, 0)
    assert specs["layers"]["attn"]["q"].padding == (0, 0, 0, 0)
