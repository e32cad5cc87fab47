"""Updates that are skipped: a NaN batch, an exploding one, a poisoned range of data; and those that must not be."""

import json
import math
import re
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import oracle
import pytest
from conftest import RunCli
from drills import DrillRecord
from hypothesis import given
from hypothesis import strategies as st
from running import Recipe, committed, left_behind, reached, records
from world import text

from crystal_jax import sharding
from crystal_jax.config import MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig, to_dict
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.model import Crystal, init_params
from crystal_jax.optimizer import make_optimizer
from crystal_jax.spikes import LEAST, Window, describe
from crystal_jax.update import TrainState, make_train_step

CONFIG = TrainingConfig()
MODEL = ModelConfig(vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=16, rotary_dim=4,
                    mup_base_width=16)


def said(loss: float, grad_norm: float = 1.0, taken: bool = True) -> dict[str, np.ndarray]:
    return {"loss": np.float32(loss), "grad_norm": np.float32(grad_norm), "taken": np.bool_(taken)}


def after(losses: list[float], config: TrainingConfig = CONFIG) -> Window:
    window = Window()
    for done, loss in enumerate(losses, 1):
        window.add(config, done, said(loss))
    return window


# What is compared


def test_until_enough_updates_are_known_only_what_is_not_finite_is_skipped() -> None:
    losses = [3.0] * 40
    assert np.isinf(after(losses[:LEAST]).limits(CONFIG, LEAST, 0)).all(), "the last one may still be under way"
    assert np.isfinite(after(losses[:LEAST]).limits(CONFIG, LEAST + 1, 0)).all()
    assert np.isinf(after(losses).limits(CONFIG, 40, 30)).all(), "a new phase begins anew"
    assert np.isinf(after(losses).limits(TrainingConfig(spike_window=0), 40, 0)).all()
    short = TrainingConfig(spike_window=4)
    assert np.isfinite(after(losses[:5], short).limits(short, 5, 0)).all()


def test_limits_are_deviations_above_the_level() -> None:
    losses = [2.0, 4.0] * 16
    loss, grad_norm = after(losses).limits(CONFIG, 33, 0)
    assert loss == pytest.approx(3 + 10 * 2 * 1.4826 / 2**0.5) and grad_norm == pytest.approx(1 + 10 * 0.5)
    steady, _ = after([3.0] * 32).limits(CONFIG, 33, 0)
    assert steady == pytest.approx(3 * 1.25), "a loss that doesn't vary at all may still move"
    falling, _ = after(list(np.linspace(7, 3, 41))).limits(CONFIG, 42, 0)
    assert 3.5 < falling < 5.5, "the window's fall doesn't widen the limit"


@given(st.lists(st.floats(1, 9, width=32), min_size=20, max_size=60), st.data())
def test_what_a_stopped_run_saved_gives_the_same_limits(losses: list[float], data) -> None:
    """A state holds one update more than an undisturbed run has seen at that step."""
    config = TrainingConfig(spike_window=data.draw(st.integers(16, 24)))
    step = data.draw(st.integers(18, len(losses)))
    undisturbed = after(losses[: step - 1], config)
    saved = Window(**json.loads(json.dumps(to_dict(after(losses[:step], config)))))
    assert np.array_equal(undisturbed.limits(config, step, 0), saved.limits(config, step, 0))
    assert len(saved.taken) <= config.spike_window + 1


@given(st.integers(0, 2**32 - 1), st.floats(0.001, 0.2), st.floats(-0.005, 0.005))
def test_ordinary_noise_and_drift_are_taken(seed: int, noise: float, drift: float) -> None:
    """Up to three deviations; one draw of 250,000 lies beyond 4.5, where a norm is six times its median."""
    rng, window = np.random.default_rng(seed), Window()
    for done in range(1, 400):
        by_loss, by_norm = np.clip(rng.standard_normal(2), -3, 3)
        value = said(6 * math.exp(drift * min(done, 200)) * (1 + noise * by_loss), math.exp(0.4 * by_norm))
        limits = window.limits(CONFIG, done - 1, 0)
        assert value["loss"] <= limits[0] and value["grad_norm"] <= limits[1]
        window.add(CONFIG, done, value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e4])
def test_what_was_skipped_leaves_no_trace(bad: float) -> None:
    """A window that took in a NaN would skip every update until it has left it again."""
    window = after([3.0] * 30)
    before = window.limits(CONFIG, 30, 0)
    window.add(CONFIG, 31, said(bad, taken=False))
    assert window.in_a_row == 1 and np.array_equal(window.limits(CONFIG, 32, 0), before)
    window.add(CONFIG, 32, said(3.0))
    assert window.in_a_row == 0 and 3.0 < window.limits(CONFIG, 34, 0)[0]


