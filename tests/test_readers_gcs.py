"""Inputs on gs://: found, named and read as local ones are."""

import shutil
from pathlib import Path

import pytest
from corpora import published_rows, write_crystal_h5, write_slimpajama, write_starcoder
from gcs import Emulator

from crystal_jax.data.readers import SourceSpec, list_inputs, read_input
from crystal_jax.errors import UserError


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    write_slimpajama(root / "slimpajama", mb=0.05, files=4)
    write_starcoder(root / "starcoder", mb=0.1)
    write_crystal_h5(root / "h5/data-2.h5", published_rows(10, 16))
    write_crystal_h5(root / "h5/data-10.h5", published_rows(10, 16, seed=1))
    (root / "text").mkdir()
    for name in ("a.md", "b.md", ".hidden.md"):
        (root / "text" / name).write_text(f"text of {name}")
    return root


@pytest.fixture(scope="module")
def bucket(tree: Path, gcs: Emulator) -> str:
    from crystal_jax.files import write_bytes

    root = gcs.folder()
    for path in tree.rglob("*"):
        if path.is_file():
            write_bytes(f"{root}/{path.relative_to(tree).as_posix()}", path.read_bytes())
    return root


def inputs_and_documents(source: SourceSpec) -> tuple[list, list]:
    inputs = list_inputs(source)
    found = [document for item in inputs for document in read_input(source, item)]
    for document in found:
        if hasattr(document, "ids"):
            object.__setattr__(document, "ids", document.ids.tolist())
    return [(item.name, item.bytes, item.ordinal, [name for _, name in item.files]) for item in inputs], found


@pytest.mark.parametrize(("kind", "place"), [
    ("slimpajama", "slimpajama"), ("slimpajama", "slimpajama/train/chunk*/*"), ("starcoder", "starcoder/"),
    ("crystal-h5", "h5"), ("crystal-h5", "h5/data-2.h5"), ("text", "text"), ("text", "text/?.md"),
    ("parquet", "starcoder/css"),
])  # fmt: skip
def test_the_same_inputs_and_documents(tree: Path, bucket: str, kind: str, place: str) -> None:
    keys = {"text_key": "content"} if kind == "parquet" else {}
    local = inputs_and_documents(SourceSpec(kind, (f"{tree}/{place}",), **keys))
    assert inputs_and_documents(SourceSpec(kind, (f"{bucket}/{place}",), **keys)) == local
    assert local[1]


def test_what_is_not_there(tree: Path, bucket: str, gcs: Emulator) -> None:
    for place, message in (
        (f"{bucket}/gone", "gone: no such file"),
        (f"{bucket}/gone/*.md", "no such file"),
        (f"{bucket}/slimpajama/validation", "validation: holds no file to read"),
        ("s3://bucket/x", "s3://bucket/x: storage of another kind"),
    ):
        with pytest.raises(UserError, match=message.replace("*", r"\*")):
            list_inputs(SourceSpec("slimpajama" if "slim" in place else "text", (place,)))
    with pytest.raises(UserError, match="some local and some remote"):
        list_inputs(SourceSpec("text", (f"{bucket}/text", f"{tree}/text")))
    with pytest.raises(UserError, match=r"a\.md is listed twice"):
        list_inputs(SourceSpec("text", (f"{bucket}/text", f"{bucket}/text/a.md")))


def test_a_damaged_file_is_named(tree: Path, bucket: str, gcs: Emulator, tmp_path: Path) -> None:
    from crystal_jax.files import write_bytes

    folder = gcs.folder()
    shutil.copytree(tree / "slimpajama/train/chunk1", tmp_path / "chunk1")
    path = tmp_path / "chunk1/example_train_0.jsonl.zst"
    write_bytes(f"{folder}/chunk1/{path.name}", path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{folder}/chunk1/example_train_0\.jsonl\.zst: truncated"):
        inputs_and_documents(SourceSpec("slimpajama", (folder,)))
    css = (tree / "starcoder/css/train-00000-of-00002.parquet").read_bytes()
    write_bytes(f"{folder}/css/train-0.parquet", css[:-20])
    with pytest.raises(UserError, match=rf"{folder}/css/train-0\.parquet: no whole parquet file"):
        inputs_and_documents(SourceSpec("starcoder", (f"{folder}/css",)))


def test_an_object_that_vanishes_is_named(gcs: Emulator) -> None:
    from crystal_jax.files import as_path, write_bytes

    path = f"{gcs.folder()}/a.md"
    write_bytes(path, b"x")
    source = SourceSpec("text", (path,))
    (item,) = list_inputs(source)
    as_path(path).unlink()
    with pytest.raises(UserError, match=rf"{path}: can't be read \(FileNotFoundError"):
        list(read_input(source, item))
