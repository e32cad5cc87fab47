"""The corpora that tests and the walkthrough are made of: the published shapes, the same bytes again, no empty part."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import corpora
import pyarrow.parquet
import pytest
import zstandard


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the script, as the walkthrough does it, in a process that doesn't have the package on its path."""
    root = tmp_path_factory.mktemp("corpora")
    result = subprocess.run([sys.executable, "-I", corpora.__file__, root, "--mb", "0.5"], cwd=root, check=False,
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "slimpajama: 7 files" in result.stdout and "starcoder: 16 files" in result.stdout
    return root


def records(path: Path) -> list[dict]:
    text = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def test_slimpajama(tree: Path) -> None:
    files = sorted((tree / "slimpajama").rglob("*.jsonl.zst"))
    assert len(files) == 7 and sum(path.parts[-3] == "train" for path in files) == 6
    assert {int(path.name.removeprefix("example_train_").split(".")[0]) % 2
            for path in files if "train" in path.name} == {0, 1}  # fmt: skip
    sizes: Counter[str] = Counter()
    for path in files:
        for record in records(path):
            assert set(record) == {"text", "meta"} and record["text"]
            sizes[record["meta"]["redpajama_set_name"]] += len(record["text"])
    assert set(sizes) == set(corpora.SLIMPAJAMA)
    assert 0.5e6 < sizes.total() < 0.8e6
    assert sizes.most_common(1)[0][0] == "RedPajamaCommonCrawl"


def test_starcoder(tree: Path) -> None:
    for language in corpora.STARCODER:
        rows = [row for path in sorted((tree / "starcoder" / language).glob("train-*-of-00002.parquet"))
                for row in pyarrow.parquet.read_table(path).to_pylist()]  # fmt: skip
        assert rows and all(row["content"] for row in rows)
        columns = {"content"} if language in corpora.WITHOUT_METADATA else {
            "content", "id", "max_stars_repo_name", "max_stars_repo_path", "max_stars_count"}  # fmt: skip
        assert set(rows[0]) == columns
    assert {"css", "javascript", "html", "python"} <= set(corpora.STARCODER)


def test_the_same_library_gives_the_same_documents(tree: Path, tmp_path: Path) -> None:
    corpora.write_slimpajama(tmp_path / "slimpajama", 0.5)
    corpora.write_starcoder(tmp_path / "starcoder", 0.5)
    files = [path.relative_to(tree) for path in sorted(tree.rglob("*")) if path.is_file()]
    for path in files:
        assert (tree / path).read_bytes() == (tmp_path / path).read_bytes()


def test_a_larger_size_is_more_documents(tmp_path: Path) -> None:
    small = [document for _, document in corpora.mixed(corpora.SLIMPAJAMA, 50_000)]
    large = [document for _, document in corpora.mixed(corpora.SLIMPAJAMA, 100_000)]
    assert large[: len(small)] == small and len(large) > len(small)


def test_the_published_rows_hold_their_own_labels() -> None:
    rows = corpora.published_rows(30, 16)
    inputs, mask, labels = rows[:, 0], rows[:, 1], rows[:, 2]
    on = mask[:, 1:] == 1
    assert (inputs[:, 1:][on] == labels[:, :-1][on]).all() and (mask[:, 0] == 1).all()
    assert 0 < (mask == 0).mean() < 0.5
