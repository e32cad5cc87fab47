"""`recipe show`: a config's whole plan as numbers, before anything is allocated.

Invariant: every number comes from the plan or is counted from the config here, and the text shows the same dict that
`--json` prints.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from crystal_jax.config import Config, ModelConfig, Subset
from crystal_jax.data.store import MANIFEST, TokenStore
from crystal_jax.errors import counted
from crystal_jax.phases import PhasePlan, Plan, checkpoint_name, code_share, learning_rate, make_plan

STATE_BYTES = 12
"""Per parameter: the float32 master weight and Adam's two float32 moments."""
EXPORT_BYTES = {"bfloat16": 2, "float32": 4}
WIDTH = 100

Sizes = dict[tuple[str, str], float]
"""(source, even/odd/all) to tokens."""


def parameter_count(model: ModelConfig) -> int:
    """Trainable numbers in the model: 6,575,278,720 at Crystal's size."""
    choices, width, inner, keys = model.choices, model.embed_dim, model.mlp_dim, model.kv_heads * model.head_dim
    norm = width * (2 if choices.norm == "layer" else 1)
    widening = 2 if choices.mlp == "gated" else 1
    attention = 2 * width * (width + keys) + choices.biases * (2 * width + 2 * keys)
    mlp = (widening + 1) * width * inner + choices.biases * (widening * inner + width)
    embeddings = model.vocab_size * (1 if choices.tied else 2) + model.max_length * (choices.positions == "learned")
    return embeddings * width + model.num_layers * (2 * norm + attention + mlp) + norm


def training_flops(parameters: int, tokens: int) -> int:
    """6ND: two FLOPs per parameter and token forward, four backward; attention scores are left out."""
    return 6 * parameters * tokens


def describe(config: Config) -> dict[str, Any]:
    """The plan of a validated config as plain JSON data.

    Raises:
      UserError: a source's store is there, but damaged.
    """
    plan = make_plan(config)
    parameters = parameter_count(config.model)
    tokens = plan.tokens(plan.total_steps)
    stated = stated_sizes(config, plan)
    phases = [_describe_phase(placed, config, stated) for placed in plan.phases]
    export = parameters * EXPORT_BYTES[config.checkpoints.export_dtype]
    names = list(plan.calendar().values())
    return {
        "name": config.name,
        "parameters": parameters,
        "sequence_length": plan.sequence_length,
        "steps": plan.total_steps,
        "tokens": tokens,
        "flops": training_flops(parameters, tokens),
        "code_share": math.fsum(phase["tokens"] * phase["code_share"] for phase in phases) / tokens,
        "phases": phases,
        "checkpoints": names,
        "state": {
            "bytes": parameters * STATE_BYTES,
            "kept": config.checkpoints.keep_last,
            "export_dtype": config.checkpoints.export_dtype,
            "export_bytes": export,
            "calendar_bytes": export * len(names),
        },
    }


