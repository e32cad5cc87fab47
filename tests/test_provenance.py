"""Provenance for recipes of every kind: both ways agree, nothing is seen twice or left out, FIM hides no document."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected import BATCH, LENGTH, make_small, small_config

from crystal_jax import files
from crystal_jax.config import Config, Subset
from crystal_jax.data.fim import Fim
from crystal_jax.data.pipeline import Batches, Stores
from crystal_jax.data.provenance import Part, Provenance, Sequence
from crystal_jax.data.store import TokenStore
from crystal_jax.errors import UserError
from crystal_jax.inspect import describe_step, open_config
from crystal_jax.rules import validate

DOCUMENTS = [f"{name}/{shard}-{line}" for name in ("text", "code") for shard in range(4) for line in range(5)]


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(world, tmp_path_factory.mktemp("small"))


def one_phase(root: Path, packing: str, steps: int, mix: dict[str, float], **fields: object) -> Config:
    config = small_config(root, packing)
    config.phases = config.phases[:1]
    phase = config.phases[0]
    phase.steps, phase.mix, phase.subset, phase.checkpoint_every = steps, mix, {}, steps
    for name, value in fields.items():
        setattr(phase, name, value)
    return validate(config)


def opened(config: Config) -> tuple[Batches, Provenance]:
    stores = Stores(config)
    batches = Batches(config, stores)
    return batches, Provenance(batches, stores)


def whole_step(batches: Batches, provenance: Provenance, step: int) -> list[Sequence]:
    batch = batches[step]
    return provenance.sequences(step, batch, list(range(len(batch["source"]))), 0)


def visible(part: Part) -> bool:
    return part.in_sequence[0] < part.in_sequence[1]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_in_an_epoch_each_token_of_a_document_is_predicted_once(small: Path, packing: str, shuffle: bool) -> None:
    """By its visits alone: concat leaves out what is behind the last whole row, best_fit predicts no first token."""
    batches, _ = opened(one_phase(small, packing, 1, {"text": 1.0}))
    reading = batches.readings[0]["text"]
    assert reading.rows is not None
    config = one_phase(small, packing, -(-3 * reading.rows.num_rows // BATCH), {"text": 1.0})
    config.data.shuffle = shuffle
    batches, provenance = opened(config)
    left_out = []
    for name in DOCUMENTS[:20]:
        (found,) = provenance.occurrences(name)
        visits = provenance.visits(found)
        if found.split == "heldout":
            assert not visits and not provenance.is_read(found)
            continue
        length = found.in_shard[1] - found.in_shard[0]
        predicted: Counter[int] = Counter()
        for visit in visits:
            predicted[visit.epoch] += visit.part.predicted
        assert {predicted[0], predicted[1], predicted[2]} == {predicted[0]}, "each epoch is the same documents"
        if packing == "best_fit":
            assert predicted[0] == length - 1
        elif predicted[0] != length:
            left_out.append((found.shard, length - predicted[0]))
    if packing == "concat":  # the very first token of the view, and its end
        assert len(left_out) <= 3 and sum(count for _, count in left_out) <= LENGTH + 1


@given(data=st.data())
@settings(max_examples=12)
def test_both_ways_agree_for_any_recipe(small: Path, data: st.DataObject) -> None:
    packing = data.draw(st.sampled_from(["concat", "best_fit"]))
    steps = data.draw(st.integers(1, 12))
    share = data.draw(st.sampled_from([0.1, 0.5, 0.8]))
    subset = {name: Subset(data.draw(st.sampled_from(["all", "even", "odd"])),
                           data.draw(st.sampled_from([1.0, 0.7])), "carried") for name in ("text", "code")}
    rates = {name: rate for name in ("text", "code") if (rate := data.draw(st.sampled_from([0.0, 0.5, 1.0])))}
    config = one_phase(small, packing, steps, {"text": share, "code": 1 - share}, subset=subset, fim_rate=rates,
                       spm_rate=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
                       global_batch_size=data.draw(st.integers(1, 9)))
    config.data.seed = data.draw(st.integers(0, 1000))
    batches, provenance = opened(config)
    seen = {}
    for step in range(steps):
        for sequence in whole_step(batches, provenance, step):
            for part in filter(visible, sequence.parts):
                seen[step, sequence.slot, sequence.epoch, part.in_sequence] = part.document
                assert part.in_shard[1] - part.in_shard[0] == part.in_document[1] - part.in_document[0] > 0
                assert 0 <= part.in_document[0] < part.in_document[1] <= part.length
                assert part.predicted <= part.in_sequence[1] - part.in_sequence[0]
    for name in DOCUMENTS[data.draw(st.integers(0, 4)) :: 5]:
        (found,) = provenance.occurrences(name)
        visits = {(visit.step, visit.slot, visit.epoch, visit.part.in_sequence) for visit in provenance.visits(found)}
        assert visits == {place for place, document in seen.items() if document == name}


def test_a_shard_is_read_once_for_a_step(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the full recipe touches hundreds of shards, whose lists of documents don't fit in memory together."""
    batches, provenance = opened(one_phase(small, "concat", 4, {"text": 0.5, "code": 0.5}, global_batch_size=40))
    asked: Counter[tuple[str, str]] = Counter()
    original = TokenStore.documents

    def counting(self: TokenStore, split: str, shard: str):
        asked[str(self.path), shard] += 1
        return original(self, split, shard)

    monkeypatch.setattr(TokenStore, "documents", counting)
    whole_step(batches, provenance, 2)
    assert len(asked) == 8 and set(asked.values()) == {1}


