"""The arithmetic of a recipe: steps, quotas, learning rate, calendar, and the same recipe at another scale.

Everything here is a pure function of the config (standard library only), exact in integers: a step's phase, its
learning rate, how many sequences every source has given by then, which steps are kept for ever.

A sequence is `data.sequence_length` tokens that are predicted; `step` counts optimizer updates over the whole run,
`phase_step` those within a phase. Update number s (from 0) of a phase uses the learning rate at s.
"""

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from crystal_jax.config import Config, LearningRate, ModelConfig, Phase, Source, Subset
from crystal_jax.errors import UserError


def phase_steps(phase: Phase, sequence_length: int) -> int:
    """Optimizer steps of a phase; a budget in tokens is rounded to the nearest step."""
    if phase.steps is not None:
        return phase.steps
    assert phase.tokens is not None, "validate() wants steps or tokens"
    per_step = phase.global_batch_size * sequence_length
    return max(1, (phase.tokens + per_step // 2) // per_step)


def quotas(mix: Mapping[str, float], sequences: int) -> dict[str, int]:
    """Whole sequences per source that sum to `sequences`: largest remainder of share times total, in exact arithmetic.

    Ties go to the source that is named first.
    """
    weights = {name: Fraction(weight) for name, weight in mix.items()}
    total = sum(weights.values())
    exact = {name: weight / total * sequences for name, weight in weights.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(mix, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: sequences - sum(counts.values())]:
        counts[name] += 1
    return counts


def share(position, quota: int, total: int):
    """round(position * quota / total), halves up: how many of the first `position` places belong to the quota.

    For ints and for arrays of them.
    """
    return (position * quota + total // 2) // total if total else position * 0


def dealing_order(quotas: Mapping[str, int]) -> list[str]:
    """Sources in the order in which they are spread over the positions: the largest first, ties by name."""
    return sorted(quotas, key=lambda name: (-quotas[name], name))


def dealt(quotas: Mapping[str, int], position: int) -> dict[str, int]:
    """Sequences that each source has given before `position` of a stretch with these quotas.

    The largest source is spread evenly over all positions, the next over the positions that are left, and so on.
    """
    counts, left, total = {}, position, sum(quotas.values())
    for name in dealing_order(quotas):
        counts[name] = share(left, quotas[name], total)
        left, total = left - counts[name], total - quotas[name]
    return counts


@dataclass(frozen=True)
class Era:
    """A recipe that a run followed until it was amended."""

    until: int
    """Global step of the first update that it didn't decide."""
    config: Config
    fingerprints: dict[str, str]
    """Of its tokenizer and token stores."""


@dataclass(frozen=True)
class Segment:
    """Updates of one phase whose sources are dealt out by one set of quotas: a phase, or its part after an amendment
    or behind data that was passed over.

    A deal that was cut short keeps the quotas of its full length: what it has dealt stays as it was.
    """

    phase: Phase
    index: int
    """Of the phase."""
    era: int
    """Index into the run's recipes; the last is the present one."""
    start: int
    """Global step of its first update."""
    steps: int
    quotas: dict[str, int]
    """Sequences per source of the whole deal."""
    begun: int = 0
    """Steps of the deal that an earlier segment has made: an amendment that leaves the mix goes on with its deal."""
    passed: dict[str, int] = field(default_factory=dict)
    """Sequences of each source that are passed over just before it (config.data.skip)."""

    @property
    def end(self) -> int:
        return self.start + self.steps

    def given(self, step: int) -> dict[str, int]:
        """Sequences that each source has given to this segment before the update at global `step`."""
        return self.stretch(0, min(max(step - self.start, 0), self.steps))

    def stretch(self, first: int, last: int) -> dict[str, int]:
        """Sequences per source in the deal's steps from `first` to `last`, both counted from `start`."""
        before, after = (dealt(self.quotas, (self.begun + step) * self.phase.global_batch_size)
                         for step in (first, last))
        return {name: after[name] - before[name] for name in after}


@dataclass(frozen=True)
class PhasePlan:
    """A phase placed in its run."""

    phase: Phase
    index: int
    start: int
    """Global step of its first update."""
    steps: int
    quotas: dict[str, int]
    """Sequences that each source gives to the whole phase."""

    @property
    def end(self) -> int:
        """Global step after its last update."""
        return self.start + self.steps

    @property
    def kept_steps(self) -> list[int]:
        """Phase steps whose parameters are kept for ever: each `checkpoint_every`-th and the last."""
        every = self.phase.checkpoint_every
        return sorted({*range(every, self.steps + 1, every), self.steps})


@dataclass(frozen=True)
class Plan:
    """A whole run as numbers."""

    phases: tuple[PhasePlan, ...]
    segments: tuple[Segment, ...]
    """One per phase, and one more for every amendment and every skip in the middle of one."""
    sequence_length: int

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end

    def at(self, step: int) -> tuple[PhasePlan, int]:
        """(phase, phase step) of the update made at global `step`; the end of the run belongs to its last phase."""
        for placed in self.phases:
            if placed.start <= step < placed.end:
                return placed, step - placed.start
        last = self.phases[-1]
        if step == last.end:
            return last, last.steps
        raise UserError(f"step {step}: the run goes from step 0 to {self.total_steps}")

    def done(self, step: int) -> tuple[PhasePlan, int]:
        """(phase, phase steps done) of the parameters after `step` updates: a phase's end belongs to that phase."""
        placed, phase_step = self.at(step)
        if phase_step == 0 and placed.index > 0:
            placed = self.phases[placed.index - 1]
            return placed, placed.steps
        return placed, phase_step

    def learning_rate(self, step: int) -> float:
        """Peak-group learning rate of the update made at global `step`, by the recipe that decided it."""
        placed, phase_step = self.at(step)
        deciding = [segment.phase for segment in self.segments if segment.start <= step < segment.end]
        return learning_rate((deciding or [placed.phase])[0].lr, phase_step)

    def settled(self, step: int) -> int:
        """Global step since which the phase that decides the update at global `step` has been as it is."""
        at = next(index for index, segment in enumerate(self.segments) if segment.start <= step < segment.end)
        while at and self.segments[at - 1].phase == self.segments[at].phase:
            at -= 1
        return self.segments[at].start

    def calendar(self) -> dict[int, str]:
        """Global step (updates done) to the folder of its permanent checkpoint, in order."""
        return {
            placed.start + step: checkpoint_name(placed.phase.name, step)
            for placed in self.phases
            for step in placed.kept_steps
        }

    def tokens(self, step: int) -> int:
        """Tokens trained on after `step` updates."""
        return sum(
            min(max(step - segment.start, 0), segment.steps) * segment.phase.global_batch_size * self.sequence_length
            for segment in self.segments
        )

    def counts(self, step: int) -> dict[str, int]:
        """Sequences that each source has given to the first `step` updates of the run."""
        total: Counter[str] = Counter()
        for segment in self.segments:
            total.update(segment.given(step))
        return dict(total)


def checkpoint_name(phase: str, phase_step: int) -> str:
    return f"{phase}/step_{phase_step:06d}"


def make_plan(config: Config, eras: Sequence[Era] = ()) -> Plan:
    """The plan of a validated config, in a run that followed `eras`, one after the other, before it."""
    segments: list[Segment] = []
    begun = 0
    for era, recipe in enumerate([*(era.config for era in eras), config]):
        until = eras[era].until if era < len(eras) else None
        segments += _segments(recipe, era, begun, until, segments[-1] if segments else None)
        begun = until or 0
    placed, start = [], 0
    for index, phase in enumerate(config.phases):
        steps = phase_steps(phase, config.data.sequence_length)
        counts: Counter[str] = Counter()
        for segment in segments:
            if segment.index == index:
                counts.update(segment.given(segment.end))
        in_order = {name: counts[name] for name in {**phase.mix, **counts}}
        placed.append(PhasePlan(phase, index, start, steps, in_order))
        start += steps
    return Plan(tuple(placed), tuple(segments), config.data.sequence_length)


def _segments(config: Config, era: int, begun: int, until: int | None, left: Segment | None) -> Iterator[Segment]:
    """What a recipe decides from the update at `begun` up to, not including, the one at `until`.

    left: the segment that is under way at `begun`, of the recipe before; its deal goes on where the mix stays.
    """
    start = 0
    for index, phase in enumerate(config.phases):
        end = start + phase_steps(phase, config.data.sequence_length)
        first, last = max(start, begun), end if until is None else min(end, until)
        if first < last:
            segment = _deal(phase, index, era, first, end)
            if left and first > start and _same_deal(left, segment):
                segment = replace(segment, quotas=left.quotas, begun=left.begun + left.steps)
            for number, steps in config.data.skip:
                at = number - 1
                if first <= at < last:
                    if segment.start < at:
                        yield replace(segment, steps=at - segment.start)
                    passed = segment.stretch(at - segment.start, at - segment.start + steps)
                    segment = replace(_deal(phase, index, era, at, end), passed=passed)
            yield replace(segment, steps=last - segment.start)
        start = end


def _deal(phase: Phase, index: int, era: int, start: int, end: int) -> Segment:
    """A new deal over the rest of a phase."""
    return Segment(phase, index, era, start, end - start,
                   quotas(phase.mix, (end - start) * phase.global_batch_size))


def _same_deal(left: Segment, segment: Segment) -> bool:
    """Whether a segment of another recipe would deal out what is left of the one before it, in the same shares."""
    remaining = sum(left.quotas.values()) - (left.begun + left.steps) * left.phase.global_batch_size
    return (left.index, left.phase.mix, left.phase.global_batch_size, remaining) == (
        segment.index, segment.phase.mix, segment.phase.global_batch_size, sum(segment.quotas.values()))


def learning_rate(lr: LearningRate, phase_step: int) -> float:
    """The schedule of one phase: 0 at its first update, `peak` at `warmup_steps`, then linear to `end`."""
    if phase_step < lr.warmup_steps:
        return lr.peak * phase_step / lr.warmup_steps
    decayed = min(phase_step - lr.warmup_steps, lr.decay_steps) / lr.decay_steps
    return lr.peak + (lr.end - lr.peak) * decayed


def code_share(phase: Phase, sources: dict[str, Source]) -> float:
    return math.fsum(weight for name, weight in phase.mix.items() if sources[name].domain == "code")


@dataclass(frozen=True)
class Scale:
    """What a smaller copy of a recipe changes; all else follows from the original."""

    steps: int
    """Of all phases together; each keeps its share, and its schedule its shape."""
    global_batch_size: int
    sequence_length: int
    kept: int
    """Permanent checkpoints of all phases together, about."""
    min_warmup: int
    """A warm-up of 0.1% of a short phase would be less than one step."""
    sources: dict[str, tuple[Source, tuple[str, ...]]]
    """New source to (its store, the original sources whose shares it takes)."""


def scaled(config: Config, scale: Scale, model: ModelConfig, name: str) -> Config:
    """The same recipe on another scale: shares, FIM rates, subsets and the shape of each schedule are the same."""
    original = make_plan(config)
    if scale.steps < len(original.phases):
        raise UserError(f"{name}: {scale.steps} steps are fewer than the {len(original.phases)} phases")
    result = copy.deepcopy(config)
    result.name, result.model = name, model
    result.data.sequence_length = scale.sequence_length
    result.sources = {key: dataclasses.replace(source) for key, (source, _) in scale.sources.items()}
    members = {key: names for key, (_, names) in scale.sources.items()}
    ratio = scale.steps / original.total_steps
    every = max(1, round(scale.steps / scale.kept))
    steps = quotas({placed.phase.name: placed.steps for placed in original.phases}, scale.steps)
    for placed, phase in zip(original.phases, result.phases, strict=True):
        phase.steps, phase.tokens = max(1, steps[phase.name]), None
        phase.global_batch_size = scale.global_batch_size
        phase.checkpoint_every = min(every, phase.steps)
        phase.lr.warmup_steps = min(max(scale.min_warmup, round(phase.lr.warmup_steps * ratio)), phase.steps)
        phase.lr.decay_steps = max(1, round((placed.phase.lr.warmup_steps + placed.phase.lr.decay_steps) * ratio)
                                   - phase.lr.warmup_steps)
        _merge_sources(phase, members)
    return result


def _merge_sources(phase: Phase, members: dict[str, tuple[str, ...]]) -> None:
    """Sums the shares of merged sources; each takes its members' highest FIM rate, and its heaviest member's subset."""
    old = copy.deepcopy(phase)
    merged = {key: [name for name in names if name in old.mix] for key, names in members.items()}
    merged = {key: sorted(names, key=lambda name: -old.mix[name]) for key, names in merged.items() if names}
    phase.mix = {key: math.fsum(old.mix[name] for name in names) for key, names in merged.items()}
    phase.fim_rate = {key: max(old.fim_rate.get(name, 0.0) for name in names) for key, names in merged.items()
                      if any(name in old.fim_rate for name in names)}
    phase.subset = {key: copy.deepcopy(old.subset.get(names[0], Subset())) for key, names in merged.items()}
    phase.epochs = {}
