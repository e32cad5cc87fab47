"""Each rule of the configuration trips with the field's path in one line; what is written is what is read back."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.config import (
    Config,
    LearningRate,
    ModelConfig,
    OptimizerConfig,
    Phase,
    Source,
    Subset,
    digest,
    from_dict,
    nearest,
    to_dict,
)
from crystal_jax.errors import FatalError, UserError
from crystal_jax.rules import validate

from configs import crystal_7b, crystal_tiny


def small() -> Config:
    """A valid config with every kind of field set."""
    return Config(
        sources={"text": Source("t"), "code": Source("c", "code")},
        phases=[
            Phase(name="one", steps=10, mix={"text": 0.5, "code": 0.5}, subset={"text": Subset("even", 0.5)},
                  epochs={"code": 2.0}, fim_rate={"code": 0.9}),
            Phase(name="two", tokens=8 * 2048 * 5, mix={"code": 1.0}),
        ],
    )


def put(path: str, value: Any) -> Callable[[Config], None]:
    """Sets `phases.0.mix.text` and the like."""
    def change(config: Config) -> None:
        owner: Any = config
        *parents, last = path.split(".")
        for name in parents:
            owner = owner[int(name)] if isinstance(owner, list) else \
                owner[name] if isinstance(owner, dict) else getattr(owner, name)
        if isinstance(owner, dict | list):
            owner[last if isinstance(owner, dict) else int(last)] = value
        else:
            setattr(owner, last, value)
    return change


# (path as it is set, value, path as it is named in the message, words of the rule)
RULES = [
    *((f"model.{name}", 0, f"config.model.{name}", "above 0") for name in (
        "vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "max_length", "rotary_base", "norm_eps",
        "mup_base_width", "embed_scale", "output_scale", "init_std")),
    ("model.embed_dim", 4100, "config.model.embed_dim", "a multiple of num_heads = 32"),
    ("model.rotary_dim", 31, "config.model.rotary_dim", "even and at most the head size 128"),
    ("model.rotary_dim", 130, "config.model.rotary_dim", "even and at most the head size 128"),
    ("model.rotary_dim", -2, "config.model.rotary_dim", "even"),
    ("data.sequence_length", 2049, "config.data.sequence_length", "from 2 to model.max_length = 2048"),
    ("data.sequence_length", 1, "config.data.sequence_length", "from 2"),
    ("phases", [], "config.phases", "at least one phase"),
    ("phases.1.name", "one", "config.phases", "must differ"),
    ("phases.0.name", "", "config.phases[0].name", "letters, digits"),
    ("phases.0.name", "a/b", "config.phases[0].name", "letters, digits"),
    ("sources.text.store", "", "config.sources.text.store", "a folder below data.root"),
    ("sources.text.domain", "prose", "config.sources.text.domain", "one of text, code"),
    ("phases.0.steps", None, "config.phases[0]", "set exactly one of the two"),
    ("phases.0.tokens", 10**6, "config.phases[0]", "set exactly one of the two"),
    ("phases.0.steps", 0, "config.phases[0].steps", "above 0"),
    ("phases.1.tokens", -1, "config.phases[1].tokens", "above 0"),
    ("phases.1.tokens", 100, "config.phases[1].tokens", "at least one step of 16384 tokens"),
    ("phases.0.global_batch_size", 0, "config.phases[0].global_batch_size", "above 0"),
    ("phases.0.checkpoint_every", 0, "config.phases[0].checkpoint_every", "above 0"),
    ("phases.0.mix", {}, "config.phases[0].mix", "at least one source"),
    ("phases.1.mix", {"cod": 1.0}, "config.phases[1].mix.cod", "no such source; did you mean code?"),
    ("phases.0.mix.text", 0.0, "config.phases[0].mix.text", "above 0; leave out a source"),
    ("phases.0.mix.text", 0.6, "config.phases[0].mix", "the shares sum to 1.1, not 1"),
    ("phases.0.mix.text", 0.50001, "config.phases[0].mix", "change one by -1"),
    ("phases.1.fim_rate", {"text": 0.5}, "config.phases[1].fim_rate.text", "not in the phase's mix"),
    ("phases.1.epochs", {"text": 1.0}, "config.phases[1].epochs.text", "not in the phase's mix"),
    ("phases.1.subset", {"cdoe": Subset()}, "config.phases[1].subset.cdoe", "did you mean code?"),
    ("phases.0.fim_rate.code", 1.1, "config.phases[0].fim_rate.code", "from 0 to 1"),
    ("phases.0.fim_rate.code", -0.1, "config.phases[0].fim_rate.code", "from 0 to 1"),
    ("phases.0.spm_rate", 2.0, "config.phases[0].spm_rate", "from 0 to 1"),
    ("phases.0.epochs.code", 0.0, "config.phases[0].epochs.code", "above 0"),
    ("phases.0.subset.text.files", "evn", "config.phases[0].subset.text.files", "one of all, even, odd"),
    ("phases.0.subset.text.first", 0.0, "config.phases[0].subset.text.first", "in (0, 1]"),
    ("phases.0.subset.text.first", 1.5, "config.phases[0].subset.text.first", "in (0, 1]"),
    ("phases.0.optimizer", "new", "config.phases[0].optimizer", "one of fresh, carried"),
    ("phases.0.lr.warmup_steps", -1, "config.phases[0].lr.warmup_steps", "0 or more"),
    ("phases.0.lr.peak", 0.0, "config.phases[0].lr.peak", "above 0"),
    ("phases.0.lr.decay_steps", 0, "config.phases[0].lr.decay_steps", "above 0"),
    ("phases.0.lr.end", -1e-3, "config.phases[0].lr.end", "0 or more"),
    ("training.dtype", "float16", "config.training.dtype", "one of bfloat16, float32"),
    ("training.remat", "some", "config.training.remat", "one of none, full, attention, products"),
    *((f"training.{name}", 0, f"config.training.{name}", "above 0") for name in (
        "unroll", "log_every", "eval_every", "eval_sequences", "skips_in_a_row", "spike_factor")),
    ("training.spike_window", -1, "config.training.spike_window", "0 or more"),
    ("training.seed", -1, "config.training.seed", "0 or more"),
    *((f"training.mesh.{axis}", size, f"config.training.mesh.{axis}", "above 0, or -1")
      for axis in ("data", "fsdp", "tensor") for size in (0, -2)),
    ("data.fim_mode", "remote", "config.data.fim_mode", "one of local, crystal, none"),
    ("data.seed", -1, "config.data.seed", "0 or more"),
    ("data.skip", [[3]], "config.data.skip[0]", "a first step, as the log counts, and a number of steps"),
    ("data.skip", [[3, 0]], "config.data.skip[0]", "a first step, as the log counts, and a number of steps"),
    ("data.skip", [[0, 1]], "config.data.skip[0]", "a first step from 1 to 15"),
    ("data.skip", [[16, 1]], "config.data.skip[0]", "a first step from 1 to 15"),
    ("data.skip", [[4, 1], [4, 1]], "config.data.skip[1]", "a first step from 5 to 15"),
    ("data.skip", [[9, 3]], "config.data.skip[0]", "data of one phase, which ends with step 10; pass over 2 steps"),
    ("checkpoints.export_dtype", "float16", "config.checkpoints.export_dtype", "one of bfloat16, float32"),
    ("checkpoints.every_steps", 0, "config.checkpoints.every_steps", "above 0"),
    ("checkpoints.keep_last", 0, "config.checkpoints.keep_last", "above 0"),
    ("optimizer.eps", 0.0, "config.optimizer.eps", "above 0"),
    ("optimizer.clip_norm", 0.0, "config.optimizer.clip_norm", "above 0"),
    ("optimizer.beta1", 1.0, "config.optimizer.beta1", "in [0, 1)"),
    ("optimizer.beta2", -0.1, "config.optimizer.beta2", "in [0, 1)"),
    ("optimizer.weight_decay", -0.1, "config.optimizer.weight_decay", "0 or more"),
]

TYPES = [
    ("name", 7, "config.name", "a string"),
    ("model", {"num_layers": 2}, "config.model", "a ModelConfig"),
    ("model.num_layers", 2.0, "config.model.num_layers", "a whole number"),
    ("model.num_layers", True, "config.model.num_layers", "a whole number"),
    ("model.norm_eps", "1e-5", "config.model.norm_eps", "a finite number"),
    ("model.norm_eps", math.nan, "config.model.norm_eps", "a finite number"),
    ("optimizer.beta1", False, "config.optimizer.beta1", "a finite number"),
    ("sources", [], "config.sources", "a dict"),
    ("sources.text", "t", "config.sources.text", "a Source"),
    ("phases", {}, "config.phases", "a list"),
    ("phases.0", None, "config.phases[0]", "a Phase"),
    ("phases.0.steps", "10", "config.phases[0].steps", "a whole number"),
    ("phases.0.mix.text", "half", "config.phases[0].mix.text", "a finite number"),
    ("phases.0.mix.text", math.inf, "config.phases[0].mix.text", "a finite number"),
    ("phases.0.subset.text", 0.5, "config.phases[0].subset.text", "a Subset"),
    ("phases.0.lr", 0.1, "config.phases[0].lr", "a LearningRate"),
    ("training.mesh.fsdp", None, "config.training.mesh.fsdp", "a whole number"),
    ("data.skip", [3], "config.data.skip[0]", "a list"),
    ("data.skip", [[3, "2"]], "config.data.skip[0][1]", "a whole number"),
]


def test_the_small_config_and_the_recipes_are_valid() -> None:
    for config in (small(), crystal_7b.get_config(), crystal_7b.get_config("original"), crystal_tiny.get_config()):
        assert validate(config) is config


@pytest.mark.parametrize(("path", "value", "named", "rule"), [*RULES, *TYPES])
def test_each_rule_trips_in_one_line(path: str, value: Any, named: str, rule: str) -> None:
    config = small()
    put(path, value)(config)
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert message.startswith(f"{named}: "), message
    assert rule in message
    assert "\n" not in message
    assert not isinstance(error.value, FatalError)


@pytest.mark.parametrize(("path", "value"), [
    ("phases.0.fim_rate.code", 0), ("phases.0.fim_rate.code", 1), ("phases.0.spm_rate", 0), ("model.rotary_dim", 0),
    ("phases.0.subset.text.first", 1), ("phases.0.lr.warmup_steps", 0), ("phases.0.lr.end", 0.0),
    ("optimizer.weight_decay", 0), ("training.mesh.fsdp", -1), ("phases.1.tokens", 16384),
    ("phases.0.mix.text", 0.5 + 4e-7), ("data.sequence_length", 2), ("training.seed", 0)])
def test_the_bounds_themselves_are_allowed(path: str, value: Any) -> None:
    config = small()
    put(path, value)(config)
    assert validate(config) is config


def test_every_choice_of_a_default_is_legal() -> None:
    """Each section's defaults pass; only the recipe itself has none."""
    with pytest.raises(UserError, match=r"config\.phases: empty"):
        validate(Config())


