"""Checkpoints times tasks: which results exist, which are wanted, and the table of them all.

A result is a file of its own, RUN/evaluations/PHASE/step_N/TASK.json, written whole. Invariant: a result that exists
was made with the same settings by the checkpoint that it names, so that a walk that was interrupted, or another
machine's, is gone on with by doing what isn't there.
"""

import contextlib
import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crystal_jax import __version__, files
from crystal_jax.config import digest
from crystal_jax.errors import UserError
from crystal_jax.evaluation.subject import Subject, open_subject
from crystal_jax.exports import EVALUATIONS, EXPORTS, MANIFEST, with_evaluations
from crystal_jax.run_dir import is_locked

TABLE = "table.csv"
PLACE = ("checkpoint", "phase", "step", "tokens")
"""The table's first columns."""


@dataclass(frozen=True)
class Task:
    """A named measurement of a checkpoint."""

    name: str
    run: Callable[[Subject], dict[str, float]]
    """The metrics, by their names."""
    settings: dict[str, Any]
    """All that the metrics depend on, beside the checkpoint."""

    def digest(self, entry: Mapping[str, Any], dtype: str) -> str:
        """Of all that a result depends on; entry: what manifest.json says of the checkpoint."""
        return digest({"settings": self.settings, "dtype": dtype, "weights": entry["fingerprint"]})

    @property
    def file(self) -> str:
        return f"{self.name.replace('/', '_')}.json"


def calendar(run_dir: files.Location) -> list[dict[str, Any]]:
    """The entries of a run's permanent checkpoints that exist, in the order of their steps.

    Raises:
      UserError: no run, or none of them yet.
    """
    path = files.as_path(run_dir) / MANIFEST
    if not files.exists(path):
        raise UserError(f"--all: {path} doesn't exist: the folder is no run with permanent checkpoints; give one")
    entries = [entry for entry in files.read_json(path)["checkpoints"] if entry["exported"]]
    if not entries:
        raise UserError(f"--all: {run_dir} has no permanent checkpoint yet; `recipe show` says when the first is due")
    return entries


def evaluate_one(subject: Subject, task: Task, name: str) -> dict[str, Any]:
    """A task's result for a checkpoint."""
    place = {key: subject.info.get(key) for key in ("phase", "step", "tokens")}
    return {"checkpoint": name, **place, "task": task.name, "metrics": task.run(subject), "settings": task.settings,
            "version": __version__}


def evaluate_all(run_dir: files.Location, tasks: list[Task], dtype: str, say: Callable[[str], None]) -> int:
    """Evaluates each permanent checkpoint of a run in each task, but for the results that are there.

    Returns the number of results that were made.

    Raises:
      UserError: no run; what a task refuses. Results made before stay.
    """
    folder = files.as_path(run_dir) / EVALUATIONS
    made = 0
    entries = calendar(run_dir)
    try:
        for number, entry in enumerate(entries, start=1):
            name, place = entry["name"], f"{entry['name']} ({number}/{len(entries)})"
            wanted = [task for task in tasks if not _is_there(folder / name / task.file, task.digest(entry, dtype))]
            if not wanted:
                say(f"{place}: done already")
                continue
            with open_subject(files.as_path(run_dir) / EXPORTS / name, dtype) as subject:
                for task in wanted:
                    result = {**evaluate_one(subject, task, name), "digest": task.digest(entry, dtype)}
                    files.write_json(folder / name / task.file, result)
                    made += 1
                    say(f"{place}: {task.name}: {shown(result['metrics'])}")
    except BaseException:
        with contextlib.suppress(UserError):  # what went wrong first is what matters
            _sum_up(run_dir)
        raise
    _sum_up(run_dir)
    return made


def _sum_up(run_dir: files.Location) -> None:
    write_table(run_dir)
    _record(run_dir)


def _record(run_dir: files.Location) -> None:
    """Says in manifest.json what has been evaluated; a process that trains there does it with its next checkpoint."""
    path = files.as_path(run_dir) / MANIFEST
    if not is_locked(path.parent):
        manifest = files.read_json(path)
        files.write_json(path, manifest | {"checkpoints": with_evaluations(run_dir, manifest["checkpoints"])})


def _is_there(path: files.Location, expected: str) -> bool:
    return files.exists(path) and files.read_json(path).get("digest") == expected


def shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def read_results(run_dir: files.Location) -> list[dict[str, Any]]:
    """Every result of a run, by step and task."""
    folder = files.as_path(run_dir) / EVALUATIONS
    found = [files.read_json(folder / name) for name in files.list_files(folder) if name.endswith(".json")]
    return sorted(found, key=lambda result: (result["step"], result["task"]))


def write_table(run_dir: files.Location) -> None:
    """RUN/evaluations/table.csv: a row per checkpoint, a column per task and metric."""
    results = read_results(run_dir)
    columns = sorted({f"{result['task']}.{metric}" for result in results for metric in result["metrics"]})
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        row = rows.setdefault(result["checkpoint"], {key: result[key] for key in PLACE})
        row |= {f"{result['task']}.{metric}": value for metric, value in result["metrics"].items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*PLACE, *columns])
    writer.writeheader()
    writer.writerows(rows.values())
    files.write_bytes(files.as_path(run_dir) / EVALUATIONS / TABLE, text.getvalue().encode())
