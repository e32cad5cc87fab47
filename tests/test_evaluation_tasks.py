"""One checkpoint in `evaluate`: where samples go, memorisation, infilling, and what a user gets wrong."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax import cli, execute
from crystal_jax.data.pipeline import Batches, Stores, heldout
from crystal_jax.evaluation import infilling, memorisation
from crystal_jax.evaluation.subject import open_subject
from crystal_jax.history import load_run
from crystal_jax.sampling import Request
from crystal_jax.scoring import Score


@pytest.fixture(scope="module")
def run(evaluated_run: Path) -> Path:
    return evaluated_run


@pytest.fixture(scope="module")
def problems(made_problems: Path) -> Path:
    return made_problems


def command(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("place", ["", "checkpoints/16", "exports/phase3/step_000002"])
def test_one_checkpoint(place: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("evaluate", f"--checkpoint={run / place}", "--tasks=losses", "--json")
    found = json.loads(capsys.readouterr().out)
    expected = load_run(run).evals[-1]["heldout"]["code"]["loss"]
    assert found["metrics"]["code.loss"] == pytest.approx(expected, rel=1e-5) and found["step"] == 16


@pytest.mark.parametrize("place", ["", "checkpoints/16", "exports/phase3/step_000002"])
def test_samples_of_a_runs_checkpoint_lie_in_the_run(place: str, run: Path, problems: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """And how they are scored is said, as it can be given to a shell."""
    monkeypatch.chdir(tmp_path)
    command("evaluate", f"--checkpoint={run / place}", "--tasks=humaneval", f"--humaneval={problems}", "--samples=1")
    path = run / "evaluations" / "humaneval-phase3-step_000002.jsonl"
    said = capsys.readouterr()
    assert said.out == "humaneval: samples 2\n"
    assert said.err.endswith(
        f"humaneval: samples: {path}\nhumaneval: to score them: crystal-jax execute --samples={path} "
        f"--problems={problems} --run_untrusted_code\n")
    assert len(execute.read_lines(path, "--samples")) == 2
    path.unlink()


def test_samples_of_a_checkpoint_without_a_run_lie_here(run: Path, problems: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "exports/phase3/step_000002", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", "--checkpoint=alone", "--tasks=humaneval", f"--humaneval={problems}", "--samples=1"]
    command(*arguments)
    assert "--samples=humaneval-phase3-step_000002.jsonl " in capsys.readouterr().err
    command(*arguments, "--output=there")
    assert "--samples=there/humaneval-phase3-step_000002.jsonl " in capsys.readouterr().err
    for folder in ("", "there"):
        assert (tmp_path / folder / "humaneval-phase3-step_000002.jsonl").exists()


# Memorisation


def test_what_a_model_says_itself_is_extractible(run: Path) -> None:
    """Windows that go on as greedy decoding does, and the same with a last token that it doesn't take."""
    with open_subject(run) as subject:
        prompts = np.random.default_rng(0).integers(3, 420, (5, memorisation.PROMPT_TOKENS), np.int32)
        asked = [Request(tuple(prompt.tolist()), memorisation.CONTINUED_TOKENS) for prompt in prompts]
        found = dict(subject.sampler(asked))
        kept = [row for row in range(5) if len(found[row]) == memorisation.CONTINUED_TOKENS]
        windows = np.array([[*prompts[row], *found[row]] for row in kept], np.int32)
        result = memorisation.measure(subject, windows)
        assert result["extractible"] == result["right_tokens"] == 1.0 and result["sequences"] == len(kept) >= 3
        windows[0, -1] = (windows[0, -1] + 1) % 400
        changed = memorisation.measure(subject, windows)
    assert changed["extractible"] == pytest.approx(1 - 1 / len(kept)) and changed["loss"] > result["loss"]
    assert changed["right_tokens"] == pytest.approx(1 - 1 / windows[:, memorisation.PROMPT_TOKENS:].size)


