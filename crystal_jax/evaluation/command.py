"""`evaluate`: a checkpoint, or every permanent checkpoint of a run, in the tasks that are named."""

import argparse
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crystal_jax import files
from crystal_jax.checkpoint import outline
from crystal_jax.config import Config, from_dict, nearest
from crystal_jax.errors import UserError
from crystal_jax.evaluation import code, infilling, lm_tasks, losses, memorisation
from crystal_jax.evaluation.subject import open_subject
from crystal_jax.evaluation.walk import TABLE, Task, evaluate_all, evaluate_one, shown
from crystal_jax.exports import EVALUATIONS, EXPORTS
from crystal_jax.history import load_run
from crystal_jax.states import FOLDER

SUITES = {"paper": ("arc_challenge", "hellaswag", "mmlu", "truthfulqa", "humaneval", "mbpp")}
"""Crystal's evaluation (its paper, table 2)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or one of its states or exports")
    parser.add_argument("--tasks", required=True, help=f"with commas between: {', '.join(TASKS)}, {', '.join(SUITES)}, "
                        "or the YAML of an lm-eval task")
    parser.add_argument("--all", action="store_true", help="every permanent checkpoint of the run; skips what is done")
    parser.add_argument("--data_root", help="where the run's token stores lie now, if they were moved")
    parser.add_argument("--task_data", help="folder of the named tasks' files: TASK/SPLIT.jsonl")
    parser.add_argument("--limit", type=int, help="documents of each lm-eval task, which alone take it")
    parser.add_argument("--add_bos", action="store_true", help="<s> before each text of an lm-eval task")
    parser.add_argument("--humaneval", help="problems as JSONL, also .gz")
    parser.add_argument("--mbpp", help="problems as JSONL, also .gz")
    parser.add_argument("--samples", type=int, default=20, help="of each problem of code; default 20")
    parser.add_argument("--output", help="folder for samples of code; default: RUN/evaluations of the run that the "
                        "checkpoint lies in, else here")
    parser.add_argument("--run_untrusted_code", action="store_true", help="score samples of code, in the sandbox")
    parser.add_argument("--gaps", type=int, default=100, help="of each kind of infilling; default 100")
    parser.add_argument("--seen_at_step", type=int, help="for memorisation: the update whose sequences are asked for")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--json", action="store_true", help="one JSON object per result")


def _recipe(args: argparse.Namespace) -> Config:
    """The config of the run that made the checkpoint.

    Raises:
      UserError: it says nothing of one.
    """
    if files.exists(files.as_path(args.checkpoint) / "config.json"):
        config = load_run(args.checkpoint).config
    else:
        info = outline(args.checkpoint).info
        if "config" not in info:
            raise UserError(f"--checkpoint={args.checkpoint}: says nothing of the run that made it (an import?), which "
                            "this task needs; give a run's folder or one of its checkpoints")
        config = from_dict(Config, info["config"], f"{args.checkpoint}: config")
    if args.data_root is not None:
        config.data.root = args.data_root
    return config


def _lm_settings(args: argparse.Namespace) -> lm_tasks.Settings:
    return lm_tasks.Settings(args.task_data, args.limit, args.add_bos)


def _code(name: str, args: argparse.Namespace) -> Task:
    problems = getattr(args, name)
    if problems is None:
        raise UserError(f"--tasks={name}: needs --{name}=FILE with its problems")
    return code.code_task(name, code.Settings(problems, args.samples, args.run_untrusted_code, _samples_folder(args)))


def _samples_folder(args: argparse.Namespace) -> str:
    """Of the run, also for one of its states or exports; the working folder for a checkpoint without a run."""
    if args.output:
        return args.output
    place = files.as_path(args.checkpoint)
    if args.all:
        return str(place / EVALUATIONS)
    if not files.is_remote(place):
        place = files.as_path(os.path.abspath(place))
    runs = [place]
    if place.parent.name == FOLDER:
        runs.append(place.parent.parent)
    if place.parent.parent.name == EXPORTS:
        runs.append(place.parent.parent.parent)
    found = next((run for run in runs if files.exists(run / "plan.json")), None)
    return "." if found is None else str(found / EVALUATIONS)


def _memorisation(_: str, args: argparse.Namespace) -> Task:
    if args.seen_at_step is None:
        raise UserError("--tasks=memorisation: needs --seen_at_step=STEP")
    return memorisation.memorisation_task(_recipe(args), args.checkpoint, args.seen_at_step)


TASKS: dict[str, Callable[[str, argparse.Namespace], Task]] = {
    "losses": lambda _, args: losses.losses_task(_recipe(args)),
    "infilling": lambda _, args: infilling.infilling_task(_recipe(args), args.gaps),
    "memorisation": _memorisation,
    "humaneval": _code,
    "mbpp": _code,
    **dict.fromkeys(lm_tasks.NAMED, lambda name, args: lm_tasks.named_task(name, _lm_settings(args))),
}


def choose(args: argparse.Namespace) -> list[Task]:
    """The tasks that were named.

    Raises:
      UserError: an unknown one, with the nearest name; data that isn't there.
    """
    names = [part for name in args.tasks.split(",") for part in SUITES.get(name, (name,)) if part]
    if not names:
        raise UserError("--tasks: names none")
    for name in names:
        if name not in TASKS and not name.endswith((".yaml", ".yml")):
            raise UserError(f"--tasks: no task {name!r}{nearest(name, [*TASKS, *SUITES])}")
        if name not in TASKS and Path(name).stem in TASKS:
            raise UserError(f"--tasks={name}: {Path(name).stem} is the name of a task that is known; rename the file")
    _check_limit(names, args)
    tasks = [TASKS[name](name, args) if name in TASKS else lm_tasks.file_task(name, _lm_settings(args))
             for name in names]
    twice = [task for task, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise UserError(f"--tasks: {twice[0]} is named twice; results have the name of their task")
    return tasks


def _check_limit(names: list[str], args: argparse.Namespace) -> None:
    if args.limit is not None and all(name in TASKS and name not in lm_tasks.NAMED for name in names):
        raise UserError(f"--limit={args.limit}: is for lm-eval tasks, and {', '.join(names)} takes none; leave it out "
                        "(--gaps is for infilling, --samples for code)")


def main(args: argparse.Namespace) -> None:
    for name in ("limit", "samples", "gaps"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name}: {value} must be above 0")
    tasks = choose(args)
    if args.all:
        made = evaluate_all(args.checkpoint, tasks, args.dtype, lambda line: print(line, file=sys.stderr))
        print(f"{made} results made; table: {files.as_path(args.checkpoint) / EVALUATIONS / TABLE}")
        _say_next(args, tasks, glob.escape(_samples_folder(args)), {"name": "*"})
        return
    with open_subject(args.checkpoint, args.dtype) as subject:
        for task in tasks:
            result = evaluate_one(subject, task, str(args.checkpoint))
            print(json.dumps(result) if args.json else f"{task.name}: {shown(result['metrics'])}")
        _say_next(args, tasks, _samples_folder(args), subject.info)


def _say_next(args: argparse.Namespace, tasks: list[Task], folder: str, info: dict[str, Any]) -> None:
    """How samples that weren't run are scored."""
    for task in tasks:
        if task.name in code.BENCHMARKS and not args.run_untrusted_code:
            samples = f"{code.stem(folder, task.name, info)}.jsonl"
            print(f"{task.name}: {code.how_to_score(samples, getattr(args, task.name))}", file=sys.stderr)
