"""Pictures of evaluations over training: each measurement against tokens, within the phases, beside published values.

Invariant: what is drawn are the results in RUN/evaluations, one point per checkpoint; nothing is smoothed.
"""

from collections.abc import Sequence
from typing import Any

from crystal_jax.history import Run
from crystal_jax.plots import FAMILIES, GREY, INK, STYLE, Axes, Figure, frame, png, tick
from crystal_jax.published import CODE, HEADLINE, LANGUAGE, PROBLEMS, PUBLISHED, average

Result = dict[str, Any]
REFERENCE_STYLES = ((0, (1, 1)), (0, (4, 2)), (0, (6, 2, 1, 2)), (0, (2, 3)), (0, (8, 3)))
COMPARED = ("#0b3d73", "#ec7a1c", "#1a7f5a", "#8250df", "#cf222e", "#57606a", "#0a7ea4", "#9a6700")
"""Colours of runs that are compared."""


def series_of(results: Sequence[Result]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(task, metric) to (tokens, value) of each checkpoint."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results:
        for metric, value in result["metrics"].items():
            found.setdefault((result["task"], metric), []).append((result["tokens"], value))
    return {key: sorted(points) for key, points in found.items()}


def panels_of(results: Sequence[Result]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title to label to points: what is drawn together, in the order of the page."""
    series = series_of(results)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    groups = (("losses", "bits_per_byte", "Bits per byte of held-out text"),
              ("infilling", "exact_match", "Infilling: share filled exactly"),
              ("infilling", "bits_per_byte", "Infilling: bits per byte of the middle"))
    for task, ending, title in groups:
        lines = {metric.removesuffix(f".{ending}").replace("_", " "): points
                 for (name, metric), points in series.items() if name == task and metric.endswith(f".{ending}")}
        if lines:
            found[title] = lines
    scores = {task: [(x, 100 * y) for x, y in series[task, metric]] for task, metric in HEADLINE.items()
              if (task, metric) in series}
    averages = {name: _averages(scores, tasks) for name, tasks in (("language", LANGUAGE), ("code", CODE))}
    if any(averages.values()):
        found["Language and code averages (%)"] = {name: points for name, points in averages.items() if points}
    found |= {f"{task} ({HEADLINE[task]}, %)": {task: points} for task, points in scores.items()}
    rest = {(task, metric): points for (task, metric), points in series.items()
            if task not in (*HEADLINE, "losses", "infilling") and metric in ("acc", "acc_norm", "exact_match", "loss",
                                                                              "extractible", "word_perplexity",
                                                                              "seen.extractible", "unseen.extractible")}
    return found | {f"{task}: {metric}": {task: points} for (task, metric), points in rest.items()}


def _averages(scores: dict[str, list[tuple[float, float]]], tasks: tuple[str, ...]) -> list[tuple[float, float]]:
    """Where all tasks of a side have a value."""
    by_tokens: dict[float, dict[str, float]] = {}
    for task in tasks:
        for tokens, value in scores.get(task, []):
            by_tokens.setdefault(tokens, {})[task] = value
    found = [(tokens, average(values, tasks)) for tokens, values in sorted(by_tokens.items())]
    return [(tokens, value) for tokens, value in found if value is not None]


def draw_evaluations(run: Run, results: Sequence[Result]) -> bytes | None:
    """One PNG with a panel per measurement, None where nothing was evaluated."""
    import matplotlib.figure
    from matplotlib import rc_context

    panels = panels_of(results)
    if not panels:
        return None
    others = {result["task"] for result in results if not as_published(result)}
    rows = -(-len(panels) // 2)
    with rc_context(STYLE):
        figure: Figure = matplotlib.figure.Figure(figsize=(13, 3.6 * rows), layout="constrained")
        places = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, (title, lines) in zip(places, panels.items(), strict=False):
            for label, points in lines.items():
                _line(axes, points, label, _colour(label, len(lines)))
            _references(axes, title, lines, others)
            frame(axes, run, title)
            if len(lines) > 1:
                axes.legend(loc="best", fontsize=8.5)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        return png(figure)


def _line(axes: Axes, points: list[tuple[float, float]], label: str, colour: str | None) -> None:
    axes.plot(*zip(*points, strict=True), "o-", label=label, color=colour, linewidth=1.6, markersize=4, clip_on=False)


def _colour(label: str, count: int) -> str | None:
    """Text and code in the colours that they have everywhere."""
    domain = {"language": "text", "text": "text", "code": "code"}.get(label)
    return FAMILIES[domain][1] if domain else INK if count == 1 else None


def as_published(result: Result) -> bool:
    """Whether a task was asked whole, all of its problems, and without <s>, as the published values are."""
    settings, problems = result["settings"], PROBLEMS.get(result["task"])
    return (settings.get("limit") is None and not settings.get("add_bos")
            and problems in (None, result["metrics"].get("problems")))


def _references(axes: Axes, title: str, lines: dict[str, Any], others: set[str]) -> None:
    """Dashed: what published models reach in the same task; `others` were asked otherwise."""
    for model, style in zip(PUBLISHED, REFERENCE_STYLES, strict=True):
        for label in lines:
            tasks = {"language": LANGUAGE, "code": CODE}.get(label, (label,))
            value = average(model.scores, tasks)
            if "(" in title and value is not None and others.isdisjoint(tasks):
                axes.axhline(value, color=GREY, linewidth=0.9, linestyle=style)
                which = f" ({label})" if len(lines) > 1 else ""
                axes.annotate(f"{model.name}{which} {value:.1f}", (0.995, value), xycoords=axes.get_yaxis_transform(),
                              ha="right", va="bottom", fontsize=7, color=GREY)


def draw_comparison(runs: Sequence[tuple[str, Run, Sequence[Result]]]) -> bytes:
    """One PNG: held-out loss of each domain and each measurement, all runs on the same axes, against tokens."""
    import matplotlib.figure
    from matplotlib import rc_context

    panels: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for name, run, results in runs:
        for domain in sorted({domain for line in run.evals for domain in line["heldout"]}, reverse=True):
            points = [(line["tokens"], line["heldout"][domain]["loss"]) for line in run.evals
                      if domain in line["heldout"]]
            panels.setdefault(f"Held-out loss of {domain} (nats per token)", []).append((name, points))
        for title, series in panels_of(results).items():
            for label, points in series.items():
                suffix = f": {label}" if len(series) > 1 else ""
                panels.setdefault(f"{title}{suffix}", []).append((name, points))
    rows = -(-max(len(panels), 1) // 2)
    colours = {name: COMPARED[number % len(COMPARED)] for number, (name, _, _) in enumerate(runs)}
    with rc_context(STYLE):
        figure: Figure = matplotlib.figure.Figure(figsize=(13, 3.8 * rows), layout="constrained")
        places = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, (title, lines) in zip(places, panels.items(), strict=False):
            for name, points in lines:
                _line(axes, points, name, colours[name])
            axes.set(title=title, xlabel="tokens")
            axes.xaxis.set_major_formatter(tick)
            axes.set_xlim(left=0)
            axes.legend(loc="best")
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        return png(figure)
