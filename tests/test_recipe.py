"""`recipe show`: the published totals, the table as text and as JSON, sizes from stores, and any step of the run."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from world import tiny_600

from crystal_jax import recipe
from crystal_jax.config import Config, DataConfig, ModelConfig, Phase, Source, Subset
from crystal_jax.data.schedule import Interleave
from crystal_jax.data.store import FORMAT, ShardWriter, write_manifest
from crystal_jax.errors import UserError
from crystal_jax.phases import make_plan
from crystal_jax.rules import validate

from configs import crystal_7b


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return recipe.describe(validate(crystal_7b.get_config()))


def source_of(plan: dict[str, Any], phase: int, name: str) -> dict[str, Any]:
    return next(source for source in plan["phases"][phase - 1]["sources"] if source["name"] == name)


def show(config: Config, *options: str) -> None:
    """The command as cli.py calls it, with the config already read."""
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    args = parser.parse_args(["show", "--config=configs/any.py", *options])
    args.config = config
    assert not recipe.main(args)


def test_parameters_are_the_published_ones() -> None:
    model = ModelConfig()
    assert recipe.parameter_count(model) == 6_575_278_720
    one_less = recipe.parameter_count(ModelConfig(num_layers=31))
    assert recipe.parameter_count(model) - one_less == 201_377_108
    assert recipe.parameter_count(ModelConfig(num_layers=0)) == 131_203_072 + 2 * 4096


def test_totals_are_the_published_ones(published: dict[str, Any]) -> None:
    assert published["steps"] == 321_836
    assert published["tokens"] == 1_392_061_710_336
    assert published["flops"] == 6 * 6_575_278_720 * 1_392_061_710_336
    assert f"{published['flops']:.2e}" == "5.49e+22"
    assert len(published["checkpoints"]) == 136
    assert [len(phase["checkpoints"]) for phase in published["phases"]] == [54, 72, 10]
    assert [round(100 * phase["code_share"], 1) for phase in published["phases"]] == [5.0, 64.7, 83.3]
    assert [phase["tokens_per_step"] for phase in published["phases"]] == [4_325_376] * 3


def test_the_state_costs_what_was_measured(published: dict[str, Any]) -> None:
    """79 GB of state, 13.15 GB an export, 1.79 TB for all 136."""
    state = published["state"]
    assert state["bytes"] == 12 * 6_575_278_720
    assert state["export_bytes"] == 2 * 6_575_278_720
    assert state["calendar_bytes"] == 136 * state["export_bytes"]
    assert [recipe.human(state[name], "B") for name in ("bytes", "export_bytes", "calendar_bytes")] == [
        "78.9 GB", "13.2 GB", "1.79 TB"]
    config = crystal_7b.get_config()
    config.checkpoints.export_dtype = "float32"
    assert recipe.describe(config)["state"]["export_bytes"] == 4 * 6_575_278_720


def test_learning_rates_of_each_phase(published: dict[str, Any]) -> None:
    found = [[(point["phase_step"], point["lr"]) for point in phase["learning_rate"]] for phase in published["phases"]]
    assert [points[0] for points in found] == [(0, 0.0)] * 3
    assert [points[1] for points in found] == [(86, 0.012), (86, 0.0087825), (276, 0.002)]
    assert [points[3][0] for points in found] == [79_720, 214_386, 27_727]
    assert [point["at"] for point in published["phases"][0]["learning_rate"]] == ["first", "peak", "middle", "last"]


def test_sources_add_up(published: dict[str, Any]) -> None:
    for phase in published["phases"]:
        assert sum(source["sequences"] for source in phase["sources"]) == phase["steps"] * phase["global_batch_size"]
        assert sum(source["tokens"] for source in phase["sources"]) == phase["tokens"]
        assert sum(source["share"] for source in phase["sources"]) == pytest.approx(1)


def test_fim_and_spm_rates(published: dict[str, Any]) -> None:
    assert [(source_of(published, phase, "StarCoder")["fim_rate"], source_of(published, phase, "StarCoder")["spm_rate"])
            for phase in (2, 3)] == [(0.9, 0.5), (0.3, 0.5)]
    assert (source_of(published, 3, "python")["fim_rate"], source_of(published, 3, "C4")["spm_rate"]) == (0.3, 0.0)


def test_stated_epochs_give_the_sizes(published: dict[str, Any]) -> None:
    starcoder = source_of(published, 2, "StarCoder")
    assert (starcoder["epochs"], starcoder["available_from"]) == (2.0, "stated")
    assert starcoder["available_tokens"] == pytest.approx(291e9, rel=2e-3)
    assert source_of(published, 3, "python")["epochs"] == pytest.approx(3.0)


def test_two_halves_make_the_whole_that_phase_3_replays(published: dict[str, Any]) -> None:
    halves = [source_of(published, phase, "Wikipedia")["available_tokens"] for phase in (1, 2)]
    replay = source_of(published, 3, "Wikipedia")
    assert replay["available_tokens"] == pytest.approx(sum(halves) / 10, abs=1)
    assert replay["epochs"] == pytest.approx(2.97, abs=0.01)
    assert source_of(published, 3, "StarCoder")["epochs"] == pytest.approx(0.138, abs=0.001)


def two_sources(root: Path, **phase: Any) -> Config:
    """64 steps of 2 sequences of 32 tokens: 3072 tokens of `a`, 1024 of `b`."""
    model = ModelConfig(vocab_size=50, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=8, max_length=32, rotary_dim=4)
    return validate(Config(
        name="two", sources={"a": Source("store-a"), "b": Source("store-b", "code")}, model=model,
        phases=[Phase(steps=64, global_batch_size=2, mix={"a": 0.75, "b": 0.25}, checkpoint_every=40, **phase)],
        data=DataConfig(root=str(root), sequence_length=32)))


def write_store(path: Path, *shards: int) -> None:
    """A store whose training shards have so many tokens."""
    (path / "train").mkdir(parents=True)
    entries = []
    for index, tokens in enumerate(shards):
        with ShardWriter(path / "train", f"{index:05d}", "<u2") as shard:
            shard.add([1] * tokens, {"id": str(index), "source": "x"})
            entries.append({"ordinal": index, **shard.close()})
    write_manifest(path, {"format": FORMAT, "name": path.name, "tokenizer": {"fingerprint": "f", "vocab_size": 50},
                          "splits": {"train": {"tokens": sum(shards), "shards": entries}}})


def test_a_store_tells_the_real_epochs(tmp_path: Path) -> None:
    write_store(tmp_path / "store-a", 400, 700, 368)
    config = two_sources(tmp_path, subset={"a": Subset(files="even", first=0.5)}, epochs={"a": 9.0, "b": 2.0})
    plan = recipe.describe(config)
    a, b = plan["phases"][0]["sources"]
    assert (a["available_tokens"], a["available_from"], a["epochs"]) == (384, "store", 8.0)
    assert (b["available_tokens"], b["available_from"], b["epochs"]) == (512, "stated", 2.0)
    text = recipe.render(plan)
    assert "8.00      384  even first 0.5" in text
    assert "2.00     ~512  all" in text
    assert "~ follows from" in text
    assert "? neither" not in text


def test_what_cannot_be_known_is_a_question_mark(tmp_path: Path) -> None:
    plan = recipe.describe(two_sources(tmp_path, subset={"a": Subset(files="even")}))
    assert {source["epochs"] for source in plan["phases"][0]["sources"]} == {None}
    assert "      ?        ?  even" in recipe.render(plan)
    assert "? neither a store on disk" in recipe.render(plan)


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "store-b", 100)
    (tmp_path / "store-b" / "train" / "00000.tokens").write_bytes(b"12")
    with pytest.raises(UserError, match=r"00000.tokens: 2 bytes, the manifest says 200"):
        recipe.describe(two_sources(tmp_path))


@pytest.mark.parametrize(
    "config", [crystal_7b.get_config(), crystal_7b.get_config("original"), tiny_600()],
    ids=["7b", "7b original", "tiny"])
@pytest.mark.parametrize("calendar", [False, True])
def test_the_text_is_aligned_and_100_columns_wide(config: Config, calendar: bool) -> None:
    plan = recipe.describe(config)
    lines = recipe.render(plan, calendar).splitlines()
    assert max(map(len, lines)) <= recipe.WIDTH
    assert all(line == line.rstrip() for line in lines)
    starts = [line.index("subset") for line in lines if line.startswith("  source ")]
    assert len(starts) == len(plan["phases"])
    for line in lines:
        if line.startswith("  ") and line[starts[0]:].startswith(("even", "odd", "all", "first")):
            assert line[starts[0] - 2 : starts[0]] == "  "
    assert (sum(line.strip() in plan["checkpoints"] for line in lines)) == len(plan["checkpoints"]) * calendar


def test_the_text_names_the_published_numbers(published: dict[str, Any]) -> None:
    text = recipe.render(published)
    for words in ("6,575,278,720 parameters", "321,836 steps, 1.392T tokens (1,392,061,710,336), 5.49e+22 FLOPs",
                  "phase1  steps 0 to 79,721 (79,721), 344.8B tokens (344,823,300,096)",
                  "2,112 sequences = 4,325,376 tokens", "first 0 (0), peak 0.012 (86)",
                  "72 checkpoints: phase2/step_003000 .. phase2/step_214387, every 3,000",
                  "fresh moments", "136 of 13.2 GB = 1.79 TB", "83.3% of the tokens"):
        assert words in text, words


def test_long_names_of_sources_keep_the_columns() -> None:
    config = tiny_600()
    config.sources["a-source-with-a-long-name"] = config.sources.pop("text")
    for phase in config.phases:
        phase.mix["a-source-with-a-long-name"] = phase.mix.pop("text")
        phase.subset.pop("text")
    lines = recipe.render(recipe.describe(validate(config))).splitlines()
    ends = {line.index("%") for line in lines if line.startswith(("  a-source", "  all  "))}
    assert len(ends) == 1


def test_carried_moments_are_said_to_be(tmp_path: Path) -> None:
    assert "moments carried over" in recipe.render(recipe.describe(two_sources(tmp_path, optimizer="carried")))


@pytest.mark.parametrize(("number", "unit", "text"), [
    (0, "", "0"), (7, "", "7"), (999, "", "999"), (999.6, "", "1.00k"), (1000, "", "1.00k"), (12_345, "", "12.3k"),
    (999_600, "", "1.00M"), (345_000_000, "", "345M"), (1.392e12, "", "1.39T"),
    (1.315e10, "B", "13.2 GB"), (5, "B", "5 B")])
def test_human_numbers_have_three_digits(number: float, unit: str, text: str) -> None:
    assert recipe.human(number, unit) == text


@pytest.mark.parametrize(("step", "phase", "phase_step", "following"), [
    (0, "phase1", 0, ("phase1", 0, 0.0)),
    (10, "phase1", 10, ("phase1", 10, 0.012)),
    (148, "phase1", 148, ("phase2", 0, 0.0)),
    (149, "phase2", 1, ("phase2", 1, 0.00087825)),
    (600, "phase3", 52, ("phase3", 52, None)),
])
def test_any_step_of_the_run(step: int, phase: str, phase_step: int, following: tuple[str, int, float | None]) -> None:
    config = validate(tiny_600())
    plan = make_plan(config)
    point = recipe.describe_step(config, step)
    assert (point["phase"], point["phase_step"], point["tokens"]) == (phase, phase_step, plan.tokens(step))
    assert (point["next_phase"], point["next_phase_step"]) == following[:2]
    assert point["next_lr"] == (None if following[2] is None else pytest.approx(following[2]))
    assert sum(point["tokens_per_source"].values()) == point["tokens"]
    assert point["kept_as"] == plan.calendar().get(step)


def test_tokens_per_source_follow_the_schedule_of_the_data() -> None:
    """After phase 1 and one step of phase 2, as the positions of the data say."""
    config = validate(tiny_600())
    phase1, phase2, _ = make_plan(config).phases
    order = Interleave.make(phase2.quotas)
    expected = {name: phase1.quotas[name] + order.counts(8)[name] for name in config.sources}
    found = recipe.describe_step(config, 149)["tokens_per_source"]
    assert found == {name: 256 * count for name, count in expected.items()}


def test_a_step_beyond_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="step 601: the run goes from step 0 to 600"):
        recipe.describe_step(tiny_600(), 601)


def test_the_command_prints_what_the_functions_return(capsys: pytest.CaptureFixture[str]) -> None:
    config = validate(tiny_600())
    show(config)
    assert capsys.readouterr().out == recipe.render(recipe.describe(config)) + "\n"
    show(config, "--json")
    assert json.loads(capsys.readouterr().out) == recipe.describe(config)
    show(config, "--calendar")
    assert "\n    phase2/step_000400\n" in capsys.readouterr().out
    show(config, "--step=148", "--json")
    assert json.loads(capsys.readouterr().out) == recipe.describe_step(config, 148)
    show(config, "--step=148")
    out = capsys.readouterr().out
    assert "phase1, 148 of its steps done" in out
    assert "kept as         phase1/step_000148" in out
    assert "0 at phase2 step 0" in out
    show(config, "--step=600")
    assert "none: the run is over" in capsys.readouterr().out


def test_the_real_command(run_cli) -> None:
    done = run_cli("recipe", "show", "--config=configs/crystal_7b.py:original", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["checkpoints"]) == 225
    done = run_cli("recipe", "show", "--config=configs/crystal_tiny.py", "--config.phases[1].spm_rate=0.25")
    assert "90%  25%" in done.stdout
    done = run_cli("recipe", "show", "--config=configs/crystal_tiny.py:600", "--step=9999")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "crystal-jax recipe: step 9999: the run goes from step 0 to 600"
