"""The three-phase strategy against two others, on the scale of a laptop: equal tokens, model and learning rates.

Derived from configs/crystal_tiny.py. Variants:

    three_phases      the recipe: 5%, 65%, then 83% code
    uniform           one mixture from the first step to the last
    code_after_text   all text, then all code, and no step with both

Each gives the same learning rate to the same step, begins its optimizer anew at the same steps, and reads each source
from its beginning to the same place in the same order: only which step reads which source differs. Fill-in-the-middle
is meant for as many of the tokens of code; the recipe's rates differ by phase, the others' are their mean. A run takes
about 7 CPU-minutes; `configs/strategy.py:uniform-6000` takes 6,000 steps instead of 1,500. docs/strategy.sh repeats
the experiment, docs/strategy.md says what came out.

    crystal-jax train --config=configs/strategy.py:uniform --config.training.seed=2 --config.data.seed=2 --run_dir=RUN
"""

import math
from dataclasses import replace

from crystal_jax.config import Config, LearningRate, Phase, nearest
from crystal_jax.errors import UserError
from crystal_jax.phases import code_share, learning_rate, quotas

from configs import crystal_tiny

EVALUATIONS = 15
"""Of a run, in training."""
FEWEST = 100
"""Steps of a run, so that the text ends behind the second phase's warm-up."""


def get_config(variant: str = "three_phases") -> Config:
    name, _, steps = variant.partition("-")
    if name not in VARIANTS:
        raise UserError(f"{variant!r}: no such variant{nearest(name, VARIANTS)}")
    if variant != name and (not steps.isdecimal() or int(steps) < FEWEST):
        raise UserError(f"{variant!r}: behind the - comes a number of steps, {FEWEST} or more, such as "
                        f"{name}-6000")
    config = crystal_tiny.get_config(steps or "1500")
    config.name = f"strategy_{name}"
    config.phases = VARIANTS[name](_three_phases(config))
    config.data.root = "runs/strategy/data"
    config.training.eval_every = max(1, sum(phase.steps or 0 for phase in config.phases) // EVALUATIONS)
    config.training.eval_sequences = 128
    return config


def _three_phases(config: Config) -> list[Phase]:
    """The recipe with its code in whole steps' worth of sequences, so that all of a run's can be dealt out anew.

    No subsets: a source is read on from phase to phase, by every variant alike.
    """
    return [_with_code(replace(phase, subset={}, checkpoint_every=phase.steps),
                       round(code_share(phase, config.sources) * phase.steps), phase.fim_rate.get("code", 0.0))
            for phase in config.phases]


def _with_code(phase: Phase, code: int, fim_rate: float) -> Phase:
    """The phase with so many steps' worth of code, and text for the rest."""
    worth = {"text": phase.steps - code, "code": code}
    return replace(phase, mix={name: steps / phase.steps for name, steps in worth.items() if steps},
                   fim_rate={"code": fim_rate} if code and fim_rate else {})


def _code(phase: Phase) -> int:
    """Steps' worth of code."""
    return round(phase.mix.get("code", 0.0) * phase.steps)


def _mean_fim_rate(phases: list[Phase]) -> float:
    """Over the code of all phases."""
    given = math.fsum(_code(phase) * phase.fim_rate.get("code", 0.0) for phase in phases)
    return given / sum(map(_code, phases))


def _uniform(phases: list[Phase]) -> list[Phase]:
    code = quotas({phase.name: phase.steps for phase in phases}, sum(map(_code, phases)))
    return [_with_code(phase, code[phase.name], _mean_fim_rate(phases)) for phase in phases]


def _code_after_text(phases: list[Phase]) -> list[Phase]:
    """The phase in which the text ends becomes two."""
    left = sum(phase.steps - _code(phase) for phase in phases)
    found: list[Phase] = []
    for phase in phases:
        text = min(left, phase.steps)
        left -= text
        parts = _split(phase, text) if 0 < text < phase.steps else [phase]
        found += [_with_code(part, 0 if first < text else part.steps, _mean_fim_rate(phases))
                  for first, part in zip((0, text), parts, strict=False)]
    return found


def _split(phase: Phase, at: int) -> list[Phase]:
    """Two phases that together are the one: the second goes on with its learning rate and its moments."""
    lr = LearningRate(peak=learning_rate(phase.lr, at), warmup_steps=0, end=phase.lr.end,
                      decay_steps=phase.lr.warmup_steps + phase.lr.decay_steps - at)
    return [replace(phase, name=f"{phase.name}_text", steps=at, checkpoint_every=at),
            replace(phase, name=f"{phase.name}_code", steps=phase.steps - at, checkpoint_every=phase.steps - at,
                    lr=lr, optimizer="carried")]


VARIANTS = {"three_phases": lambda phases: phases, "uniform": _uniform, "code_after_text": _code_after_text}
