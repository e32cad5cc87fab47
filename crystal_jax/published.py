"""Published scores that a run's own can be laid beside (the Crystal paper, table 2).

ARC-C 25-shot, HellaSwag 10, MMLU 5, TruthfulQA 0; HumanEval at temperature 0.2 and MBPP at 0.1, pass@1. In percent.
"""

from dataclasses import dataclass

LANGUAGE = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa")
CODE = ("humaneval", "mbpp")
HEADLINE = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa": "acc",
            "humaneval": "pass@1", "mbpp": "pass@1"}
"""The metric of each task that the table states."""
PROBLEMS = {"humaneval": 164, "mbpp": 500}
"""All that a benchmark of code has (of MBPP its test split): a score on others says something else."""


@dataclass(frozen=True)
class Model:
    name: str
    tokens: float
    """Seen in training."""
    scores: dict[str, float]


PUBLISHED = (
    Model("Crystal, phase 2", 1.27e12, {"arc_challenge": 47.44, "hellaswag": 74.38, "mmlu": 48.42, "truthfulqa": 36.46,
                                        "humaneval": 23.90, "mbpp": 30.99}),
    Model("Crystal, phase 3", 1.4e12, {"arc_challenge": 47.01, "hellaswag": 71.97, "mmlu": 48.78, "truthfulqa": 35.91,
                                       "humaneval": 28.38, "mbpp": 36.38}),
    Model("Llama 2 7B", 2e12, {"arc_challenge": 53.07, "hellaswag": 77.74, "mmlu": 43.80, "truthfulqa": 38.98,
                               "humaneval": 13.05, "mbpp": 20.09}),
    Model("Code Llama 7B", 2.5e12, {"arc_challenge": 39.93, "hellaswag": 60.80, "mmlu": 31.12, "truthfulqa": 37.82,
                                    "humaneval": 33.50, "mbpp": 41.40}),
    Model("StarCoder 15B", 1.03e12, {"humaneval": 33.63, "mbpp": 43.28}),
)


def average(scores: dict[str, float], tasks: tuple[str, ...]) -> float | None:
    """The mean over tasks, None where one is missing: an average over fewer says something else."""
    found = [scores[task] for task in tasks if task in scores]
    return sum(found) / len(found) if len(found) == len(tasks) else None
