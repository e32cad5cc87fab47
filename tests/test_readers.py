"""Readers: what the inputs of each kind are and how they are named, put in order, dealt and grouped."""

import ast
import os
import pickle
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data import readers
from crystal_jax.data.readers import Document, Dropped, Input, SourceSpec, list_inputs, listing, pystd, read_input
from crystal_jax.errors import UserError


def write(folder: Path, name: str, data: bytes = b'{"text": "x"}\n') -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def documents(source: SourceSpec) -> list[Document | Dropped]:
    return [document for item in list_inputs(source) for document in read_input(source, item)]


def jsonl(*paths: Path | str, **keys: object) -> SourceSpec:
    return SourceSpec("jsonl", tuple(map(str, paths)), **keys)


# The standard library


@pytest.fixture(scope="module")
def library() -> dict[str, list[Document | Dropped]]:
    return {kind: documents(SourceSpec(kind)) for kind in ("pystd-code", "pystd-text")}


def test_pystd_code_is_the_library_without_tests(library: dict) -> None:
    found = {document.id: document for document in library["pystd-code"]}
    assert len(found) == len(library["pystd-code"])
    root = Path(sysconfig.get_paths()["stdlib"])
    assert found["json/decoder.py"].text == (root / "json/decoder.py").read_text(encoding="utf-8")
    assert found["json/decoder.py"].group == found["json/decoder.py"].source == "json/decoder.py"
    folders = {part for name in found for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert pystd.TOPICS not in found
    total = sum(len(document.text) for document in library["pystd-code"])
    assert 9e6 < total < 14e6


def test_pystd_text_is_docstrings_and_topics(library: dict) -> None:
    found = {document.id: document for document in library["pystd-text"] if isinstance(document, Document)}
    text = found["json/decoder.py"].text
    assert text.startswith("Implementation of JSONDecoder") and "def " not in text.splitlines()
    assert text.index("Simple JSON") < text.index("Decode a JSON document")
    assert len(found["pydoc_data/topics.py#lambda"].text) > 200
    total = sum(len(document.text) for document in found.values())
    assert 1.8e6 < total < 3e6


def test_pystd_docstrings_go_where_their_code_goes(library: dict) -> None:
    groups = {document.group for document in library["pystd-code"]}
    for document in library["pystd-text"]:
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
        assert pystd.docstrings(Document("a.py", text, "a.py", "a.py")) == Dropped("a.py", "not_python")
    odd = Document("a.py", '"""Odd \\d escape."""', "a.py", "a.py")
    assert pystd.docstrings(odd).text == "Odd \\d escape."


def test_docstrings_come_in_the_order_of_the_file() -> None:
    method = '    def f(self):\n        """F.\n\n        more\n        """\n'
    code = f'"""M."""\nclass A:\n    """A."""\n{method}def g(): "G."\n'
    assert ast.parse(code)
    found = pystd.docstrings(Document("a", code, "a", "a"))
    assert found.text == "M.\n\nA.\n\nF.\n\nmore\n\nG."


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
    with pytest.raises(UserError, match=r"empty: holds no file to read \(\.jsonl, \.jsonl\.gz or \.jsonl\.zst\)"):
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
    assert len(inputs) == listing.DEALT_INPUTS
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


# Order, ordinals and groups


def test_numbers_in_names_count_as_numbers(tmp_path: Path) -> None:
    names = [f"chunk{chunk}/example_{number}.jsonl" for chunk in (1, 2, 10) for number in (0, 2, 10, 100)]
    for name in sorted(names):
        write(tmp_path, name)
    inputs = list_inputs(jsonl(tmp_path))
    assert [item.name for item in inputs] == names
    assert [item.ordinal for item in inputs] == list(range(len(names)))


@given(st.lists(st.text(alphabet="a1²٣0-/", max_size=8)))
def test_the_order_is_one_order(names: list[str]) -> None:
    order = sorted(names, key=listing.natural)
    names.reverse()
    assert sorted(names, key=listing.natural) == order
    assert all(listing.natural(one) != listing.natural(other) for one in set(names) for other in set(names) - {one})


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 7))
def test_groups_keep_parity_and_lose_nothing(ordinals: list[int], size: int) -> None:
    files = [listing.File(f"/data/{index}", str(index), index, index) for index in range(len(ordinals))]
    inputs = listing.group(files, ordinals, size)
    parity = {file.name: ordinal % 2 for file, ordinal in zip(files, ordinals, strict=True)}
    names = [name for item in inputs for _, name in item.files]
    assert sorted(names, key=int) == [file.name for file in files]
    assert sum(item.bytes for item in inputs) == sum(file.bytes for file in files)
    for item in inputs:
        assert len(item.files) <= size
        assert {parity[name] for _, name in item.files} == {item.ordinal % 2}
    if size > 1:
        assert len({item.ordinal for item in inputs}) == len({item.name for item in inputs}) == len(inputs)
        for half in (0, 1):
            assert [len(item.files) for item in inputs if item.ordinal % 2 == half][:-1].count(size) == max(
                0, -(-list(parity.values()).count(half) // size) - 1)


def test_dealt_inputs_have_ordinals() -> None:
    assert [item.ordinal for item in list_inputs(SourceSpec("pystd-code"))] == list(range(16))


# The table


@pytest.mark.parametrize("kind", readers.READERS)
def test_each_kind_says_what_it_is(kind: str) -> None:
    assert readers.READERS[kind].help
    assert readers.READERS[kind].options <= set(SourceSpec.__dataclass_fields__)


def test_options_that_a_kind_has_not(tmp_path: Path) -> None:
    for kind, field, value in (("text", "text_key", "body"), ("pystd-code", "files_per_input", 4),
                               ("jsonl", "languages", ("python",)), ("starcoder", "split_by", "lang"),
                               ("crystal-h5", "id_key", "id")):  # fmt: skip
        source = SourceSpec(kind, (str(tmp_path),), **{field: value})
        for use in (list_inputs, readers.parts):
            with pytest.raises(UserError, match=f"--{field}: .* --source={kind} has no such option"):
                use(source)
    with pytest.raises(UserError, match="--files_per_input: 0 must be 1 or more"):
        list_inputs(jsonl(tmp_path, files_per_input=0))


@pytest.mark.parametrize(("kind", "hint"), [
    ("jsnl", "did you mean jsonl"), ("star-coder", "did you mean starcoder"), ("tfds", "tfds:NAME"),
    ("seqoi:task", "did you mean seqio:"), ("parquet:x", "did you mean parquet"), ("tfds:", "names no dataset"),
])  # fmt: skip
def test_unknown_kinds(kind: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"--source: '{kind}' .*{hint}"):
        list_inputs(SourceSpec(kind, ("x",)))


def test_sources_and_inputs_pickle(tmp_path: Path) -> None:
    source = jsonl(write(tmp_path, "a.jsonl"), split_by="a.b", split_names=(("x", "y"),))
    (item,) = list_inputs(source)
    assert isinstance(item, Input)
    assert pickle.loads(pickle.dumps((source, item))) == (source, item)
    assert hash(source) == hash(pickle.loads(pickle.dumps(source)))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    for kind in ("text", "jsonl"):
        path = write(tmp_path, f"{kind}.jsonl")
        source = SourceSpec(kind, (str(path),))
        (item,) = list_inputs(source)
        path.unlink()
        with pytest.raises(UserError, match=rf"{kind}\.jsonl: can't be read \(No such file"):
            list(read_input(source, item))


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    for kind in ("text", "jsonl"):
        item = Input("a", ((str(tmp_path), "a"),), 0)  # opens, or not, but can't be read
        with pytest.raises(UserError, match=rf"{tmp_path}: can't be read \(Is a directory"):
            list(read_input(SourceSpec(kind, ("x",)), item))
    if Path("/proc/self/mem").exists():  # opens, but its first page can't be read
        for kind in ("text", "jsonl"):
            with pytest.raises(UserError, match=r"/proc/self/mem: can't be read \(Input/output error"):
                list(read_input(SourceSpec(kind, ("x",)), Input("a", (("/proc/self/mem", "a"),), 0)))


@pytest.mark.parametrize(("kind", "package", "message"), [
    ("tfds:x", "tensorflow_datasets", r"needs tensorflow_datasets; pip install .*data.txt"),
    ("seqio:x", "seqio", r"seqio can't be imported \(ModuleNotFoundError.*pip install .*data.txt"),
])  # fmt: skip
def test_a_package_that_is_not_installed_is_named(kind: str, package: str, message: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=message):
        list_inputs(SourceSpec(kind))


def test_listing_and_naming_load_no_heavy_package() -> None:
    program = "import sys; from crystal_jax.data import readers; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"pyarrow", "h5py", "fsspec", "tensorflow_datasets", "seqio", "tensorflow"}
    assert not heavy & set(result.stdout.split())