def test_the_log_says_why() -> None:
    limits = np.array([4.0, 6.0], np.float32)
    assert describe(said(5.0), limits) == {"reason": "loss 5 above 4", "loss": 5.0, "grad_norm": 1.0, "loss_limit": 4.0,
                                           "grad_norm_limit": 6.0}
    nan = describe(said(math.nan, math.inf), np.full(2, np.inf, np.float32))
    assert nan["reason"] == "loss nan not finite, grad_norm inf not finite"
    assert json.loads(json.dumps(nan, allow_nan=False))["loss"] is None


# The update


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(2, 2, 1), jax.devices()[:4])


def test_an_update_above_a_limit_leaves_every_bit_as_it_was(mesh: jax.sharding.Mesh) -> None:
    model = Crystal(MODEL)
    optimizer = make_optimizer(OptimizerConfig(), MODEL, model.specs())
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 64, (8, 17), np.int32)
    batch = {"inputs": rows[:, :-1], "targets": rows[:, 1:], "mask": np.ones((8, 16), np.float32),
             "source": np.zeros(8, np.int32)}
    with jax.set_mesh(mesh):
        step = make_train_step(model, optimizer, 1)
        drawn = init_params(model.specs(), 1, mesh)
        state = TrainState(drawn, optimizer.init(drawn))
        lr = sharding.put(sharding.replicated(mesh), np.asarray(0.01, np.float32))

        def limit(loss: float, grad_norm: float) -> jax.Array:
            return sharding.put(sharding.replicated(mesh), np.array([loss, grad_norm], np.float32))

        def update(state: TrainState, factor: float, limits: jax.Array) -> tuple[TrainState, dict, bool]:
            before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
            placed = sharding.put_batch(mesh, {**batch, "mask": batch["mask"] * np.float32(factor)})
            new, metrics = compiled(state, placed, lr, limits)
            same = before == [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(new)]
            return new, jax.device_get(metrics), same

        compiled = step.lower(state, sharding.put_batch(mesh, batch), lr, limit(1, 1)).compile(oracle.QUICK)
        state, first, same = update(state, 1.0, limit(np.inf, np.inf))
        assert first["taken"] and not same
        near = float(first["loss"]) * 1.5, float(first["grad_norm"]) * 2
        for factor, limits in ((np.nan, (np.inf, np.inf)), (1e4, near), (1e4, (np.inf, near[1])),
                               (1e4, (near[0], np.inf)), (np.inf, near)):
            state, metrics, same = update(state, factor, limit(*limits))
            assert same and not metrics["taken"], (factor, limits)
        state, metrics, same = update(state, 1.0, limit(*near))
        assert metrics["taken"] and not same, "the next one is taken"
        assert int(optax.tree.get(state.opt_state, "count")) == 2, "skipped updates aren't counted by Adam"


# Runs


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """36 steps of one phase and 4 of another, with batches that POISON names poisoned."""
    folder = tmp_path_factory.mktemp("spikes")
    (folder / "config.py").write_text(
        f"from pathlib import Path\nfrom world import make_config\n\n\ndef get_config():\n"
        f"    config = make_config(Path({str(world)!r}), log_every=1, eval_every=100)\n"
        "    del config.phases[2]\n    config.phases[0].steps, config.phases[1].steps = 36, 4\n    return config\n")
    return Recipe(folder / "config.py", {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "POISON": '{"4": "nan", "24": 1e4, "38": "nan"}'}, program=(str(Path(__file__).parent / "poisoned.py"),))


def skipped(run_dir: Path) -> dict[int, dict]:
    return {record["step"]: record for record in records(run_dir) if record["kind"] == "skip"}


