"""report.html and its pictures: from a finished run, one that was killed and resumed, and one that has barely begun."""

import argparse
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import tiny_600

from crystal_jax import report
from crystal_jax.config import Config, to_dict
from crystal_jax.data.schedule import Interleave
from crystal_jax.errors import UserError
from crystal_jax.evaluate import measures
from crystal_jax.history import load_run
from crystal_jax.phases import Plan, make_plan
from crystal_jax.plots import FAMILIES, draw_all, source_colours
from crystal_jax.rules import validate

from configs import crystal_7b

PICTURES = {"report.png", "loss.png", "mixture.png", "learning_rate.png", "gradient_norm.png", "throughput.png",
            "time.png"}
UNIGRAM = {"text": 6.31, "code": 5.72}
START = {"kind": "start", "step": 0, "time": 1_770_000_000.0, "versions": {"crystal_jax": "0.1.0", "jax": "0.10.2"},
         "devices": "1 x cpu", "parameters": 4_225_920, "resumed": False}


def cumulative(plan: Plan, step: int) -> dict[str, int]:
    """Tokens per source after `step` updates, dealt out as training deals them."""
    tokens: dict[str, int] = {}
    for placed in plan.phases:
        done = min(max(step - placed.start, 0), placed.steps)
        counts = Interleave.make(placed.quotas).counts(done * placed.phase.global_batch_size)
        for name, count in counts.items():
            tokens[name] = tokens.get(name, 0) + count * plan.sequence_length
    return tokens


def loss_at(domain: str, done: float, code: float, noise: float) -> float:
    """A loss that falls with the share of the run that is done; code only as far as code was read."""
    read = done * (0.2 + code if domain == "code" else 1.2 - code)
    return {"text": 3.3, "code": 2.2}[domain] + 5.0 / (1 + 25 * read) ** 0.75 + noise


def metrics(config: Config, last: int | None = None, every: int = 10, eval_every: int = 100) -> list[dict[str, Any]]:
    """The lines that a run of `config` writes, up to step `last`."""
    plan, rng = make_plan(config), np.random.default_rng(1)
    ends = {placed.end for placed in plan.phases}
    last = plan.total_steps if last is None else last
    domains = {name: source.domain for name, source in config.sources.items()}
    lines, before = [dict(START)], cumulative(plan, 0)
    for step in sorted({*range(every, last + 1, every), *(step for step in {*ends, *plan.calendar()} if step <= last)}):
        placed, phase_step = plan.done(step)
        where = {"step": step, "phase": placed.phase.name, "phase_step": phase_step, "tokens": plan.tokens(step)}
        given = cumulative(plan, step)
        done = plan.tokens(step) / plan.tokens(plan.total_steps)
        code = sum(tokens for name, tokens in given.items() if domains[name] == "code") / max(1, sum(given.values()))
        if step % every == 0 or step in ends:
            losses = {name: loss_at(domains[name], done, code, rng.normal(0, 0.09))
                      for name in given if given[name] > before.get(name, 0)}
            lines.append({"kind": "train", **where, "loss": float(np.mean(list(losses.values()))),
                          "loss_per_source": losses, "tokens_per_source": given,
                          "grad_norm": float(0.5 + 6 * math.exp(-25 * done) + rng.gamma(4, 0.05)),
                          "lr": plan.learning_rate(step - 1), "tokens_per_second": float(rng.normal(3100, 90)),
                          "step_seconds": 0.66, "skipped": 0, "time": START["time"] + 0.7 * step})
            before = given
        if step % eval_every == 0 or step in ends:
            heldout = {domain: {**measures(16384 * loss_at(domain, done, code, 0.06), np.zeros(16384, int),
                                           np.array([3])), "unigram_entropy": entropy}
                       for domain, entropy in UNIGRAM.items()}
            lines.append({"kind": "eval", **where, "heldout": heldout, "seconds": 2.0, "time": START["time"]})
        if step in plan.calendar():
            lines.append({"kind": "checkpoint", "step": step, "name": plan.calendar()[step], "time": START["time"]})
    return lines


