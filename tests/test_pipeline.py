"""Batches: exact shares, the same for any number of hosts, and a pure function of the step."""

import copy
import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import make_config

from crystal_jax.config import Config, Subset
from crystal_jax.data.packing import write_plan
from crystal_jax.data.pipeline import Batches, Stores, batch_hash, heldout
from crystal_jax.errors import UserError
from crystal_jax.sharding import Part

NO_FIM = "none"


@pytest.fixture(scope="module")
def config(world: Path) -> Config:
    return make_config(world)


@pytest.fixture(scope="module")
def stores(config: Config) -> Stores:
    return Stores(config)


@pytest.fixture(scope="module")
def batches(config: Config, stores: Stores) -> Batches:
    return Batches(config, stores)


@pytest.fixture(scope="module")
def packed_world(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Stores]:
    """The world with a packing plan in each store."""
    root = tmp_path_factory.mktemp("packed") / "world"
    shutil.copytree(world, root)
    for name in ("text", "code"):
        write_plan(root / name, 32)
    config = make_config(root)
    return config, Stores(config)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_a_batch_has_the_stated_shapes_and_targets_follow_inputs(batches: Batches) -> None:
    for step in range(len(batches)):
        batch = batches[step]
        shapes = {name: (values.dtype.name, values.shape) for name, values in batch.items()}
        assert shapes == {"inputs": ("int32", (8, 32)), "targets": ("int32", (8, 32)), "mask": ("float32", (8, 32)),
                          "source": ("int32", (8,))}
        assert np.array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_every_phase_gives_exactly_its_quotas_and_counts_agree(batches: Batches) -> None:
    names = sorted(batches.config.sources)
    seen = dict.fromkeys(names, 0)
    for step in range(len(batches)):
        assert batches.counts(step) == seen
        for index in batches[step]["source"]:
            seen[names[index]] += 1
    assert batches.counts(len(batches)) == seen
    assert seen == {name: sum(placed.quotas[name] for placed in batches.plan.phases) for name in names}


def part_of(host: int, hosts: int) -> Callable[[int], np.ndarray]:
    return Part(hosts, (host,), (host,)).slots


@pytest.mark.parametrize("hosts", [2, 3, 4, 8])
def test_hosts_together_see_the_batch_that_one_host_sees(
        config: Config, stores: Stores, batches: Batches, hosts: int) -> None:
    parts = [Batches(config, stores, part_of(host, hosts)) for host in range(hosts)]
    for step in (0, 5, 6, 9, 13, 14, 17):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in batches[step]}
        assert equal(joined, batches[step]), step


def test_a_seek_gives_what_walking_there_gives(batches: Batches) -> None:
    """Also across the ends of phases, at 6 and 14."""
    walked = list(batches.iterate(0))
    assert len(walked) == len(batches)
    for start in (0, 1, 5, 6, 7, 13, 14, 16):
        for step, batch in zip(range(start, len(batches)), batches.iterate(start), strict=True):
            assert equal(batch, walked[step]), (start, step)


def unshuffled(config: Config) -> Config:
    plain = copy.deepcopy(config)
    plain.data.fim_mode = NO_FIM
    return plain


def test_without_fim_each_row_is_a_window_of_its_subset_each_once_an_epoch(config: Config, stores: Stores) -> None:
    batches = Batches(unshuffled(config), stores)
    names, seen = sorted(config.sources), Counter()
    for step in range(len(batches)):
        batch, draws = batches[step], batches.draws(step)
        assert [draw.slot for draw in draws] == list(range(8))
        for draw in draws:
            window = draw.reading.rows.view.read(draw.row * 32, 33)
            assert names[batch["source"][draw.slot]] == draw.source
            assert np.array_equal(batch["inputs"][draw.slot], window[:-1])
            assert np.array_equal(batch["targets"][draw.slot], window[1:])
            seen[draw.reading.key, draw.epoch, draw.row] += 1
            assert (step, draw.slot, draw.epoch) in batches.steps_of(draw.reading, draw.row)
    assert set(seen.values()) == {1}, "a row twice in an epoch"
    for key in {key for key, _, _ in seen}:
        size = next(reading.rows.num_rows for phase in batches.readings for reading in phase.values()
                    if reading.key == key)
        epochs = Counter(epoch for k, epoch, _ in seen if k == key)
        assert all(epochs[epoch] == size for epoch in range(max(epochs))), "an epoch is whole before the next"