@pytest.fixture(scope="module")
def poisoned(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing else disturbed."""
    run_dir = tmp_path_factory.mktemp("poisoned") / "run"
    said = recipe.finish(run_dir)
    assert "step 24: skipped: loss" in said and "step 4: skipped: loss nan not finite" in said
    return run_dir


def test_nan_and_exploding_batches_cost_one_update_each(recipe: Recipe, poisoned: Path, tmp_path: Path) -> None:
    found = skipped(poisoned)
    assert sorted(found) == [4, 24, 38], "and none beside"
    assert found[24]["loss"] > 1e4 > found[24]["loss_limit"] > 2 and found[4]["loss"] is None
    assert found[38]["phase"] == "phase2" and found[4]["loss_limit"] is None
    recipe.using({"POISON": "{}"}).finish(tmp_path / "clean")
    ours, clean = ({record["step"]: record for record in records(run_dir) if record["kind"] == "train"}
                   for run_dir in (poisoned, tmp_path / "clean"))
    assert not skipped(tmp_path / "clean")
    assert ours[24]["skipped"] == 1 and "loss" not in ours[24]
    assert ours[3]["loss"] == clean[3]["loss"]
    for step, near in ((25, 0.3), (40, 0.2)):
        assert ours[step]["loss"] == pytest.approx(clean[step]["loss"], abs=near)


@pytest.mark.drill
@pytest.mark.parametrize("which, at", [(signal.SIGKILL, 26), (signal.SIGTERM, 23), (signal.SIGTERM, 20)])
def test_a_resumed_run_skips_the_same(which: signal.Signals, at: int, recipe: Recipe, poisoned: Path,
                                      drill_record: DrillRecord, tmp_path: Path) -> None:
    drill = drill_record("F15", "two NaN batches and one of 10^4 times the loss in 40 steps, stopped and killed near "
                                "them: the same three updates are skipped, all else is bit for bit the same")
    drill.lost = "the three updates"
    with drill.attempt():
        trainer = recipe.start(tmp_path / "run")
        assert trainer.wait_until(lambda: reached(tmp_path / "run") >= at)
        trainer.signal(which)
        code, said = trainer.end()
        assert code == (3 if which == signal.SIGTERM else -9), said
        recipe.finish(tmp_path / "run")
        expected, found = left_behind(poisoned), left_behind(tmp_path / "run")
        last = "checkpoints/40/"  # states between are other ones: the stopped run saved one more
        names = [name for name in expected if not name.startswith("checkpoints/") or name.startswith(last)]
        assert len(names) > 80
        assert [name for name in names if found[name] != expected[name]] == []


GARBAGE = "".join(chr(0x2800 + index) for index in range(256))
"""Braille: letters that the tokenizer spells in bytes, in sequences that it has never seen."""


@pytest.fixture(scope="module")
def spoilt(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """One source in the order of its file, in which a stretch is garbage; four batches in a row are full of it."""
    import random

    root, rng = tmp_path_factory.mktemp("spoilt"), random.Random(3)
    documents = [text(rng) for _ in range(60)]
    noise = ["".join(rng.choices(GARBAGE, k=150)) for _ in range(4)]
    (root / "raw.jsonl").write_text("".join(
        json.dumps({"text": document}) + "\n" for document in [*documents, *noise, *documents[::-1]]))
    (root / "tokenizer.json").write_bytes((world / "tokenizer.json").read_bytes())
    prepare(SourceSpec("jsonl", (str(root / "raw.jsonl"),)), "text", root / "tokenizer.json", root, Options(heldout=0))
    (root / "config.py").write_text(
        f"from pathlib import Path\nfrom world import make_config\n\n\ndef get_config():\n"
        f"    config = make_config(Path({str(root)!r}), log_every=1, eval_every=100)\n"
        "    del config.phases[1:], config.sources['code']\n"
        "    config.phases[0].steps, config.phases[0].mix, config.phases[0].subset = 40, {'text': 1.0}, {}\n"
        "    config.data.shuffle = False\n    return config\n")
    return Recipe(root / "config.py", {"JAX_COMPILATION_CACHE_DIR": str(root / "xla"),
                                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})


@pytest.mark.drill
def test_a_poisoned_range_stops_the_run_and_can_be_passed_over(
        spoilt: Recipe, run_cli: RunCli, drill_record: DrillRecord, tmp_path: Path) -> None:
    drill = drill_record("F15", "a range of garbage in the data ends the run with 4; it goes on with config.data.skip")
    run_dir = tmp_path / "run"
    with drill.attempt():
        code, said = spoilt.start(run_dir).end()
        assert code == 4, said
        first, = (int(number) for number in re.findall(r"--config\.data\.skip=\[\[(\d+),STEPS\]\]", said))
        assert sorted(skipped(run_dir)) == [first, first + 1, first + 2, first + 3], said
        shown = run_cli("inspect", f"--run_dir={run_dir}", f"--step={first + 1}")
        assert shown.returncode == 0 and sum(letter in GARBAGE for letter in shown.stdout) > 50, shown.stdout
        before, state = records(run_dir), max(committed(run_dir))
        spoilt.using({}, f"--config.data.skip=[[{first},8]]", f"--amend_from={state}").finish(run_dir)
        again = records(run_dir)[len(before):]
        ours, theirs = ({line["step"]: line["loss"] for line in lines if line["kind"] == "train" and "loss" in line}
                        for lines in (again, before))
        assert state < first and all(ours[step] == theirs[step] for step in range(state + 1, first))
        assert not [line for line in again if line["kind"] == "skip"], "behind the range, nothing is skipped"
        assert max(ours) == 40 and ours[40] < 4
        drill.lost = f"{first + 3 - state} steps since the last state"
