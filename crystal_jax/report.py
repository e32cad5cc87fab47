"""`report`: report.html and PNGs from a run's folder, while it trains, after it stopped, or when it is done.

Invariant: the page says nothing that the run's folder doesn't hold, and a report that is written again replaces the
old one file by file, each whole.
"""

import argparse
import math
import os
import statistics
import time

from etils import epath

from crystal_jax import files
from crystal_jax.compare import write_comparison
from crystal_jax.errors import UserError, counted
from crystal_jax.evaluation.walk import read_results
from crystal_jax.goodput import ACTIVITIES, LOST
from crystal_jax.history import Line, Run, load_run
from crystal_jax.phases import code_share
from crystal_jax.recipe import human
from crystal_jax.report_page import cards, header, note, page, picture, section, table

CAPTIONS = {
    "loss": "Training loss per source (mean between two log lines), held-out loss per domain, and the entropy of the "
            "held-out tokens' own frequencies: what a model without context could reach at best.",
    "evaluations": "What `evaluate --all` measured, one point per permanent checkpoint; dotted and dashed: published "
                   "models in the same tasks (the Crystal paper, table 2).",
    "mixture": "Tokens per source within each phase: what the recipe asks for and what was read.",
    "learning_rate": "Learning rate of the peak group; dashed as planned.",
    "gradient_norm": "Global norm of the gradient before it is clipped.",
    "throughput": "Tokens per second of updates; compilation, evaluation and checkpoints are left out.",
    "time": "The time from the first process's beginning to the log's last line, and what it went into.",
}