def orders(batches: Batches, source: str) -> dict[int, list[int]]:
    """Epoch to the rows of a source in the order in which the run reads them, phase 2 on."""
    read: dict[int, list[int]] = {}
    for step in range(6, len(batches)):
        for draw in batches.draws(step):
            if draw.source == source:
                read.setdefault(draw.epoch, []).append(draw.row)
    return read


def longer(config: Config, steps: int = 900, **data: object) -> Config:
    config = copy.deepcopy(config)
    config.phases[1].steps = steps
    config.data = dataclasses.replace(config.data, **data)
    return config


def test_epochs_are_in_different_orders(config: Config, stores: Stores) -> None:
    read = orders(Batches(longer(config), stores), "code")
    assert sorted(read[1]) == sorted(read[2]) and read[1] != read[2]


def test_without_shuffling_each_epoch_is_in_the_order_of_the_store(config: Config, stores: Stores) -> None:
    read = orders(Batches(longer(config, shuffle=False), stores), "code")
    assert read[1] == read[2] == sorted(read[1])
    batches = Batches(longer(config, 10, shuffle=False), stores)
    draw = batches.draws(8)[0]
    assert (8, draw.slot, draw.epoch) in batches.steps_of(draw.reading, draw.row)


def test_a_fresh_cursor_begins_again_in_an_order_of_its_own(config: Config, stores: Stores) -> None:
    changed = copy.deepcopy(config)
    changed.phases[1].subset["code"] = Subset(cursor="fresh")
    batches = Batches(changed, stores)
    first, second, third = (readings["code"] for readings in batches.readings)
    assert first.cursor == second.cursor == 0 and second.key == (*first.key, "phase2")
    assert third.cursor == batches.plan.phases[0].quotas["code"], "and the old one goes on where it was"


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(0, 17), st.sampled_from(["concat", "best_fit"]), st.booleans())
def test_batches_depend_on_step_and_seed_alone(
        packed_world: tuple[Config, Stores], hosts: int, step: int, packing: str, masked: bool) -> None:
    config, stores = packed_world
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing, document_mask=masked))
    whole = Batches(config, stores)[step]
    parts = [Batches(config, stores, part_of(host, hosts))[step] for host in range(hosts)]
    assert equal({key: np.concatenate([part[key] for part in parts]) for key in whole}, whole)
    assert ("segment_ids" in whole) == masked
    example = next(iter(Batches(config, stores).iterate(step)))
    assert equal(example, whole) and batch_hash(example) == batch_hash(whole)


def test_a_hash_tells_batches_apart(batches: Batches) -> None:
    hashes = {batch_hash(batches[step]) for step in range(len(batches))}
    assert len(hashes) == len(batches)
    turned = {name: values[::-1] for name, values in batches[0].items()}
    assert batch_hash(turned) != batch_hash(batches[0])


def test_padding_is_no_target_also_under_fim(packed_world: tuple[Config, Stores]) -> None:
    config, stores = packed_world
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing="best_fit"))
    batches, tokenizer = Batches(config, stores), stores.tokenizer
    rated = 0
    for step in range(6, 14):  # phase 2, where 90% of the code segments are cut
        batch = batches[step]
        for draw in batches.draws(step):
            targets, mask = batch["targets"][draw.slot], batch["mask"][draw.slot]
            assert not mask[targets == tokenizer.fim_pad_id].any()
            plain, kept = draw.reading.rows.read(np.array([draw.row]))
            assert mask.sum() <= kept[0, 1:].sum() + 3 * (plain == tokenizer.eos_id).sum() + 3
            if draw.fim_rate and tokenizer.fim_middle_id in targets:
                rated += 1
                assert mask[targets == tokenizer.fim_middle_id].all(), "what FIM adds is learnt"
    assert rated


def test_a_packing_that_was_not_prepared_is_refused_with_the_command(config: Config, stores: Stores) -> None:
    with pytest.raises(UserError, match=r"--packing=best_fit --sequence_length=32"):
        Batches(longer(config, packing="best_fit"), stores)


def test_a_cursor_goes_on_while_the_subset_stays_and_starts_anew_with_another(batches: Batches) -> None:
    cursors = [{name: reading.cursor for name, reading in phase.items()} for phase in batches.readings]
    quotas = [placed.quotas for placed in batches.plan.phases]
    assert [phase["text"] for phase in cursors] == [0, 0, 0]
    assert [phase["code"] for phase in cursors] == [0, quotas[0]["code"], quotas[0]["code"] + quotas[1]["code"]]