def test_both_kinds_of_error_have_their_exit_code() -> None:
    assert (UserError.exit_code, FatalError.exit_code) == (1, 4)


def test_the_published_model_is_the_default() -> None:
    model = ModelConfig()
    assert (model.head_dim, model.width_scale, model.logit_scale) == (128, 1 / 16, 0.13875)
    assert model.matrix_std == pytest.approx(0.01825)
    assert model.output_std == pytest.approx(0.00228125)
    assert hash(model) == hash(ModelConfig())
    assert OptimizerConfig() == OptimizerConfig(0.9, 0.95, 1e-9, 0.1, 1.0)


shares = st.floats(0.01, 0.99)
phases = st.builds(
    lambda share, **fields: Phase(mix={"text": share, "code": 1 - share}, **fields), shares,
    name=st.text("abc123_-", min_size=1).filter(lambda name: name.strip("_-")),
    steps=st.integers(1, 700_000), global_batch_size=st.integers(1, 4096), spm_rate=st.floats(0, 1),
    subset=st.dictionaries(st.sampled_from(["text", "code"]),
                           st.builds(Subset, st.sampled_from(["all", "even", "odd"]), shares)),
    fim_rate=st.dictionaries(st.sampled_from(["text", "code"]), st.floats(0, 1)),
    epochs=st.dictionaries(st.sampled_from(["text", "code"]), st.floats(0.1, 5)),
    lr=st.builds(LearningRate, st.floats(1e-6, 1), st.integers(0, 1000), st.floats(0, 1), st.integers(1, 10**6)),
    optimizer=st.sampled_from(["fresh", "carried"]), checkpoint_every=st.integers(1, 10**6))


