"""TFDS datasets and seqio Tasks and Mixtures, as those libraries write and register them.

What needs TensorFlow is asked of one process (readers_probe.py).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from corpora import write_tfds
from hypothesis import example, given
from hypothesis import strategies as st

from crystal_jax.data.readers import Document, SourceSpec, list_inputs, parts, read_input
from crystal_jax.errors import UserError

TEXTS = [f"document {index} é\n{'word ' * (index % 50)}" for index in range(100)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:label\\(\\) is deprecated:DeprecationWarning"),  # TFDS with a newer protobuf
    pytest.mark.skipif(not importlib.util.find_spec("tensorflow_datasets"),
                       reason="needs tensorflow_datasets and seqio: pip install -r requirements/data.txt"),
]  # fmt: skip


# TFDS


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    write_tfds(folder, [{"text": text, "number": index} for index, text in enumerate(TEXTS)])
    return folder


def source(folder: Path, name: str = "small_text", **keys: Any) -> SourceSpec:
    return SourceSpec(f"tfds:{name}", (str(folder),), **keys)


def documents(spec: SourceSpec) -> list[Any]:
    return [document for item in list_inputs(spec) for document in read_input(spec, item)]


def test_a_tfds_dataset(tfds_dir: Path) -> None:
    inputs = list_inputs(source(tfds_dir))
    names = [f"small_text/small_text-train.array_record-{index:05d}-of-00003" for index in range(3)]
    assert [item.name for item in inputs] == names
    assert [item.ordinal for item in inputs] == [0, 1, 2]
    assert sum(item.bytes for item in inputs) > sum(map(len, TEXTS))
    assert parts(source(tfds_dir)) == ("",)
    found = documents(source(tfds_dir))
    assert [document.text for document in found] == TEXTS
    assert found[0] == Document(f"{names[0]}:0", TEXTS[0], names[0], f"{names[0]}:0")
    assert [document.id for document in documents(source(tfds_dir, id_key="number"))] == list(map(str, range(100)))
    assert len(documents(source(tfds_dir, "small_text:1.0.0"))) == 100


@pytest.mark.parametrize(("name", "keys", "message"), [
    ("small_txt", {}, r"--source: tfds:small_txt: isn't in .*; did you mean small_text\?"),
    ("small_text:2.0.0", {}, r"isn't in .*; known: 1\.0\.0"),
    ("small_text/conf", {}, r"isn't in .*; known: 1\.0\.0"),
    ("small_text", {"text_key": "txt"}, r"example 0: no key 'txt'; it has number, text; choose with --text_key"),
    ("small_text", {"text_key": "number"}, r"example 0: 'number' holds int\d*, not a string"),
])  # fmt: skip
def test_datasets_that_are_not_there(tfds_dir: Path, name: str, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        documents(source(tfds_dir, name, **keys))
    assert "\n" not in str(caught.value)


def test_a_data_dir_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone, which is no folder; give the data_dir with --input"):
        list_inputs(source(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"--input: a,b: .* takes one, its data_dir"):
        list_inputs(SourceSpec("tfds:small_text", ("a", "b")))


@example(share=0.5)  # ends between two of the file's blocks: no record is left, and TFDS sees no fault
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_array_records_are_named(tfds_dir: Path, share: float) -> None:
    item = list_inputs(source(tfds_dir))[1]
    path = Path(item.files[0][0])
    data = path.read_bytes()
    try:
        path.write_bytes(data[: int(len(data) * share)])
        texts = [document.text for document in read_input(source(tfds_dir), item)]
    except UserError as error:
        assert f"{path}: " in str(error) and "\n" not in str(error)
    else:  # only padding was lost
        assert texts == TEXTS[33:67]
    finally:
        path.write_bytes(data)


def test_flipped_bits_of_array_records_are_named(tfds_dir: Path) -> None:
    item = list_inputs(source(tfds_dir))[1]
    path = Path(item.files[0][0])
    data = path.read_bytes()
    errors = 0
    try:
        for place in [place for place in range(len(data)) if data[place]][::25]:
            path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
            try:
                assert [document.text for document in read_input(source(tfds_dir), item)] == TEXTS[33:67]
            except UserError as error:
                assert f"{path}: " in str(error)
                errors += 1
    finally:
        path.write_bytes(data)
    assert errors > 20


def test_reading_array_records_needs_no_tensorflow(tfds_dir: Path) -> None:
    program = ("import sys\nfrom crystal_jax.data.readers import *\n"
               f"source = SourceSpec('tfds:small_text', ({str(tfds_dir)!r},))\n"
               "print(sum(1 for item in list_inputs(source) for _ in read_input(source, item)))\n"
               "print('tensorflow' in sys.modules)")  # fmt: skip
    assert run_python("-c", program).split() == ["100", "False"]


# seqio


def run_python(*args: object) -> str:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**OUTER_ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, *map(str, args)], env=environment, capture_output=True, text=True,
                            timeout=600, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What readers_probe.py found."""
    if not importlib.util.find_spec("seqio"):
        pytest.skip("needs seqio: pip install -r requirements/data.txt")
    folder = tmp_path_factory.mktemp("probe")
    for index in range(3):
        (folder / f"lines-{index}.txt").write_text("".join(f"line {index}.{number}\n" for number in range(4)))
    return json.loads(run_python(ROOT / "tests" / "readers_probe.py", folder).splitlines()[-1])


