"""`store export --to=tfds`: what TFDS reads back is the store, in its order; whole or not there; without TensorFlow."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from hypothesis import given
from hypothesis import strategies as st
from stores import make_store, upload

from crystal_jax.data import tfds_export
from crystal_jax.data.documents import read_documents
from crystal_jax.data.store import ShardSpan, TokenStore
from crystal_jax.data.tfds_export import ORIGIN, VERSION, dataset_name, export_tfds
from crystal_jax.errors import UserError

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("tensorflow_datasets"),
                       reason="needs TFDS: pip install -r requirements/data.txt"),
    pytest.mark.filterwarnings("ignore:label.. is deprecated:DeprecationWarning"),  # TFDS reading its own metadata
]
LENGTHS = ((5, 2, 40), (), (300,), (2, 2, 2, 7))
"""Of documents, by shard: one shard has none."""
SPLITS = ("train", "heldout")


def opened(output: Path, name: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.data_source(name, data_dir=output, split=split)


def files_of(folder: Path) -> dict[str, bytes]:
    folder = Path(folder)  # epath knows no rglob
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    make_store(tmp_path / "small", LENGTHS)
    return TokenStore.open(tmp_path / "small")


def test_documents_come_back_in_order(store: TokenStore, tmp_path: Path) -> None:
    result = export_tfds(store.path, tmp_path / "out")
    assert (result.name, result.folder) == ("small", tmp_path / "out" / "small" / VERSION)
    for split in SPLITS:
        view = store.view(split)
        wanted = [document for span in view.shards for document in read_documents(store, view, split, span)]
        data = opened(tmp_path / "out", "small", split)
        assert len(data) == len(wanted) == result.examples[split] == 8
        for example, document in zip(data, wanted, strict=True):
            assert example["id"].decode() == document.id and example["source"].decode() == document.source
            assert example["tokens"].dtype == np.int32
            np.testing.assert_array_equal(example["tokens"], document.ids)
        # Any record at once, as training wants it.
        np.testing.assert_array_equal(data[5]["tokens"], wanted[5].ids)


@pytest.mark.parametrize("length", [1, 7, 100, 359])
def test_windows_come_back_in_order(store: TokenStore, tmp_path: Path, length: int) -> None:
    result = export_tfds(store.path, tmp_path / "out", length)
    for split in SPLITS:
        view = store.view(split)
        data = opened(tmp_path / "out", f"small_windows_{length}", split)
        assert len(data) == (view.num_tokens - 1) // length == result.examples[split]
        for number, example in enumerate(data):
            assert example["start"] == number * length and example["tokens"].shape == (length + 1,)
            np.testing.assert_array_equal(example["tokens"], view.read(number * length, length + 1))


def test_the_metadata_say_what_it_is(store: TokenStore, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    folder = export_tfds(store.path, tmp_path / "out").folder
    builder = tfds.builder_from_directory(folder)
    assert builder.info.name == "small" and str(builder.info.version) == VERSION
    assert builder.info.disable_shuffling, "the order is the store's"
    assert builder.info.file_format.value == "array_record"
    assert store.fingerprint in builder.info.description and store.tokenizer_fingerprint in builder.info.description
    assert set(builder.info.features) == {"id", "source", "tokens"}
    for split in SPLITS:
        info = builder.info.splits[split]
        assert list(info.shard_lengths) == [3, 1, 4], "a file per shard that has documents"
        assert info.num_bytes == sum(os.path.getsize(path) for path in info.filepaths)
    assert len(builder.as_data_source("train[:50%]")) == 4
    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    assert origin == {"store": "small", "store_digest": store.fingerprint, "sequence_length": None,
                      "tokenizer": store.tokenizer_fingerprint}


def test_a_split_without_examples_is_left_out(tmp_path: Path) -> None:
    make_store(tmp_path / "small", [(9,)])
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["splits"]["heldout"]["tokens"] == 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(manifest["splits"]["heldout"], "tokens", 0)
        store = SimpleNamespace(path="small", splits=manifest["splits"], view=TokenStore.open(tmp_path / "small").view)
        assert tfds_export._parts(store, 4).keys() == {"train"}  # type: ignore[arg-type]


def test_odd_names_survive(tmp_path: Path) -> None:
    """A file's name may hold bytes that aren't UTF-8: Python knows them as lone surrogates."""
    values = {"id": "a\udcff", "source": "naïve 日本", "tokens": np.array([70000, 1], np.int32)}
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(tfds_export._serialise(values)).features.feature
    assert feature["id"].bytes_list.value[0] == b"a\\udcff"
    assert feature["source"].bytes_list.value[0].decode() == "naïve 日本"
    assert list(feature["tokens"].int64_list.value) == [70000, 1]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any), st.integers(1, 40))
def test_each_window_lies_in_one_file(sizes: Sequence[int], length: int) -> None:
    starts = np.cumsum([0, *sizes])
    spans = [ShardSpan(str(index), index, int(start), size)
             for index, (start, size) in enumerate(zip(starts, sizes, strict=False))]
    view: Any = SimpleNamespace(num_tokens=sum(sizes), shards=spans)
    parts = [tfds_export._window_part("train", view, span, length) for span in spans]
    numbers = [number for part in parts for number in range(part.first, part.first + part.count)]
    assert numbers == list(range((sum(sizes) - 1) // length))
    for part in parts:
        for number in range(part.first, part.first + part.count):
            assert part.span.start <= number * length < part.span.start + part.span.tokens


@pytest.mark.parametrize("store, length, name", [
    ("slimpajama/C4", None, "slimpajama_c4"), ("slimpajama/C4", 2048, "slimpajama_c4_windows_2048"),
    ("pystd-code", None, "pystd_code"), ("2nd", None, "store_2nd"), ("日本", None, "store"),
])
def test_names(store: str, length: int | None, name: str) -> None:
    assert dataset_name(store, length) == name


@given(st.text(min_size=1), st.none() | st.integers(1, 9999))
def test_every_name_is_one_for_tfds(store: str, length: int | None) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", dataset_name(store, length))


def test_a_stopped_export_goes_on(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files_of(export_tfds(store.path, tmp_path / "whole").folder)
    write, written = tfds_export._write_part, []

    def stop_at_the_third(store: TokenStore, part: Any, length: int | None, target: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target.name)
        write(store, part, length, target)

    with monkeypatch.context() as patch:
        patch.setattr(tfds_export, "_write_part", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            export_tfds(store.path, tmp_path / "out")
    folder = tmp_path / "out" / "small" / VERSION
    assert files_of(folder).keys() == {ORIGIN, *written}, "no metadata yet: TFDS takes it for nothing"
    times = {name: (folder / name).stat().st_mtime_ns for name in written}
    assert export_tfds(store.path, tmp_path / "out").folder == folder
    assert files_of(folder) == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == times, "what was whole is left alone"


KILLED = """
import os, signal, sys
from array_record.python import array_record_module
from crystal_jax.data import tfds_export

