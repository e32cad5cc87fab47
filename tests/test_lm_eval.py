"""lm-eval tasks on local files: the same numbers as lm-eval's own backend for transformers on the exported model.

The tasks of published tables are run with files of a few made-up documents that have the columns of the hub's datasets.
"""

import json
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import world
import yaml
from conftest import OUTER_ENVIRONMENT, ROOT

from crystal_jax import cli
from crystal_jax.checkpoint import save_weights
from crystal_jax.config import ModelConfig
from crystal_jax.convert.calendar import export_checkpoint
from crystal_jax.convert.made import Options
from crystal_jax.evaluation import lm_tasks
from crystal_jax.evaluation.subject import Subject, open_subject
from crystal_jax.model import Crystal
from crystal_jax.published import HEADLINE
from crystal_jax.sampling import Sampler
from crystal_jax.scoring import Query, Scorer

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -r requirements/data.txt")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of others' deprecations
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from crystal_jax.evaluation.harness import CrystalLM

MODEL = ModelConfig(vocab_size=448, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=48, max_length=256, rotary_dim=4,
                    mup_base_width=16, embed_scale=1.0)
EXPORTED = "exported"
TASKS = ("choice", "rolling", "text")


@pytest.fixture(scope="module")
def checkpoint(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that make up their minds, so that each text goes its own way; beside it EXPORTED."""
    folder = tmp_path_factory.mktemp("weights") / "step_7"
    params = oracle.random_params(Crystal(MODEL).specs(), 3, 0.4)
    params["embed"][3:259] *= 0.01  # hardly single bytes, of which each decoder makes another text
    save_weights(folder, params, MODEL, world / "tokenizer.json", {"name": "made/step_7", "step": 7})
    export_checkpoint(str(folder), "crystal", folder.with_name(EXPORTED), Options())
    return folder


@pytest.fixture(scope="module")
def subject(checkpoint: Path) -> Iterator[Subject]:
    with open_subject(checkpoint) as opened:
        yield opened


def sentence(rng: random.Random, least: int = 2, most: int = 9) -> str:
    return " ".join(rng.choices(world.WORDS, k=rng.randint(least, most)))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_task(path: Path, data: dict[str, str], **fields: Any) -> Path:
    metrics = [{"metric": name} for name in fields.pop("metrics")]
    path.write_text(yaml.safe_dump({"task": path.stem, "dataset_path": "json", "dataset_kwargs": {"data_files": data},
                                    "test_split": "test", "metric_list": metrics, **fields}))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, subject: Subject) -> dict[str, Path]:
    """A task of each kind of request; some contexts and texts are longer than the model's context."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(1)
    questions = [{"question": sentence(rng), "label": rng.randrange(3), "choices": [sentence(rng, 1) for _ in range(3)]}
                 for _ in range(24)]
    questions[0]["question"] = sentence(rng, 300, 300)
    test, shots = lines(folder / "test.jsonl", questions[:16]), lines(folder / "shots.jsonl", questions[16:])
    made = {"choice": write_task(
        folder / "choice.yaml", {"test": test, "train": shots}, output_type="multiple_choice", num_fewshot=2,
        fewshot_split="train", doc_to_text="{{question}} =", doc_to_choice="choices", doc_to_target="label",
        metrics=("acc", "acc_norm"))}
    texts = [{"text": sentence(rng, 1, 40)} for _ in range(6)] + [{"text": sentence(rng, 400, 400)}]
    made["rolling"] = write_task(
        folder / "rolling.yaml", {"test": lines(folder / "texts.jsonl", texts)}, doc_to_text="", metrics=(
            "word_perplexity", "bits_per_byte"), output_type="loglikelihood_rolling", doc_to_target="text")
    prompts = [sentence(rng) for _ in range(11)] + [sentence(rng, 200, 200)]
    kinds = {"until": ["the", "of"], "max_gen_toks": 20, "do_sample": False}
    said = ours(subject).generate_until(requests("generate_until", [(prompt, kinds) for prompt in prompts]))
    assert len({*said}) > 8 and any(len(text) < 20 for text in said), "texts that say little would prove little"
    wanted = [{"prompt": prompt, "answer": text.strip() if number % 2 else "no"}
              for number, (prompt, text) in enumerate(zip(prompts, said, strict=True))]
    made["text"] = write_task(
        folder / "text.yaml", {"test": lines(folder / "prompts.jsonl", wanted)}, output_type="generate_until",
        doc_to_text="prompt", doc_to_target="answer", generation_kwargs=kinds, metrics=("exact_match",),
        filter_list=[{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}])
    return made


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, 0, ("task", number, 1)) for number, given in enumerate(arguments)]


