"""The pictures of a run, drawn with matplotlib and no global state.

Invariant: one colour family per domain (text blue, code orange) in every picture, tokens on the x axis of all that
follows the training, phases as bands; a run with nothing logged yet gives the same pictures, empty.
"""

import io
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from crystal_jax.config import LearningRate
from crystal_jax.goodput import LOST
from crystal_jax.history import Line, Run
from crystal_jax.phases import learning_rate
from crystal_jax.recipe import human

# matplotlib.axes.Axes and matplotlib.figure.Figure: slow to import, so only where something is drawn.
Axes = Any
Figure = Any

FAMILIES = {"text": ("#0b3d73", "#2f7cc4", "#a9cdee"), "code": ("#8f3503", "#ec7a1c", "#fbc891")}
"""Per domain: dark (held out), middle (a single source), light (the last of many sources)."""
INK, GREY, BANDS = "#22272e", "#6e7781", ("#eef1f5", "#ffffff")
MANY = 300
"""Points above which a noisy line is drawn pale, with its running mean over it."""
UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
STYLE = {
    "font.size": 9.5, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": GREY, "ytick.color": GREY, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#d8dee4", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 8.5, "figure.facecolor": "white", "savefig.dpi": 150, "lines.solid_capstyle": "round",
}


def draw_all(run: Run) -> dict[str, bytes]:
    """File name to PNG: report.png (the overview) and one picture per panel."""
    import matplotlib.figure
    from matplotlib import rc_context

    pictures = {}
    with rc_context(STYLE):
        for name, (panel, height) in PANELS.items():
            figure = matplotlib.figure.Figure(figsize=(10, height), layout="constrained")
            panel(figure.subplots(), run)
            pictures[f"{name}.png"] = png(figure)
        pictures["report.png"] = png(_overview(run))
    return pictures


def _overview(run: Run) -> Figure:
    import matplotlib.figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure = matplotlib.figure.Figure(figsize=(13, 8.2), layout=layout)
    planned = run.plan.tokens(run.plan.total_steps)
    parts = [f"{human(run.starts[-1]['parameters'])} parameters"] if run.starts else []
    parts.append(f"{human(run.tokens)} of " * (run.tokens < planned) + f"{human(planned)} tokens")
    figure.suptitle(f"{run.config.name}: {', '.join(parts)}, {len(run.plan.phases)} phases",
                    fontsize=14, fontweight="bold", x=0.012, ha="left")
    for axes, panel in zip(figure.subplots(2, 2).flat, OVERVIEW, strict=True):
        panel(axes, run)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw_loss(axes: Axes, run: Run) -> None:
    """Training loss per source, held-out loss per domain, and the entropy that a table of token frequencies reaches."""
    colours, ceilings = source_colours(run), [0.0]
    members = Counter(run.config.sources[name].domain for name in colours)
    for name, colour in colours.items():
        tokens, loss = run.series(partial(_loss_of, name))
        domain = run.config.sources[name].domain
        # One entry for all sources of a domain: the mixture's legend tells them apart.
        count = members.pop(domain, 0)
        label = {0: "_", 1: f"{name}, training"}.get(count, f"{domain}, training ({count} sources)")
        _noisy(axes, tokens, loss, colour, label)
        ceilings.append(float(np.nanquantile(loss, 0.97)) if np.isfinite(loss).any() else 0.0)
    for domain in sorted({domain for line in run.evals for domain in line["heldout"]}, reverse=True):
        rows = [(line["tokens"], line["heldout"][domain]) for line in run.evals if domain in line["heldout"]]
        dark, entropy = FAMILIES[domain][0], rows[-1][1]["unigram_entropy"]
        axes.plot([x for x, _ in rows], [row["loss"] for _, row in rows], "o-", color=dark, linewidth=1,
                  markersize=_size(len(rows), 5.5), markeredgecolor="white", markeredgewidth=0.7,
                  label=f"{domain}, held out", zorder=5, clip_on=False)
        axes.axhline(entropy, color=dark, linestyle=(0, (5, 3)), linewidth=1)
        # Labels of neighbouring lines would overlap: one lies above its line, the other below.
        above = domain == "text"
        axes.annotate(f"unigram entropy of {domain}, {entropy:.2f}", (0.99, entropy), (0, 2.5 if above else -2.5),
                      ha="right", va="bottom" if above else "top", color=dark, fontsize=8.5,
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points")
        ceilings.append(entropy)
    frame(axes, run, "Loss (nats per token)")
    if max(ceilings) > 0:
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.12 * max(ceilings)))
    else:
        axes.set_yticks([])
    _legend(axes)


def _loss_of(source: str, line: Line) -> float | None:
    return line.get("loss_per_source", {}).get(source)


