"""`inspect` against brute force: every row found again in the stores, every document in just the batches it names."""

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspected import BATCH, LENGTH, STEPS, make_small, small_config

from crystal_jax.data.prepare import prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.inspect import Subject, describe_counts, describe_document, describe_step, open_config
from crystal_jax.inspect_page import render_document, render_step


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(world, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def subject(small: Path, request: pytest.FixtureRequest) -> Subject:
    return open_config(small_config(small, request.param))


@pytest.fixture(scope="module")
def steps(subject: Subject) -> list[dict[str, Any]]:
    """Every step, with all its text."""
    return [describe_step(subject, step, chars=None) for step in range(1, STEPS + 1)]


def shard_tokens(root: Path, source: str, shard: str) -> np.ndarray:
    return np.fromfile(root / source / "train" / f"{shard}.tokens", "<u2").astype(np.int32)


def rows_of_batch(subject: Subject, step: int) -> np.ndarray:
    batch = subject.batches[step - 1]
    return np.concatenate([batch["inputs"][:, :1], batch["targets"]], axis=1)


def without_fim(subject: Subject, ids: list[int]) -> str:
    """The text of tokens in which some segments are rearranged, as it was before; spaces aside."""
    tokenizer = subject.stores.tokenizer
    out: list[int] = []
    segment: list[int] = []

    def close() -> None:
        if segment[:1] == [tokenizer.fim_prefix_id]:
            # The last parts may have been pushed out, if there was nothing in them.
            middle = segment.index(tokenizer.fim_middle_id) if tokenizer.fim_middle_id in segment else len(segment)
            suffix = segment.index(tokenizer.fim_suffix_id) if tokenizer.fim_suffix_id in segment else len(segment)
            rest, before, after = segment[middle + 1 :], segment[1:suffix], segment[suffix + 1 : middle]
            out.extend([*before, *rest, *after])
        else:
            out.extend(segment)
        segment.clear()

    for token in ids:
        if token in (tokenizer.bos_id, tokenizer.eos_id):
            close()
            out.append(token)
        else:
            segment.append(token)
    close()
    return tokenizer.decode_fragment(out).replace(" ", "")


def test_every_sequence_of_every_step_is_found_again(subject: Subject, steps: list[dict], small: Path) -> None:
    """Spans are checked against the files, text against the batch; the parts leave out nothing but padding."""
    tokenizer, decode = subject.stores.tokenizer, subject.stores.tokenizer.decode_fragment
    rearranged = whole = 0
    for found in steps:
        rows, mask = rows_of_batch(subject, found["step"]), subject.batches[found["step"] - 1]["mask"]
        assert [sequence["slot"] for sequence in found["sequences"]] == list(range(BATCH))
        for sequence, row in zip(found["sequences"], rows, strict=True):
            parts = sequence["parts"]
            assert [part["in_sequence"][0] for part in parts[1:]] == [part["in_sequence"][1] for part in parts[:-1]]
            last = parts[-1]["in_sequence"][1]
            assert parts[0]["in_sequence"][0] == 0 and set(row[last:]) <= {tokenizer.eos_id, tokenizer.fim_pad_id}
            assert not mask[sequence["slot"]][max(last - 1, 0) :].any(), "what follows is padding"
            assert sum(part["predicted"] for part in parts) == mask[sequence["slot"]].sum()
            for part in parts:
                seen = row[slice(*part["in_sequence"])]
                assert part["text"] == decode(seen.tolist())
                stored = shard_tokens(small, sequence["source"], part["shard"])[slice(*part["in_shard"])]
                assert len(stored) == part["in_document"][1] - part["in_document"][0]
                if not any(other["fim"] for other in parts):
                    assert np.array_equal(seen, stored)
                elif not part["pushed_out"]:
                    rearranged += bool(part["fim"])
                    assert without_fim(subject, seen.tolist()) == decode(stored.tolist()).replace(" ", "")
                whole += part["in_document"] == (0, part["length"])
    assert rearranged > 8 and whole > 20


def test_a_part_says_which_tokens_of_which_document(steps: list[dict], small: Path) -> None:
    raw = {f"{name}/{shard}-{line}": json.loads(text)["text"] for name in ("text", "code") for shard in range(4)
           for line, text in enumerate((small / "raw" / name / f"{shard}.jsonl").read_text().splitlines())}
    checked = 0
    for found in steps:
        for sequence in found["sequences"]:
            for part in sequence["parts"]:
                assert part["document"].startswith(sequence["source"]) and part["file"].endswith(".jsonl")
                assert part["file"][0] == part["document"].split("/")[1][0] == str(int(part["shard"]))
                if part["in_document"] == (0, part["length"]) and not part["fim"] and not part["pushed_out"]:
                    assert part["text"] == f"<s> {raw[part['document']]}</s>"
                    checked += 1
    assert checked > 5


def test_a_document_is_in_the_batches_of_exactly_the_steps_that_it_names(subject: Subject, steps: list[dict]) -> None:
    """Against all steps: step, slot, epoch and part of each visit; all epochs and subsets, held-out documents too."""
    expected: dict[tuple[str, str], list[tuple]] = {}
    epochs: dict[str, set[int]] = {}
    for found in steps:
        for sequence in found["sequences"]:
            epochs.setdefault(sequence["source"], set()).add(sequence["epoch"])
            for part in sequence["parts"]:
                if part["in_sequence"][0] < part["in_sequence"][1]:
                    expected.setdefault((sequence["source"], part["document"]), []).append(
                        (found["step"], sequence["slot"], sequence["epoch"], part["in_document"], part["in_sequence"],
                         part["predicted"], part["pushed_out"], len(part["fim"])))
    assert max(max(seen) for seen in epochs.values()) >= 1, "several epochs"
    unread = 0
    for name in ("text", "code"):
        for shard in range(4):
            for line in range(5):
                identity = f"{name}/{shard}-{line}"
                (place,) = describe_document(subject, identity)["found"]
                visits = [(visit["step"], visit["slot"], visit["epoch"], visit["in_document"], visit["in_sequence"],
                           visit["predicted"], visit["pushed_out"], len(visit["fim"])) for visit in place["visits"]]
                assert visits == sorted(expected.pop((name, identity), [])), identity
                assert not (visits and (place["split"] == "heldout" or not place["in_a_subset"]))
                assert place["sources"] == [name] and place["tokens_seen"] <= place["length"]
                unread += not visits
    assert not expected and unread


def test_what_fim_pushes_out_is_neither_seen_nor_lost_in_silence(subject: Subject, steps: list[dict]) -> None:
    out = [part for found in steps for sequence in found["sequences"] for part in sequence["parts"]
           if part["in_sequence"][0] == part["in_sequence"][1] or part["pushed_out"]]
    assert out and all(part["in_sequence"][1] == LENGTH + 1 for part in out)
    assert "pushed out by FIM" in "\n".join(map(render_step, steps))


def test_counts_are_those_of_all_batches(subject: Subject) -> None:
    names = sorted(subject.batches.config.sources)
    seen: Counter[str] = Counter()
    before: Counter[str] = Counter()
    for step in range(1, STEPS + 1):
        seen.update(names[index] for index in subject.batches[step - 1]["source"])
        found = describe_counts(subject, step)
        assert {source["name"]: source["sequences"] for source in found["sources"]} == dict(seen)
        assert found["tokens"] == step * BATCH * LENGTH == sum(source["tokens"] for source in found["sources"])
        phase = found["phases"][-1]
        given = {source["name"]: source["sequences"] for source in phase["sources"]}
        assert given == {name: seen[name] - before[name] for name in names} and phase["last_step"] == step
        assert abs(sum(source["off"] for source in phase["sources"])) < 1e-9
        assert all(abs(source["off"]) < 2 for source in phase["sources"])
        if step == phase["end_step"]:
            before = seen.copy()


def test_epochs_in_counts_go_on_with_the_cursor_and_begin_anew_with_another_subset(subject: Subject) -> None:
    tables = [{source["name"]: source for source in phase["sources"]} for phase in describe_counts(subject)["phases"]]
    first, second, third = (table["code"] for table in tables)
    rows = first["available"]
    assert second["available"] == rows > third["available"]
    assert second["epochs"] == pytest.approx((first["sequences"] + second["sequences"]) / rows)
    assert third["epochs"] == pytest.approx(third["sequences"] / third["available"])


def test_a_step_has_a_table_of_its_sources(steps: list[dict]) -> None:
    for found in steps:
        for source in found["sources"]:
            own = [sequence for sequence in found["sequences"] if sequence["source"] == source["name"]]
            assert source["sequences"] == len(own) and source["share"] == len(own) / BATCH
            assert source["documents"] == sum(len(sequence["parts"]) for sequence in own)
            assert source["epochs"] == sorted({sequence["epoch"] for sequence in own})
            orders = Counter(fim["order"] for sequence in own for part in sequence["parts"] for fim in part["fim"])
            assert source["fim"] == orders
    assert {order for found in steps for source in found["sources"] for order in source["fim"]} == {"PSM", "SPM"}


def test_fim_spans_are_the_rearranged_segments(subject: Subject, steps: list[dict]) -> None:
    prefix = subject.stores.tokenizer.fim_prefix_id
    for found in steps:
        rows = rows_of_batch(subject, found["step"])
        for sequence, row in zip(found["sequences"], rows, strict=True):
            starts = [fim["span"][0] for part in sequence["parts"] for fim in part["fim"]]
            assert starts == np.flatnonzero(row == prefix).tolist()


@pytest.mark.parametrize("mode", ["crystal", "none"])
def test_other_ways_of_fim_are_found_again_too(small: Path, mode: str) -> None:
    config = small_config(small, "concat")
    config.data.fim_mode = mode
    subject = open_config(config)
    decode, count = subject.stores.tokenizer.decode_fragment, 0
    for step in (8, 11, 14, 16):
        found, rows = describe_step(subject, step, chars=None), rows_of_batch(subject, step)
        for sequence, row in zip(found["sequences"], rows, strict=True):
            bounds = [0, *(part["in_sequence"][1] for part in sequence["parts"])]
            assert [part["in_sequence"][0] for part in sequence["parts"]] == bounds[:-1]
            assert "".join(part["text"] for part in sequence["parts"]) == decode(row[: bounds[-1]].tolist())
            count += sum(len(part["fim"]) for part in sequence["parts"])
    assert (count > 10) == (mode == "crystal")


def test_one_slot_is_that_sequence_of_the_step(subject: Subject, steps: list[dict]) -> None:
    for slot in (0, 5):
        found = describe_step(subject, 9, slot, None)
        assert found["sequences"] == [steps[8]["sequences"][slot]] and found["batch_hash"] == steps[8]["batch_hash"]
        assert "documents" not in found["sources"][0]


def test_text_is_cut_where_asked(subject: Subject, steps: list[dict]) -> None:
    for chars in (0, 1, 7, 200):
        found = describe_step(subject, 12, chars=chars)
        for short, long in zip(found["sequences"], steps[11]["sequences"], strict=True):
            assert [part["text"] for part in short["parts"]] == [part["text"][:chars] for part in long["parts"]]


def test_documents_that_no_step_reads_say_why(small: Path) -> None:
    config = small_config(small, "concat")
    config.phases = [dataclasses.replace(config.phases[0], mix={"text": 1.0}, steps=2, checkpoint_every=2)]
    subject = open_config(config)
    answers = {f"{name}/{shard}-{line}": render_document(describe_document(subject, f"{name}/{shard}-{line}"))
               for name in ("text",) for shard in range(4) for line in range(5)}
    held = [identity for identity, page in answers.items() if "held out: no step trains on it" in page]
    assert held == [identity for identity in answers
                    if describe_document(subject, identity)["found"][0]["split"] == "heldout"] and held
    unread = {identity for identity, page in answers.items() if "no part of the store that the recipe reads" in page}
    odd = {identity for identity in answers if identity.split("/")[1][0] in "13"} - set(held)
    assert odd <= unread and unread - odd <= {"text/2-4"}, "of even files what is left after the last row"


def test_a_document_that_lies_in_two_stores_is_shown_in_both(small: Path, tmp_path: Path) -> None:
    config = small_config(small, "concat")
    config.sources["again"] = copy.copy(config.sources["text"])
    config.phases[0].mix = {"text": 0.5, "again": 0.25, "code": 0.25}
    subject = open_config(config)
    places = [describe_document(subject, f"text/0-{line}")["found"] for line in range(5)]
    assert all(len(place) == 1 and place[0]["sources"] == ["again", "text"] for place in places)
    assert {visit["source"] for (place,) in places for visit in place["visits"]} == {"again", "text"}
    (small / "raw" / "copy").mkdir(exist_ok=True)
    (small / "raw" / "copy" / "0.jsonl").write_bytes((small / "raw" / "text" / "0.jsonl").read_bytes())
    prepare(SourceSpec("jsonl", (str(small / "raw" / "copy"),), id_key="key"), "copy", small / "tokenizer.json", small)
    config.sources["again"].store = "copy"
    found = describe_document(open_config(config), "text/0-1")["found"]
    assert [place["sources"] for place in found] == [["again"], ["text"]]