def write_run(folder: Path, config: Config, lines: list[dict[str, Any]], manifest: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plan = make_plan(config)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "plan.json").write_text(json.dumps({"plan": {}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if manifest:
        entries = [{"name": line["name"], "phase": line["name"].split("/")[0], "phase_step": plan.done(line["step"])[1],
                    "step": line["step"], "tokens": plan.tokens(line["step"]),
                    "tokens_per_source": cumulative(plan, line["step"]), "lr": 0.0, "plan_hash": "0", "exported": True}
                   for line in lines if line["kind"] == "checkpoint"]
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "plan_hash": "0", "checkpoints": entries}))
    return folder


def resumed_at(step: int) -> dict[str, Any]:
    return {**START, "step": step, "resumed": True, "time": START["time"] + 500}


def interrupted(config: Config, killed: int, saved: int, last: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run that was killed after step `killed` and went on from its state of step `saved`."""
    first, second = metrics(config, last=killed), metrics(config, last=last)
    return [*first, resumed_at(saved), *(line for line in second if line["step"] > saved)]


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, the texts between them, and the rows of its tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if data.strip() and "style" not in self.open:
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def tiny() -> Config:
    return validate(tiny_600())


@pytest.fixture(scope="module")
def finished(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three phases, killed once on its way, with its report."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "finished", tiny, interrupted(tiny, killed=243, saved=200))
    assert report.write_report(folder) == folder / "report" / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page((finished / "report" / "report.html").read_text(encoding="utf-8"))


def test_it_writes_the_page_and_whole_pictures(finished: Path) -> None:
    files = {path.name for path in (finished / "report").iterdir()}
    assert files == PICTURES | {"report.html"}
    for name in PICTURES:
        data = (finished / "report" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert data.endswith(b"IEND\xaeB`\x82")


def test_the_page_stands_alone(page: Page, finished: Path) -> None:
    assert not page.open, "every tag is closed"
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert "href" not in attributes, tag
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert sum(tag == "img" for tag, _ in page.tags) == 6
    text = (finished / "report" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?:|url\(|@import", text)


def test_the_header_says_what_the_run_was(page: Page) -> None:
    assert page.texts[1] == "crystal_tiny"
    for word in ("4,225,920 parameters", "3 phases", "1 x cpu", "jax 0.10.2", "finished"):
        assert word in page.texts[2]
    cards = dict(zip(page.texts[3:30], page.texts[4:], strict=False))
    assert cards["tokens"] == "1.23M"
    assert cards["updates"] == "600"
    assert cards["resumes"] == "1"
    assert cards["skipped updates"] == "0"
    assert cards["permanent checkpoints"] == "13"


def test_heldout_losses_stand_beside_the_unigram_entropy(page: Page, finished: Path) -> None:
    rows = [row for row in page.rows if row[0] == "phase3" and row[1] == "600"]
    last = load_run(finished).evals[-1]["heldout"]
    assert [row[2] for row in rows] == ["text", "code"]
    for row in rows:
        loss, entropy = last[row[2]]["loss"], UNIGRAM[row[2]]
        assert row[3:] == ["16,384", f"{loss:.4f}", f"{entropy:.4f}", f"{entropy - loss:+.4f}", f"{math.exp(loss):.1f}",
                           f"{math.exp(entropy):.1f}", f"{loss / math.log(2) / 3:.4f}"]


def test_a_domain_without_bytes_has_a_dash(finished: Path) -> None:
    run = load_run(finished)
    for line in run.evals:
        del line["heldout"]["code"]["bits_per_byte"]
    shown = report._heldout_table(run)
    assert shown.count(">-<") == 3 and run.evals[-1]["heldout"]["text"]["bits_per_byte"]


def test_a_finished_run_has_read_the_recipe_exactly(page: Page, finished: Path) -> None:
    run = load_run(finished)
    for placed, given in zip(run.plan.phases, run.consumption(), strict=True):
        assert given == {name: quota * 256 for name, quota in placed.quotas.items()}
    rows = [row for row in page.rows if len(row) == 7 and row[1] in ("text", "code") and row[0].startswith("phase")]
    assert [row[:2] for row in rows] == [[f"phase{n}", name] for n in (1, 2, 3) for name in ("text", "code")]
    assert {row[5] for row in rows} == {"+0.0000"}
    assert sum(int(row[6].replace(",", "")) for row in rows) == run.tokens == 1_228_800


def test_every_permanent_checkpoint_is_listed(page: Page, finished: Path) -> None:
    names = [row[0] for row in page.rows if "/step_" in row[0]]
    assert names == list(load_run(finished).plan.calendar().values())


def test_both_processes_are_listed(page: Page) -> None:
    rows = [row for row in page.rows if row[0].endswith("UTC")]
    assert [row[1:3] for row in rows] == [["0", "fresh"], ["200", "resumed"]]


@pytest.mark.parametrize(
    ("last", "kept", "done"), [(0, 0, "0.0%"), (10, 1, "1.7%"), (60, 6, "10.0%"), (233, 24, "38.3%")],
    ids=["only started", "one line", "before an evaluation", "in phase 2"])
def test_a_run_that_goes_on_has_a_report_too(last: int, kept: int, done: str, tiny: Config, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tiny, metrics(tiny, last=last))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 9')
    run = load_run(folder)
    assert len(run.train) == kept
    found = Page(report.write_report(folder).read_text(encoding="utf-8"))
    assert found.texts[2].endswith(f"{done} done")
    assert ("No evaluation has been logged yet." in found.texts) == (not run.evals)


def test_without_any_line_or_manifest(tiny: Config, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tiny, [], manifest=False)
    found = Page(report.write_report(folder).read_text(encoding="utf-8"))
    assert "0 of 13 exist." in found.texts


def test_an_interval_of_skipped_updates_has_no_loss(tiny: Config, tmp_path: Path) -> None:
    lines = metrics(tiny, last=60)
    broken = next(line for line in lines if line["kind"] == "train" and line["step"] == 30)
    for name in ("loss", "loss_per_source", "grad_norm"):
        del broken[name]
    broken["skipped"] = 10
    run = load_run(write_run(tmp_path / "run", tiny, lines))
    assert report.skipped_updates(run) == 10
    assert len(run.series(lambda line: line.get("grad_norm"))[0]) == 5
    assert set(draw_all(run)) == PICTURES


def test_a_loss_that_is_not_finite_is_drawn_as_a_gap(tiny: Config, tmp_path: Path) -> None:
    lines = metrics(tiny, last=40)
    for line in lines:
        if line["kind"] == "train" and line["step"] in (20, 30):
            line["loss_per_source"] = dict.fromkeys(line["loss_per_source"], math.nan)
            line["grad_norm"] = math.inf
    assert set(draw_all(load_run(write_run(tmp_path / "run", tiny, lines)))) == PICTURES


def test_training_time_leaves_out_the_pauses(tiny: Config, tmp_path: Path) -> None:
    lines = metrics(tiny, last=100)
    for line in lines:
        if line["kind"] == "train":
            line["tokens_per_second"] = 2048.0
    run = load_run(write_run(tmp_path / "run", tiny, lines))
    assert report.training_seconds(run) == pytest.approx(100)


def with_ledger(config: Config, peak: float | None = 459.0) -> list[dict[str, Any]]:
    """The lines of a run that says where its time went: 600 updates of 0.5 s after 20 s, on 64 devices."""
    lines = metrics(config)
    rates = {"step_seconds": 0.5, "seconds_of_steps": [0.4, 0.6], "tokens_per_second": 4096.0,
             "smoothed_tokens_per_second": 4000.0, "tflops_per_device": 183.6, **({"mfu": 0.4} if peak else {})}
    for line in lines:
        spent = {"initialising": 8.0, "compiling": 12.0, "stepping": 0.5 * line["step"]}
        line["time"] = START["time"] + 0.5 * line["step"]
        if line["kind"] == "start":
            line |= {"spent": {"initialising": 8.0, "compiling": 12.0}, "code": "0123456789abcdef",
                     "utilisation": {"flops_per_token": {"palm": 1.0}, "devices": 64, "peak_tflops": peak}}
        elif line["kind"] == "train":
            line |= {"spent": spent, **rates}
    memory = {"program": {"arguments": 3 * 10**9, "temporaries": 10**9, "total": 4 * 10**9},
              "device": {"in_use": 10**9, "peak": 5 * 10**9, "limit": 102 * 10**9} if peak else {}}
    return [*lines[:1], {"kind": "program", "step": 1, "global_batch_size": 8, "seconds": 11.5, "cache": "miss",
                         "memory": memory, "spent": {"initialising": 8.0, "compiling": 12.0}, "time": START["time"]},
            *lines[1:]]


def test_goodput_use_of_the_peak_and_memory_are_shown(tiny: Config, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tiny, with_ledger(tiny))
    found = Page(report.write_report(folder).read_text(encoding="utf-8"))
    cards = dict(zip(found.texts, found.texts[1:], strict=False))
    assert (cards["goodput"], cards["MFU"], cards["memory a device"]) == ("93.8%", "40.0%", "5.00 GB")
    assert "6N + 12LDS FLOPs a token against 459 TFLOP/s (bfloat16) a device" in found.texts
    assert "at the first step of 102 GB" in found.texts
    assert ["1", "8", "11.5", "miss", "3.00 GB", "1.00 GB", "4.00 GB", "5.00 GB"] in found.rows
    spent = {row[0]: row[2:] for row in found.rows if len(row) == 4}
    assert spent["stepping"] == ["300.0", "93.75%"] and spent["lost"] == ["0.0", "0.00%"]
    assert spent["sum"] == spent["wall time"] == ["320.0", "100.00%"]
    assert any("0123456789abcdef" in row for row in found.rows)


def test_without_a_known_peak_there_is_a_rate_and_no_mfu(tiny: Config, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tiny, with_ledger(tiny, peak=None))
    found = Page(report.write_report(folder).read_text(encoding="utf-8"))
    cards = dict(zip(found.texts, found.texts[1:], strict=False))
    assert "MFU" not in cards and cards["TFLOP/s a device"] == "184" and cards["memory a device"] == "4.00 GB"


def test_a_log_without_a_ledger_says_so(page: Page) -> None:
    assert "The log doesn't say where the time went." in page.texts


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (59.6, "1 min"), (90, "1 min 30 s"), (3600, "1 h"), (3_725, "1 h 2 min"), (100_000, "1 d 3 h")])
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_many_sources_keep_the_colours_of_their_domain(tmp_path: Path) -> None:
    config = validate(crystal_7b.get_config())
    run = load_run(write_run(tmp_path / "run", config, metrics(config, every=40_000, eval_every=80_000)))
    colours = source_colours(run)
    assert set(colours) == set(config.sources)
    assert len(set(colours.values())) == len(colours)
    for name, colour in colours.items():
        red, _, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert (red < blue) == (config.sources[name].domain == "text"), name
    assert set(draw_all(run)) == PICTURES
    assert set(FAMILIES) == {"text", "code"}


def test_names_of_a_run_are_escaped(tiny: Config, tmp_path: Path) -> None:
    config = validate(tiny_600())
    config.name = "<b>&\"quoted\"</b>"
    found = Page(report.write_report(write_run(tmp_path / "run", config, [START])).read_text(encoding="utf-8"))
    assert found.texts[1] == config.name


def test_writing_again_replaces_and_elsewhere_leaves_the_run_alone(tiny: Config, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tiny, [START])
    assert report.write_report(folder, tmp_path / "elsewhere") == tmp_path / "elsewhere" / "report.html"
    assert not (folder / "report").exists()
    before = (tmp_path / "elsewhere" / "report.html").read_text(encoding="utf-8")
    write_run(folder, tiny, metrics(tiny, last=20))
    report.write_report(folder, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "report.html").read_text(encoding="utf-8") != before
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == PICTURES | {"report.html"}


def test_the_command_prints_the_path(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", tiny, [START])
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert not report.main(parser.parse_args([f"--run_dir={folder}"]))
    assert capsys.readouterr().out == f"{folder / 'report' / 'report.html'}\n"


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run \(there is no config.json\)") as error:
        report.write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is written before the run is known to be one"
