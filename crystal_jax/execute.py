"""`execute`: scores generated code by running it, each sample in a sandbox of its own (sandbox.py).

Invariant: nothing that a model wrote runs in this process, and nothing runs at all before the user has said so and the
machine has what holds it. Results are written as they come, so that an interrupted command goes on where it was.
"""

import argparse
import contextlib
import glob
import gzip
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crystal_jax import files, sandbox
from crystal_jax.config import digest, nearest
from crystal_jax.errors import UserError, reason

RESULTS = ".results.jsonl"
"""The ending of results, which lie beside their samples."""
REQUIRED = ("landlock files", "seccomp")
SANDBOX = Path(sandbox.__file__)
PASS_AT = (1, 10, 100)

Problem = dict[str, Any]


def _humaneval(problem: Problem, completion: str) -> str:
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def _mbpp(problem: Problem, completion: str) -> str:
    setup = problem.get("test_setup_code") or "\n".join(problem.get("test_imports", []))
    return "\n".join([completion, setup, *problem["test_list"], ""])


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Problem, str], str]]] = {
    "humaneval": (("task_id", "prompt", "test", "entry_point"), _humaneval),
    "mbpp": (("task_id", "test_list"), _mbpp),
}
"""Name to the columns that a problem of it has, and the program that tries a completion."""