def write_report(run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> epath.Path:
    """Writes the report of a run and returns the path of its report.html; `output` is RUN/report unless given.

    Raises:
      UserError: the folder holds no run, or a file of it is damaged.
    """
    from crystal_jax.plots import draw_all
    from crystal_jax.plots_evaluations import draw_evaluations

    run = load_run(run_dir)
    folder = files.as_path(output) if output else run.folder / "report"
    pictures = draw_all(run)
    if (evaluations := draw_evaluations(run, read_results(run_dir))) is not None:
        pictures["evaluations.png"] = evaluations
    text = make_page(run, pictures)
    for name, data in {**pictures, "report.html": text.encode()}.items():
        files.write_bytes(folder / name, data)
    return folder / "report.html"


def make_page(run: Run, pictures: dict[str, bytes]) -> str:
    """The whole page as text, from the run and `plots.draw_all` of it."""
    total = run.plan.total_steps
    figures = {name: picture(pictures[f"{name}.png"], caption) for name, caption in CAPTIONS.items()
               if f"{name}.png" in pictures}
    evaluations = [section("Evaluations", figures["evaluations"])] if "evaluations" in figures else []
    return page(f"{run.config.name}: training report", [
        header(run.config.name, _subtitle(run), run.step / total),
        cards(_facts(run)),
        section("Loss", figures["loss"], _heldout_table(run)),
        *evaluations,
        section("Mixture", figures["mixture"], _mixture_table(run)),
        section("Optimization", figures["learning_rate"], figures["gradient_norm"]),
        section("Throughput", figures["throughput"], _program_table(run)),
        section("Time", figures["time"], _time_table(run)),
        section("Permanent checkpoints", _checkpoint_table(run)),
        section("The run", _phase_table(run), _start_table(run)),
    ])


def _subtitle(run: Run) -> str:
    parts = [counted(len(run.plan.phases), "phase"), counted(len(run.config.sources), "source")]
    if run.starts:
        last = run.starts[-1]
        parts = [f"{last['parameters']:,} parameters", *parts, last["devices"],
                 *(f"{name} {last['versions'][name]}" for name in ("crystal_jax", "jax") if name in last["versions"])]
    state = "finished" if run.step >= run.plan.total_steps else f"{run.step / run.plan.total_steps:.1%} done"
    return ", ".join([*parts, state])


def _facts(run: Run) -> list[tuple[str, str, str, str]]:
    plan, seconds = run.plan, training_seconds(run)
    evaluated = run.evals[-1]["heldout"] if run.evals else {}
    return [
        *((f"held-out loss of {domain}", f"{row['loss']:.3f}", f"unigram entropy {row['unigram_entropy']:.3f}", domain)
          for domain, row in sorted(evaluated.items(), reverse=True)),
        ("tokens", human(run.tokens), f"of {human(plan.tokens(plan.total_steps))}", ""),
        ("updates", f"{run.step:,}", f"of {plan.total_steps:,}", ""),
        ("time spent training", duration(seconds),
         f"{human(run.tokens / seconds)} tokens per second" if seconds else "", ""),
        *_efficiency(run),
        ("skipped updates", f"{skipped_updates(run):,}", "for a loss or gradient that wasn't finite", ""),
        ("resumes", f"{len(run.resumed_at):,}", "by a later process, from a saved step", ""),
        ("permanent checkpoints", f"{len(run.checkpoints):,}", f"of {len(plan.calendar()):,}", ""),
    ]


def _efficiency(run: Run) -> list[tuple[str, str, str, str]]:
    """Goodput, use of the devices' peak and memory, as far as the log says."""
    rows = []
    if run.account:
        rows.append(("goodput", f"{run.account.goodput:.1%}",
                     f"of {duration(run.account.total)} went into updates that count", ""))
    for name, label, form, about in (
            ("mfu", "MFU", "{:.1%}", "6N + 12LDS FLOPs a token against {peak:g} TFLOP/s (bfloat16) a device"),
            ("tflops_per_device", "TFLOP/s a device", "{:.3g}", "at 6N + 12LDS FLOPs a token; no known peak")):
        values = [line[name] for line in run.train if line.get(name)]
        if values:
            peak = run.starts[-1]["utilisation"]["peak_tflops"]
            rows.append((label, form.format(statistics.median(values)), about.format(peak=peak), ""))
            break
    if run.programs:
        memory = run.programs[-1]["memory"]
        limit = f" of {human(memory['device']['limit'], 'B')}" if "limit" in memory["device"] else ""
        peak = memory["device"].get("peak") or memory["program"].get("total", 0)
        rows.append(("memory a device", human(peak, "B"), f"at the first step{limit}", ""))
    return rows


def training_seconds(run: Run) -> float:
    """Seconds that the updates took, from each log line's throughput."""
    before, seconds = 0, 0.0
    for line in run.train:
        if line.get("tokens_per_second"):
            seconds += (line["tokens"] - before) / line["tokens_per_second"]
        before = line["tokens"]
    return seconds


def skipped_updates(run: Run) -> int:
    return sum(line["skipped"] for line in run.train)


def duration(seconds: float) -> str:
    """90 as 1 min 30 s: the two largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    parts: list[str] = []
    for name, size in units:
        if left >= size or (name == "s" and not parts):
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])


def final_evals(run: Run) -> list[tuple[str, Line]]:
    """(phase, its last evaluation) for every phase that was evaluated."""
    return list({line["phase"]: line for line in run.evals}.items())


def _heldout_table(run: Run) -> str:
    rows = []
    for phase, line in final_evals(run):
        for domain, row in sorted(line["heldout"].items(), reverse=True):
            gain = row["unigram_entropy"] - row["loss"]
            bits = f"{row['bits_per_byte']:.4f}" if "bits_per_byte" in row else "-"
            rows.append((phase, f"{line['step']:,}", domain, f"{row['tokens']:,}", f"{row['loss']:.4f}",
                         f"{row['unigram_entropy']:.4f}", f"{gain:+.4f}", f"{row['perplexity']:,.1f}",
                         f"{math.exp(row['unigram_entropy']):,.1f}", bits))
    if not rows:
        return note("No evaluation has been logged yet.")
    columns = ("last evaluation in", "#step", "held out", "#tokens", "#loss (nats)", "#unigram entropy", "#gained",
               "#perplexity", "#of unigrams", "#bits per byte")
    return table(columns, rows)


def _mixture_table(run: Run) -> str:
    rows = []
    for placed, given in zip(run.plan.phases, run.consumption(), strict=True):
        planned, total = sum(placed.quotas.values()), sum(given.values())
        for name, quota in placed.quotas.items():
            recipe, read = quota / planned, given[name] / total if total else math.nan
            rows.append((placed.phase.name, name, run.config.sources[name].domain, f"{recipe:.4%}",
                         f"{read:.4%}" if total else "-", f"{100 * (read - recipe):+.4f}" if total else "-",
                         f"{given[name]:,.0f}"))
    return table(("phase", "source", "domain", "#recipe", "#read", "#difference, points", "#tokens read"), rows)


def _checkpoint_table(run: Run) -> str:
    planned = len(run.plan.calendar())
    rows = [(line["name"], f"{line['step']:,}", f"{run.plan.tokens(line['step']):,}",
             f"{run.plan.learning_rate(line['step'] - 1):.6g}") for line in run.checkpoints]
    summary = note(f"{len(rows)} of {planned} exist.")
    return summary + table(("name", "#step", "#tokens", "#learning rate of its last update"), rows) if rows else summary


def _phase_table(run: Run) -> str:
    rows = []
    for placed in run.plan.phases:
        phase = placed.phase
        tokens = run.plan.tokens(placed.end) - run.plan.tokens(placed.start)
        rates = sorted({rate for rate in phase.fim_rate.values() if rate})
        rows.append((phase.name, f"{placed.steps:,}", f"{tokens:,}", f"{phase.global_batch_size:,}",
                     f"{code_share(phase, run.config.sources):.1%}", ", ".join(f"{rate:.0%}" for rate in rates) or "-",
                     f"{phase.lr.peak:.6g}", phase.optimizer))
    return table(("phase", "#updates", "#tokens", "#batch", "#code", "#FIM", "#peak learning rate", "optimizer"), rows)


def _program_table(run: Run) -> str:
    """Each compilation of the step, and the bytes that it takes on a device."""
    rows = [(f"{line['step']:,}", f"{line['global_batch_size']:,}", f"{line['seconds']:.1f}", line["cache"],
             *(human(line["memory"]["program"].get(name, 0), "B") for name in ("arguments", "temporaries", "total")),
             human(line["memory"]["device"]["peak"], "B") if "peak" in line["memory"]["device"] else "-")
            for line in run.programs]
    columns = ("#first step", "#batch", "#seconds to compile", "compilation cache", "#arguments", "#temporaries",
               "#needed in all", "#peak of the device")
    return table(columns, rows) if rows else ""


def _time_table(run: Run) -> str:
    if run.account is None:
        return note("The log doesn't say where the time went.")
    account, total = run.account, run.account.total
    spent = {name: (about, account.seconds[name]) for name, about in {**ACTIVITIES, **LOST}.items()}
    spent |= {"sum": (f"of {account.processes} process{'es' * (account.processes > 1)}", total),
              "wall time": ("by the times of the log's lines, which follow the calendar's clock", account.wall)}
    return table(("activity", "what it is", "#seconds", "#share"), [
        (name, about, f"{seconds:,.1f}", f"{seconds / total:.2%}" if total else "-")
        for name, (about, seconds) in spent.items()])


def _start_table(run: Run) -> str:
    rows = [(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(line["time"])), f"{line['step']:,}",
             "resumed" if line["resumed"] else "fresh", line["devices"], line.get("code", "-"),
             ", ".join(f"{name} {version}" for name, version in line["versions"].items())) for line in run.starts]
    return table(("process started", "#at step", "state", "devices", "code", "versions"), rows) if rows else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run_dir", help="the folder that train --run_dir=... wrote")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="instead: several runs on the same axes")
    parser.add_argument("--output", help="folder for the report (RUN/report; of a comparison: comparison)")


def main(args: argparse.Namespace) -> None:
    if (args.run_dir is None) == (args.compare is None):
        raise UserError("--run_dir: give either --run_dir=RUN or --compare RUN1 RUN2 ...")
    if args.compare:
        print(write_comparison(args.compare, args.output or "comparison"))
        return
    print(write_report(args.run_dir, args.output))