def test_documents_stay_apart_under_fim_wherever_the_row_begins(small: Path) -> None:
    """Rows cut out of the stream at any place: <s> and </s> stay where the part that they belong to says."""
    config = one_phase(small, "concat", 4, {"code": 1.0}, fim_rate={"code": 1.0})
    stores, provenance = Stores(config), opened(config)[1]
    tokenizer, fim = stores.tokenizer, Fim(stores.tokenizer, "local")
    view = stores.by_source["code"].view("train")
    stream = view.read(0, view.num_tokens)
    ends = np.flatnonzero(stream == tokenizer.eos_id) + 1
    hidden = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        first = int(rng.integers(0, len(stream) - LENGTH - 1))
        before = stream[first : first + LENGTH + 1]
        after, _ = fim.apply(before, rng, 0.7, 0.5)
        inner = ends[(ends > first) & (ends < first + LENGTH + 1)] - first
        stops = np.array([0, *inner, LENGTH + 1])
        end = len(after) - int(np.argmax(after[::-1] != tokenizer.fim_pad_id))
        placed = provenance._placed(stops, before, after, end)
        assert placed[0] == 0 and placed[-1] == end and (np.diff(placed) >= 0).all()
        for begin, stop in pairwise(placed):
            if begin == stop:
                hidden += 1
                continue
            assert begin == 0 or after[begin] == tokenizer.bos_id
            assert stop == end or after[stop - 1] == tokenizer.eos_id
            assert np.count_nonzero(after[begin:stop] == tokenizer.eos_id) <= 1
    assert hidden > 3


@pytest.mark.parametrize(("spm_rate", "order"), [(1.0, "SPM"), (0.0, "PSM")])
def test_the_order_of_fim_is_the_one_that_was_drawn(small: Path, spm_rate: float, order: str) -> None:
    """But where the prefix is empty, both orders are the same tokens and are called SPM."""
    rates = {"fim_rate": {"code": 1.0}, "spm_rate": spm_rate}
    batches, provenance = opened(one_phase(small, "concat", 4, {"code": 1.0}, **rates))
    orders = Counter(fim.order for step in range(4) for sequence in whole_step(batches, provenance, step)
                     for part in sequence.parts for fim in part.fim)
    assert orders.most_common(1)[0][0] == order and orders[order] > 20
    # The other one stands where the row ends behind <|fim_prefix|>, or before an empty prefix.
    assert orders.total() - orders[order] < 10


def test_an_id_that_no_document_has_is_answered_with_its_neighbours(small: Path) -> None:
    _, provenance = opened(one_phase(small, "concat", 2, {"text": 0.5, "code": 0.5}))
    for wanted, near in (("code/1", "code/1-"), ("aaa", "code/0-0"), ("zzz", "text/3-4"),
                         ("code/9", "code/3-4, text/0-0"), ("TEXT", "code/0-0")):
        with pytest.raises(UserError) as caught:
            provenance.occurrences(wanted)
        assert f"the nearest: {near}" in str(caught.value) and "\n" not in str(caught.value)


def test_stores_on_gs_give_the_same_answer(small: Path, gcs) -> None:
    folder = files.as_path(gcs.folder())
    wanted = [small / "tokenizer.json", *(path for name in ("text", "code") for path in (small / name).rglob("*"))]
    for path in filter(Path.is_file, wanted):
        files.write_bytes(folder / path.relative_to(small).as_posix(), path.read_bytes())
    for packing in ("concat", "best_fit"):
        config = small_config(small, packing)
        here = describe_step(open_config(config), 9)
        config.data.root = str(folder)
        there = open_config(config)
        assert describe_step(there, 9) == here
        name = here["sequences"][3]["parts"][0]["document"]
        (found,) = there.provenance.occurrences(name)
        assert (8, 3) in {(visit.step, visit.slot) for visit in there.provenance.visits(found)}
