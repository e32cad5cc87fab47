"""The published HDF5 rows, from the file to the batches: each row as it was trained on, once an epoch."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import published_rows, write_crystal_h5
from preparing import in_process
from world import make_config

from crystal_jax import cli
from crystal_jax.config import Config, LearningRate, Phase, Source
from crystal_jax.data.pipeline import Batches, Stores
from crystal_jax.data.prepare import prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.errors import UserError

T, ROWS, BATCH = 32, 64, 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)


def write_rows(world: Path, root: Path, full: bool) -> list[np.ndarray]:
    """Two files in root/raw and a tokenizer; the ids [T + 1] of each row."""
    (root / "tokenizer.json").write_bytes((world / "tokenizer.json").read_bytes())
    found = []
    for index in (0, 1):
        rows = published_rows(ROWS // 2, T, seed=index, full=full)
        write_crystal_h5(root / "raw" / f"data-{index}.h5", rows)
        lengths = rows[:, 1].sum(axis=1)
        found += [np.append(row[0, :length], row[2, length - 1]) for row, length in zip(rows, lengths, strict=True)]
    return found


def prepare_rows(root: Path, *more: str) -> int:
    return cli.main(["prepare", "--source=crystal-h5", f"--input={root / 'raw'}", "--name=rows", f"--output={root}",
                     f"--tokenizer={root / 'tokenizer.json'}", *more])  # fmt: skip


def config_of(root: Path, packing: str) -> Config:
    """One epoch of the rows."""
    config = make_config(root)
    phase = Phase("phase1", steps=ROWS // BATCH, mix={"rows": 1.0}, lr=LearningRate(0.01, 2, 0.001, ROWS // BATCH),
                  global_batch_size=BATCH)  # fmt: skip
    data = dataclasses.replace(config.data, packing=packing)
    return dataclasses.replace(config, sources={"rows": Source("rows", "text")}, phases=[phase], data=data)


def test_an_epoch_is_the_published_rows(world: Path, tmp_path: Path) -> None:
    wanted = write_rows(world, tmp_path, full=True)
    assert prepare_rows(tmp_path, "--packing=best_fit", f"--sequence_length={T}") == 0
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["heldout"] == 0.0 and manifest["splits"]["heldout"]["documents"] == 0
    config = config_of(tmp_path, "best_fit")
    batches = Batches(config, Stores(config))
    found: Counter[bytes] = Counter()
    for step in range(len(batches)):
        batch = batches[step]
        assert batch["mask"].all()
        rows = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
        found.update(row.astype(np.int32).tobytes() for row in rows)
    assert len(batches) == ROWS // BATCH
    assert found == Counter(row.astype(np.int32).tobytes() for row in wanted)


def test_rows_that_end_early_keep_their_targets(world: Path, tmp_path: Path) -> None:
    wanted = write_rows(world, tmp_path, full=False)
    assert prepare_rows(tmp_path, "--packing=best_fit", f"--sequence_length={T}") == 0
    config = config_of(tmp_path, "best_fit")
    batches = Batches(config, Stores(config))
    ((reading,),) = (found.values() for found in batches.readings)
    assert reading.rows is not None and reading.store is not None
    view, found = reading.store.view("train"), Counter[bytes]()
    before = {span.name: span.start for span in view.shards}
    for row in range(reading.rows.num_rows):
        for piece in reading.rows.pieces(row):
            found[view.read(before[piece.shard] + piece.start, piece.length).astype(np.int32).tobytes()] += 1
        assert reading.rows.read(np.array([row]))[1] is not None
    assert found == Counter(row.astype(np.int32).tobytes() for row in wanted)


def test_concat_is_refused(world: Path, tmp_path: Path) -> None:
    write_rows(world, tmp_path, full=True)
    prepare(SourceSpec("crystal-h5", (str(tmp_path / "raw"),)), "rows", tmp_path / "tokenizer.json", tmp_path)
    config = config_of(tmp_path, "concat")
    with pytest.raises(UserError) as error:
        Batches(config, Stores(config))
    assert str(error.value) == (
        f"config.phases[0].subset.rows: {tmp_path / 'rows'}: its documents are published rows, which "
        "config.data.packing=concat cuts elsewhere; run its `prepare` command again with --packing=best_fit "
        f"--sequence_length={T} and set config.data.packing=best_fit")
    assert prepare_rows(tmp_path, "--packing=best_fit", f"--sequence_length={T}") == 0  # as it says
    config = config_of(tmp_path, "best_fit")
    assert len(Batches(config, Stores(config))) == ROWS // BATCH


def test_a_share_may_be_held_out_on_request(world: Path, tmp_path: Path) -> None:
    write_rows(world, tmp_path, full=True)
    assert prepare_rows(tmp_path, "--heldout=0.3") == 0
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["heldout"] == 0.3 and manifest["splits"]["heldout"]["documents"] > 0
