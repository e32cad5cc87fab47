"""The rule that each field of a config obeys.

Invariant: nothing is opened or allocated before `validate` has passed.
"""

import itertools
import math
from typing import Any

from crystal_jax.config import DOMAINS, FAMILIES, REMAT, Config, ModelConfig, Phase, check_types, nearest, require
from crystal_jax.errors import UserError
from crystal_jax.phases import phase_steps

MAX_SEQUENCES = 3_000_000_000
"""Of a phase: the square, which the order of its sources is computed with, is below 2^63."""


def validate(config: Config) -> Config:
    """The config itself, once every rule holds.

    Raises:
      UserError: the first rule that doesn't hold: the field's path, its value, the rule.
    """
    check_types(config, "config")
    _check_model(config.model, config.data.sequence_length)
    if not config.phases:
        raise UserError("config.phases: empty; a recipe needs at least one phase")
    names = [phase.name for phase in config.phases]
    if len(set(names)) < len(names):
        raise UserError(f"config.phases: names {names} must differ, since exports are filed under them")
    for name, source in config.sources.items():
        require(bool(source.store), f"config.sources.{name}.store", source.store, "a folder below data.root")
        _one_of(f"config.sources.{name}.domain", source.domain, DOMAINS)
    for index, phase in enumerate(config.phases):
        _check_phase(phase, config, f"config.phases[{index}]")
    _check_skips(config)
    _check_rest(config)
    return config


def _positive(owner: Any, path: str, *names: str) -> None:
    for name in names:
        require(getattr(owner, name) > 0, f"{path}.{name}", getattr(owner, name), "above 0")