def texts(answer: dict[str, Any]) -> list[str]:
    assert "documents" in answer, answer
    return [document.get("text") for some in answer["documents"] for document in some]


PROBED = ["first é", "", "third\nline", "a" * 5000]


@pytest.mark.parametrize("kind", ["plain", "tokenized", "with module", "by key"])
def test_a_task_gives_its_text_once_and_in_order(found: dict, kind: str) -> None:
    assert texts(found[kind]) == PROBED
    assert found[kind]["parts"] == [""]
    (item,) = found[kind]["inputs"]
    assert item["name"].endswith("/00") and item["ordinal"] == 0


def test_ids_of_examples(found: dict) -> None:
    first = found["plain"]["documents"][0][0]
    assert (first["id"], first["source"], first["group"]) == ("plain/00:0", "plain/00", "plain/00:0")
    assert [document["id"] for document in found["by key"]["documents"][0]] == ["k0", "k1", "k2", "k3"]
    assert texts(found["by text_key"]) == ["k0", "k1", "k2", "k3"]


def test_the_shards_of_a_task_are_inputs(found: dict) -> None:
    assert [item["ordinal"] for item in found["lines"]["inputs"]] == [0, 1, 2]
    assert [[document["text"] for document in some] for some in found["lines"]["documents"]] == [
        [f"line {index}.{number}" for number in range(4)] for index in range(3)]  # fmt: skip


def test_a_mixture_is_a_part_per_task(found: dict) -> None:
    answer = found["both"]
    assert answer["parts"] == ["lines", "tokenized"]
    assert [item["name"] for item in answer["inputs"]] == ["lines/00", "lines/01", "lines/02", "tokenized/00"]
    found_parts = [{document["part"] for document in some} for some in answer["documents"]]
    assert found_parts == [{"lines"}] * 3 + [{"tokenized"}]
    assert texts(answer) == texts(found["lines"]) + PROBED


def test_bytes_that_are_not_utf8_are_dropped(found: dict) -> None:
    assert found["bad"]["documents"][0] == [{"id": "bad/00:0", "reason": "not_utf8"},
                                            {**found["bad"]["documents"][0][1], "text": "fine"}]  # fmt: skip


@pytest.mark.parametrize(("kind", "message"), [
    ("ids_only", "ids_only/00: example 0: no text in targets or text; it has targets; choose with --text_key, or give"),
    ("failing", "failing: can't be read (InvalidArgumentError: "),
    ("no_train", "--source: no_train: no split 'train'; it has validation"),
    ("plane", "--source: seqio:plane: no Task or Mixture of this name; did you mean plain?"),
    ("none registered", "no Task or Mixture of this name, and none at all is registered; --input names the modules"),
    ("without module", "--input: no.such.module: can't be imported (No module named 'no'"),
    ("tfrecord flipped", "can't be read ("),
])  # fmt: skip
def test_mistakes_are_one_line(found: dict, kind: str, message: str) -> None:
    error = found[kind].get("error", "no error")
    assert message in error and "\n" not in error


def test_datasets_of_other_formats_are_read_with_tensorflow(found: dict) -> None:
    assert texts(found["tfrecord"]) == PROBED
    assert [document["id"] for some in found["tfrecord"]["documents"] for document in some] == ["0", "1", "2", "3"]
    assert len(found["tfrecord"]["inputs"]) == 2
