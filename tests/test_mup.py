"""The model at other widths: only sizes differ; and the sweep trains what `train` does."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import RunCli
from hypothesis import given
from hypothesis import strategies as st
from world import make_config

from benchmarks import lr_sweep
from crystal_jax.config import FAMILIES, Config, DataConfig, ModelConfig, Phase, Source
from crystal_jax.errors import UserError
from crystal_jax.mup import at_widths, standard
from crystal_jax.plots_mup import best, draw_sweep
from crystal_jax.rules import validate

from configs import compared, crystal_7b, crystal_tiny, mup_sweep

PUBLISHED = ModelConfig()


def is_valid(model: ModelConfig) -> bool:
    """By the rules of any config."""
    validate(Config(model=replace(model), sources={"text": Source("text")}, phases=[Phase(steps=1, mix={"text": 1.0})],
                    data=DataConfig(sequence_length=64)))
    return True


@given(st.sampled_from([PUBLISHED, crystal_tiny.get_config().model, *compared.MODELS.values()]),
       st.lists(st.integers(16, 300) | st.integers(1, 32).map(lambda n: 64 * n), min_size=2, max_size=4, unique=True))
def test_every_width_is_the_same_model_in_proportion(model: ModelConfig, widths: list[int]) -> None:
    found = at_widths(model, widths)
    assert list(found) == sorted(widths)
    counts = {(sized.num_heads, sized.kv_heads, sized.num_layers, sized.vocab_size) for sized in found.values()}
    assert len(counts) == 1
    for width, sized in found.items():
        assert is_valid(sized) and sized.embed_dim == width and sized.head_dim >= 16
        assert abs(sized.mlp_dim / width - model.mlp_dim / model.embed_dim) <= 0.5 / width + 1e-9
        assert abs(sized.rotary_dim / sized.head_dim - model.rotary_dim / model.head_dim) < 2 / sized.head_dim
        assert sized.matrix_std == model.init_std * math.sqrt(model.mup_base_width / width)


def test_heads_are_as_many_as_the_smallest_width_has_room_for() -> None:
    assert [sized.head_dim for sized in at_widths(PUBLISHED, [512, 64, 64, 128]).values()] == [16, 32, 128]
    assert [sized.num_heads for sized in at_widths(PUBLISHED, [2048, 4096]).values()] == [32, 32]
    assert at_widths(PUBLISHED, [2048, 4096])[4096] == PUBLISHED
    assert [sized.num_heads for sized in at_widths(PUBLISHED, [64, 102]).values()] == [2, 2]
    shared = at_widths(compared.MODELS["starcoder"], [64, 128])[128]
    assert (shared.num_heads, shared.kv_heads, shared.rotary_dim) == (4, 1, 0)


@pytest.mark.parametrize(("widths", "said"), [
    ([64], "--widths=64: give two or more"), ([64, 64], "--widths=64: give two or more"), ([], "--widths=: give two"),
    ([8, 64], "--widths=8,64: give two or more that differ, each 16 or more"), ([0, -5], "each 16 or more"),
])
def test_widths_that_do_not_fit_are_refused_with_the_nearest(widths: list[int], said: str) -> None:
    with pytest.raises(UserError) as caught:
        at_widths(PUBLISHED, widths)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@given(st.sampled_from(sorted(FAMILIES)), st.sampled_from([64, 128, 256, 1024]))
def test_the_standard_model_equals_it_at_the_base_width_but_for_the_scores(family: str, width: int) -> None:
    model = replace(crystal_tiny.get_config().model, family=family, embed_dim=width)
    usual = standard(model)
    assert usual.width_scale == 1 and usual.choices.attention_power == 0.5
    assert replace(usual.choices, attention_power=model.choices.attention_power) == model.choices
    # What a matrix begins with, what the embedding puts into the stream and the size of the first logits.
    assert math.isclose(usual.matrix_std, model.matrix_std)
    assert math.isclose(usual.output_std, model.output_std)
    assert math.isclose(usual.init_std * usual.embed_scale, model.init_std * model.embed_scale)
    assert math.isclose(usual.logit_scale * usual.init_std * math.sqrt(width), model.output_scale * model.init_std * 8)
    if width == model.mup_base_width:
        assert vars(usual) == vars(model)


@pytest.mark.parametrize("width", ["64", "256"])
def test_the_config_of_the_sweep_is_one_model_at_any_width(width: str) -> None:
    config = validate(mup_sweep.get_config(width))
    assert config.model == at_widths(mup_sweep.get_config().model, [64, int(width), 512])[int(width)]


@pytest.mark.parametrize("width", ["wide", "0", "40", "-64", "64.5"])
def test_a_width_that_the_config_has_not_is_refused(width: str) -> None:
    with pytest.raises(UserError, match=f"the variant is a width in multiples of 16, such as 128, not {width!r}"):
        mup_sweep.get_config(width)


def test_published_scales() -> None:
    """What coord_check looks at is the parametrisation of the released model."""
    sized = at_widths(crystal_7b.get_config().model, [64, 4096])
    assert sized[4096].width_scale == 0.0625 and sized[64].width_scale == 4.0


@pytest.fixture(scope="module")
def small(world: Path) -> Config:
    config = make_config(world, log_every=6, eval_every=100, fingerprint_every=100)
    config.model = at_widths(config.model, [32, 48])[32]
    return validate(config)


@pytest.fixture(scope="module")
def swept(small: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lr_sweep.Sweep]:
    output = tmp_path_factory.mktemp("sweep")
    return output, lr_sweep.sweep(small, [32, 48], [0.01, 0.02], 1, output)


@pytest.mark.drill
def test_a_run_of_the_sweep_is_a_run_of_train(small: Config, world: Path, run_cli: RunCli, tmp_path: Path,
                                              swept: tuple[Path, lr_sweep.Sweep]) -> None:
    """At the config's own width, rate and seed: the same held-out losses."""
    file = tmp_path / "small_config.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
                    "from world import make_config\nfrom crystal_jax.mup import at_widths\n\n\ndef get_config():\n"
                    f"    config = make_config(Path({str(world)!r}), log_every=6, eval_every=100)\n"
                    "    config.model = at_widths(config.model, [32, 48])[32]\n    return config\n")
    done = run_cli("train", f"--config={file}", f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in [line for line in lines if line["kind"] == "eval"][-1]["heldout"].values()]
    assert math.isclose(swept[1]["muP"][32][0.01], sum(losses) / len(losses), rel_tol=1e-5)
    assert swept[1]["muP"][32][0.01] != swept[1]["muP"][32][0.02]
    assert swept[1]["standard"][48] != swept[1]["muP"][48]


