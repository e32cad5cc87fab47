"""lm-evaluation-harness tasks on local files: the suite of the Crystal paper, and any task of one's own.

A named task is lm-eval's own definition with its data replaced by TASK_DATA/NAME/SPLIT.jsonl, so that nothing is
fetched. Invariant: what is measured is what lm-eval's own backends measure on the same files (tests/test_lm_eval.py).
"""

import contextlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_jax import files
from crystal_jax.errors import UserError, install
from crystal_jax.evaluation.subject import Subject
from crystal_jax.evaluation.walk import Task


@dataclass(frozen=True)
class Named:
    """A task of lm-eval that is run on local files."""

    definition: str
    """Below lm_eval/tasks; with a *, every file that fits is a part, and {part} is its name in `folder`."""
    folder: str
    """Of the data, below TASK_DATA."""
    splits: tuple[str, ...]
    num_fewshot: int


NAMED = {
    "arc_challenge": Named("arc/arc_challenge.yaml", "arc_challenge", ("train", "validation", "test"), 25),
    "hellaswag": Named("hellaswag/hellaswag.yaml", "hellaswag", ("train", "validation"), 10),
    "mmlu": Named("mmlu/default/mmlu_*.yaml", "mmlu/{part}", ("dev", "test"), 5),
    "truthfulqa": Named("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa", ("validation",), 0),
}
"""Shots as in the Crystal paper, table 2."""
FEWSHOT_SEED = 1234
"""lm-eval's default."""
OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Settings:
    """How lm-eval tasks are run."""

    task_data: str | None = None
    """The folder of the named tasks' files."""
    limit: int | None = None
    """Documents of each task that are asked; None for all."""
    add_bos: bool = False
    """Whether <s> precedes each text."""


def _check_installed(name: str) -> None:
    if not importlib.util.find_spec("lm_eval"):
        raise UserError(f"--tasks={name}: needs lm-eval; {install('data')}")


def named_task(name: str, settings: Settings) -> Task:
    """One of NAMED.

    Raises:
      UserError: its data isn't there, or lm-eval.
    """
    _check_installed(name)
    known = NAMED[name]
    if settings.task_data is None:
        raise UserError(f"--tasks={name}: needs --task_data=DIR with {known.folder}/{known.splits[-1]}.jsonl below it")
    parts = list(_parts(known, Path(settings.task_data)))
    digests = [files.sha256(path) for _, data in parts for path in data.values()]
    return Task(name, lambda subject: _run_named(subject, name, parts, settings),
                {"task": name, "num_fewshot": known.num_fewshot, "limit": settings.limit, "add_bos": settings.add_bos,
                 "data": digests})


def _parts(known: Named, root: Path) -> Iterator[tuple[Path, dict[str, Path]]]:
    """(lm-eval's definition, split to file) of each part of a task."""
    import lm_eval.tasks

    assert lm_eval.tasks.__file__
    stem = known.definition.rpartition("*")[0]
    found = sorted(Path(lm_eval.tasks.__file__).parent.glob(known.definition))
    for definition in found:
        part = str(definition)[len(str(Path(lm_eval.tasks.__file__).parent / stem)) :].removesuffix(".yaml")
        data = {split: root / known.folder.format(part=part) / f"{split}.jsonl" for split in known.splits}
        for path in data.values():
            if not path.is_file():
                raise UserError(f"--task_data: {path} doesn't exist; docs/evaluation.md says how it is made")
        yield definition, data


def _run_named(subject: Subject, name: str, parts: list[tuple[Path, dict[str, Path]]], settings: Settings) -> dict[
        str, float]:
    import yaml

    known = NAMED[name]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, (definition, data) in enumerate(parts):
            path = Path(folder) / f"{number}.yaml"
            path.write_text(yaml.safe_dump({
                "include": str(definition), "task": f"{name}_{number}", "num_fewshot": known.num_fewshot,
                "dataset_path": "json", "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(file) for split, file in data.items()},
                                   "cache_dir": folder}}))
            paths.append(str(path))
        return run(subject, f"--tasks={name}", paths, settings)


def file_task(path: str, settings: Settings) -> Task:
    """A task of one's own: an lm-eval definition, whose data_files count from the working folder.

    Raises:
      UserError: no such file, data_files that don't exist, or no lm-eval.
    """
    _check_installed(path)
    if not Path(path).is_file():
        raise UserError(f"--tasks={path}: no such file; give a task's name or the YAML of an lm-eval task")
    data = _data_files(path)
    for file in data:
        if not Path(file).is_file():
            raise UserError(f"--tasks={path}: data_files: {file} doesn't exist; correct its name")
    return Task(Path(path).stem,
                lambda subject: run(subject, f"--tasks={path}", [str(Path(path).absolute())], settings),
                {"task": files.sha256(path), "data": [files.sha256(file) for file in data], "limit": settings.limit,
                 "add_bos": settings.add_bos})


def _data_files(path: str) -> list[str]:
    """What a definition names itself; what it includes isn't looked at."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Passes over lm-eval's own tags, such as !function."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks={path}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or "task" not in found:
        raise UserError(f"--tasks={path}: no definition of a task; it must have the field `task`")
    named = (found.get("dataset_kwargs") or {}).get("data_files") or []
    named = list(named.values()) if isinstance(named, dict) else [named]
    return [file for value in named for file in ([value] if isinstance(value, str) else value)]


def run(subject: Subject, where: str, definitions: list[str], settings: Settings) -> dict[str, float]:
    """The mean of each metric over the documents of all definitions, their number, and the requests that were cut.

    Raises:
      UserError: files that don't fit a definition; `where` names it.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        from crystal_jax.evaluation.harness import CrystalLM

        model = CrystalLM(subject.scorer, subject.sampler, subject.tokenizer, settings.add_bos, progress=True)
        with _data(where):
            tasks = TaskManager(include_defaults=False).load(list(definitions))
            for task in tasks["tasks"].values():
                task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
                task.set_fewshot_seed(FEWSHOT_SEED)
                _check_choices(task)
            found: Any = evaluate(lm=model, task_dict=tasks, limit=settings.limit, bootstrap_iters=0,
                                  log_samples=False)
    if model.cut:
        print(f"{where}: {model.cut} requests had contexts longer than the model's {model.max_length} tokens; their "
              "beginnings were cut off", file=sys.stderr)
    return _mean(found["results"], found["n-samples"]) | {"contexts_cut": float(model.cut)}


def _check_choices(task: Any) -> None:
    if task.OUTPUT_TYPE == "multiple_choice":
        for number, document in enumerate(task.eval_docs):
            choices = task.doc_to_choice(document)
            if not choices or "" in choices:
                raise UserError(f"document {number}: {'an empty choice' if choices else 'no choices'}; give each "
                                "document two or more, each with some text")


def _mean(results: dict[str, dict[str, Any]], samples: dict[str, dict[str, int]]) -> dict[str, float]:
    sizes = {name: found["effective"] for name, found in samples.items()}
    total, metrics = sum(sizes.values()), dict[str, float]()
    for name, size in sizes.items():
        for key, value in results[name].items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                metrics[metric] = metrics.get(metric, 0.0) + float(value) * size / total
    return {**metrics, "documents": float(total)}


@contextlib.contextmanager
def _data(where: str) -> Iterator[None]:
    """Turns what lm-eval and its loader raise for files that don't fit, a dozen types, into one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: {type(error).__name__}: {said}; the columns of the data must be those that the "
                        "task's definition names") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the network, and without the warnings of libraries, which are no one's mistake here."""
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(OFFLINE)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "lm_eval.tasks")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
