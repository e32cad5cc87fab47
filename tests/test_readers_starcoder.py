"""StarCoder: its folders, and which of the tags in its text stand for control tokens."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from corpora import STARCODER, WITHOUT_METADATA, write_starcoder
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data.readers import Document, Dropped, SourceSpec, list_inputs, parts, read_input, starcoder
from crystal_jax.errors import UserError


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_starcoder(tmp_path_factory.mktemp("starcoder"), mb=0.3)


def source(*paths: Path, **options: Any) -> SourceSpec:
    return SourceSpec("starcoder", tuple(map(str, paths)), **options)


def documents(spec: SourceSpec) -> list[Document | Dropped]:
    return [document for item in list_inputs(spec) for document in read_input(spec, item)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def tagged(document: Document) -> list[tuple[str, str]]:
    return [(document.text[start:end], name) for start, end, name in document.tags]


# Folders


def test_each_folder_is_read(tree: Path) -> None:
    spec = source(tree)
    inputs = list_inputs(spec)
    assert [item.name for item in inputs] == [
        f"{language}/train-{index:05d}-of-00002.parquet" for language in STARCODER for index in (0, 1)]  # fmt: skip
    assert [item.ordinal for item in inputs] == list(range(len(inputs)))
    assert parts(spec) == ("",)
    found = documents(spec)
    assert {document.source.split("/")[0] for document in found} == set(STARCODER)
    assert len({document.id for document in found}) == len(found)


def test_languages_select(tree: Path) -> None:
    found = documents(source(tree, languages=("css", "python")))
    assert {document.id.split("/")[0] for document in found} == {"css", "python"}
    assert {item.files[0][1].split("/")[0] for item in list_inputs(source(tree, languages=("html",)))} == {"html"}


def test_a_repository_is_held_out_together(tree: Path) -> None:
    table = pyarrow.parquet.read_table(tree / "python/train-00000-of-00002.parquet").to_pylist()
    found = documents(source(tree / "python/train-00000-of-00002.parquet"))
    assert [document.group for document in found] == [row["max_stars_repo_name"] for row in table]
    assert [document.id for document in found] == [f"python/{row['id']}" for row in table]
    assert [document.text for document in found] == [row["content"] for row in table]
    for language in WITHOUT_METADATA:
        assert all(document.id == document.group for document in documents(source(tree / language)))


def test_unknown_languages_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--languages: 'javscript' is no folder of StarCoderData; did you mean javasc"):
        list_inputs(source(tree, languages=("javscript",)))
    with pytest.raises(UserError, match=r"--languages: 'rust': no file of it among css, "):
        list_inputs(source(tree, languages=("css", "rust")))
    path = write(tmp_path / "pyton/train-0.parquet", [{"content": "x"}])
    with pytest.raises(UserError, match=r"train-0\.parquet: 'pyton' is no folder of StarCoderData; did you mean pyt"):
        list_inputs(source(path))


def test_rows_that_hold_no_text(tmp_path: Path) -> None:
    rows = [{"content": None, "id": "1"}, {"content": "", "id": None}, {"content": "x", "id": "3"}]
    found = documents(source(write(tmp_path / "c/train-0.parquet", rows)))
    assert found[0] == Dropped("c/1", "no_text")
    assert [found[1].id, found[2].id] == ["c/train-0.parquet:1", "c/3"]
    with pytest.raises(UserError, match=r"train-0\.parquet: no column 'content'; it has text"):
        documents(source(write(tmp_path / "go/train-0.parquet", [{"text": "x"}])))


# Tags


def test_the_published_tree_has_each_kind_of_head(tree: Path) -> None:
    found = documents(source(tree, languages=("css", "html", "javascript", "markdown", "python")))
    heads = {tuple(name for _, _, name in document.tags) for document in found}
    assert len(heads) >= 6 and ("reponame", "filename", "gh_stars") in heads and () in heads


@pytest.mark.parametrize(("text", "expected"), [
    ("<reponame>a/b<filename>c/d.py<gh_stars>10-100\ncode", ["reponame", "filename", "gh_stars"]),
    ("<reponame>a/b\ncode", ["reponame"]),
    ("<filename>x<y>.py\ncode", ["filename"]),
    ("<gh_stars>0\n", ["gh_stars"]),
    ("<reponame>a<gh_stars>1-10", ["reponame", "gh_stars"]),
    ("<filename>a<reponame>b\ncode", ["filename"]),
    ("<reponame>a<reponame>b\ncode", ["reponame"]),
    ("\n<reponame>a/b\ncode", []),
    (" <reponame>a/b\ncode", []),
    ("code\n<filename>c/d.py\n", []),
    ("<reponame>a/b\n<filename>c\n", ["reponame"]),
    ("<s><fim_middle><jupyter_code></s>", []),
    ("<|reponame|>a\n", []),
    ("", []),
])  # fmt: skip
def test_heads(text: str, expected: list[str]) -> None:
    found = starcoder.tags(text, "python")
    assert [name for _, _, name in found] == expected
    assert all(text[start:end] == f"<{name}>" for start, end, name in found)


PIECES = ("<reponame>", "<filename>", "<gh_stars>", "a", "<", "\n", "<jupyter_code>")


@given(st.lists(st.sampled_from(PIECES), max_size=9))
def test_tags_are_in_order_apart_and_literal(pieces: list[str]) -> None:
    text = "".join(pieces)
    for language in ("python", *starcoder.FOLDER_TAGS):
        found = starcoder.tags(text, language)
        assert all(text[start:end] == f"<{name}>" for start, end, name in found)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(found))
        head = [tag for tag in found if tag[2] in ("reponame", "filename", "gh_stars")]
        assert all("\n" not in text[:start] for start, _, _ in head)
        assert bool(head) == text.startswith(("<reponame>", "<filename>", "<gh_stars>"))


def test_folders_have_tags_of_their_own(tree: Path) -> None:
    for language, names in starcoder.FOLDER_TAGS.items():
        assert language in starcoder.LANGUAGES
        found = documents(source(tree / language))
        # The commits that the tree is made of hold code, which may hold a tag of another folder as text.
        assert {name for document in found for _, _, name in document.tags} == set(names)
        first = found[0]
        assert tagged(first)[0] == (f"<{names[0]}>", names[0]) and first.tags[0][0] == 0
    text = "<jupyter_start><jupyter_text>a<jupyter_code>print('<jupyter_text>')<issue_start><empty_output>"
    assert len(starcoder.tags(text, "jupyter-structured-clean-dedup")) == 5
    assert starcoder.tags(text, "python") == starcoder.tags(text, "jupyter-scripts-dedup-filtered") == ()


def test_every_tag_is_a_control_token_of_the_published_tokenizer(reference: Path) -> None:
    vocabulary = (reference / "crystalcoder_hf/tokenizer.json").read_text(encoding="utf-8")
    for name in itertools.chain(("reponame", "filename", "gh_stars"), *starcoder.FOLDER_TAGS.values()):
        assert f'"<|{name}|>"' in vocabulary


def test_a_long_head_takes_linear_time() -> None:
    text = "<reponame>" + "<filename" * 300_000
    assert starcoder.tags(text, "python") == ((0, 10, "reponame"),)