def ours(subject: Subject) -> CrystalLM:
    return CrystalLM(subject.scorer, subject.sampler, subject.tokenizer)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """lm-eval's own model, of the exported folder."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        import transformers
        from lm_eval.models.huggingface import HFLM

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads, path = torch.get_num_threads(), list(sys.path)
        torch.set_num_threads(1)
        folder = checkpoint.with_name(EXPORTED)
        yield HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, trust_remote_code=True)
        torch.set_num_threads(threads)
        sys.path[:] = path


def evaluated(model: Any, path: Path) -> tuple[dict[str, float], list[Any]]:
    """(metrics, what the model answered) of a task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = simple_evaluate(model, tasks=[str(path)], task_manager=TaskManager(include_defaults=False),
                                     bootstrap_iters=0)
    samples = sorted(found["samples"][path.stem], key=lambda sample: sample["doc_id"])
    metrics = {name.partition(",")[0]: value for name, value in found["results"][path.stem].items()
               if "," in name and "_stderr" not in name}
    return metrics, [sample["resps"] for sample in samples]


@pytest.mark.torch
@pytest.mark.parametrize("name", TASKS)
def test_numbers_are_those_of_lm_evals_own_backend(name: str, tasks: dict[str, Path], subject: Subject,
                                                   theirs: Any) -> None:
    metrics, answers = evaluated(ours(subject), tasks[name])
    expected_metrics, expected = evaluated(theirs, tasks[name])
    assert metrics == pytest.approx(expected_metrics, rel=1e-4) and metrics
    assert lm_tasks.file_task(str(tasks[name]), lm_tasks.Settings()).run(subject).items() >= metrics.items()
    if name == "text":
        # transformers drops a space before the first word; what follows is the same.
        assert [[[text.lstrip() for text in texts] for texts in answer] for answer in answers] == [
            [[text.lstrip() for text in texts] for texts in answer] for answer in expected]
        assert 0 < metrics["exact_match"] < 1
        return
    numbers, greedy = _flat(answers)
    expected_numbers, expected_greedy = _flat(expected)
    # Theirs are sums in float32, whose steps are larger than 1e-4 beyond 1,000.
    np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-7, atol=1e-4)
    assert greedy == expected_greedy


def _flat(answers: list[Any]) -> tuple[list[float], list[bool]]:
    found = [response for answer in answers for responses in answer for response in responses]
    pairs = [(value[0], bool(value[1])) if isinstance(value, tuple | list) else (value, False) for value in found]
    return [float(number) for number, _ in pairs], [best for _, best in pairs]


def scrambled(asked: list[Instance], answers: list[Any], other: CrystalLM, method: str) -> list[tuple[Any, Any]]:
    """(answer, what the other model answers to the same when it is asked in another order)."""
    order = np.random.default_rng(2).permutation(len(asked)).tolist()
    return list(zip([answers[i] for i in order], getattr(other, method)([asked[i] for i in order]), strict=True))


