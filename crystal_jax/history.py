"""Reading a run's folder back: its config, its plan, and what metrics.jsonl and the manifest say happened.

metrics.jsonl is append-only, so a run that was resumed from an earlier step has written some steps twice. Invariant:
in what `read_metrics` returns, each (kind, step) occurs once, as it was written last, and training steps only go up.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from crystal_jax import files, storage
from crystal_jax.config import Config, digest, from_dict
from crystal_jax.errors import UserError
from crystal_jax.goodput import Account, account
from crystal_jax.phases import Era, Plan, make_plan
from crystal_jax.rules import validate

Line = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """plan.json: what a run's results depend on, now and before each amendment."""

    plan: dict[str, Any]
    amendments: list[dict[str, Any]]
    """{"from_step", "plan", "config"}: a recipe that was left and the first step that it didn't decide, in order."""

    @property
    def hash(self) -> str:
        """Names the plan in every checkpoint; that of an amended run depends on what it followed before."""
        before = [{"from_step": left["from_step"], "plan": left["plan"]} for left in self.amendments]
        return digest({**self.plan, "amendments": before} if before else self.plan)

    @property
    def eras(self) -> list[Era]:
        return [Era(left["from_step"], validate(from_dict(Config, left["config"])), left["plan"]["fingerprints"])
                for left in self.amendments]

    def accepts(self, plan_hash: str, step: int) -> bool:
        """Whether a checkpoint of `plan_hash` at `step` belongs to this run."""
        before = [(Record(left["plan"], self.amendments[:index]).hash, left["from_step"])
                  for index, left in enumerate(self.amendments)]
        return plan_hash == self.hash or any(plan_hash == known and step <= until for known, until in before)


def read_record(run_dir: epath.Path) -> Record:
    """The plan.json of a run.

    Raises:
      UserError: it is missing or damaged.
    """
    path = run_dir / "plan.json"
    known = files.read_json(path)
    if not isinstance(known, dict) or not isinstance(known.get("plan"), dict):
        raise UserError(f"{path}: damaged: no plan in it; put back the run's own file, or start a new run elsewhere")
    return Record(known["plan"], known.get("amendments", []))


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it, finished or not."""

    folder: epath.Path
    config: Config
    plan: Plan
    starts: list[Line]
    """One per process that trained."""
    train: list[Line]
    evals: list[Line]
    programs: list[Line]
    """One per process and global batch size: what the step took to compile, and its memory."""
    account: Account | None
    """Where the time went, that of lines included which were taken back; None if the log doesn't say."""
    checkpoints: list[Line]
    """The permanent ones that exist, in order: name and step, and all of manifest.json's fields once it lists them."""

    @property
    def step(self) -> int:
        """Updates done when the log was last written."""
        return self.train[-1]["step"] if self.train else 0

    @property
    def tokens(self) -> int:
        return self.train[-1]["tokens"] if self.train else 0

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which a process took the run up again."""
        return [line["step"] for line in self.starts if line["resumed"]]

    def series(self, value: Callable[[Line], float | None]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, value) of the training lines that have the value; a null is a NaN."""
        points = [(line["tokens"], value(line)) for line in self.train]
        points = [(tokens, found) for tokens, found in points if found is not None]
        x, y = zip(*points, strict=True) if points else ((), ())
        return np.asarray(x, np.float64), np.asarray(y, np.float64)

    def consumption(self) -> list[dict[str, float]]:
        """Tokens that each source has given to each phase so far; a phase that hasn't begun has none.

        Exact at the steps of permanent checkpoints, so for every phase that is over; linear between two log lines.
        """
        cumulative = {0: dict.fromkeys(self.config.sources, 0)}
        for line in [*self.train, *self.checkpoints]:
            if line["step"] <= self.step and "tokens_per_source" in line:
                cumulative[line["step"]] = line["tokens_per_source"]
        steps = sorted(cumulative)
        given = []
        for placed in self.plan.phases:
            ends = [placed.start, max(placed.start, min(placed.end, self.step))]
            values = {name: np.interp(ends, steps, [cumulative[step].get(name, 0) for step in steps])
                      for name in placed.quotas}
            given.append({name: float(last - first) for name, (first, last) in values.items()})
        return given


def load_run(run_dir: str | os.PathLike[str]) -> Run:
    """The run in a folder.

    Raises:
      UserError: the folder holds no run, or a file of it is damaged.
    """
    folder = files.as_path(run_dir)
    storage.check(folder)
    if not files.exists(folder / "config.json"):
        raise UserError(f"{folder}: no run (there is no config.json); give the folder that train --run_dir=... wrote")
    recorded = _read_json(folder / "config.json")
    config = validate(from_dict(Config, {key: value for key, value in recorded.items() if key != "versions"}))
    written = read_all(folder / "metrics.jsonl")
    lines = latest(written)
    checkpoints = {line["step"]: line for line in lines if line["kind"] == "checkpoint"}
    if files.exists(folder / "manifest.json"):
        checkpoints |= {entry["step"]: entry for entry in _read_json(folder / "manifest.json")["checkpoints"]
                        if entry["exported"]}
    return Run(
        folder, config, make_plan(config, read_record(folder).eras),
        starts=[line for line in lines if line["kind"] == "start"],
        train=[line for line in lines if line["kind"] == "train"],
        evals=[line for line in lines if line["kind"] == "eval"],
        programs=[line for line in lines if line["kind"] == "program"],
        account=account(written),
        checkpoints=[checkpoints[step] for step in sorted(checkpoints)],
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    data = files.read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object; restore it from a copy")
    return data


def read_metrics(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of a metrics.jsonl that count; see `latest`.

    Raises:
      UserError: no such file, or a damaged line that no interruption explains, by its number.
    """
    return latest(read_all(path))


def latest(lines: Sequence[Line]) -> list[Line]:
    """Those that count of all the lines of a metrics.jsonl, in the order in which they were written.

    A "start" or "train" line takes back all that was written before it about later steps, since the run has gone back
    behind them; any line takes back an earlier one of its kind and step. "start" lines, one per process, all stay.
    """
    kept: list[Line] = []
    seen: set[tuple[str, int]] = set()
    first_later_step = math.inf
    for line in reversed(lines):
        kind, step = line["kind"], line["step"]
        if kind != "start" and ((kind, step) in seen or step > first_later_step):
            continue
        seen.add((kind, step))
        if kind in ("start", "train"):
            first_later_step = min(first_later_step, step)
        kept.append(line)
    return kept[::-1]


def read_all(path: str | os.PathLike[str]) -> list[Line]:
    """Every whole line, those included that were taken back.

    A killed process may leave half a line: the file's last, or one just before a "start".

    Raises:
      UserError: as read_metrics.
    """
    path = files.as_path(path)
    try:
        data = files.read_bytes(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; a run that has begun has one") from None
    texts = data.split(b"\n")
    parsed = [_parse_line(text) for text in texts]
    following = "start"
    for number in range(len(texts) - 1, -1, -1):
        line = parsed[number]
        if line is not None:
            following = line["kind"]
        elif texts[number].strip() and following != "start":
            raise UserError(f"{path}: line {number + 1} is damaged: {texts[number][:40].decode(errors='replace')!r}; "
                            "each line must be a JSON object with kind and step")
    return [line for line in parsed if line is not None]


def _parse_line(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    complete = isinstance(line, dict) and isinstance(line.get("kind"), str) and type(line.get("step")) is int
    return line if complete else None