def read_lines(path: str | Path, flag: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a JSONL file, which may be compressed (.gz).

    Raises:
      UserError: no such file, or a line that is no JSON object, by its number.
    """
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}={path}: {reason(error)}; give a JSONL file") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{flag}={path}: line {number} is no JSON ({error}); mend or remove it") from error
        if not isinstance(value, dict):
            raise UserError(f"{flag}={path}: line {number} is a {type(value).__name__}, not a JSON object")
        found.append((number, value))
    return found


def format_of(problem: Problem, where: str) -> str:
    """The name of a problem's format.

    Raises:
      UserError: its columns fit none.
    """
    for name, (columns, _) in FORMATS.items():
        if all(column in problem for column in columns):
            return name
    wanted = "; ".join(f"{name}: {', '.join(columns)}" for name, (columns, _) in FORMATS.items())
    raise UserError(f"{where}: columns {', '.join(problem)} fit no format ({wanted})")


def read_problems(path: str | Path) -> dict[str, Problem]:
    """Problems by their id, in the file's order.

    Raises:
      UserError: as read_lines; wrong columns; an id that occurs twice.
    """
    problems: dict[str, Problem] = {}
    for number, problem in read_lines(path, "--problems"):
        format_of(problem, f"--problems={path}: line {number}")
        name = str(problem["task_id"])
        if name in problems:
            raise UserError(f"--problems={path}: line {number}: task_id {name} occurs twice")
        problems[name] = problem
    if not problems:
        raise UserError(f"--problems={path}: no problem in it")
    return problems


def read_programs(samples: str | Path, problems: dict[str, Problem]) -> list[tuple[str, str]]:
    """(task_id, program) of each sample.

    Raises:
      UserError: as read_lines; a sample without task_id or completion, or of an unknown problem.
    """
    programs = []
    for number, sample in read_lines(samples, "--samples"):
        where = f"--samples={samples}: line {number}"
        if "task_id" not in sample or not isinstance(sample.get("completion"), str):
            raise UserError(f"{where}: has {', '.join(sample)}; a sample is {{\"task_id\": ..., \"completion\": ...}}")
        name = str(sample["task_id"])
        if name not in problems:
            raise UserError(f"{where}: task_id {name} is not among the problems{nearest(name, problems)}")
        problem = problems[name]
        programs.append((name, FORMATS[format_of(problem, where)][1](problem, sample["completion"])))
    if not programs:
        raise UserError(f"--samples={samples}: no sample in it")
    return programs


def list_samples(values: list[str]) -> list[Path]:
    """The files behind files and globs, as --input of `prepare` takes them; a glob passes over results.

    Raises:
      UserError: nothing is named or found, a folder, or one that isn't local.
    """
    from crystal_jax.data.readers import split_inputs

    found: list[Path] = []
    for value in split_inputs(values):
        if files.is_remote(value):
            raise UserError(f"--samples={value}: programs are run from local files; copy it here")
        if os.path.isdir(value):
            raise UserError(f"--samples={value}: a folder; give a JSONL file or a glob, such as '{value}/*.jsonl'")
        matches = [value] if os.path.exists(value) else sorted(
            path for path in glob.glob(value, recursive=True) if os.path.isfile(path) and not path.endswith(RESULTS))
        if not matches:
            raise UserError(f"--samples={value}: no such file; give an existing file or glob")
        found += map(Path, matches)
    if not found:
        raise UserError("--samples: names no file; give a JSONL file or a glob")
    return list(dict.fromkeys(found))


def check_layers(weak: bool) -> dict[str, bool]:
    """What this machine can hold a program with.

    Raises:
      UserError: a required layer is missing and `weak` doesn't allow that.
    """
    found = sandbox.layers()
    missing = [name for name in REQUIRED if not found[name]]
    if missing and not weak:
        raise UserError(f"this machine lacks {' and '.join(missing)} (Linux 5.13 or newer with Landlock, on x86_64 or "
                        "aarch64); run it elsewhere, or in a virtual machine that may be lost with --weak_sandbox")
    return found


def show_layers(weak: bool) -> dict[str, bool]:
    """As check_layers, and says which they are."""
    active = check_layers(weak)
    print("sandbox: " + ", ".join(f"{name} {'on' if there else 'MISSING'}" for name, there in active.items()),
          file=sys.stderr)
    return active


def run_program(program: str, seconds: float, memory: int, layers: list[str]) -> dict[str, Any]:
    """{"result", "seconds"} of one program in a sandbox: passed, timed out, or failed and why."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    job = json.dumps({"program": program, "seconds": seconds, "memory": memory, "layers": layers})
    with subprocess.Popen([interpreter, "-I", "-S", str(SANDBOX)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={"PATH": ""}) as warden:
        said, trouble = warden.communicate(job.encode())
    if warden.returncode:
        lines = trouble.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"the sandbox itself failed ({warden.returncode}): {lines[-1] if lines else 'no message'}")
    return json.loads(said)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that one of k samples drawn from `samples` passes: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Problems, samples and the mean pass@k over problems, for each k that every problem has samples for."""
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        by_problem[result["task_id"]].append(result["result"] == "passed")
    fewest = min(map(len, by_problem.values()))
    scores = {f"pass@{k}": math.fsum(pass_at_k(len(found), sum(found), k) for found in by_problem.values())
              / len(by_problem) for k in PASS_AT if k <= fewest}
    return {"problems": len(by_problem), "samples": len(results), **scores}


def execute(samples: str | Path, problems: str | Path, output: str | Path, seconds: float = 3.0,
            memory: int = 1 << 30, workers: int | None = None, weak: bool = False) -> dict[str, Any]:
    """Runs every sample, appends each result to `output` (JSONL), returns the summary.

    A sample whose result is there already isn't run again.

    Raises:
      UserError: wrong files, or a machine without a sandbox.
    """
    available = [name for name, there in check_layers(weak).items() if there]
    programs = read_programs(samples, read_problems(problems))
    done = _read_done(Path(output))
    keys = [digest([index, name, program]) for index, (name, program) in enumerate(programs)]
    todo = [index for index, key in enumerate(keys) if key not in done]
    workers = workers or os.cpu_count() or 1
    files.end_last_line(output)
    with open(output, "a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        futures = _bounded(pool, todo, lambda index: run_program(programs[index][1], seconds, memory, available),
                           workers)
        for index, found in tqdm(futures, initial=len(programs) - len(todo), total=len(programs), unit="sample",
                                 disable=None):
            result = {"task_id": programs[index][0], "sample": index, "key": keys[index], **found}
            done[keys[index]] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
    return summarise([done[key] for key in keys])


def _bounded(pool: ThreadPoolExecutor, items: list[int], work: Callable[[int], dict[str, Any]],
             workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(item, result) as they come; only a few are begun ahead, so that Ctrl-C ends soon."""
    left, running = iter(items), dict[Future[dict[str, Any]], int]()
    while True:
        for item in left:
            running[pool.submit(work, item)] = item
            if len(running) >= 2 * workers:
                break
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def _read_done(output: Path) -> dict[str, dict[str, Any]]:
    """Results of an earlier command by key; a line that a kill cut off is left out."""
    done = {}
    if output.exists():
        for line in output.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                result = json.loads(line)
                done[result["key"]] = result
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", required=True, action="append",
                        help='JSONL of {"task_id", "completion"}: files or globs; commas or repeated')
    parser.add_argument("--problems", required=True, help="HumanEval or MBPP: a JSONL file, also .gz")
    parser.add_argument("--output", help="results as JSONL, of a single file; default SAMPLES with the ending "
                        f"{RESULTS}")
    parser.add_argument("--run_untrusted_code", action="store_true", help="yes, run what a model wrote")
    parser.add_argument("--weak_sandbox", action="store_true", help="also where layers of the sandbox are missing")
    parser.add_argument("--seconds", type=float, default=3.0, help="a sample may take; default 3")
    parser.add_argument("--memory_mib", type=int, default=1024, help="a sample may take; default 1024")
    parser.add_argument("--workers", type=int, help="samples at a time; default: one per processor")
    parser.add_argument("--json", action="store_true", help="the summary of each file as one JSON object")


def main(args: argparse.Namespace) -> None:
    if not args.run_untrusted_code:
        raise UserError("runs programs that a model wrote; say --run_untrusted_code if that is meant")
    for name in ("seconds", "memory_mib", "workers"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name}: {value} must be above 0")
    found = list_samples(args.samples)
    if args.output and len(found) > 1:
        raise UserError(f"--output={args.output}: is for one file, and --samples names {len(found)}; leave it out")
    active = show_layers(args.weak_sandbox)
    for number, samples in enumerate(found):
        output = Path(args.output or samples.with_name(samples.name.removesuffix(".jsonl") + RESULTS))
        summary = execute(samples, args.problems, output, args.seconds, args.memory_mib << 20, args.workers,
                          args.weak_sandbox)
        if args.json:
            print(json.dumps({**summary, "sandbox": active, "results": str(output)}), flush=True)
            continue
        print("\n" * (number > 0), end="")
        for name, value in summary.items():
            print(f"{name:10} {value:.4f}" if isinstance(value, float) else f"{name:10} {value}")
        print(f"results    {output}", flush=True)
