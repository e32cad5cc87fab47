"""`inspect`: what a step of a run saw, which steps saw a document, and what each source has given.

A run writes none of this down: it is computed again from recipe, plan and stores. Its invariant: no answer that isn't
the run's. Stores must have the fingerprints in plan.json, and a batch whose hash is in the log must have that hash.
Steps are counted as the log does, from 1; slots, epochs, rows and tokens from 0, and spans exclude their end.
"""

import argparse
import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crystal_jax import files
from crystal_jax.config import Config, Phase
from crystal_jax.data.pipeline import Batch, Batches, Stores, batch_hash
from crystal_jax.data.provenance import Occurrence, Provenance, Sequence
from crystal_jax.errors import UserError
from crystal_jax.history import Line, load_run, read_record
from crystal_jax.inspect_page import render_counts, render_document, render_step
from crystal_jax.phases import Segment

EXCERPT = 90
"""Characters of each document that are shown where --text doesn't say how many."""


@dataclass(frozen=True)
class Subject:
    """A run, or a config that no run has followed yet."""

    name: str
    stores: Stores
    batches: Batches
    log: list[Line] | None
    """The training lines of its metrics.jsonl; None without a run."""

    @cached_property
    def provenance(self) -> Provenance:
        return Provenance(self.batches, self.stores)

    @property
    def reached(self) -> int | None:
        """The last step in the log."""
        return None if self.log is None else self.log[-1]["step"] if self.log else 0

    def check_step(self, step: int) -> None:
        if not 1 <= step <= len(self.batches):
            raise UserError(f"--step={step}: {self.name} has the steps 1 to {len(self.batches)}; step N is its N-th "
                            "update, as the log counts")

    def segment(self, step: int) -> Segment:
        return next(segment for segment in self.batches.plan.segments if segment.start < step <= segment.end)


def open_run(run_dir: str | Path) -> Subject:
    """The run in a folder, with the stores that it has read.

    Raises:
      UserError: no run there; a store or tokenizer that is missing, or isn't the one that the run has read.
    """
    run, record = load_run(run_dir), read_record(files.as_path(run_dir))
    stores = Stores(run.config, record.eras)
    read, now = record.plan["fingerprints"], stores.fingerprints()
    if changed := [name for name in {**read, **now} if read.get(name) != now.get(name)]:
        kind, _, source = changed[0].partition(".")
        path = stores.by_source[source].path if source in stores.by_source else stores.tokenizer.path
        raise UserError(f"{run.folder}: has read {kind} {read.get(changed[0])}, but {path} is {now.get(changed[0])}; "
                        "the answer would be wrong: put back what the run has read")
    return Subject(str(run.folder), stores, Batches(run.config, stores, eras=record.eras), run.train)


def open_config(config: Config) -> Subject:
    """A run that nobody has begun.

    Raises:
      UserError: data that don't fit the config.
    """
    stores = Stores(config)
    return Subject(config.name, stores, Batches(config, stores), None)


def describe_step(subject: Subject, step: int, slot: int | None = None, chars: int | None = EXCERPT) -> dict[str, Any]:
    """What the update `step` (from 1) saw, as plain JSON data; of one sequence, or of all of its batch.

    chars: characters of each document's text, None for all.

    Raises:
      UserError: a step or slot that the run doesn't have; a batch that isn't the one in the log.
    """
    subject.check_step(step)
    segment = subject.segment(step)
    size = segment.phase.global_batch_size
    if slot is not None and not 0 <= slot < size:
        raise UserError(f"--slot={slot}: step {step} has the slots 0 to {size - 1}")
    batch = subject.batches[step - 1]
    plan, phase_step = subject.batches.plan, subject.batches.plan.done(step)[1]
    logged = _check_hash(subject, step, batch)
    line = next((line for line in subject.log or [] if line["step"] >= step), None)
    sequences = subject.provenance.sequences(step - 1, batch, list(range(size)) if slot is None else [slot], chars)
    return {
        "run": subject.name, "step": step, "steps": len(subject.batches), "reached": subject.reached,
        "phase": segment.phase.name, "phase_step": phase_step, "lr": plan.learning_rate(step - 1),
        "global_batch_size": size, "sequence_length": plan.sequence_length,
        "batch_hash": batch_hash(batch), "batch_hash_in_log": logged,
        "log": line and {key: line[key] for key in ("step", "loss", "loss_per_source", "grad_norm") if key in line},
        "sources": _sources(sorted(subject.batches.config.sources), segment.phase, batch,
                            sequences if slot is None else None),
        "text_chars": chars, "sequences": [dataclasses.asdict(sequence) for sequence in sequences],
    }


def _check_hash(subject: Subject, step: int, batch: Batch) -> int | None:
    """The step nearest to `step` whose hash is in the log and is that of its batch; None where there is none.

    Raises:
      UserError: it is that of another batch.
    """
    era = subject.segment(step).era
    lines = [line for line in subject.log or [] if "batch_hash" in line and subject.segment(line["step"]).era == era]
    if not lines:
        return None
    line = min(lines, key=lambda line: abs(line["step"] - step))
    found = batch_hash(batch if line["step"] == step else subject.batches[line["step"] - 1])
    if found != line["batch_hash"]:
        raise UserError(f"{subject.name}: the log has batch {line['batch_hash']} at step {line['step']}, but plan and "
                        f"stores give {found}; the answer would be wrong: `verify` the stores, and use the versions "
                        "in the run's config.json")
    return line["step"]


