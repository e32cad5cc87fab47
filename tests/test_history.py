"""metrics.jsonl read back: what a killed, resumed or amended run leaves in it, and what of it counts."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import tiny_600

from crystal_jax.config import to_dict
from crystal_jax.errors import UserError
from crystal_jax.history import load_run, read_metrics
from crystal_jax.rules import validate


def start(step: int = 0) -> dict[str, Any]:
    return {"kind": "start", "step": step, "resumed": step > 0}


def train(step: int, note: str = "") -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": step * 2048, "note": note}


def other(kind: str, step: int, note: str = "") -> dict[str, Any]:
    return {"kind": kind, "step": step, "note": note}


def write(path: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    return path


def short(lines: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return [(line["kind"], line["step"], line.get("note", "")) for line in lines]


def test_an_uninterrupted_run_is_read_as_written(tmp_path: Path) -> None:
    lines = [start(), train(10), other("eval", 10), other("checkpoint", 10), train(20)]
    assert read_metrics(write(tmp_path / "metrics.jsonl", lines)) == lines


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path / "metrics.jsonl", [])) == []


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    lines = [start(), train(10, "a"), train(20, "a"), other("eval", 20, "a"),
             start(10), train(20, "b"), other("eval", 20, "b")]
    found = short(read_metrics(write(tmp_path / "metrics.jsonl", lines)))
    assert found == [("start", 0, ""), ("train", 10, "a"), ("start", 10, ""), ("train", 20, "b"), ("eval", 20, "b")]


def test_a_resume_takes_back_what_lies_after_it(tmp_path: Path) -> None:
    lines = [start(), *(train(step) for step in (10, 20, 30, 40)), other("eval", 40), start(20), train(25)]
    found = short(read_metrics(write(tmp_path / "metrics.jsonl", lines)))
    assert found == [("start", 0, ""), ("train", 10, ""), ("train", 20, ""), ("start", 20, ""), ("train", 25, "")]


def test_processes_that_died_before_their_first_line_all_count(tmp_path: Path) -> None:
    lines = [start(), train(10), start(10), start(10), train(20)]
    assert read_metrics(write(tmp_path / "metrics.jsonl", lines)) == lines


def test_a_checkpoint_that_is_logged_late_stays(tmp_path: Path) -> None:
    lines = [start(), train(10), train(20), other("checkpoint", 15), train(30)]
    assert read_metrics(write(tmp_path / "metrics.jsonl", lines)) == lines


@pytest.mark.parametrize("half", ['{"kind": "tra', '{"kind": "train", "step": 3', "{", '{"kind": "train"}', "\x00\x00"])
def test_a_half_written_last_line_is_ignored(half: str, tmp_path: Path) -> None:
    lines = [start(), train(10)]
    assert read_metrics(write(tmp_path / "metrics.jsonl", lines, half)) == lines
    assert read_metrics(write(tmp_path / "metrics.jsonl", lines, half + "\n")) == lines


@given(st.integers(0, 60))
def test_a_file_cut_anywhere_gives_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    lines = [start(), train(10), other("eval", 10), train(20)]
    path = write(tmp_path_factory.mktemp("cut") / "metrics.jsonl", lines)
    data = path.read_bytes()
    data = data[: len(data) - cut]
    path.write_bytes(data)
    found = read_metrics(path)
    assert found == lines[: len(found)]
    assert data.count(b"\n") <= len(found) <= data.count(b"\n") + 1


def test_half_a_line_before_a_resume_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [start(), train(10)], '{"kind": "train", "st\n')
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(start(10)) + "\n" + json.dumps(train(20)) + "\n")
    assert short(read_metrics(path)) == [("start", 0, ""), ("train", 10, ""), ("start", 10, ""), ("train", 20, "")]


def test_damage_that_no_kill_explains_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [start()], '{"kind": "tra#"}x\n' + json.dumps(train(20)) + "\n")
    with pytest.raises(UserError, match="line 2 is damaged") as error:
        read_metrics(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_missing_file_is_a_users_mistake(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / name)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=5))
def test_what_counts_is_a_run_without_interruptions(
        tmp_path_factory: pytest.TempPathFactory, processes: list[tuple[int, int]]) -> None:
    """Whatever was killed and resumed from wherever, each step counts once and as it was written last."""
    lines, step = [start()], 0
    for number, (length, back) in enumerate(processes):
        step = max(0, step - back)
        lines.append(start(step))
        for _ in range(length):
            step += 1
            lines += [train(step, str(number)), other("eval", step, str(number))]
    found = read_metrics(write(tmp_path_factory.mktemp("runs") / "metrics.jsonl", lines))
    for kind in ("train", "eval"):
        kept = [line for line in found if line["kind"] == kind]
        assert [line["step"] for line in kept] == list(range(1, step + 1))
        for line in kept:
            written = [old["note"] for old in lines if (old["kind"], old["step"]) == (kind, line["step"])]
            assert line["note"] == written[-1]
    assert [line for line in found if line["kind"] == "start"] == [line for line in lines if line["kind"] == "start"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = to_dict(validate(tiny_600())) | {"versions": {"jax": "0.10.2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "plan.json").write_text(json.dumps({"plan": {}}))
    write(tmp_path / "metrics.jsonl", [])
    return tmp_path


def log(path: Path, *points: tuple[int, int, int]) -> None:
    """Lines of (step, tokens of text so far, tokens of code so far)."""
    write(path / "metrics.jsonl", [start(), *({**train(step), "tokens_per_source": {"text": text, "code": code}}
                                              for step, text, code in points)])


def test_a_run_knows_where_it_stands(run_dir: Path) -> None:
    assert (load_run(run_dir).step, load_run(run_dir).tokens, load_run(run_dir).resumed_at) == (0, 0, [])
    log(run_dir, (10, 20_000, 480), (20, 39_000, 1960))
    run = load_run(run_dir)
    assert (run.step, run.tokens) == (20, 40_960)


def test_a_series_leaves_out_lines_without_the_value(run_dir: Path) -> None:
    write(run_dir / "metrics.jsonl", [start(), train(1), {**train(2), "lr": 0.5}, {**train(3), "lr": float("nan")}])
    tokens, rates = load_run(run_dir).series(lambda line: line.get("lr"))
    assert tokens.tolist() == [4096, 6144]
    assert rates[0] == 0.5
    assert rates[1] != rates[1]


def test_consumption_is_counted_per_phase(run_dir: Path) -> None:
    log(run_dir, (148, 288_000, 15_104), (248, 360_000, 147_904))
    phase1, phase2, phase3 = load_run(run_dir).consumption()
    assert phase1 == {"text": 288_000, "code": 15_104}
    assert phase2 == {"text": 72_000, "code": 132_800}
    assert phase3 == {"text": 0, "code": 0}


def test_consumption_uses_the_exact_counts_of_checkpoints(run_dir: Path) -> None:
    """Phase 1 ends at step 148, between the two log lines; its last checkpoint knows what had been read by then."""
    log(run_dir, (140, 272_000, 14_720), (150, 290_000, 17_200))
    entry = {"name": "phase1/step_000148", "step": 148, "exported": True,
             "tokens_per_source": {"text": 288_000, "code": 15_104}}
    planned = {"step": 248, "exported": False}
    (run_dir / "manifest.json").write_text(json.dumps({"format": 1, "checkpoints": [entry, planned]}))
    run = load_run(run_dir)
    assert run.consumption()[0] == {"text": 288_000, "code": 15_104}
    assert run.checkpoints == [entry]


def test_checkpoints_come_from_the_log_until_a_manifest_lists_them(run_dir: Path) -> None:
    write(run_dir / "metrics.jsonl", [start(), train(50), other("checkpoint", 50)])
    assert [line["step"] for line in load_run(run_dir).checkpoints] == [50]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("config.json", "{", "config.json: damaged (Expecting property name"),
    ("config.json", "[]", "config.json: not a JSON object"),
    ("config.json", '{"modle": {}}', "config.modle: unknown field; did you mean model?"),
    ("manifest.json", "[", "manifest.json: damaged (Expecting value"),
])
def test_damaged_files_of_a_run_are_named(name: str, text: str, message: str, run_dir: Path) -> None:
    (run_dir / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_run(run_dir)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_metrics_is_no_run(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        load_run(run_dir)