def draw_mixture(axes: Axes, run: Run) -> None:
    """Per phase the recipe's share of tokens per source (pale) over the share that was read (full)."""
    from matplotlib.patches import Patch

    colours = source_colours(run)
    for index, (placed, given) in enumerate(zip(run.plan.phases, run.consumption(), strict=True)):
        _stacked_bar(axes, index - 0.22, placed.quotas, colours, pale=True)
        if any(given.values()):
            _stacked_bar(axes, index + 0.14, given, colours, pale=False)
        else:
            axes.text(0.006, index + 0.14, "not begun", va="center", color=GREY, fontsize=8.5)
    count = len(run.plan.phases)
    axes.set_title("Share of each phase's tokens: recipe (pale) and read", pad=10)
    axes.set(xlim=(0, 1), ylim=(count - 0.5, -0.5))
    axes.set_yticks(range(count), [placed.phase.name for placed in run.plan.phases])
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncol=min(4, len(handles)),
                borderaxespad=0, handlelength=1, handleheight=0.9)


def _stacked_bar(axes: Axes, y: float, amounts: Mapping[str, float], colours: dict[str, str], pale: bool) -> None:
    total, left = sum(amounts.values()), 0.0
    for name in [name for name in colours if name in amounts]:
        share = amounts[name] / total
        axes.barh(y, share, 0.24 if pale else 0.42, left, color=colours[name], alpha=0.45 if pale else 1,
                  edgecolor="white", linewidth=0.6)
        if share > 0.035 and not pale:
            label = f"{share:.1%}" if share > 0.08 else f"{share:.0%}"
            axes.text(left + share / 2, y, label, ha="center", va="center", fontsize=8.5,
                      color=_readable_on(colours[name]))
        left += share


def draw_learning_rate(axes: Axes, run: Run) -> None:
    """The schedule as planned (dashed) and as logged."""
    # An update's rate stands where the log has it: at the tokens seen after that update.
    planned = [(run.plan.tokens(min(placed.start + step + 1, placed.end)), learning_rate(placed.phase.lr, step))
               for placed in run.plan.phases for step in _corners(placed.phase.lr, placed.steps)]
    axes.plot(*zip(*planned, strict=True), color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="planned")
    for placed in run.plan.phases:
        logged = run.series(partial(_lr_in, placed.phase.name))
        axes.plot(*logged, "o-", color="#1a7f5a", linewidth=2, markersize=_size(len(run.train), 4),
                  label="_" * placed.index + "logged")
    frame(axes, run, "Learning rate")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _lr_in(phase: str, line: Line) -> float | None:
    return line["lr"] if line["phase"] == phase else None


def _corners(lr: LearningRate, steps: int) -> list[int]:
    """Phase steps between which the schedule is straight."""
    return sorted({0, min(lr.warmup_steps, steps - 1), min(lr.warmup_steps + lr.decay_steps, steps - 1), steps - 1})


