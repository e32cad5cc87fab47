"""Readers: what the inputs and the documents of each kind are, and that damage is never read as a shorter file."""

import ast
import gzip
import io
import itertools
import json
import os
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data import readers
from crystal_jax.data.readers import Document, Dropped, Input, SourceSpec, list_inputs, read_input
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


def jsonl(*paths: Path | str, **keys: str) -> SourceSpec:
    return SourceSpec("jsonl", tuple(map(str, paths)), **keys)


# The standard library


@pytest.fixture(scope="module")
def pystd() -> dict[str, list[Document | Dropped]]:
    return {kind: documents(SourceSpec(kind)) for kind in ("pystd-code", "pystd-text")}


def test_pystd_code_is_the_library_without_tests(pystd: dict) -> None:
    found = {document.id: document for document in pystd["pystd-code"]}
    assert len(found) == len(pystd["pystd-code"])
    root = Path(sysconfig.get_paths()["stdlib"])
    assert found["json/decoder.py"].text == (root / "json/decoder.py").read_text(encoding="utf-8")
    assert found["json/decoder.py"].group == found["json/decoder.py"].source == "json/decoder.py"
    folders = {part for name in found for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert readers.TOPICS not in found
    total = sum(len(document.text) for document in pystd["pystd-code"])
    assert 9e6 < total < 14e6


def test_pystd_text_is_docstrings_and_topics(pystd: dict) -> None:
    found = {document.id: document for document in pystd["pystd-text"] if isinstance(document, Document)}
    text = found["json/decoder.py"].text
    assert text.startswith("Implementation of JSONDecoder") and "def " not in text.splitlines()
    assert text.index("Simple JSON") < text.index("Decode a JSON document")
    assert len(found["pydoc_data/topics.py#lambda"].text) > 200
    total = sum(len(document.text) for document in found.values())
    assert 1.8e6 < total < 3e6


def test_pystd_docstrings_go_where_their_code_goes(pystd: dict) -> None:
    groups = {document.group for document in pystd["pystd-code"]}
    for document in pystd["pystd-text"]:
        assert isinstance(document, Dropped) or "#" in document.id or document.group in groups


def test_pystd_comes_in_sixteen_inputs_that_cover_it() -> None:
    inputs = list_inputs(SourceSpec("pystd-code"))
    assert [item.name for item in inputs] == [f"pystd-code/{index:02d}" for index in range(16)]
    names = Counter(name for item in inputs for _, name in item.files)
    assert max(names.values()) == 1
    assert inputs == list_inputs(SourceSpec("pystd-code"))
    assert [item.files for item in inputs] == [item.files for item in list_inputs(SourceSpec("pystd-text"))]
    with pytest.raises(UserError, match="leave --input out"):
        list_inputs(SourceSpec("pystd-code", ("x",)))


def test_code_that_is_not_python_is_dropped() -> None:
    for text in ("def f(:", "a\0b"):
        assert readers._docstrings(Document("a.py", text, "a.py", "a.py")) == Dropped("a.py", "not_python")
    odd = Document("a.py", '"""Odd \\d escape."""', "a.py", "a.py")
    assert readers._docstrings(odd).text == "Odd \\d escape."


def test_docstrings_come_in_the_order_of_the_file() -> None:
    method = '    def f(self):\n        """F.\n\n        more\n        """\n'
    code = f'"""M."""\nclass A:\n    """A."""\n{method}def g(): "G."\n'
    assert ast.parse(code)
    found = readers._docstrings(Document("a", code, "a", "a"))
    assert found.text == "M.\n\nA.\n\nF.\n\nmore\n\nG."


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
        monkeypatch.setattr(readers, "READ_BYTES", size)
        assert len(documents(jsonl(path))) == len(RECORDS)


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
    (b'{"text": "\xff\xfe"}', r"bad\.jsonl:3: not a line of JSON"),
    (b"[1]", r"bad\.jsonl:3: a JSON list, not an object"),
    (b'{"text": 5}', r"bad\.jsonl:3: 'text' holds int, not a string"),
    (b'{"body": "x", "id": 1}', r"bad\.jsonl:3: no key 'text'; it has body, id; choose with --text_key"),
])  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, "bad.jsonl", b'{"text": "fine"}\n\n' + line)
    with pytest.raises(UserError, match=message):
        documents(jsonl(path))