@given(st.text(max_size=8), st.integers(0, 2**31), st.sampled_from([-1, 1, 4]),
       st.lists(phases, min_size=1, max_size=3, unique_by=lambda phase: phase.name))
def test_what_is_written_is_what_is_read(name: str, seed: int, fsdp: int, phases: list[Phase]) -> None:
    config = dataclasses.replace(small(), name=name, phases=phases)
    put("training.seed", seed)(config)
    put("training.mesh.fsdp", fsdp)(config)
    data = json.loads(json.dumps(to_dict(validate(config))))
    again = from_dict(Config, data)
    assert again == config
    assert isinstance(again.phases[0].lr, LearningRate)
    assert to_dict(again) == data
    assert digest(to_dict(again)) == digest(to_dict(config))


def test_fields_that_are_absent_take_their_defaults() -> None:
    assert from_dict(Config, {"model": {"num_layers": 2}}).model == ModelConfig(num_layers=2)
    assert from_dict(Config, {}) == Config()


@pytest.mark.parametrize(("data", "message"), [
    ({"modle": {}}, "config.modle: unknown field; did you mean model?"),
    ({"model": {"num_layer": 2}}, "config.model.num_layer: unknown field; did you mean num_layers?"),
    ({"phases": [{"mixx": {}}]}, "config.phases[0].mixx: unknown field; did you mean mix?"),
    ({"phases": [{}, {"lr": {"paek": 1.0}}]}, "config.phases[1].lr.paek: unknown field; did you mean peak?"),
    ({"sources": {"text": {"stoer": "x"}}}, "config.sources.text.stoer: unknown field; did you mean store?"),
    ({"phases": [{"subset": {"a": {"zzz": 1}}}]},
     "config.phases[0].subset.a.zzz: unknown field; known: cursor, files, first"),
    ({"model": 3}, "config.model: 3 should be an object with the fields of ModelConfig"),
    ({"phases": {"a": 1}}, "config.phases: {'a': 1} must be a list"),
    ({"phases": [{"steps": "10"}]}, "config.phases[0].steps: '10' must be a whole number"),
    ({"phases": [{"mix": {"text": "half"}}]}, "config.phases[0].mix.text: 'half' must be a finite number"),
    ({"training": {"mesh": {"data": None}}}, "config.training.mesh.data: None must be a whole number"),
    ({"name": None}, "config.name: None must be a string"),
    ([], "config: [] should be an object with the fields of Config"),
])
def test_data_that_is_no_config_is_refused_by_its_path(data: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_dict(Config, data)
    assert str(error.value) == message


def test_nearest_names() -> None:
    assert nearest("starcodr", ["StarCoder", "starcoder"]) == "; did you mean starcoder?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"


def test_a_digest_is_stable_and_tells_values_apart() -> None:
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"ä": "▁"}) == digest({"ä": "▁"})
    assert len(digest([])) == 16