def draw_gradient_norm(axes: Axes, run: Run) -> None:
    """The global norm before clipping, with the norm that it is clipped to."""
    from matplotlib.ticker import LogLocator, NullLocator

    tokens, norms = run.series(lambda line: line.get("grad_norm"))
    _noisy(axes, tokens, norms, "#6f42c1", "gradient norm")
    axes.axhline(run.config.optimizer.clip_norm, color=INK, linewidth=1, linestyle=(0, (5, 3)), label="clipped to this")
    if (norms > 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda norm, _: f"{norm:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    frame(axes, run, "Gradient norm")
    _legend(axes)


def draw_throughput(axes: Axes, run: Run) -> None:
    """Tokens per second of updates: of the slowest and the fastest of a log line, of its mean, and smoothed; on the
    right what that asks of each device."""
    timed = [line for line in run.train if line.get("seconds_of_steps")]
    if timed:
        slowest, fastest = ([line["tokens_per_second"] * line["step_seconds"] / choose(line["seconds_of_steps"])
                             for line in timed] for choose in (max, min))
        tokens = [line["tokens"] for line in timed]
        axes.fill_between(tokens, slowest, fastest, color="#57606a", alpha=0.15, linewidth=0,
                          label="single updates, slowest to fastest")
    _noisy(axes, *run.series(lambda line: line.get("tokens_per_second")), "#57606a", "mean of a log line")
    smoothed = run.series(lambda line: line.get("smoothed_tokens_per_second"))
    axes.plot(*smoothed, color="#1a7f5a", linewidth=1.8, label="smoothed")
    frame(axes, run, "Throughput (tokens per second)")
    if len(smoothed[1]):  # the first updates of a process may be several times as fast as any that follow
        axes.set_ylim(top=1.6 * float(np.nanmax(smoothed[1])))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(tick)
    _device_scale(axes, run)
    _legend(axes)


def _device_scale(axes: Axes, run: Run) -> None:
    """The same curve in MFU, or where no peak is known in TFLOP/s a device, by the last line that says it."""
    for name, label, scale in (("mfu", "MFU (%)", 100.0), ("tflops_per_device", "TFLOP/s a device", 1.0)):
        known = [scale * line[name] / line["tokens_per_second"] for line in run.train if line.get(name)]
        if known:
            factor = known[-1]
            right = axes.secondary_yaxis("right", functions=(partial(np.multiply, factor),
                                                             partial(np.multiply, 1 / factor)))
            right.set_ylabel(label)
            return


def draw_time(axes: Axes, run: Run) -> None:
    """The run's wall time by what it went into."""
    spent = run.account.seconds if run.account else {}
    total = sum(spent.values())
    unit, size = next((unit, size) for unit, size in UNITS.items() if total >= 2 * size or size == 1)
    found = {name: seconds / size for name, seconds in spent.items() if seconds}
    colours = {"stepping": "#1a7f5a", **dict.fromkeys(LOST, "#cf222e")}
    axes.set_title("Where the time went", pad=10)
    axes.barh([*found], [*found.values()], color=[colours.get(name, "#8c959f") for name in found])
    for row, length in enumerate(found.values()):
        axes.annotate(f"{length * size / total:.1%}", (length, row), (4, 0), va="center", fontsize=8.5,
                      textcoords="offset points")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_formatter(tick)
    if not found:
        axes.text(0.5, 0.5, "the log doesn't say", transform=axes.transAxes, ha="center", va="center", color=GREY)


PANELS: dict[str, tuple[Callable[[Axes, Run], None], float]] = {
    "loss": (draw_loss, 4.8),
    "mixture": (draw_mixture, 3.6),
    "learning_rate": (draw_learning_rate, 3.2),
    "gradient_norm": (draw_gradient_norm, 3.2),
    "throughput": (draw_throughput, 3.2),
    "time": (draw_time, 3.0),
}
"""File name to (panel, height of its own picture in inches)."""
OVERVIEW = (draw_loss, draw_mixture, draw_learning_rate, draw_gradient_norm)


def source_colours(run: Run) -> dict[str, str]:
    """A colour per source from its domain's family: text first, the heaviest source darkest."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    weight = {name: sum(placed.quotas.get(name, 0) for placed in run.plan.phases) for name in run.config.sources}
    colours = {}
    for domain, (dark, middle, light) in FAMILIES.items():
        names = [name for name in run.config.sources if run.config.sources[name].domain == domain and weight[name]]
        shades = LinearSegmentedColormap.from_list(domain, [dark, middle, light])
        positions = np.linspace(0.2, 1, len(names)) if len(names) > 1 else [0.5]
        for name, position in zip(sorted(names, key=lambda name: -weight[name]), positions, strict=True):
            colours[name] = to_hex(shades(position))
    return colours


def _readable_on(colour: str) -> str:
    from matplotlib.colors import to_rgb

    return "white" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.62 else INK


def _noisy(axes: Axes, tokens: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    if len(values) > MANY:
        axes.plot(tokens, values, color=colour, linewidth=0.7, alpha=0.3)
        window = len(values) // 60 | 1
        padded = np.pad(values, window // 2, mode="edge")
        values = np.convolve(padded, np.full(window, 1 / window), mode="valid")
    single = {"marker": "o", "markersize": 4, "clip_on": False} if len(values) == 1 else {}
    axes.plot(tokens, values, color=colour, linewidth=1.8, label=label, **single)


def frame(axes: Axes, run: Run, title: str) -> None:
    """Phase bands with their names, permanent checkpoints as ticks, resumes as dotted lines, tokens along x."""
    end = max(run.tokens, 1) if run.train else run.plan.tokens(run.plan.total_steps)
    across = axes.get_xaxis_transform()
    axes.set_title(title, pad=20)
    axes.set_xlim(0, end)
    axes.margins(y=0.08)
    for placed in run.plan.phases:
        first, last = (min(run.plan.tokens(step), end) for step in (placed.start, placed.end))
        if last > first:
            axes.axvspan(first, last, color=BANDS[placed.index % 2], zorder=-10, linewidth=0)
            axes.axvline(first, color=GREY, linewidth=0.6, zorder=-9)
        if last - first > 0.04 * end:
            axes.text((first + last) / 2, 1.012, placed.phase.name, transform=across, ha="center", va="bottom",
                      color=GREY, fontsize=9)
    kept = [run.plan.tokens(line["step"]) for line in run.checkpoints if run.plan.tokens(line["step"]) <= end]
    if kept:
        axes.plot(kept, np.zeros(len(kept)), "^", color=INK, markersize=_size(len(kept), 4), markeredgewidth=0,
                  transform=across, clip_on=False, zorder=9)
    for step in run.resumed_at:
        axes.axvline(run.plan.tokens(step), color="#cf222e", linewidth=0.9, linestyle=":", zorder=-8)
    axes.xaxis.set_major_formatter(tick)
    axes.set_xlabel("tokens (▲ permanent checkpoint" + (", red dots: resumed)" if run.resumed_at else ")"))
    if not run.train:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=GREY,
                  bbox={"facecolor": "white", "edgecolor": "none"})


def _size(count: int, few: float) -> float:
    """Of markers: `few` points for up to 30 of them, then ever smaller, so that they don't run into one another."""
    return few * min(1.0, 30 / max(count, 1)) ** 0.5


def tick(value: float, _: object) -> str:
    """2,500,000 as 2.5M."""
    text = human(value)
    return f"{text[:-1].rstrip('0').rstrip('.')}{text[-1]}" if value >= 1000 and "." in text else text


def _legend(axes: Axes) -> None:
    """At most two rows, beside the title."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.055), ncol=2, borderaxespad=0, labelspacing=0.3)