def _one_of(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{path}: {value!r} must be one of {', '.join(choices)}")


def _check_model(model: ModelConfig, sequence_length: int) -> None:
    path = "config.model"
    _one_of(f"{path}.family", model.family, tuple(FAMILIES))
    if model.num_kv_heads is not None:
        shared = model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads == 0
        require(shared, f"{path}.num_kv_heads", model.num_kv_heads, f"a divisor of num_heads = {model.num_heads}")
    _positive(model, path, "vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "max_length", "rotary_base",
              "norm_eps", "mup_base_width", "embed_scale", "output_scale", "init_std")
    require(model.embed_dim % model.num_heads == 0, f"{path}.embed_dim", model.embed_dim,
             f"a multiple of num_heads = {model.num_heads}")
    require(0 <= model.rotary_dim <= model.head_dim and model.rotary_dim % 2 == 0, f"{path}.rotary_dim",
             model.rotary_dim, f"even and at most the head size {model.head_dim}")
    require(model.choices.positions != "learned" or model.rotary_dim == 0, f"{path}.rotary_dim", model.rotary_dim,
            f"0 in the family {model.family}, whose positions are learned")
    require(1 < sequence_length <= model.max_length, "config.data.sequence_length", sequence_length,
             f"from 2 to model.max_length = {model.max_length}")


def _check_phase(phase: Phase, config: Config, path: str) -> None:
    require(bool(phase.name) and phase.name.replace("_", "").replace("-", "").isalnum(), f"{path}.name", phase.name,
             "letters, digits, - and _ only, since it names a folder")
    if (phase.steps is None) == (phase.tokens is None):
        raise UserError(f"{path}: steps = {phase.steps}, tokens = {phase.tokens}: set exactly one of the two")
    _positive(phase, path, "global_batch_size", "checkpoint_every")
    budget = "steps" if phase.steps is not None else "tokens"
    _positive(phase, path, budget)
    if phase.tokens is not None:
        per_step = phase.global_batch_size * config.data.sequence_length
        require(phase.tokens >= per_step, f"{path}.tokens", phase.tokens, f"at least one step of {per_step} tokens")
    sequences = phase_steps(phase, config.data.sequence_length) * phase.global_batch_size
    require(sequences <= MAX_SEQUENCES, f"{path}.{budget}", getattr(phase, budget),
            f"at most {MAX_SEQUENCES:,} sequences; make several phases of it")
    _check_mix(phase, config, path)
    for owner, rates in (("fim_rate", phase.fim_rate), ("epochs", phase.epochs), ("subset", phase.subset)):
        for name in rates:
            if name not in phase.mix:
                raise UserError(f"{path}.{owner}.{name}: not in the phase's mix{nearest(name, phase.mix)}")
    for name, rate in phase.fim_rate.items():
        require(0 <= rate <= 1, f"{path}.fim_rate.{name}", rate, "from 0 to 1")
    require(0 <= phase.spm_rate <= 1, f"{path}.spm_rate", phase.spm_rate, "from 0 to 1")
    for name, epochs in phase.epochs.items():
        require(epochs > 0, f"{path}.epochs.{name}", epochs, "above 0")
    for name, subset in phase.subset.items():
        _one_of(f"{path}.subset.{name}.files", subset.files, ("all", "even", "odd"))
        require(0 < subset.first <= 1, f"{path}.subset.{name}.first", subset.first, "in (0, 1]")
        _one_of(f"{path}.subset.{name}.cursor", subset.cursor, ("carried", "fresh"))
    _one_of(f"{path}.optimizer", phase.optimizer, ("fresh", "carried"))
    require(phase.lr.warmup_steps >= 0, f"{path}.lr.warmup_steps", phase.lr.warmup_steps, "0 or more")
    _positive(phase.lr, f"{path}.lr", "peak", "decay_steps")
    require(phase.lr.end >= 0, f"{path}.lr.end", phase.lr.end, "0 or more")


def _check_mix(phase: Phase, config: Config, path: str) -> None:
    require(bool(phase.mix), f"{path}.mix", phase.mix, "a share for at least one source")
    for name, weight in phase.mix.items():
        if name not in config.sources:
            raise UserError(f"{path}.mix.{name}: no such source{nearest(name, config.sources)}")
        require(weight > 0, f"{path}.mix.{name}", weight, "above 0; leave out a source that isn't read")
    total = math.fsum(phase.mix.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"{path}.mix: the shares sum to {total:.9g}, not 1; divide each by {total:.9g}, or change one "
                        f"by {1 - total:+.9g}")


def _check_skips(config: Config) -> None:
    """Each stretch of data that is passed over lies within one phase, behind the one before."""
    ends = list(itertools.accumulate(phase_steps(phase, config.data.sequence_length) for phase in config.phases))
    before = 0
    for index, skip in enumerate(config.data.skip):
        path = f"config.data.skip[{index}]"
        require(len(skip) == 2 and skip[1] > 0, path, skip, "a first step, as the log counts, and a number of steps")
        require(before < skip[0] <= ends[-1], path, skip, f"a first step from {before + 1} to {ends[-1]}, in order")
        end = next(end for end in ends if skip[0] <= end)
        require(skip[0] + skip[1] - 1 <= end, path, skip, f"data of one phase, which ends with step {end}; pass over "
                f"{end - skip[0] + 1} steps here, and the rest from the next phase's first step on")
        before = skip[0]


def _check_rest(config: Config) -> None:
    training, optimizer, checkpoints = config.training, config.optimizer, config.checkpoints
    _one_of("config.training.dtype", training.dtype, ("bfloat16", "float32"))
    _one_of("config.training.remat", training.remat, tuple(REMAT))
    _one_of("config.training.attention", training.attention, ("auto", "xla", "splash", "cudnn"))
    _one_of("config.optimizer.mu_dtype", optimizer.mu_dtype, ("float32", "bfloat16"))
    require(training.z_loss >= 0, "config.training.z_loss", training.z_loss, "0 or more")
    _one_of("config.data.fim_mode", config.data.fim_mode, ("local", "crystal", "none"))
    _one_of("config.data.packing", config.data.packing, ("concat", "best_fit"))
    _one_of("config.checkpoints.export_dtype", checkpoints.export_dtype, ("bfloat16", "float32"))
    _positive(training, "config.training", "unroll", "log_every", "eval_every", "eval_sequences", "fingerprint_every",
              "skips_in_a_row", "spike_factor", "hang_seconds", "accumulate", "pad_to")
    require(training.spike_window >= 0, "config.training.spike_window", training.spike_window, "0 or more")
    _positive(checkpoints, "config.checkpoints", "every_steps", "keep_last", "slow_save_seconds")
    for name in ("every_minutes", "keep_public_every"):
        value = getattr(checkpoints, name)
        require(value >= 0, f"config.checkpoints.{name}", value, "0 or more")
    _positive(optimizer, "config.optimizer", "eps", "clip_norm")
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        require(0 <= value < 1, f"config.optimizer.{name}", value, "in [0, 1)")
    require(optimizer.weight_decay >= 0, "config.optimizer.weight_decay", optimizer.weight_decay, "0 or more")
    for axis in ("slice", "data", "fsdp", "tensor"):
        size = getattr(training.mesh, axis)
        require(size > 0 or size == -1, f"config.training.mesh.{axis}", size, "above 0, or -1 for what is left")
    for path, seed in (("config.training.seed", training.seed), ("config.data.seed", config.data.seed)):
        require(seed >= 0, path, seed, "0 or more")
