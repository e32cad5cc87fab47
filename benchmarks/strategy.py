"""The table and the curves of the strategy experiment: means over seeds, with their spread.

    python -m benchmarks.strategy FOLDER [--output=curves.png]

FOLDER/VARIANT/seedN are runs of configs/strategy.py, all evaluated (`evaluate --all --tasks=losses,infilling`), with
the same seeds for each variant; docs/strategy.sh makes them. Prints Markdown. "3.710 ± 0.020": mean and sample standard
deviation over the seeds. A difference is taken seed by seed, between runs that began with the same parameters and read
the same sequences.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crystal_jax.errors import UserError
from crystal_jax.evaluation.walk import read_results
from crystal_jax.history import Run, load_run
from crystal_jax.phases import code_share
from crystal_jax.plots import BANDS, STYLE, Axes, png, tick

from configs.strategy import VARIANTS

COLOURS = {"three_phases": "#1a7f5a", "uniform": "#0b3d73", "code_after_text": "#ec7a1c"}
DOMAINS = ("text", "code")
COLUMNS = (*DOMAINS, "average")
GAPS = ("single_line", "multi_line", "random_span")
Runs = dict[str, list[Run]]
"""Variant to its runs, by seed."""
Metrics = dict[str, float]


def load(folder: Path) -> Runs:
    """The runs below a folder.

    Raises:
      UserError: a variant without runs, with other seeds than the first, or a run that isn't finished.
    """
    paths = {variant: sorted(folder.glob(f"{variant}/seed*")) for variant in VARIANTS}
    seeds = {variant: [path.name for path in found] for variant, found in paths.items()}
    for variant, names in seeds.items():
        if not names or names != seeds["three_phases"]:
            raise UserError(f"{folder}/{variant}: holds {names}; each variant needs runs, with the seeds of the others")
    runs = {variant: [load_run(path) for path in found] for variant, found in paths.items()}
    for run in [run for found in runs.values() for run in found]:
        if run.step < run.plan.total_steps:
            raise UserError(f"{run.folder}: at step {run.step} of {run.plan.total_steps}; the same command goes on")
    return runs


def losses_at(run: Run) -> dict[int, Metrics]:
    """Tokens to held-out loss of each domain, and their mean, in nats per token."""
    return {line["tokens"]: with_average({domain: line["heldout"][domain]["loss"] for domain in DOMAINS})
            for line in run.evals}


def with_average(values: Metrics) -> Metrics:
    return {**values, "average": statistics.fmean(values[name] for name in DOMAINS)}


def final(run: Run) -> Metrics:
    """What `evaluate` found at the run's end: bits per byte of each domain, and of each kind of gap.

    Raises:
      UserError: the end wasn't evaluated, or a domain holds no bytes.
    """
    found = {result["task"]: result["metrics"] for result in read_results(run.folder)
             if result["step"] == run.plan.total_steps}
    for task in ("losses", "infilling"):
        if task not in found:
            raise UserError(f"{run.folder}: no result of {task}; evaluate --all --tasks=losses,infilling makes it")
    for domain in DOMAINS:
        if f"{domain}.bits_per_byte" not in found["losses"]:
            raise UserError(f"{run.folder}: no bits per byte of {domain}: its held-out windows hold no text that the "
                            "tokenizer knows")
    bytes_ = with_average({domain: found["losses"][f"{domain}.bits_per_byte"] for domain in DOMAINS})
    filled = [found["infilling"][f"{gap}.exact_match"] for gap in GAPS]
    return {**bytes_, **{gap: found["infilling"][f"{gap}.bits_per_byte"] for gap in GAPS},
            "filled exactly": statistics.fmean(filled)}


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation}"


def markdown(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def differences(values: dict[str, list[Metrics]], columns: list[str]) -> list[list[str]]:
    """Rows of each other variant less three_phases, seed by seed."""
    rows = []
    for variant in [name for name in VARIANTS if name != "three_phases"]:
        pairs = list(zip(values[variant], values["three_phases"], strict=True))
        rows.append([f"{variant} less three_phases",
                     *(spread([one[column] - other[column] for one, other in pairs], "+") for column in columns)])
    return rows


def equal_tokens(runs: Runs) -> Iterator[str]:
    """At the ends of the recipe's phases, and after one and two thirds of the run."""
    plan = runs["three_phases"][0].plan
    steps = {*(placed.end for placed in plan.phases), plan.total_steps // 3, 2 * plan.total_steps // 3}
    logged = set.intersection(*(set(losses_at(run)) for found in runs.values() for run in found))
    chosen = sorted(logged & set(map(plan.tokens, steps)))
    rows = [[f"{tokens:,}", variant, *(spread([losses_at(run)[tokens][column] for run in runs[variant]])
                                       for column in COLUMNS)] for tokens in chosen for variant in VARIANTS]
    yield from markdown(["tokens", "nats per token, held out", *COLUMNS], rows)


def at_the_end(runs: Runs) -> Iterator[str]:
    losses = {variant: [losses_at(run)[run.tokens] for run in found] for variant, found in runs.items()}
    table = [[variant, *(spread([value[column] for value in values]) for column in COLUMNS)]
             for variant, values in losses.items()]
    yield from markdown(["nats per token, at the end", *COLUMNS], table + differences(losses, list(COLUMNS)))
    values = {variant: [final(run) for run in found] for variant, found in runs.items()}
    columns = list(values["three_phases"][0])
    table = [[variant, *(spread([value[column] for value in values[variant]]) for column in columns)]
             for variant in VARIANTS]
    yield from markdown(["bits per byte, at the end", *columns], table + differences(values, columns))


def draw(runs: Runs) -> bytes:
    """Held-out losses and their mean against tokens, and each variant's share of code; bands span the seeds."""
    import matplotlib.figure
    from matplotlib import rc_context

    with rc_context({**STYLE, "savefig.dpi": 90}):
        figure = matplotlib.figure.Figure(figsize=(12, 7.6), layout="constrained")
        places = figure.subplots(2, 2).flat
        for axes, column in zip(places, COLUMNS, strict=False):
            _curves(axes, runs, column)
            title = "the mean of both" if column == "average" else column
            axes.set_title(f"Held-out loss of {title} (nats per token)")
        _shares(places[3], runs)
        for axes in places:
            for placed in runs["three_phases"][0].plan.phases:
                ends = [placed.start, placed.end]
                axes.axvspan(*map(runs["three_phases"][0].plan.tokens, ends), color=BANDS[placed.index % 2], zorder=-10)
            axes.set_xlim(left=0)
            axes.set_xlabel("tokens (bands: the recipe's phases)")
            axes.xaxis.set_major_formatter(tick)
            axes.legend(loc="best")
        return png(figure)


def _curves(axes: Axes, runs: Runs, column: str) -> None:
    for variant, found in runs.items():
        tokens = sorted(losses_at(found[0]))
        values = np.array([[losses_at(run)[x][column] for x in tokens] for run in found])
        axes.fill_between(tokens, values.min(0), values.max(0), color=COLOURS[variant], alpha=0.2, linewidth=0)
        axes.plot(tokens, values.mean(0), "o-", color=COLOURS[variant], linewidth=1.6, markersize=3, label=variant)


def _shares(axes: Axes, runs: Runs) -> None:
    for variant, found in runs.items():
        plan, sources = found[0].plan, found[0].config.sources
        edges = [plan.tokens(placed.start) for placed in plan.phases] + [plan.tokens(plan.total_steps)]
        shares = [100 * code_share(placed.phase, sources) for placed in plan.phases]
        axes.stairs(shares, edges, baseline=None, color=COLOURS[variant], linewidth=1.6, label=variant)
    axes.set(title="Share of code (%)", ylim=(-3, 103))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="a PNG of the curves")
    args = parser.parse_args()
    try:
        runs = load(args.folder)
        print(*equal_tokens(runs), *at_the_end(runs), sep="\n")
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.output is not None:
        args.output.write_bytes(draw(runs))


if __name__ == "__main__":
    main()
