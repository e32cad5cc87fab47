"""A `prepare` that failed leaves nothing in the way of the corrected one."""

from pathlib import Path

import pytest

from crystal_jax.data.prepare import prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.data.store import TokenStore
from crystal_jax.errors import UserError


def test_arguments_that_led_nowhere_may_be_corrected(world: Path, tmp_path: Path) -> None:
    raw, tokenizer = str(world / "raw" / "text"), world / "tokenizer.json"
    with pytest.raises(UserError, match="content"):
        prepare(SourceSpec("jsonl", (raw,), text_key="content"), "one", tokenizer, tmp_path)
    prepare(SourceSpec("jsonl", (raw,)), "one", tokenizer, tmp_path)
    assert TokenStore.open(tmp_path / "one").splits["train"]["tokens"] > 0


def test_a_source_without_any_document_makes_no_store(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="1 documents read, none kept; look at --input and --text_key"):
        prepare(SourceSpec("jsonl", (str(tmp_path / "empty.jsonl"),)), "one", world / "tokenizer.json", tmp_path)
    assert not (tmp_path / "one" / "manifest.json").exists()
