"""JSON lines, plain and compressed, and SlimPajama: what a line becomes, and that damage is never a shorter file."""

import gzip
import io
import itertools
import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from corpora import write_slimpajama
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data.readers import Document, Dropped, Input, SourceSpec, compressed, list_inputs, parts, read_input
from crystal_jax.errors import UserError

RECORDS = [{"text": f"document {index} é\n語 {'x' * (index % 50)}", "name": f"n{index}", "n": index}
           for index in range(2000)]  # fmt: skip
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def write(folder: Path, name: str, data: bytes = LINES) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS[path.suffix if path.suffix != ".jsonl" else ""](data))
    return path


def documents(source: SourceSpec) -> list[Document | Dropped]:
    return [document for item in list_inputs(source) for document in read_input(source, item)]


def jsonl(*paths: Path | str, **keys: object) -> SourceSpec:
    return SourceSpec("jsonl", tuple(map(str, paths)), **keys)


# JSON lines


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines(tmp_path: Path, ending: str) -> None:
    source = jsonl(write(tmp_path, f"a.jsonl{ending}"))
    (item,) = list_inputs(source)
    assert item == Input(f"a.jsonl{ending}", ((str(tmp_path / f"a.jsonl{ending}"), f"a.jsonl{ending}"),),
                         (tmp_path / f"a.jsonl{ending}").stat().st_size)  # fmt: skip
    found = documents(source)
    assert [document.text for document in found] == [record["text"] for record in RECORDS]
    assert found[4] == Document(f"a.jsonl{ending}:5", RECORDS[4]["text"], f"a.jsonl{ending}", f"a.jsonl{ending}:5")
    named = documents(jsonl(tmp_path, id_key="name"))
    assert [document.id for document in named] == [record["name"] for record in RECORDS]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_many_frames_in_a_file(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = [0, 1, 1, 50_000, len(LINES) - 1, len(LINES)]
    frames = [COMPRESS[ending](LINES[start:end]) for start, end in itertools.pairwise(cuts)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(frames))
    for size in (17, 1 << 20):
        monkeypatch.setattr(compressed, "READ_BYTES", size)
        assert len(documents(jsonl(path))) == len(RECORDS)


def test_frames_that_hold_no_data_are_passed_over(tmp_path: Path) -> None:
    note = struct.pack("<II", 0x184D2A50, 5) + b"hello"  # a skippable frame, as seekable .zst files end with
    half = len(LINES) // 2
    frames = [COMPRESS[".zst"](data) for data in (LINES[:half], LINES[half:])]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(note + frames[0] + note + frames[1] + note)
    assert len(documents(jsonl(path))) == len(RECORDS)
    path.write_bytes(frames[0] + frames[1] + note[:-2])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: truncated"):
        documents(jsonl(path))


@pytest.mark.parametrize("size", [17, 1 << 20])
def test_gzip_padded_with_zeros(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tapes and block devices leave it; gzip itself reads on behind it."""
    monkeypatch.setattr(compressed, "READ_BYTES", size)
    frame = COMPRESS[".gz"](LINES)
    path = tmp_path / "a.jsonl.gz"
    for data, times in ((frame + bytes(1000), 1), (frame + bytes(20) + frame + bytes(1), 2)):
        path.write_bytes(data)
        assert len(documents(jsonl(path))) == times * len(RECORDS)
    for data, message in ((frame + bytes(9) + b"more" * 9, "damaged"), (bytes(9), "damaged|truncated"),
                          (frame + bytes(20) + frame[:-3], "truncated")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.jsonl\.gz: ({message})"):
            documents(jsonl(path))
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS[".zst"](LINES) + bytes(10))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: (damaged|truncated)"):
        documents(jsonl(tmp_path / "a.jsonl.zst"))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_what_follows_the_last_frame_is_named(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, f"a.jsonl{ending}")
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(UserError, match=rf"a\.jsonl{ending}: damaged compressed data"):
        documents(jsonl(path))


def test_a_frame_of_unknown_size(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
        writer.write(LINES)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(out.getvalue())
    assert len(documents(jsonl(path))) == len(RECORDS)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_named(tmp_path_factory: pytest.TempPathFactory, ending: str, share: float) -> None:
    path = write(tmp_path_factory.mktemp("cut"), f"cut.jsonl{ending}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=rf"cut\.jsonl{ending}: truncated"):
        documents(jsonl(path))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_flipped_bits_are_named(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, f"flip.jsonl{ending}")
    data = bytearray(path.read_bytes())
    for place in range(20, len(data), len(data) // 20):
        data[place] ^= 0x10
        path.write_bytes(data)
        try:
            found = documents(jsonl(path))
        except UserError as error:
            assert f"flip.jsonl{ending}" in str(error)
        else:  # a bit that the format has no use for
            assert [document.text for document in found] == [record["text"] for record in RECORDS]
        data[place] ^= 0x10


@pytest.mark.parametrize(("line", "message"), [
    (b'{"text": "cut off', r"bad\.jsonl:3: not a line of JSON"),
    (b"[1]", r"bad\.jsonl:3: a JSON list, not an object"),
    (b'{"text": 5}', r"bad\.jsonl:3: 'text' holds int, not a string"),
    (b'{"body": "x", "id": 1}', r"bad\.jsonl:3: no key 'text'; it has body, id; choose with --text_key"),
])  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, "bad.jsonl", b'{"text": "fine"}\n\n' + line)
    with pytest.raises(UserError, match=message):
        documents(jsonl(path))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_that_is_not_utf8_is_dropped_alone(tmp_path: Path, ending: str) -> None:
    lines = b'{"text": "fine"}\n{"text": "\xff\xfe"}\n{"text": "caf\xe9", "id": 5}\n{"text": "too"}\n'
    found = documents(jsonl(write(tmp_path, f"a.jsonl{ending}", lines)))
    assert [document.id for document in found] == [f"a.jsonl{ending}:{number}" for number in (1, 2, 3, 4)]
    assert [document.text for document in (found[0], found[3])] == ["fine", "too"]
    assert found[1:3] == [Dropped(f"a.jsonl{ending}:{number}", "not_utf8") for number in (2, 3)]


def test_a_missing_id_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no key 'id'.*--id_key"):
        documents(jsonl(write(tmp_path, "a.jsonl"), id_key="id"))


def test_lone_surrogates_reach_the_caller(tmp_path: Path) -> None:
    (found,) = documents(jsonl(write(tmp_path, "a.jsonl", b'{"text": "a\\ud800b \\ud83d\\ude42"}')))
    assert found.text == "a\ud800b 🙂"


def test_a_null_text_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    found = documents(jsonl(write(tmp_path, "a.jsonl", b'{"text": null}\n\n{"text": ""}\n')))
    assert found == [Dropped("a.jsonl:1", "no_text"), Document("a.jsonl:3", "", "a.jsonl", "a.jsonl:3")]


def test_deep_nesting_is_a_bad_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"deep\.jsonl:1: not a line of JSON"):
        documents(jsonl(write(tmp_path, "deep.jsonl", b'{"text": ' + b"[" * 200_000)))


def test_duplicate_ids_reach_the_caller(tmp_path: Path) -> None:
    lines = b'{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n{"text": "c", "id": 2}\n'
    assert [found.id for found in documents(jsonl(write(tmp_path, "a.jsonl", lines), id_key="id"))] == ["1", "1", "2"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_giant_documents_and_flat_memory(tmp_path: Path, ending: str) -> None:
    noise = random.Random(0).randbytes(8_000_000).hex()
    texts = [*(noise[start : start + 1000] for start in range(0, 10_000_000, 1000)), noise[-6_000_000:], "end"]
    path = write(tmp_path, f"a.jsonl{ending}", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (item,) = list_inputs(jsonl(path))
    tracemalloc.start()
    try:
        lengths = [len(document.text) for document in read_input(jsonl(path), item)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lengths == [1000] * 10_000 + [6_000_000, 3]
    assert peak < 30e6  # the giant line in a few forms; not the 16 MB before it


# Parts


SPLIT = {"split_by": "meta.set", "split_names": (("X1", "x"), ("X2", "x"), ("Y", "y"))}


def test_parts_by_a_dotted_key(tmp_path: Path) -> None:
    lines = b'{"text": "a", "meta": {"set": "Y"}}\n{"text": "b", "meta.set": "X2"}\n'
    source = jsonl(write(tmp_path, "a.jsonl", lines), **SPLIT)
    assert parts(source) == ("x", "y")
    assert [found.part for found in documents(source)] == ["y", "x"]
    assert parts(jsonl(tmp_path)) == ("",)


@pytest.mark.parametrize(("line", "message"), [
    (b'{"text": "a", "meta": {"set": "Y1"}}', r"a\.jsonl:1: meta.set is 'Y1', which --split_names lacks; did you mean"),
    (b'{"text": "a", "meta": {"sort": "Y"}}', r"a\.jsonl:1: no key 'meta.set'; it has text, meta; choose with --split"),
    (b'{"text": "a", "meta": 5}', r"a\.jsonl:1: no key 'meta.set'"),
])  # fmt: skip
def test_parts_that_are_not_there(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents(jsonl(write(tmp_path, "a.jsonl", line), **SPLIT))


def test_a_key_and_its_names_need_each_other(tmp_path: Path) -> None:
    for key in SPLIT:
        with pytest.raises(UserError, match="need each other"):
            parts(jsonl(tmp_path, **{key: SPLIT[key]}))


# SlimPajama


@pytest.fixture(scope="module")
def slimpajama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slimpajama(tmp_path_factory.mktemp("slimpajama"), mb=0.3, chunks=3, files=12)


def test_slimpajama_is_seven_parts(slimpajama: Path) -> None:
    source = SourceSpec("slimpajama", (str(slimpajama),))
    found = documents(source)
    assert parts(source) == ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
    assert {document.part for document in found} == set(parts(source))
    assert found[0].id == "chunk1/example_train_0.jsonl.zst:1"
    assert all(document.text for document in found)


def test_slimpajama_halves_go_by_the_number_of_the_file(slimpajama: Path) -> None:
    inputs = list_inputs(SourceSpec("slimpajama", (str(slimpajama),)))
    assert [(item.name, item.ordinal) for item in inputs] == [
        (f"chunk{1 + index // 4}/example_train_{index % 4}.jsonl.zst", index % 4) for index in range(12)]  # fmt: skip
    some = SourceSpec("slimpajama", (f"{slimpajama}/train/chunk2", f"{slimpajama}/train/chunk3/example_train_1*"))
    assert [item.ordinal for item in list_inputs(some)] == [0, 1, 2, 3, 1]


@pytest.mark.parametrize("size", [2, 4, 100])
def test_slimpajama_in_groups(slimpajama: Path, size: int) -> None:
    single = SourceSpec("slimpajama", (str(slimpajama),))
    inputs = list_inputs(SourceSpec("slimpajama", (str(slimpajama),), files_per_input=size))
    ordinals = {item.files[0]: item.ordinal for item in list_inputs(single)}
    for item in inputs:
        assert {ordinals[file] % 2 for file in item.files} == {item.ordinal % 2}
    assert len(inputs) == {2: 6, 4: 4, 100: 2}[size]
    grouped = SourceSpec("slimpajama", (str(slimpajama),), files_per_input=size)
    assert sorted(document.id for document in documents(grouped)) == sorted(found.id for found in documents(single))


def test_other_files_are_no_slimpajama(slimpajama: Path) -> None:
    holdout = slimpajama / "validation/chunk1/example_holdout_0.jsonl.zst"
    assert holdout.exists()
    for path in (holdout, slimpajama / "validation/chunk1/*"):
        with pytest.raises(UserError, match=r"holdout_0.*are called chunkN/example_train_M\.jsonl\.zst"):
            list_inputs(SourceSpec("slimpajama", (str(path),)))
    with pytest.raises(UserError, match="validation: holds no file to read"):
        list_inputs(SourceSpec("slimpajama", (str(slimpajama / "validation"),)))
    with pytest.raises(UserError, match="--text_key: 'body': --source=slimpajama has no such option"):
        list_inputs(SourceSpec("slimpajama", (str(slimpajama),), text_key="body"))


def test_an_unknown_set_is_named(tmp_path: Path) -> None:
    line = b'{"text": "a", "meta": {"redpajama_set_name": "RedPajamaBooks"}}\n'
    path = write(tmp_path, "chunk1/example_3.jsonl.zst", line)
    with pytest.raises(UserError, match=r"example_3\.jsonl\.zst:1: .*'RedPajamaBooks'.*did you mean RedPajamaBook\?"):
        documents(SourceSpec("slimpajama", (str(path),)))