def _describe_phase(placed: PhasePlan, config: Config, stated: Sizes) -> dict[str, Any]:
    phase = placed.phase
    per_step = phase.global_batch_size * config.data.sequence_length
    points = {"first": 0, "peak": phase.lr.warmup_steps, "middle": placed.steps // 2, "last": placed.steps - 1}
    return {
        "name": phase.name,
        "first_step": placed.start,
        "end_step": placed.end,
        "steps": placed.steps,
        "tokens": placed.steps * per_step,
        "global_batch_size": phase.global_batch_size,
        "tokens_per_step": per_step,
        "code_share": code_share(phase, config.sources),
        "optimizer": phase.optimizer,
        "learning_rate": [
            {"at": at, "phase_step": step, "lr": learning_rate(phase.lr, step)} for at, step in points.items()
        ],
        "sources": [_describe_source(name, placed, config, stated) for name in phase.mix],
        "checkpoint_every": phase.checkpoint_every,
        "checkpoints": [checkpoint_name(phase.name, step) for step in placed.kept_steps],
    }


def _describe_source(name: str, placed: PhasePlan, config: Config, stated: Sizes) -> dict[str, Any]:
    phase = placed.phase
    subset = phase.subset.get(name, Subset())
    tokens = placed.quotas[name] * config.data.sequence_length
    available, known_from = _available_tokens(name, subset, config, stated)
    fim_rate = phase.fim_rate.get(name, 0.0)
    return {
        "name": name,
        "domain": config.sources[name].domain,
        "share": phase.mix[name],
        "sequences": placed.quotas[name],
        "tokens": tokens,
        "available_tokens": available,
        "available_from": known_from,
        "epochs": tokens / available if available else None,
        "files": subset.files,
        "first": subset.first,
        "fim_rate": fim_rate,
        "spm_rate": phase.spm_rate if fim_rate else 0.0,
    }


def stated_sizes(config: Config, plan: Plan) -> Sizes:
    """Sizes that follow from the epochs the phases state; a source whose two halves are known is known whole."""
    sizes: Sizes = {}
    for placed in plan.phases:
        for name, epochs in placed.phase.epochs.items():
            subset = placed.phase.subset.get(name, Subset())
            tokens = placed.quotas[name] * plan.sequence_length
            sizes.setdefault((name, subset.files), tokens / epochs / subset.first)
    for name in config.sources:
        if (name, "even") in sizes and (name, "odd") in sizes:
            sizes.setdefault((name, "all"), sizes[name, "even"] + sizes[name, "odd"])
    return sizes


def _available_tokens(name: str, subset: Subset, config: Config, stated: Sizes) -> tuple[int | None, str | None]:
    """(tokens that a phase may read of the source, "store" or "stated"); (None, None) where nothing tells."""
    store = Path(config.data.root) / config.sources[name].store
    if (store / MANIFEST).exists():
        return TokenStore.open(store).view("train", subset.files, subset.first).num_tokens, "store"
    if (name, subset.files) in stated:
        return round(stated[name, subset.files] * subset.first), "stated"
    return None, None


def describe_step(config: Config, step: int) -> dict[str, Any]:
    """Where the run stands after `step` updates, with the learning rate of the update that comes next.

    Raises:
      UserError: the run has no such step.
    """
    plan = make_plan(config)
    done, phase_step = plan.done(step)
    coming, coming_step = plan.at(step)
    sequences = {**dict.fromkeys(config.sources, 0), **plan.counts(step)}
    return {
        "step": step,
        "phase": done.phase.name,
        "phase_step": phase_step,
        "tokens": plan.tokens(step),
        "tokens_per_source": {name: count * plan.sequence_length for name, count in sequences.items()},
        "next_phase": coming.phase.name,
        "next_phase_step": coming_step,
        "next_lr": plan.learning_rate(step) if step < plan.total_steps else None,
        "kept_as": plan.calendar().get(step),
    }


def human(number: float, unit: str = "", digits: int = 3) -> str:
    """1234567 as 1.23M; `unit` follows, as in 1.23 MB."""
    power = 0
    while abs(number) >= 1000 - 0.5 * 10 ** (3 - digits) and power < 5:
        number, power = number / 1000, power + 1
    suffix = ["", "k", "M", "G" if unit else "B", "T", "P"][power]
    text = f"{number:.{max(0, digits - len(str(int(abs(number)))))}f}" if power else f"{number:g}"
    return f"{text} {suffix}{unit}" if unit else f"{text}{suffix}"


def render(plan: dict[str, Any], calendar: bool = False) -> str:
    """What `describe` gave, as aligned text at most 100 columns wide; `calendar` names every permanent checkpoint."""
    head = [
        f"{plan['name']}: {plan['parameters']:,} parameters, sequences of {plan['sequence_length']:,} tokens",
        f"{plan['steps']:,} steps, {human(plan['tokens'], digits=4)} tokens ({plan['tokens']:,}), "
        f"{plan['flops']:.3g} FLOPs (6ND), {plan['code_share']:.1%} code",
    ]
    blocks = ["\n".join(head), *(_render_phase(phase, calendar) for phase in plan["phases"])]
    known = {source["available_from"] for phase in plan["phases"] for source in phase["sources"]}
    notes = {"stated": "~ follows from the epochs that the recipe states, for want of a store on disk",
             None: "? neither a store on disk nor a statement tells the size of the source"}
    footnotes = [note for key, note in notes.items() if key in known]
    return "\n\n".join([*blocks, *(["\n".join(footnotes)] if footnotes else []), _render_state(plan)])


def _render_phase(phase: dict[str, Any], calendar: bool) -> str:
    title = (f"{phase['name']}  steps {phase['first_step']:,} to {phase['end_step']:,} ({phase['steps']:,}), "
             f"{human(phase['tokens'], digits=4)} tokens ({phase['tokens']:,})")
    rates = [f"{point['at']} {point['lr']:.6g} ({point['phase_step']:,})" for point in phase["learning_rate"]]
    kept = phase["checkpoints"]
    facts = {
        "batch": f"{phase['global_batch_size']:,} sequences = {phase['tokens_per_step']:,} tokens",
        "code": f"{phase['code_share']:.1%} of the tokens",
        "optimizer": {"fresh": "fresh moments", "carried": "moments carried over"}[phase["optimizer"]],
        "lr (step)": ", ".join(rates),
        "kept": f"{counted(len(kept), 'checkpoint')}: {kept[0]} .. {kept[-1]}, every {phase['checkpoint_every']:,} and "
                "the last",
    }
    lines = [title, "-" * WIDTH, *(f"  {key:<10}{value}" for key, value in facts.items())]
    if calendar:
        lines += [f"    {name}" for name in kept]
    return "\n".join([*lines, "", *_source_table(phase)])


def _source_table(phase: dict[str, Any]) -> list[str]:
    name_width = max(14, *(len(source["name"]) + 1 for source in phase["sources"]))
    row = f"  {{:<{name_width}}}{{:>9}}{{:>13}}{{:>16}}{{:>9}}{{:>7}}{{:>9}}  {{:<10}}{{:>4}}{{:>5}}".format
    lines = [row("source", "share", "sequences", "tokens", "", "epochs", "of", "subset", "FIM", "SPM")]
    for source in phase["sources"]:
        mark = "~" if source["available_from"] == "stated" else ""
        known = source["available_tokens"] is not None
        parts = [source["files"]] if source["files"] != "all" else []
        parts += [f"first {source['first']:.3g}"] if source["first"] < 1 else []
        lines.append(row(
            source["name"], f"{source['share']:.4%}", f"{source['sequences']:,}", f"{source['tokens']:,}",
            human(source["tokens"]), f"{source['epochs']:.2f}" if known else "?",
            mark + human(source["available_tokens"]) if known else "?", " ".join(parts) or "all",
            f"{source['fim_rate']:.0%}" if source["fim_rate"] else "-",
            f"{source['spm_rate']:.0%}" if source["fim_rate"] else "-",
        ))
    total = sum(source["sequences"] for source in phase["sources"])
    share = math.fsum(source["share"] for source in phase["sources"])
    lines.append(row("all", f"{share:.4%}", f"{total:,}", f"{phase['tokens']:,}", human(phase["tokens"]), *[""] * 5))
    return [line.rstrip() for line in lines]


def _render_state(plan: dict[str, Any]) -> str:
    state, count = plan["state"], len(plan["checkpoints"])
    return "\n".join([
        f"full state (float32 weights and Adam): {human(state['bytes'], 'B')}, the newest {state['kept']} kept: "
        f"{human(state['bytes'] * state['kept'], 'B')}",
        f"permanent checkpoints ({state['export_dtype']} weights): {count} of {human(state['export_bytes'], 'B')} = "
        f"{human(state['calendar_bytes'], 'B')}",
    ])


def render_step(point: dict[str, Any]) -> str:
    """What `describe_step` gave, as aligned text."""
    rate = "none: the run is over" if point["next_lr"] is None else (
        f"{point['next_lr']:.6g} at {point['next_phase']} step {point['next_phase_step']:,}")
    facts = {
        "step": f"{point['step']:,}",
        "phase": f"{point['phase']}, {point['phase_step']:,} of its steps done",
        "kept as": point["kept_as"] or "-",
        "next update": rate,
        "tokens": f"{point['tokens']:,} ({human(point['tokens'])})",
    }
    total = max(1, point["tokens"])
    return "\n".join([
        *(f"{key:<16}{value}" for key, value in facts.items()),
        *(f"  {name:<14}{tokens:>20,}{tokens / total:>11.4%}" for name, tokens in point["tokens_per_source"].items()),
    ])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    about = "steps, tokens, epochs, learning rate, checkpoints and cost of a recipe"
    show = actions.add_parser("show", help=about, description=about, allow_abbrev=False)
    show.add_argument("--config", required=True, help="configs/X.py[:VARIANT]; --config.a.b=VALUE overrides a field")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument("--calendar", action="store_true", help="name every permanent checkpoint")
    show.add_argument("--step", type=int, help="show where the run stands after this many updates instead")


def main(args: argparse.Namespace) -> None:
    if args.step is not None:
        result = describe_step(args.config, args.step)
        text = render_step(result)
    else:
        result = describe(args.config)
        text = render(result, args.calendar)
    print(json.dumps(result, indent=2) if args.json else text)
