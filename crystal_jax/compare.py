"""`report --compare`: several runs on the same axes, and their held-out losses at equal tokens as a table."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from crystal_jax import files
from crystal_jax.config import to_dict
from crystal_jax.errors import UserError
from crystal_jax.evaluation.walk import read_results
from crystal_jax.history import Run, load_run
from crystal_jax.recipe import human
from crystal_jax.report_page import header, note, page, picture, section, table
from crystal_jax.run_dir import differences

POINTS = 6
"""Numbers of tokens at which the table compares."""


def write_comparison(run_dirs: Sequence[str], output: files.Location) -> epath.Path:
    """Writes compare.html and compare.png into a folder and returns the path of the page.

    Raises:
      UserError: fewer than two runs, a folder that holds none, runs without an evaluation.
    """
    from crystal_jax.plots_evaluations import draw_comparison

    if len(run_dirs) < 2:
        raise UserError("--compare: name two or more runs")
    runs = [load_run(run_dir) for run_dir in run_dirs]
    for run_dir, run in zip(run_dirs, runs, strict=True):
        if not run.evals:
            raise UserError(f"--compare: {run_dir} has logged no evaluation yet")
    names = _names(run_dirs)
    image = draw_comparison([(name, run, read_results(run.folder)) for name, run in zip(names, runs, strict=True)])
    text = page("Comparison of runs", [
        header("Comparison of runs", ", ".join(names), 1.0),
        section("Over training", picture(image, "The same axes for all runs; one point per evaluation.")),
        section("Held-out loss at equal tokens", _losses(names, runs)),
        section("What differs", _settings(names, runs)),
    ])
    folder = files.as_path(output)
    for name, data in {"compare.png": image, "compare.html": text.encode()}.items():
        files.write_bytes(folder / name, data)
    return folder / "compare.html"


def _names(run_dirs: Sequence[str]) -> list[str]:
    """The last parts of the folders' names, as many as tell them apart."""
    parts = [str(run_dir).rstrip("/").split("/") for run_dir in run_dirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("--compare: the same run is named twice")


def _losses(names: list[str], runs: list[Run]) -> str:
    """Linear between two evaluations; no value where a run has none on both sides."""
    domains = sorted({domain for run in runs for line in run.evals for domain in line["heldout"]}, reverse=True)
    last = min(run.evals[-1]["tokens"] for run in runs)
    first = max(run.evals[0]["tokens"] for run in runs)
    rows = []
    for tokens in np.unique(np.linspace(min(first, last), last, POINTS).astype(np.int64)):
        for domain in domains:
            values = []
            for run in runs:
                found = [(line["tokens"], line["heldout"][domain]["loss"]) for line in run.evals
                         if domain in line["heldout"]]
                inside = found and found[0][0] <= tokens <= found[-1][0]
                x, y = [x for x, _ in found], [y for _, y in found]
                values.append(f"{np.interp(tokens, x, y):.4f}" if inside else "-")
            rows.append((human(int(tokens)), domain, *values))
    return table(("#tokens", "held out", *(f"#{name}" for name in names)), rows)


def _settings(names: list[str], runs: list[Run]) -> str:
    """Each field of the configs in which a run differs from the first."""
    rows = [(name, line) for name, run in zip(names[1:], runs[1:], strict=True)
            for line in differences(to_dict(runs[0].config), to_dict(run.config))]
    return table((f"against {names[0]}", "field"), rows) if rows else note("Nothing in their configs.")