documents = tfds_export._documents
def die(store, part):
    for number, values in enumerate(documents(store, part)):
        if part.split == "heldout" and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield values
tfds_export._documents = die
tfds_export.export_tfds(sys.argv[1], sys.argv[2])
"""


def test_a_killed_export_leaves_nothing_half(store: TokenStore, tmp_path: Path) -> None:
    whole = files_of(export_tfds(store.path, tmp_path / "whole").folder)
    result = run_python(KILLED, store.path, tmp_path / "out")
    assert result.returncode == -9, result.stderr
    folder = tmp_path / "out" / "small" / VERSION
    there = {name: data for name, data in files_of(folder).items() if "/" not in name}
    assert there.items() <= whole.items() and len(there) == 4, "what has its name is whole"
    export_tfds(store.path, tmp_path / "out")
    assert files_of(folder) == whole and all(path.is_file() for path in folder.iterdir())


def test_a_finished_export_is_left_alone(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = export_tfds(store.path, tmp_path / "out")
    monkeypatch.setattr(tfds_export, "_write_part", lambda *_: pytest.fail("writes again"))
    assert export_tfds(store.path, tmp_path / "out") == first


def test_another_store_isnt_mixed_in(store: TokenStore, tmp_path: Path) -> None:
    export_tfds(store.path, tmp_path / "out")
    make_store(tmp_path / "other" / "small", [(4, 4)])
    with pytest.raises(UserError, match=r"small/1\.0\.0: exported with store_digest \w+, now it is \w+; remove"):
        export_tfds(tmp_path / "other" / "small", tmp_path / "out")


def test_a_strangers_folder_is_left_alone(store: TokenStore, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "small" / VERSION
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("three years")
    with pytest.raises(UserError, match="holds something that no export began"):
        export_tfds(store.path, tmp_path / "out")
    assert files_of(folder) == {"thesis.tex": b"three years"}


@pytest.mark.parametrize("length, message", [
    (0, "--sequence_length: 0 must be 1 or more"), (-3, "--sequence_length: -3"),
    (5000, "no example to export; it is shorter than --sequence_length=5000"),
])
def test_lengths_that_give_nothing(store: TokenStore, tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_tfds(store.path, tmp_path / "out", length)
    assert not (tmp_path / "out").exists()


def test_without_tfds(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"tensorflow_datasets: not installed.*pip install .*data.txt"):
        export_tfds(store.path, tmp_path / "out")


def run_python(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          env={**OUTER_ENVIRONMENT, "PYTHONPATH": str(ROOT)}, timeout=600, check=False)


WITHOUT_TENSORFLOW = """
import sys
from crystal_jax.cli import main
code = main(["store", "export", "--to=tfds", *sys.argv[1:]])
import tensorflow_datasets as tfds
print(len(tfds.data_source("small", data_dir=sys.argv[2], split="train")), "tensorflow" in sys.modules)
sys.exit(code)
"""


def test_the_command_and_the_reader_load_no_tensorflow(store: TokenStore, tmp_path: Path) -> None:
    result = run_python(WITHOUT_TENSORFLOW, store.path, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    told, seen = result.stdout.splitlines()
    assert told == (f"{tmp_path}/out/small/1.0.0: 8 train, 8 heldout; "
                    f"tfds.data_source('small', data_dir='{tmp_path}/out')")
    assert seen == "8 False"
    assert "small: 100%" in result.stderr and "tok/s" in result.stderr, "a progress bar"


@pytest.mark.parametrize("args, message", [
    (("export", "--to=csv", "{store}", "out"), "argument --to: invalid choice: 'csv'"),
    (("export", "{store}", "out"), "the following arguments are required: --to"),
    (("export", "--to=tfds", "nowhere", "out"), "nowhere"),
])
def test_mistakes_are_one_line(run_cli: Callable[..., subprocess.CompletedProcess[str]], store: TokenStore,
                               tmp_path: Path, args: Sequence[str], message: str) -> None:
    result = run_cli("store", *(arg.format(store=store.path) for arg in args), cwd=tmp_path)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("crystal-jax store: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_from_and_to_gs(store: TokenStore, tmp_path: Path, gcs: Any) -> None:
    """The store and the dataset both on gs://; the files are those of a local export."""
    from crystal_jax.files import as_path

    source, output = gcs.folder(), gcs.folder()
    upload(Path(store.path), f"{source}/small")
    whole = files_of(export_tfds(store.path, tmp_path / "out").folder)
    result = export_tfds(f"{source}/small", output)
    assert {name: (as_path(result.folder) / name).read_bytes() for name in whole} == whole
    assert export_tfds(f"{source}/small", output) == result
