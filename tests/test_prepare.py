"""What `prepare` puts into a store: every document accounted for, in order, in its part, with its control ids."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard
from corpora import published_rows, write_crystal_h5, write_slimpajama, write_starcoder
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import DOCUMENTS, HELDOUT, INPUTS, files_of, in_parts, in_process, make, spec, write_raw, write_tokenizer

from crystal_jax.data import readers, tasks
from crystal_jax.data.manifests import summary
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import Document, Dropped, Input, SourceSpec
from crystal_jax.data.store import SPLITS, TokenStore
from crystal_jax.data.tasks import Task, held_out
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.data.verify import verify


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "raw")


@pytest.fixture(scope="module")
def prepared(raw: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    make(raw, tokenizer, output)
    return output / "set" / "one"


def stored(folder: Path, split: str) -> list[tuple[str, str, list[int]]]:
    """(id, source, ids) of every document of a split, in order."""
    opened = TokenStore.open(folder)
    found = []
    for span in opened.view(split).shards if opened.splits[split]["tokens"] else []:
        documents = opened.documents(split, span.name)
        start = 0
        for index, end in enumerate(documents.ends.tolist()):
            ids = opened.view(split).read(span.start + start, end - start).tolist()
            found.append((*documents.identity(index), ids))
            start = end
    return found


def read_all(source: SourceSpec) -> list[Any]:
    return [document for item in readers.list_inputs(source) for document in readers.read_input(source, item)]


# Accounts


def test_every_document_is_accounted_for(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    documents = manifest["documents"]
    assert documents["read"] == INPUTS * DOCUMENTS
    assert documents["dropped"] == {"empty": INPUTS}
    assert documents["kept"] == documents["read"] - INPUTS
    assert documents["replaced_surrogates"] == 2 * INPUTS
    assert documents["duplicate_ids_within_inputs"] == INPUTS
    assert documents["control_tokens"] == {} and manifest["control_ids"] == []
    splits = manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == documents["kept"]
    for split in splits.values():
        assert [shard["input"] for shard in split["shards"]] == [f"{index:02d}.jsonl" for index in range(INPUTS)]
        assert [shard["ordinal"] for shard in split["shards"]] == list(range(INPUTS))
        assert split["tokens"] == sum(shard["tokens"] for shard in split["shards"]) > 0
    assert (manifest["name"], manifest["source"], manifest["format"]) == ("set/one", "jsonl", 2)
    assert "packing" not in manifest and "documents_of_all_parts" not in manifest
    assert summary(manifest).startswith(f"set/one: {INPUTS * (DOCUMENTS - 1)} documents, ")
    assert summary(manifest).endswith("bytes/token, dropped 6 (6 empty); 6 ids came again within an input")
    assert verify(prepared) == []
    assert sorted(path.name for path in prepared.iterdir()) == ["heldout", "manifest.json", "train"]


def test_documents_come_back_in_order(prepared: Path, raw: Path, tokenizer: Path) -> None:
    loaded = Tokenizer.load(tokenizer)
    expected: dict[str, list[tuple[str, str, str]]] = {"train": [], "heldout": []}
    for document in read_all(spec(raw)):
        if document.text:
            text = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in document.text)
            split = "heldout" if held_out(document.group, HELDOUT) else "train"
            expected[split].append((document.id, document.source, text))
    for split, wanted in expected.items():
        found = stored(prepared, split)
        assert all((ids[0], ids[-1]) == (loaded.bos_id, loaded.eos_id) for *_, ids in found)
        assert [(identity, source, loaded.decode(ids[1:-1])) for identity, source, ids in found] == wanted


def test_held_out_share_is_a_hash() -> None:
    names = [f"document {index}" for index in range(5000)]
    chosen = {name for name in names if held_out(name, 0.1)}
    assert 400 < len(chosen) < 600
    assert chosen <= {name for name in names if held_out(name, 0.2)}
    assert not any(held_out(name, 0.0) for name in names)


def task_of(source: SourceSpec, item: Input, tokenizer: Path, folder: Path) -> Task:
    return Task(source, item, 0, str(tokenizer), Tokenizer.load(tokenizer).fingerprint, "reference", 0.3, str(folder),
                "")  # fmt: skip


def test_docstrings_of_held_out_code_are_held_out(tokenizer: Path, tmp_path: Path) -> None:
    split_of: dict[str, dict[str, str]] = {}
    for kind in ("pystd-code", "pystd-text"):
        prepare_one = task_of(SourceSpec(kind), readers.list_inputs(SourceSpec(kind))[3], tokenizer, tmp_path / kind)
        tasks.prepare_input(prepare_one)
        found = json.loads((tmp_path / kind / "progress" / "00000.json").read_text())
        assert sum(shard["documents"] for shard in found["shards"].values()) == found["counts"][""]["kept"]
        split_of[kind] = {identity: split for split in SPLITS for identity in ids_in(tmp_path / kind, split, found)}
    code, text = split_of.values()
    assert len(text) > 20 and set(code.values()) == set(SPLITS)
    assert all(code[name] == split for name, split in text.items())


def ids_in(folder: Path, split: str, record: dict[str, Any]) -> list[str]:
    data = (folder / split / "00000.docs.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(data).splitlines()
    assert len(lines) == record["shards"][split]["documents"]
    return [json.loads(line)["id"] for line in lines]


a_document = st.builds(Document, st.sampled_from("abc"), st.text(max_size=30), st.just("s"), st.just("g"),
                       st.sampled_from(["", "p"]))
a_found = st.one_of(a_document, st.builds(Dropped, st.just("x"), st.sampled_from(["not_utf8", "no_text"])))


@settings(max_examples=40)
@given(found=st.lists(a_found, max_size=12), size=st.integers(1, 40))
def test_what_is_read_is_kept_or_dropped(found: list[Document | Dropped], size: int) -> None:
    counts: tasks.Counts = tasks.defaultdict(Counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "read_input", lambda *_: iter(found))
        patch.setattr(tasks, "BATCH_BYTES", size)
        task = Task(SourceSpec("jsonl"), Input("i", (), 0), 0, "", "", "auto", 0.0, "", "")
        batches = list(tasks._batches(task, counts))
    kept = [document for document in found if isinstance(document, Document) and document.text]
    assert [document for batch in batches for document in batch] == kept
    assert all(batches)
    for part in counts.values():
        dropped = sum(value for key, value in part.items() if key.startswith(tasks.DROPPED))
        assert part["read"] == part["kept"] + dropped
    total = sum(counts.values(), Counter())
    assert total["read"] == len(found)
    assert total["duplicate_ids_within_inputs"] == len(kept) - len({document.id for document in kept})
    assert total["text_bytes"] == sum(len(document.text.encode()) for document in kept)


# Parts and control ids


def test_parts_are_stores_of_their_own(raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    manifests = make(in_parts(raw), tokenizer, tmp_path)
    folder = tmp_path / "set" / "one"
    assert [manifest["name"] for manifest in manifests] == ["set/one/A", "set/one/B"]
    assert sorted(path.name for path in folder.iterdir()) == ["A", "B"]
    documents = read_all(in_parts(raw))
    for part, manifest in zip("AB", manifests, strict=True):
        assert verify(folder / part) == []
        wanted = sorted(document.id for document in documents if document.part == part and document.text)
        found = [identity for split in SPLITS for identity, *_ in stored(folder / part, split)]
        assert sorted(found) == wanted
        assert manifest["documents"]["read"] == sum(document.part == part for document in documents)
        assert manifest["documents_of_all_parts"]["read"] == len(documents)


def test_slimpajama_becomes_seven_stores(tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    write_slimpajama(tmp_path / "raw", mb=0.2)
    source = SourceSpec("slimpajama", (str(tmp_path / "raw"),), files_per_input=2)
    manifests = prepare(source, "sp", tokenizer, tmp_path, Options(heldout=0.1))
    names = ["ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia"]
    assert [manifest["name"] for manifest in manifests] == [f"sp/{name}" for name in names]
    inputs = readers.list_inputs(source)
    expected = Counter(document.part for document in read_all(source) if getattr(document, "text", ""))
    for name, manifest in zip(names, manifests, strict=True):
        assert verify(tmp_path / "sp" / name) == []
        assert manifest["documents"]["kept"] == expected[name] > 0
        shards = manifest["splits"]["train"]["shards"]
        assert [shard["ordinal"] for shard in shards] == [item.ordinal for item in inputs]
    opened = TokenStore.open(tmp_path / "sp" / "C4")
    halves = [{span.name for span in opened.view(files=half).shards} for half in ("even", "odd")]
    assert halves[0] | halves[1] == {f"{index:05d}" for index in range(len(inputs))} and not halves[0] & halves[1]


def test_starcoder_tags_are_control_ids_and_nothing_else_is(tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    write_starcoder(tmp_path / "raw", mb=0.2)
    source = SourceSpec("starcoder", (str(tmp_path / "raw"),))
    (manifest,) = prepare(source, "code", tokenizer, tmp_path, Options(heldout=0.0))
    loaded = Tokenizer.load(tokenizer)
    special = set(loaded.special_ids)
    documents = [document for document in read_all(source) if isinstance(document, Document) and document.text]
    written: Counter[str] = Counter()
    for document, (identity, _, ids) in zip(documents, stored(tmp_path / "code", "train"), strict=True):
        controls = [loaded.decode([token]) for token in ids[1:-1] if token in special]
        assert controls == [f"<|{name}|>" for _, _, name in document.tags]
        written.update(controls)
        # Tags become ids of the same name; all other characters come back as they were.
        text = document.text
        for start, end, name in reversed(document.tags):
            text = f"{text[:start]}<|{name}|>{text[end:]}"
        assert (identity, loaded.decode(ids[1:-1])) == (document.id, text)
    assert {"<|reponame|>", "<|filename|>", "<|gh_stars|>", "<|commit_msg|>", "<|jupyter_code|>"} <= set(written)
    assert manifest["documents"]["control_tokens"] == written
    assert {loaded.decode([token]) for token in manifest["control_ids"]} == set(written)
    assert verify(tmp_path / "code") == []


def test_literal_tags_are_text(tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    text = "<s>a</s> <unk> <|fim_prefix|> <reponame>b<filename>c <fim_middle><|endoftext|> 1 < 2"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    prepare(SourceSpec("jsonl", (str(tmp_path / "a.jsonl"),)), "x", tokenizer, tmp_path, Options(heldout=0.0))
    ((_, _, ids),) = stored(tmp_path / "x", "train")
    loaded = Tokenizer.load(tokenizer)
    assert not set(ids[1:-1]) & set(loaded.special_ids)
    assert loaded.decode(ids[1:-1]) == text


def test_tokenised_data_stay_as_they_are(tokenizer: Path, tmp_path: Path, monkeypatch: Any) -> None:
    in_process(monkeypatch)
    loaded = Tokenizer.load(tokenizer)
    rows = published_rows(5, 16, loaded.vocab_size)
    rows[1, 0, 5] = rows[1, 2, 4] = loaded.fim_prefix_id
    write_crystal_h5(tmp_path / "raw" / "a.h5", rows)
    source = SourceSpec("crystal-h5", (str(tmp_path / "raw"),))
    (manifest,) = prepare(source, "x", tokenizer, tmp_path, Options(heldout=0.0))
    lengths = rows[:, 1].sum(axis=1).tolist()
    wanted = [[*rows[row, 0, :length].tolist(), int(rows[row, 2, length - 1])] for row, length in enumerate(lengths)]
    assert [ids for *_, ids in stored(tmp_path / "x", "train")] == wanted
    assert {loaded.bos_id, loaded.eos_id, loaded.fim_prefix_id} <= set(manifest["control_ids"])
    assert verify(tmp_path / "x") == []
    assert summary(manifest) == f"x: 5 documents, {sum(map(len, wanted))} tokens (0 held out), dropped 0"


# The command


def test_the_command_reports_rate_tokens_and_time_left(raw: Path, tokenizer: Path, tmp_path: Path, run_cli: Any,
                                                       prepared: Path) -> None:
    done = run_cli("prepare", "--source=jsonl", f"--input={raw}", "--name=set/one", "--id_key=name",
                   f"--tokenizer={tokenizer}", f"--output={tmp_path}", f"--heldout={HELDOUT}", "--workers=2",
                   "--packing=best_fit", "--sequence_length=64")  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert done.stdout.strip() == summary(manifest)
    lines = done.stderr.replace("\r", "\n").splitlines()
    last = [line for line in lines if "inputs_left=" in line][-1]
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    shown = r"one: 100% \|.*\| ([\d.]+)k/\1k [\d.]+[kM]?B/s, ETA 00:00, inputs_left=0, tokens=([\d,]+)"
    match = re.search(shown, last)
    assert match and int(match[2].replace(",", "")) == tokens, last
    assert re.search(rf"set/one: packing: 100%.* {manifest['documents']['kept']}/.* documents/s", lines[-1])
    found = files_of(tmp_path / "set" / "one")
    assert any(name.startswith("packing/best_fit-64/") for name in found)
    assert {name: data for name, data in found.items() if not name.startswith("packing/")} == files_of(prepared)
