"""The pictures of docs/mup.md: activations against width, and the loss against the learning rate.

Invariant: width is told by colour or position alone, and both axes are logarithmic, so that a power law is a line.
"""

from collections.abc import Mapping
from typing import Any

from crystal_jax.plots import GREY, INK, STYLE, png

WORST = 1.6
"""Losses up to so many nats above the best are shown: what lies above has diverged."""


def draw_coord_check(result: Any) -> bytes:
    """One PNG of a coord_check.Result: a column per place, the size of its values above and their change below, a line
    per update done.
    """
    import matplotlib.figure
    from matplotlib import colormaps, rc_context

    steps = len(result.changes["stream"][0])
    shades = colormaps["viridis"]
    with rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(12, 4.8), layout="constrained")
        grid = figure.subplots(2, len(result.sizes), sharex=True)
        measured = ((result.sizes, 0, "mean |x|"), (result.changes, 1, "mean |change|"))
        for row, (found, first, title) in zip(grid, measured, strict=True):
            for axes, place in zip(row, result.sizes, strict=True):
                _frame(axes, result.widths, [value for per_step in found[place] for value in per_step])
                for updates in range(first, steps + 1):
                    values = [per_step[updates - first] for per_step in found[place]]
                    colour = shades(0.9 * updates / steps) if updates else GREY
                    axes.plot(result.widths, values, "o-" if updates else "o--", color=colour, markersize=3.5,
                              linewidth=1.6, label=f"after {updates}" if updates else "at first")
            row[0].set_ylabel(title)
        for axes, place in zip(grid[0], result.sizes, strict=True):
            axes.set_title(f"{place}: {result.problem(place)[0] or 'ok'}")
        for axes in grid[1]:
            axes.set_xlabel("width")
        grid[0][0].legend(loc="best", fontsize=7.5)
        figure.suptitle(f"{result.parametrisation}: activations against width, learning rate {result.lr:.3g}, "
                        f"{result.seeds} seeds", fontsize=14, fontweight="bold", x=0.012, ha="left")
        return png(figure)


def _frame(axes: Any, widths: list[int], values: list[float]) -> None:
    """At least a factor of 16 from bottom to top: noise within a few percent should look flat."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    sizes = [value for value in values if 0 < value < float("inf")] or [1.0]
    low, high = min(sizes), max(sizes)
    middle, reach = (low * high) ** 0.5, max(4.0, 1.3 * (high / low) ** 0.5)
    axes.set_ylim(middle / reach, middle * reach)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")


def best(found: Mapping[float, float]) -> float:
    """The rate with the lowest loss, of rate to loss."""
    return min(found, key=lambda rate: found[rate])


def draw_sweep(losses: Mapping[str, Mapping[int, Mapping[float, float]]]) -> bytes:
    """One PNG: a panel per parametrisation, a line per width, its best learning rate marked."""
    import matplotlib.figure
    from matplotlib import colormaps, rc_context

    everything = [loss for widths in losses.values() for found in widths.values() for loss in found.values()]
    lowest = min(everything)
    shades = colormaps["viridis"]
    with rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
        for axes, (name, widths) in zip(figure.subplots(1, len(losses), sharey=True, squeeze=False)[0], losses.items(),
                                        strict=True):
            for number, (width, found) in enumerate(widths.items()):
                rates, colour = sorted(found), shades(0.9 * number / max(1, len(widths) - 1))
                axes.plot(rates, [found[rate] for rate in rates], "o-", color=colour, linewidth=1.8, markersize=4,
                          label=f"width {width}, best at {best(found):g}")
                axes.plot([best(found)], [found[best(found)]], "*", color=colour, markersize=15, markeredgecolor=INK,
                          markeredgewidth=0.8, zorder=5)
            axes.set_xscale("log", base=2)
            rates = sorted({rate for found in widths.values() for rate in found})
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.set(title=name, xlabel="peak learning rate", ylim=(lowest - 0.08, lowest + WORST))
            axes.legend(loc="upper center")
        figure.axes[0].set_ylabel("held-out loss (nats per token)")
        return png(figure)
