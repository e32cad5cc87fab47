"""The published HDF5 files: rows become documents of the very same tokens; a row that contradicts itself is named."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from corpora import published_rows, write_crystal_h5
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data.readers import SourceSpec, Tokens, crystal_h5, list_inputs, parts, read_input
from crystal_jax.errors import UserError

LENGTH = 32


def documents(*paths: Path, files_per_input: int = 1) -> list[Tokens]:
    source = SourceSpec("crystal-h5", tuple(map(str, paths)), files_per_input=files_per_input)
    return [document for item in list_inputs(source) for document in read_input(source, item)]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_rows_are_documents(tmp_path: Path, dtype: type) -> None:
    rows = published_rows(600, LENGTH)
    found = documents(write_crystal_h5(tmp_path / "data-00000.h5", rows.astype(dtype)))
    assert len(found) == 600
    for index, document in enumerate(found):
        assert isinstance(document, Tokens) and document.ids.dtype == np.int32
        assert document.id == document.group == f"data-00000.h5:{index}"
        inputs, mask, labels = rows[index]
        np.testing.assert_array_equal(document.ids[:-1], inputs[mask == 1])
        np.testing.assert_array_equal(document.ids[1:], labels[mask == 1])
    assert {len(document.ids) for document in found[1::3]} == {LENGTH + 1}


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_ids_hold_every_prediction_of_a_row(count: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, 2**31, (count, length + 1))
    ends = rng.integers(1, length + 1, count)
    mask = (np.arange(length) < ends[:, None]).astype(np.int64)
    noise = rng.integers(-9, 9, (2, count, length)) * (1 - mask)  # whatever lies where the mask is off
    rows = np.stack([stream[:, :-1] * mask + noise[0], mask, stream[:, 1:] * mask + noise[1]], axis=1)
    found = list(crystal_h5._tokens("a.h5", "a.h5", 7, rows))
    for row, document in enumerate(found):
        assert document.id == f"a.h5:{row + 7}"
        np.testing.assert_array_equal(document.ids, stream[row, : ends[row] + 1])


def test_files_are_in_order(tmp_path: Path) -> None:
    rows = published_rows(4, LENGTH)
    paths = [write_crystal_h5(tmp_path / f"data-{number}.h5", rows + 0 * number) for number in (0, 1, 2, 10, 11)]
    source = SourceSpec("crystal-h5", (str(tmp_path),))
    assert [item.files[0][0] for item in list_inputs(source)] == [str(path) for path in paths]
    assert [item.ordinal for item in list_inputs(source)] == [0, 1, 2, 3, 4]
    assert parts(source) == ("",)
    assert len(documents(tmp_path, files_per_input=2)) == 20


def change(row: int, kind: int, place: int | slice, value: int) -> Callable[[np.ndarray], None]:
    return lambda rows: rows.__setitem__((row, kind, place), value)


@pytest.mark.parametrize(("edit", "row", "rule"), [
    (change(500, 2, 3, 7000), 500, "the labels aren't the inputs one place later"),
    (change(301, 0, 9, 7000), 301, "the labels aren't the inputs one place later"),
    (change(4, 1, 9, 0), 4, "the mask isn't ones, then zeros"),
    (change(4, 1, 0, 0), 4, "the mask"),
    (change(4, 1, slice(None), 0), 4, "the mask is all zeros"),
    (change(4, 1, LENGTH - 1, 2), 4, "the mask isn't ones, then zeros"),
    (change(4, 0, 0, -1), 4, r"an id isn't from 0 to 2\^31 - 1"),
    (change(4, 2, LENGTH - 1, 2**31), 4, r"an id isn't from 0 to 2\^31 - 1"),
])  # fmt: skip
def test_rows_that_contradict_themselves(tmp_path: Path, edit: Callable, row: int, rule: str) -> None:
    rows = published_rows(600, LENGTH).astype(np.int64)
    edit(rows)
    with pytest.raises(UserError, match=rf"bad\.h5: row {row}: {rule}"):
        documents(write_crystal_h5(tmp_path / "bad.h5", rows))


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path: Path, share: float) -> None:
    path = write_crystal_h5(tmp_path / "cut.h5", published_rows(600, LENGTH))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"cut\.h5: no whole HDF5 file .*fetch the file again"):
        documents(path)


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    rows = published_rows(40, LENGTH)
    path = write_crystal_h5(tmp_path / "flip.h5", rows)
    expected = [document.ids.tolist() for document in documents(path)]
    data = path.read_bytes()
    errors = 0
    for place in range(0, len(data), len(data) // 100):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            found = [document.ids.tolist() for document in documents(path)]
        except UserError as error:
            assert "flip.h5" in str(error) and "\n" not in str(error)
            errors += 1
        else:
            assert found == expected
    assert errors > 30


def test_other_hdf5_files_are_named(tmp_path: Path) -> None:
    for name, shape, message in (
        ("tokens", (3, 3, 8), r"no dataset 'data'; it has tokens"),
        ("data", (3, 8), r"'data' is int32 \[3, 8\], not integers \[rows, 3, length\]"),
        ("data", (3, 2, 8), r"'data' is int32 \[3, 2, 8\]"),
    ):
        with h5py.File(tmp_path / "other.h5", "w") as file:
            file.create_dataset(name, shape, np.int32)
        with pytest.raises(UserError, match=rf"other\.h5: {message}"):
            documents(tmp_path / "other.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_group("data")
    with pytest.raises(UserError, match=r"other\.h5: 'data' is a group, not integers"):
        documents(tmp_path / "other.h5")