def test_even_and_odd_subsets_share_no_window(config: Config, stores: Stores) -> None:
    batches = Batches(unshuffled(config), stores)
    even, odd = (batches.readings[phase]["text"].rows.view for phase in (0, 1))
    whole = stores.by_source["text"].view("train")
    assert even.num_tokens + odd.num_tokens == whole.num_tokens
    assert batches.readings[2]["text"].rows.view.num_tokens == int(whole.num_tokens * 0.5)


def test_fim_stands_in_the_phases_and_sources_that_ask_for_it(batches: Batches) -> None:
    middle = Stores(batches.config).tokenizer.fim_middle_id
    code = sorted(batches.config.sources).index("code")
    shares = []
    for placed in batches.plan.phases:
        rows = [(source == code, middle in row) for step in range(placed.start, placed.end)
                for source, row in zip(batches[step]["source"], batches[step]["inputs"], strict=True)]
        assert not any(has for is_code, has in rows if not is_code), "text is never cut"
        shares.append(np.mean([has for is_code, has in rows if is_code]))
    assert shares[0] == 0 and shares[1] > 0.6 > shares[2] > 0.02


def test_another_seed_is_another_order(config: Config, stores: Stores, batches: Batches) -> None:
    other = copy.deepcopy(config)
    other.data.seed += 1
    assert not equal(Batches(other, stores)[0], batches[0])


def test_the_order_never_changes_silently(batches: Batches) -> None:
    """Frozen: a change here trains another model from the same recipe, and needs a new plan format."""
    assert batches[0]["source"].tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    assert batches[9]["source"].sum() == 3


def test_heldout_windows_are_of_the_heldout_split(config: Config, stores: Stores) -> None:
    windows = heldout(config, stores)
    assert set(windows) == {"text", "code"}
    for domain, rows in windows.items():
        view = stores.by_source[domain].view("heldout")
        assert rows.shape[0] <= config.training.eval_sequences and rows.shape[1] == 33 and rows.dtype == np.int32
        starts = np.arange((view.num_tokens - 1) // 32) * 32
        every = {row.tobytes() for row in view.rows(starts, 33)}
        assert all(row.tobytes() in every for row in rows)


def broken(config: Config, change) -> Config:
    result = copy.deepcopy(config)
    change(result)
    return result


def less_vocab(c: Config) -> None:
    c.model.vocab_size = 400


def no_store(c: Config) -> None:
    c.sources["text"].store = "absent"


def no_tokenizer(c: Config) -> None:
    c.data.tokenizer = "absent.json"


def too_many_epochs(c: Config) -> None:
    c.phases[0].epochs = {"text": 0.001}


def too_little(c: Config) -> None:
    c.phases[2].subset = {"text": Subset(first=1e-5)}


@pytest.mark.parametrize(("change", "said"), [
    (less_vocab, "config.model.vocab_size: 400 is less than the 420 ids"),
    (no_store, "absent"),
    (no_tokenizer, "absent.json"),
    (too_many_epochs, "config.phases[0].epochs.text: the mix reads"),
    (too_little, "tokens"),
])
def test_data_that_do_not_fit_are_refused_in_one_line(config: Config, change, said: str) -> None:
    with pytest.raises(UserError) as caught:
        changed = broken(config, change)
        Batches(changed, Stores(changed))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_store_of_another_tokenizer_is_refused_by_both_fingerprints(config: Config, tmp_path: Path) -> None:
    from crystal_jax.data.tokenizer import train_tokenizer

    train_tokenizer(["other words entirely"] * 5, 380).save(str(tmp_path / "other.json"))
    changed = broken(config, lambda c: setattr(c.data, "tokenizer", str(tmp_path / "other.json")))
    with pytest.raises(UserError, match=r"made by tokenizer .* set config.data.tokenizer"):
        Stores(changed)


def test_stated_epochs_allow_what_they_state(config: Config, stores: Stores) -> None:
    batches = Batches(config, stores)
    reading, quota = batches.readings[0]["text"], batches.plan.phases[0].quotas["text"]
    stated = dataclasses.replace(config.phases[0], epochs={"text": quota / reading.rows.num_rows})
    Batches(dataclasses.replace(config, phases=[stated, *config.phases[1:]]), stores)
