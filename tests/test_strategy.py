"""configs/strategy.py: three orders of the same tokens, and nothing else between them; and docs/strategy.sh."""

import collections
import dataclasses
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import strategy as table
from crystal_jax.config import Config, to_dict
from crystal_jax.data.pipeline import Batches, Stores
from crystal_jax.errors import UserError
from crystal_jax.phases import make_plan
from crystal_jax.rules import validate

from configs import crystal_7b, crystal_tiny, strategy

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, GUIDE = ROOT / "docs" / "strategy.sh", ROOT / "docs" / "strategy.md"
steps = st.integers(strategy.FEWEST, 1500)


def variants(length: int) -> dict[str, Config]:
    return {name: validate(strategy.get_config(f"{name}-{length}")) for name in strategy.VARIANTS}


@given(steps)
def test_each_source_gives_the_same_number_of_sequences(length: int) -> None:
    given = {name: make_plan(config) for name, config in variants(length).items()}
    assert {plan.total_steps for plan in given.values()} == {length}
    totals = [collections.Counter(plan.counts(length)) for plan in given.values()]
    assert totals[0] == totals[1] == totals[2]


@given(steps)
def test_each_step_has_the_same_learning_rate_and_moments_of_the_same_age(length: int) -> None:
    plans = [make_plan(config) for config in variants(length).values()]
    for step in range(length):
        rates = [plan.learning_rate(step) for plan in plans]
        assert rates == pytest.approx([rates[0]] * 3, rel=1e-12, abs=0)
    fresh = [{placed.start for placed in plan.phases if placed.phase.optimizer == "fresh"} for plan in plans]
    assert fresh[0] == fresh[1] == fresh[2] and len(fresh[0]) == 3


@given(steps)
def test_as_much_code_is_meant_for_infilling(length: int) -> None:
    plans = [make_plan(config) for config in variants(length).values()]
    expected = [sum(placed.quotas.get("code", 0) * placed.phase.fim_rate.get("code", 0.0) for placed in plan.phases)
                for plan in plans]
    assert expected == pytest.approx([expected[0]] * 3)


def test_nothing_but_the_phases_differs() -> None:
    found = [to_dict(dataclasses.replace(config, name="", phases=[])) for config in variants(1500).values()]
    assert found[0] == found[1] == found[2]
    demo = crystal_tiny.get_config()
    assert strategy.get_config().model == demo.model and strategy.get_config().optimizer == demo.optimizer


def test_the_three_phases_are_the_recipe() -> None:
    published, here = crystal_7b.get_config(), strategy.get_config()
    shares = [[sum(weight for name, weight in phase.mix.items() if config.sources[name].domain == "code")
               for phase in config.phases] for config in (published, here)]
    assert shares[1] == pytest.approx(shares[0], abs=0.005)
    assert [phase.fim_rate.get("code", 0) for phase in here.phases] == [0, 0.9, 0.3]
    assert [phase.lr.peak for phase in here.phases] == [phase.lr.peak for phase in published.phases]


def test_one_has_no_step_with_both_and_one_has_them_evenly() -> None:
    found = {name: make_plan(config) for name, config in variants(1500).items()}
    shares = {name: [placed.quotas.get("code", 0) / sum(placed.quotas.values()) for placed in plan.phases]
              for name, plan in found.items()}
    assert shares["code_after_text"] == [0, 0, 1, 1]
    assert max(shares["uniform"]) - min(shares["uniform"]) < 0.005
    assert sorted(shares["three_phases"]) == shares["three_phases"]


def test_they_read_the_same_rows_of_the_stores_in_the_same_order(world: Path) -> None:
    read = {}
    for name, config in variants(150).items():
        config.data = dataclasses.replace(config.data, root=str(world), sequence_length=32)
        config.sources = {source: dataclasses.replace(there, store=source) for source, there in config.sources.items()}
        batches = Batches(config, Stores(config))
        draws = [draw for step in range(150) for draw in batches.draws(step)]
        read[name] = {source: [(draw.epoch, draw.row) for draw in draws if draw.source == source]
                      for source in config.sources}
    assert read["three_phases"] == read["uniform"] == read["code_after_text"]
    assert {len(rows) for rows in read["uniform"].values()} == {288, 312}