def test_a_missing_id_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no key 'id'.*--id_key"):
        documents(jsonl(write(tmp_path, "a.jsonl"), id_key="id"))


def test_lone_surrogates_reach_the_caller(tmp_path: Path) -> None:
    (found,) = documents(jsonl(write(tmp_path, "a.jsonl", b'{"text": "a\\ud800b \\ud83d\\ude42"}')))
    assert found.text == "a\ud800b 🙂"


# Naming files


def test_inputs_are_sorted_and_named_below_their_common_folder(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl.gz", "a/0.jsonl", "a/.hidden.jsonl", "a/readme.txt"):
        write(tmp_path / "data", name) if "jsonl" in name else (tmp_path / "data" / name).write_text("x")
    expected = ["a/0.jsonl", "a/1.jsonl.gz", "b/2.jsonl"]
    for inputs in ([tmp_path / "data"], [tmp_path / "data/b", tmp_path / "data/a"],
                   [tmp_path / "data/*/*.jsonl*"], [tmp_path / "data/**/*.jsonl", tmp_path / "data/a/1.jsonl.gz"]):
        assert [item.name for item in list_inputs(jsonl(*inputs))] == expected  # fmt: skip


def test_names_do_not_depend_on_where_the_data_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one", "a/x.jsonl")
    write(tmp_path / "one", "b/x.jsonl")
    os.rename(tmp_path / "one", tmp_path / "two")
    monkeypatch.chdir(tmp_path / "two")
    assert [item.name for item in list_inputs(jsonl("a", "b"))] == ["a/x.jsonl", "b/x.jsonl"]


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for inputs in ([path, path], [path, tmp_path], [path, link]):
        with pytest.raises(UserError, match=r"a\.jsonl|link\.jsonl is listed twice"):
            list_inputs(jsonl(*inputs))
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        list_inputs(jsonl(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="empty: holds no file to read"):
        (tmp_path / "empty").mkdir()
        list_inputs(jsonl(tmp_path / "empty"))
    with pytest.raises(UserError, match="needs at least one file"):
        list_inputs(SourceSpec("jsonl"))
    with pytest.raises(UserError, match=r"'jsnl' must be one of .*mean.*jsonl|'jsnl' must be one of"):
        list_inputs(SourceSpec("jsnl", ("x",)))


# Folders of text


def test_text_files(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index:02d}.md").write_text(f"text {index}\r\n", newline="")
    (tmp_path / "05.md").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    source = SourceSpec("text", (str(tmp_path),))
    inputs = list_inputs(source)
    assert len(inputs) == readers.DEALT_INPUTS
    assert [name for _, name in inputs[1].files] == ["01.md", "17.md", "33.md"]
    found = documents(source)
    assert len(found) == 40 and Dropped("05.md", "not_utf8") in found
    assert Document("07.md", "text 7\r\n", "07.md", "07.md") in found
    assert len(list_inputs(SourceSpec("text", (str(tmp_path / "0[1-3].md"),)))) == 3


def test_the_kind_that_a_training_input_names(tmp_path: Path) -> None:
    assert readers.guess_source("pystd-code", "text") == SourceSpec("pystd-code")
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"):
        assert readers.guess_source(name, "body") == SourceSpec("jsonl", (name,), text_key="body")
    assert readers.guess_source("folder", "text").kind == "text"
    assert readers.split_commas(["a,b", "c", ""]) == ["a", "b", "c"]