def _sources(names: list[str], phase: Phase, batch: Batch, sequences: list[Sequence] | None) -> list[dict[str, Any]]:
    """Of each source of a phase, what a batch holds; only how much of it where the sequences aren't known.

    names: those that batch["source"] points into.
    """
    found = []
    for name in phase.mix:
        count = int(np.sum(batch["source"] == names.index(name)))
        entry = {"name": name, "sequences": count, "share": count / phase.global_batch_size,
                 "recipe_share": phase.mix[name]}
        if sequences is not None:
            own = [sequence for sequence in sequences if sequence.source == name]
            fim = Counter(one.order for sequence in own for part in sequence.parts for one in part.fim)
            entry |= {"documents": sum(len(sequence.parts) for sequence in own), "fim": dict(sorted(fim.items())),
                      "epochs": sorted({sequence.epoch for sequence in own})}
        found.append(entry)
    return found


def describe_document(subject: Subject, identity: str, step: int | None = None) -> dict[str, Any]:
    """Where a document lies and each sequence of the run that saw some of it, as plain JSON data.

    step: up to which (from 1) the visits count as done; the last one in the log, or without a run the last of all.

    Raises:
      UserError: no store has the document, or the run no such step.
    """
    if step is not None:
        subject.check_step(step)
    done = step if step is not None else subject.reached if subject.reached is not None else len(subject.batches)
    found = subject.provenance.occurrences(identity)
    last = "the last" if subject.log is None else "the log's last"
    return {"run": subject.name, "document": identity, "steps": len(subject.batches), "until": done,
            "until_is": last if step is None else "asked for",
            "found": [_describe_occurrence(subject, occurrence, done) for occurrence in found]}


def _describe_occurrence(subject: Subject, found: Occurrence, done: int) -> dict[str, Any]:
    visits, seen = [], np.zeros(found.in_shard[1] - found.in_shard[0], bool)
    for visit in subject.provenance.visits(found):
        seen[slice(*visit.part.in_document)] |= visit.step < done
        part = {key: value for key, value in dataclasses.asdict(visit.part).items()
                if key in ("in_document", "in_sequence", "predicted", "pushed_out", "fim")}
        visits.append({"step": visit.step + 1, "phase": subject.segment(visit.step + 1).phase.name, "slot": visit.slot,
                       "source": visit.source, "epoch": visit.epoch, "done": visit.step < done, **part})
    return {"store": str(found.store.path), "sources": list(found.sources), "split": found.split, "shard": found.shard,
            "file": found.file, "in_shard": list(found.in_shard), "length": len(seen),
            "in_a_subset": subject.provenance.is_read(found), "visits": visits,
            "tokens_seen": int(seen.sum())}


def describe_counts(subject: Subject, step: int | None = None) -> dict[str, Any]:
    """What each source has given by `step`, phase by phase, as plain JSON data.

    step: the last one in the log, or without a run the last of all, unless given.

    Raises:
      UserError: the run has no such step.
    """
    if step is not None:
        subject.check_step(step)
    done = step if step is not None else subject.reached if subject.reached is not None else len(subject.batches)
    plan, length = subject.batches.plan, subject.batches.plan.sequence_length
    phases = []
    for segment, readings in zip(plan.segments, subject.batches.readings, strict=True):
        if segment.start >= done:
            break
        given = segment.given(done)
        total, sources = sum(given.values()), []
        for name, share in segment.phase.mix.items():
            reading = readings[name]
            rows = reading.rows.num_rows if reading.rows else None
            sources.append({"name": name, "sequences": given[name], "tokens": given[name] * length,
                            "share": given[name] / total, "recipe_share": share,
                            "off": given[name] - share * total, "available": rows,
                            "passed_over": segment.passed.get(name, 0),
                            "epochs": (reading.cursor + given[name]) / rows if rows else None})
        phases.append({"name": segment.phase.name, "first_step": segment.start + 1, "last_step": min(done, segment.end),
                       "end_step": segment.end, "sources": sources})
    counts = subject.batches.counts(done)
    total = max(1, sum(counts.values()))
    return {"run": subject.name, "step": done, "steps": len(subject.batches), "tokens": plan.tokens(done),
            "phases": phases,
            "sources": [{"name": name, "sequences": count, "tokens": count * length, "share": count / total}
                        for name, count in counts.items()]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run_dir", help="the run's folder")
    subject.add_argument("--config", help="configs/X.py[:VARIANT], before there is a run; --config.a.b=VALUE overrides "
                         "a field")
    parser.add_argument("--step", type=int, help="the update to show, as the log counts; with --document and --counts: "
                        "up to which (default: the log's last, or the recipe's)")
    parser.add_argument("--slot", type=int, help="of that step only this sequence, with all its text")
    parser.add_argument("--text", type=int, metavar="CHARS", help=f"characters of each document (default {EXCERPT})")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--document", metavar="ID", help="each step that saw this document, and which part of it")
    question.add_argument("--counts", action="store_true", help="what each source has given, next to its share")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    about_step = args.document is None and not args.counts
    if about_step and args.step is None:
        raise UserError("give --step=N, --document=ID or --counts")
    for name in ("slot", "text"):
        value = getattr(args, name)
        if value is not None and (not about_step or value < 0):
            raise UserError(f"--{name}={value}: 0 or more, and together with --step=N alone")
    subject = open_run(args.run_dir) if args.run_dir else open_config(args.config)
    if args.document is not None:
        result = describe_document(subject, args.document, args.step)
        text = render_document(result)
    elif args.counts:
        result = describe_counts(subject, args.step)
        text = render_counts(result)
    else:
        chars = args.text if args.text is not None else EXCERPT if args.slot is None else None
        result = describe_step(subject, args.step, args.slot, chars)
        text = render_step(result)
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else text)