def test_the_same_sweep_again_trains_nothing(small: Config, swept: tuple[Path, lr_sweep.Sweep],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    output, losses = swept
    assert len((output / "runs.jsonl").read_text().splitlines()) == 8
    monkeypatch.setattr(lr_sweep, "Trainer", None)
    assert lr_sweep.sweep(small, [32, 48], [0.01, 0.02], 1, output) == losses
    assert lr_sweep.sweep(small, [32, 48], [0.02], 1, output) == losses, "what was made before is kept"
    with pytest.raises(TypeError):
        lr_sweep.sweep(replace(small, optimizer=replace(small.optimizer, beta2=0.9)), [32, 48], [0.01], 1, output)


def test_the_table_and_the_picture_name_the_best_rate() -> None:
    losses = {"muP": {64: {0.01: 4.5, 0.02: 4.25}, 128: {0.01: 4.0, 0.02: 3.9}},
              "standard": {64: {0.005: 4.75, 0.01: 4.5}, 128: {0.01: 4.0, 0.02: math.inf}}}
    assert best(losses["standard"][128]) == 0.01
    table = lr_sweep.render(losses).splitlines()
    assert table[0] == "| | width | 0.005 | 0.01 | 0.02 | best rate |"
    assert table[2] == "| muP | 64 |  | 4.500 | **4.250** | 0.02 |" and len(table) == 6
    assert draw_sweep(losses).startswith(b"\x89PNG")