def test_answers_depend_on_neither_order_nor_batch(subject: Subject) -> None:
    rng = random.Random(3)
    other = CrystalLM(Scorer(subject.model, subject.params, 2048),
                      Sampler(subject.model, subject.params, subject.tokenizer.eos_id, 16), subject.tokenizer)
    pairs = requests("loglikelihood", [(sentence(rng, 0, 30), " " + sentence(rng)) for _ in range(40)])
    for (logprob, greedy), (again, also) in scrambled(pairs, ours(subject).loglikelihood(pairs), other,
                                                      "loglikelihood"):
        assert again == pytest.approx(logprob, abs=1e-4) and also == greedy
    texts = requests("loglikelihood_rolling", [(sentence(rng, 1, 90),) for _ in range(10)])
    for total, again in scrambled(texts, ours(subject).loglikelihood_rolling(texts), other, "loglikelihood_rolling"):
        assert again == pytest.approx(total, abs=1e-4)
    kinds = {"until": ["of"], "max_gen_toks": 24, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    prompts = requests("generate_until", [(sentence(rng, 1, 30), kinds) for _ in range(13)])
    answers = ours(subject).generate_until(prompts)
    for text, again in scrambled(prompts, answers, other, "generate_until"):
        assert text == again
    assert len({*answers}) == 13


def test_a_rolling_text_is_the_sum_over_its_windows(subject: Subject) -> None:
    """Directly: each window of the whole context behind the last token before it."""
    text, model = sentence(random.Random(4), 300, 300), ours(subject)
    ids = [model.prefix_token_id, *model.tok_encode(text)]
    length = MODEL.max_length
    starts = range(0, len(ids) - 1, length)
    assert len(starts) > 2
    last = len(ids) - 1 - starts[-1]
    queries = [Query((ids[start],), tuple(ids[start + 1 : start + 1 + length])) for start in starts[:-1]]
    tail = ids[-length - 1 :]
    queries.append(Query(tuple(tail[: len(tail) - last]), tuple(tail[len(tail) - last :])))
    expected = sum(score.logprob for score in subject.scorer(queries))
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert found == pytest.approx([expected], abs=1e-3)


def test_samples_of_one_document_differ_and_stay(subject: Subject) -> None:
    kinds = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0}
    asked = [Instance("generate_until", {}, ("the", kinds), index, ("task", 5, 4)) for index in range(4)]
    found = ours(subject).generate_until(asked)
    assert len({*found}) == 4 and ours(subject).generate_until(asked[:2]) == found[:2]
    other = [Instance("generate_until", {}, ("the", kinds), 0, ("task", 6, 4))]
    assert ours(subject).generate_until(other)[0] not in found


NO_TORCH = """
import sys
from crystal_jax import cli
code = cli.main(sys.argv[1:])
assert not {"torch", "transformers", "tensorflow"} & set(sys.modules), "imported"
sys.exit(code)
"""


