"""Parquet: what a row becomes, and that damage is never read as other rows."""

import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data.readers import Document, Dropped, SourceSpec, list_inputs, parts, read_input
from crystal_jax.errors import UserError

ROWS = [{"text": f"document {index} é\n語 {'x' * (index % 50)}", "name": f"n{index}", "meta": {"set": "ab"[index % 2]}}
        for index in range(500)]  # fmt: skip


def write(folder: Path, name: str = "a.parquet", table: Any = None, checksums: bool = True, **options: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(ROWS) if table is None else table
    options = {"row_group_size": 100, "data_page_size": 1024, **options}
    pyarrow.parquet.write_table(table, path, write_page_checksum=checksums, **options)
    return path


def documents(source: SourceSpec) -> list[Document | Dropped]:
    return [document for item in list_inputs(source) for document in read_input(source, item)]


def parquet(*paths: Path, **keys: Any) -> SourceSpec:
    return SourceSpec("parquet", tuple(map(str, paths)), **keys)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_rows(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path, compression=compression)
    found = documents(parquet(path))
    assert [document.text for document in found] == [row["text"] for row in ROWS]
    assert found[123] == Document("a.parquet:123", ROWS[123]["text"], "a.parquet", "a.parquet:123")
    source = parquet(path, id_key="name", split_by="meta.set", split_names=(("a", "A"), ("b", "B")))
    assert parts(source) == ("A", "B")
    found = documents(source)
    assert [(document.id, document.part) for document in found[:3]] == [("n0", "A"), ("n1", "B"), ("n2", "A")]


@pytest.mark.parametrize("type_", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(),
                                   pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str)  # fmt: skip
def test_each_type_of_string(tmp_path: Path, type_: pyarrow.DataType) -> None:
    texts = ["é", None, "", "b"]
    plain = pyarrow.array([text and text.encode() if type_ == pyarrow.binary() else text for text in texts],
                          None if pyarrow.types.is_dictionary(type_) else type_)  # fmt: skip
    column = plain.dictionary_encode() if pyarrow.types.is_dictionary(type_) else plain
    found = documents(parquet(write(tmp_path, table=pyarrow.table({"text": column}))))
    assert [getattr(document, "text", "-") for document in found] == ["é", "-", "", "b"]
    assert found[1] == Dropped("a.parquet:1", "no_text")


def test_invalid_utf8_is_dropped_alone(tmp_path: Path) -> None:
    data = pyarrow.array([b"fine", b"\xff\xfe", b"\xed\xa0\x80", b"also fine"])
    text = pyarrow.StringArray.from_buffers(4, *data.buffers()[1:])
    found = documents(parquet(write(tmp_path, table=pyarrow.table({"text": text}))))
    assert [type(document).__name__ for document in found] == ["Document", "Dropped", "Dropped", "Document"]
    assert found[1] == Dropped("a.parquet:1", "not_utf8")


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    for keys, message in (
        ({"text_key": "body"}, r"no column 'body'; it has text, name, meta; choose with --text_key"),
        ({"id_key": "id"}, r"no column 'id'; .* --id_key"),
        ({"text_key": "meta"}, r"row 0: 'meta' holds dict, not a string"),
        ({"split_by": "meta.kind", "split_names": (("a", "A"),)}, r"row 0: no key 'meta.kind'"),
        ({"split_by": "meta.set", "split_names": (("a", "A"),)}, r"row 1: meta.set is 'b'"),
    ):
        with pytest.raises(UserError, match=rf"a\.parquet: {message}"):
            documents(parquet(path, **keys))


# Damage


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_named(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = write(tmp_path_factory.mktemp("cut"), "cut.parquet")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"cut\.parquet: no whole parquet file .*fetch the file again"):
        documents(parquet(path))


def flips(path: Path, count: int) -> list[str]:
    """What happens to the texts for flipped bits all over the file: error, same or changed."""
    data, texts, seen = path.read_bytes(), [row["text"] for row in ROWS], []
    for place in range(4, len(data) - 8, len(data) // count):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            found = [getattr(document, "text", None) for document in documents(parquet(path))]
            seen.append("same" if found == texts else "changed")
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            seen.append("error")
    path.write_bytes(data)
    return seen


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_flipped_bits_are_found_by_checksums(tmp_path: Path, compression: str) -> None:
    seen = flips(write(tmp_path, compression=compression), 300)
    assert "changed" not in seen
    assert seen.count("error") > 75


def test_without_checksums_flipped_bits_may_pass(tmp_path: Path) -> None:
    seen = flips(write(tmp_path, checksums=False, compression="none"), 100)
    assert "changed" in seen


def test_memory_holds_pages_not_row_groups(tmp_path: Path) -> None:
    texts = [f"{index} " + random.Random(index).randbytes(5000).hex() for index in range(4000)]  # 40 MB
    path = write(tmp_path, table=pyarrow.table({"text": texts}), row_group_size=4000, data_page_size=1 << 16,
                 use_dictionary=False, write_batch_size=8)  # fmt: skip
    del texts
    (item,) = list_inputs(parquet(path))
    pool, peak, count = pyarrow.default_memory_pool(), 0, 0
    before = pool.bytes_allocated()
    for document in read_input(parquet(path), item):
        assert len(document.text) > 10_000
        count, peak = count + 1, max(peak, pool.bytes_allocated() - before)
    assert count == 4000 and peak < 10e6