def test_what_was_seen_is_the_batch_that_inspect_shows(run: Path) -> None:
    """And what wasn't is of the same domains."""
    config = load_run(run).config
    known, asked = Batches(config, Stores(config)), {}
    for step in (1, 6):
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memorisation, "measure", lambda _, windows: asked.update({len(asked): windows}) or {})
            subject = SimpleNamespace(info={"step": 6})
            found = memorisation.memorisation_task(config, str(run), step).run(subject)  # type: ignore[arg-type]
        batch = known[step - 1]
        plain = [draw for draw in known.draws(step - 1) if not draw.fim_rate]
        np.testing.assert_array_equal(asked[0][:, 1:], batch["targets"][[draw.slot for draw in plain]])
        assert found == {"updates_since": 6.0 - step}
        domains = Counter(config.sources[draw.source].domain for draw in plain)
        expected = [windows[: domains[domain]] for domain, windows in heldout(config, Stores(config)).items()]
        np.testing.assert_array_equal(asked[1], np.concatenate(expected))


# Infilling


@given(st.text("ab \n", max_size=300), st.sampled_from(infilling.KINDS), st.integers(0, 2**32))
def test_a_gap_is_a_part_of_the_text(text: str, kind: str, seed: int) -> None:
    gap = infilling.cut(text, kind, np.random.Generator(np.random.Philox(seed)))
    if gap is None:
        return
    assert gap.prefix + gap.middle + gap.suffix == text and gap.middle.strip() and gap.prefix
    if kind == "random_span":
        assert infilling.SPAN_CHARACTERS[0] <= len(gap.middle) < infilling.SPAN_CHARACTERS[1]
    else:
        assert gap.prefix.endswith("\n") and gap.suffix.startswith("\n")
        count = gap.middle.count("\n") + 1
        assert count == 1 if kind == "single_line" else infilling.LINES[0] <= count <= infilling.LINES[1]


def test_gaps_are_counted_when_they_are_filled_exactly(run: Path) -> None:
    """By a model that knows every second middle, but for space at its ends."""
    gaps = [infilling.Gap("def f(x):\n", f"    return {number}", "\n\n") for number in range(4)]
    with open_subject(run) as subject:
        told = [subject.tokenizer.encode_fragment(gap.middle if number % 2 else "no") for number, gap in
                enumerate(gaps)]
        told[3] = subject.tokenizer.encode_fragment("return 3\n")
        fake: Any = SimpleNamespace(
            tokenizer=subject.tokenizer, model=subject.model, sampler=lambda asked: enumerate(told),
            scorer=lambda queries: [Score(-np.log(2) * len(gap.middle), False) for gap in gaps])
        assert infilling.measure(fake, gaps) == {"exact_match": 0.5, "bits_per_byte": pytest.approx(1), "gaps": 4}


# What a user gets wrong


def test_mistakes_are_one_line(run: Path, problems: Path, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: object) -> str:
        capsys.readouterr()
        assert cli.main(["evaluate", *map(str, arguments)]) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1, said.err
        return said.err

    at = f"--checkpoint={run}"
    assert "neither a run with a saved state, nor" in complaint(f"--checkpoint={tmp_path}", "--tasks=losses")
    assert "the folder is no run with permanent checkpoints" in complaint(
        f"{at}/exports/phase3/step_000002", "--all", "--tasks=losses")
    assert "needs --seen_at_step=STEP" in complaint(at, "--tasks=memorisation")
    assert "--seen_at_step: 17 must be from 1 to 16" in complaint(at, "--tasks=memorisation", "--seen_at_step=17")
    assert "needs --mbpp=FILE" in complaint(at, "--tasks=losses,mbpp")
    assert "its columns are those of humaneval, not of mbpp" in complaint(at, "--tasks=mbpp", f"--mbpp={problems}")
    assert f"{tmp_path}/tokenizer.json: No such file" in complaint(at, "--tasks=losses", f"--data_root={tmp_path}")
    assert "plan.json" in complaint(f"{at}/exports/phase3/step_000002", "--tasks=memorisation", "--seen_at_step=1")
    assert "losses is the name of a task that is known" in complaint(at, f"--tasks={tmp_path}/losses.yaml")
    assert "losses is named twice" in complaint(at, "--tasks=losses,losses")
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert "line 1 is no JSON" in complaint(at, "--tasks=humaneval", f"--humaneval={tmp_path / 'bad.jsonl'}")
    assert "--limit=5: is for lm-eval tasks, and losses, humaneval takes none" in complaint(
        at, "--tasks=losses,humaneval", "--limit=5")
    assert "--samples: 0 must be above 0" in complaint(at, "--tasks=losses", "--samples=0")