@pytest.mark.parametrize(("variant", "message"), [
    ("two_phases", r"'two_phases': no such variant; did you mean three_phases\?"),
    ("uniform-", r"'uniform-': behind the - comes a number of steps, 100 or more, such as uniform-6000"),
    ("uniform-99", r"a number of steps, 100 or more"),
])
def test_a_wrong_variant_is_one_line(variant: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        strategy.get_config(variant)


def test_the_guide_gives_the_numbers_of_the_plans() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    plans = {name: make_plan(config) for name, config in variants(1500).items()}
    for name, plan in plans.items():
        shares = [f"{placed.quotas.get('code', 0) / sum(placed.quotas.values()):.1%}" for placed in plan.phases]
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert all(share.replace(".0%", "%") in row for share in shares), row
    counts = plans["uniform"].counts(1500)
    words = (f"{counts['text']:,} sequences of text", f"({counts['text'] * 256:,} tokens)",
             f"and {counts['code']:,} of code",
             f"{strategy.get_config('uniform').phases[0].fim_rate['code']:.1%}, throughout")
    for found in words:
        assert found in text, found
    for path in re.findall(r"`((?:tests|docs|benchmarks|configs)/[\w./]+)", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((\w[\w./-]+)\)", text):
        assert (ROOT / "docs" / path).is_file(), path


def test_the_script_names_existing_commands_and_variants() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    from crystal_jax.cli import COMMANDS

    assert set(re.findall(r"^ *crystal ([a-z]+)", text, re.M)) <= set(COMMANDS)
    assert re.search(r'^VARIANTS="(.*)"$', text, re.M)[1].split() == list(strategy.VARIANTS)
    assert re.search(r"\{([\w,]+)\}/seed", text)[1].split(",") == list(strategy.VARIANTS)


# benchmarks/strategy.py


def write_runs(folder: Path, seeds: tuple[int, ...] = (1, 2)) -> None:
    """Finished runs of 150 steps whose losses are 4 for text and 3 for code, higher by a tenth per variant and seed."""
    for number, (name, config) in enumerate(variants(150).items()):
        plan = make_plan(config)
        for seed in seeds:
            run, higher = folder / name / f"seed{seed}", 0.1 * (number + seed)
            lines = [{"kind": "train", "step": 150, "tokens": plan.tokens(150)}]
            lines += [{"kind": "eval", "step": step, "tokens": plan.tokens(step),
                       "heldout": {"text": {"loss": 4 + higher}, "code": {"loss": 3 + higher}}}
                      for step in (37, 50, 100, 137, 150)]
            results = {"losses": {f"{domain}.bits_per_byte": higher for domain in table.DOMAINS},
                       "infilling": {f"{gap}.{metric}": higher for gap in table.GAPS
                                     for metric in ("bits_per_byte", "exact_match")}}
            (run / "evaluations").mkdir(parents=True)
            (run / "config.json").write_text(json.dumps(to_dict(config)))
            (run / "plan.json").write_text(json.dumps({"plan": {}, "amendments": []}))
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            for task, metrics in results.items():
                (run / "evaluations" / f"{task}.json").write_text(json.dumps(
                    {"step": 150, "task": task, "tokens": plan.tokens(150), "metrics": metrics}))


def test_the_table_has_means_spreads_and_differences_by_seed(tmp_path: Path) -> None:
    write_runs(tmp_path)
    runs = table.load(tmp_path)
    equal = list(table.equal_tokens(runs))
    assert [line.split(" | ")[0] for line in equal[2:-1]] == [
        f"| {tokens:,}" for tokens in (37888, 51200, 102400, 140288, 153600) for _ in strategy.VARIANTS]
    deviation = f"{statistics.stdev([0.1, 0.2]):.3f}"
    assert equal[2] == f"| 37,888 | three_phases | 4.150 ± {deviation} | 3.150 ± {deviation} | 3.650 ± {deviation} |"
    end = list(table.at_the_end(runs))
    assert "| uniform less three_phases | +0.100 ± 0.000 | +0.100 ± 0.000 | +0.100 ± 0.000 |" in end
    assert any(line.startswith("| code_after_text less three_phases | +0.200 ± 0.000") for line in end)
    assert table.draw(runs).startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    write_runs(tmp_path)
    metrics = tmp_path / "uniform" / "seed2" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.splitlines()[0].replace("150", "149") + "\n")
    with pytest.raises(UserError, match="uniform/seed2: at step 149 of 150"):
        table.load(tmp_path)
    metrics.write_text(whole)
    (tmp_path / "uniform" / "seed1" / "evaluations" / "infilling.json").unlink()
    with pytest.raises(UserError, match="uniform/seed1: no result of infilling"):
        list(table.at_the_end(table.load(tmp_path)))
    (tmp_path / "uniform" / "seed2").rename(tmp_path / "uniform" / "seed3")
    with pytest.raises(UserError, match=r"uniform: holds \['seed1', 'seed3'\]; each variant needs runs"):
        table.load(tmp_path)