def test_by_the_command_without_torch(checkpoint: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    names = ",".join(str(tasks[name]) for name in TASKS)
    result = subprocess.run(
        [sys.executable, "-c", NO_TORCH, "evaluate", f"--checkpoint={checkpoint}", f"--tasks={names}", "--json"],
        cwd=tmp_path, env={**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {line["task"]: line["metrics"] for line in map(json.loads, result.stdout.splitlines())}
    assert [*found] == list(TASKS)
    assert found["choice"]["documents"] == 16 and found["choice"]["contexts_cut"] == 3
    assert found["text"]["contexts_cut"] == 1 and found["text"]["exact_match"] == 0.5
    assert (f"--tasks={tasks['choice']}: 3 requests had contexts longer than the model's 256 tokens; their beginnings "
            "were cut off\n") in result.stderr


# The tasks of the published tables


def columns(name: str, rng: random.Random, number: int) -> dict[str, Any]:
    """A document as the hub's dataset of a task has it."""
    options = [sentence(rng) for _ in range(4)]
    return {
        "arc_challenge": {"id": f"made_{number}", "question": sentence(rng), "answerKey": rng.choice("ABCD"),
                          "choices": {"text": options, "label": list("ABCD")}},
        "hellaswag": {"ind": number, "activity_label": "Growing", "ctx_a": sentence(rng), "ctx_b": sentence(rng),
                      "ctx": "", "endings": options, "source_id": "", "split": "val", "split_type": "indomain",
                      "label": str(rng.randrange(4))},
        "mmlu": {"question": sentence(rng), "subject": "made", "choices": options, "answer": rng.randrange(4)},
        "truthfulqa": {"question": sentence(rng), "mc1_targets": {"choices": options, "labels": [1, 0, 0, 0]},
                       "mc2_targets": {"choices": options, "labels": [1, 1, 0, 0]}},
    }[name]


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each named task's files, with one document more in each part of MMLU than in the one before, up to 3."""
    import lm_eval.tasks

    folder, rng = tmp_path_factory.mktemp("task_data"), random.Random(5)
    below = Path(str(lm_eval.tasks.__file__)).parent / "mmlu" / "default"
    parts = sorted(path.stem.removeprefix("mmlu_") for path in below.glob("mmlu_*.yaml"))
    assert len(parts) == 57
    for name, known in lm_tasks.NAMED.items():
        for number, part in enumerate(parts if name == "mmlu" else [""]):
            for split in known.splits:
                count = 1 + number % 3 if name == "mmlu" and split == "test" else known.num_fewshot + 3
                lines(folder / known.folder.format(part=part) / f"{split}.jsonl",
                      [columns(name, rng, row) for row in range(count)])
    return folder


@pytest.mark.parametrize("name", lm_tasks.NAMED)
def test_a_named_task(name: str, subject: Subject, task_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = lm_tasks.named_task(name, lm_tasks.Settings(str(task_data)))
    metrics = task.run(subject)
    known = lm_tasks.NAMED[name]
    assert metrics["documents"] == (sum(1 + n % 3 for n in range(57)) if name == "mmlu" else known.num_fewshot + 3)
    assert 0 < metrics[HEADLINE[name]] < 1
    assert (metrics["contexts_cut"] > 0) == ("were cut off" in capsys.readouterr().err)
    assert task.settings["num_fewshot"] == {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa": 0}[name]
    limited = lm_tasks.named_task(name, lm_tasks.Settings(str(task_data), limit=1))
    assert limited.settings != task.settings


@pytest.mark.torch
@pytest.mark.parametrize("name", lm_tasks.NAMED)
def test_a_named_task_has_the_numbers_of_lm_evals_own_backend(
        name: str, subject: Subject, theirs: Any, task_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = lm_tasks.named_task(name, lm_tasks.Settings(str(task_data)))
    metrics = task.run(subject)
    monkeypatch.setattr(theirs, "cut", metrics["contexts_cut"], raising=False)  # it doesn't count them
    monkeypatch.setattr("crystal_jax.evaluation.harness.CrystalLM", lambda *_, **__: theirs)
    assert task.run(subject) == pytest.approx(metrics, rel=1e-4)


# What a user gets wrong


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    return next(line for line in said.err.splitlines() if line.startswith("crystal-jax evaluate: "))


MISTAKES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "wrong columns": ([{"query": "a", "choices": ["b", "c"], "label": 0}], "'question' is undefined"),
    "no choices": ([{"question": "a", "choices": ["b", "c"], "label": 0},
                    {"question": "a", "choices": [], "label": 0}], "document 1: no choices; give each"),
    "an empty choice": ([{"question": "a", "choices": ["b", "c"], "label": 0},
                         {"question": "a", "choices": ["b", ""], "label": 0}],
                        "document 1: an empty choice; give each document two or more, each with some text"),
    "a choice that is too long": ([{"question": "a", "choices": ["b", "c " * 300], "label": 0}],
                                  "doesn't fit the model's context of 256; shorten it"),
    "no documents": ([], ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_data_that_does_not_fit(name: str, checkpoint: Path, tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    rows, expected = MISTAKES[name]
    task = write_task(tmp_path / "choice.yaml", {"test": lines(tmp_path / "test.jsonl", rows)},
                      output_type="multiple_choice", doc_to_text="{{question}} =", doc_to_choice="choices",
                      doc_to_target="label", metrics=("acc",))
    said = complaint(capsys, f"--checkpoint={checkpoint}", f"--tasks={task}")
    assert f"--tasks={task}: " in said and expected in said


def test_names_and_files_that_are_not_there(checkpoint: Path, tmp_path: Path, task_data: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    at = f"--checkpoint={checkpoint}"
    assert "no task 'helaswag'; did you mean hellaswag?" in complaint(capsys, at, "--tasks=helaswag")
    assert "needs --task_data=DIR with mmlu/{part}/test.jsonl below it" in complaint(capsys, at, "--tasks=mmlu")
    assert f"{tmp_path}/hellaswag/train.jsonl doesn't exist; docs/evaluation.md says how" in complaint(
        capsys, at, "--tasks=hellaswag", f"--task_data={tmp_path}")
    assert "no such file" in complaint(capsys, at, f"--tasks={tmp_path}/mine.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    assert "no YAML" in complaint(capsys, at, f"--tasks={broken}")
    broken.write_text("dataset_path: json")
    assert "it must have the field `task`" in complaint(capsys, at, f"--tasks={broken}")
    task = write_task(broken, {"test": f"{tmp_path}/no.jsonl"}, output_type="multiple_choice", metrics=("acc",))
    assert f"data_files: {tmp_path}/no.jsonl doesn't exist" in complaint(capsys, at, f"--tasks={task}")
    assert "--limit: 0 must be above 0" in complaint(capsys, at, "--tasks=mmlu", "--limit=0")
    assert "--tasks: names none" in complaint(capsys, at, "--tasks=,")


def test_a_checkpoint_without_tokenizer(checkpoint: Path, tasks: dict[str, Path], tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "tokenizer.json").unlink()
    said = complaint(capsys, f"--checkpoint={copy}", f"--tasks={tasks['choice']}")
    assert f"--checkpoint={copy}: no tokenizer.json beside it" in said
