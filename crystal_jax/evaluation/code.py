"""Generated code: samples of HumanEval and MBPP as the standard JSONL, and, where that is asked for, their scores.

Samples are {"task_id", "completion"}, which other harnesses take too. Running them is `execute`'s, in its sandbox.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystal_jax import files
from crystal_jax.errors import UserError
from crystal_jax.evaluation.subject import Subject
from crystal_jax.evaluation.walk import Task
from crystal_jax.execute import RESULTS, Problem, execute, format_of, read_problems, show_layers
from crystal_jax.sampling import Request, key_of, sample_texts

TOP_P = 0.95
MAX_TOKENS = 512


def _humaneval(problem: Problem) -> str:
    return problem["prompt"]


def _mbpp(problem: Problem) -> str:
    """The text and the tests as a docstring, as in the BigCode harness; no examples before it."""
    text = problem.get("text") or problem["prompt"]
    return '"""\n' + text + "\n" + "\n".join(problem["test_list"]) + '\n"""\n'


@dataclass(frozen=True)
class Benchmark:
    prompt: Callable[[Problem], str]
    temperature: float
    """As in the Crystal paper, table 2."""
    stops: tuple[str, ...]
    """What begins something after the function that was asked for (Chen et al. 2021, BigCode)."""


BENCHMARKS = {
    "humaneval": Benchmark(_humaneval, 0.2, ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ")),
    "mbpp": Benchmark(_mbpp, 0.1, ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif ", "\n#")),
}


@dataclass(frozen=True)
class Settings:
    problems: str
    samples: int = 20
    """Of each problem. The paper doesn't state its number; pass@10 needs ten or more."""
    run: bool = False
    """Whether the samples are run, in the sandbox."""
    output: str = "."
    """The folder that samples and their results are kept in."""


def code_task(name: str, settings: Settings) -> Task:
    """HumanEval or MBPP.

    Raises:
      UserError: a wrong file of problems; a machine without a sandbox, where samples are to be run.
    """
    problems = read_problems(settings.problems)
    for problem in problems.values():
        if (found := format_of(problem, f"--problems={settings.problems}")) != name:
            raise UserError(f"--problems={settings.problems}: its columns are those of {found}, not of {name}")
    if settings.run:
        show_layers(weak=False)
    benchmark = BENCHMARKS[name]

    def run(subject: Subject) -> dict[str, float]:
        kept = stem(settings.output, name, subject.info)
        lines = generate(subject, problems, benchmark, settings.samples)
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        files.write_bytes(f"{kept}.jsonl", data)
        print(f"{name}: samples: {kept}.jsonl", file=sys.stderr)
        if not settings.run:
            return {"samples": float(len(lines))}
        with tempfile.TemporaryDirectory() as folder:  # what is kept may lie on gs://
            samples, results = Path(folder) / "samples.jsonl", Path(folder) / "results.jsonl"
            samples.write_bytes(data)
            found = execute(samples, settings.problems, results)
            files.write_bytes(f"{kept}{RESULTS}", results.read_bytes())
        return {key: float(value) for key, value in found.items()}

    return Task(name, run, {"task": name, "problems": files.sha256(settings.problems), "samples": settings.samples,
                            "temperature": benchmark.temperature, "top_p": TOP_P, "run": settings.run})


def stem(folder: str, name: str, info: dict[str, Any]) -> files.Location:
    """The path without its ending of what is kept of a benchmark for a checkpoint, by what it says of itself."""
    return files.as_path(folder) / f"{name}-{info.get('name', 'samples').replace('/', '-')}"


def how_to_score(samples: str, problems: str) -> str:
    """The command to give next; samples: a file or a glob."""
    given = " ".join(shlex.quote(word) for word in (f"--samples={samples}", f"--problems={problems}"))
    copy = "copy them here, and with their names: " if files.is_remote(samples) else ""
    return f"to score them: {copy}crystal-jax execute {given} --run_untrusted_code"


def generate(subject: Subject, problems: dict[str, Problem], benchmark: Benchmark, samples: int) -> list[
        dict[str, Any]]:
    """{"task_id", "completion"} of each sample, by problem.

    Raises:
      UserError: a problem that leaves the model's context no room.
    """
    tokenizer, room = subject.tokenizer, subject.model.config.max_length
    asked, names = [], []
    for name, problem in problems.items():
        prompt = (tokenizer.bos_id, *tokenizer.encode_document(benchmark.prompt(problem)))
        if len(prompt) >= room:
            raise UserError(f"problem {name}: {len(prompt)} tokens leave no room in the model's context of {room}; "
                            "evaluate a model with a longer one, or leave the problem out of the file")
        for sample in range(samples):
            names.append(problem["task_id"])
            asked.append(Request(prompt, min(MAX_TOKENS, room - len(prompt)), benchmark.temperature, TOP_P,
                                 key_of("code", name), sample))

    texts = sample_texts(subject.sampler, asked, [benchmark.stops] * len(asked), tokenizer.decode_fragment,
                         tokenizer.decode_fragment, progress=True)
    return [{"task_id": name, "completion": text} for name, text in zip(names, texts, strict=True)]
