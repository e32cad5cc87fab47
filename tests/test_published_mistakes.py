"""The ten mistakes of the published Crystal pipeline, each run here to see that ours doesn't make it.

They were found by running the published code and data. A test that needs no store of its own uses the small world.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from world import code, make_config

from crystal_jax.config import Config
from crystal_jax.data import readers, verify
from crystal_jax.data.documents import read_documents
from crystal_jax.data.fim import Fim
from crystal_jax.data.pipeline import Batches, Stores, batch_hash
from crystal_jax.data.prepare import Options, prepare
from crystal_jax.data.readers import SourceSpec
from crystal_jax.data.store import TokenStore
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Tokenizer:
    return Tokenizer.load(world / "tokenizer.json")


@pytest.fixture(scope="module")
def batches(world: Path) -> Batches:
    config = make_config(world)
    return Batches(config, Stores(config))


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return path


def stored(path: Path) -> list[np.ndarray]:
    """The ids of each document of a store, in order."""
    store = TokenStore.open(path)
    view = store.view("train")
    return [document.ids for span in view.shards for document in read_documents(store, view, "train", span)]


TEXTS = {
    "html strike tags": "a <s>struck</s> word, <unk>, <|fim_prefix|> and <fim_middle>, </s>",
    "only a tag": "</s>",
    "entities": "if (a &amp;&amp; b &lt; c) &quot;x&quot;; &amp;amp; &nbsp;",
    "curly quotes and ligatures": "\u201cquoted\u201d \u2018it\u2019s\u2019 \ufb01ne \u2026 \u2014",
    "mojibake in a test of mojibake": "sch\u00c3\u00b6n \u00e2\u20ac\u2122 na\u00ef\u00bf\u00bdve",
    "control characters": "\x1b[31mred\x1b[0m\r\nline\u2028separator\u00a0no-break\x00\ufeff",
    "combining marks": "e\u0301 and \u00e9, \u212b and \u00c5",
    "spaces": "  two in front,   three inside, two behind  ",
    "2,000-character cuts": "word " * 4000,
    "cuts inside words": "".join(f"name_{number} = {number}\n" for number in range(2000)),
    "one long line": "".join(random.Random(0).choices("ab (", k=20_000)),
}


@pytest.fixture(scope="module")
def prepared(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """TEXTS through `prepare`: name to stored ids."""
    root = tmp_path_factory.mktemp("texts")
    raw = write_lines(root / "texts.jsonl", list(TEXTS.values()))
    prepare(SourceSpec("jsonl", (str(raw),)), "texts", world / "tokenizer.json", root, Options(heldout=0.0))
    assert verify.verify(root / "texts") == []
    return dict(zip(TEXTS, stored(root / "texts"), strict=True))


def fim_parts(tokenizer: Tokenizer, row: list[int], spm: bool) -> tuple[list[int], list[int], list[int]]:
    """(prefix, middle, suffix) of a rearranged segment; in SPM order prefix and middle are one run, called prefix."""
    middle, suffix = row.index(tokenizer.fim_middle_id), row.index(tokenizer.fim_suffix_id)
    assert row[0] == tokenizer.fim_prefix_id
    if spm:
        assert suffix == 1
        return row[middle + 1 :], [], row[2:middle]
    return row[1:suffix], row[middle + 1 :], row[suffix + 1 : middle]


# 1. The parts of a FIM segment were tokenised with a dummy space each


def rearrange(tokenizer: Tokenizer, mode: str, ids: list[int], seed: int, spm_rate: float) -> list[int]:
    """A document's ids between <s> and </s>, rearranged; room enough for all of it."""
    room = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    padded = np.array(room + [tokenizer.eos_id] * 40, np.int32)
    result, _ = Fim(tokenizer, mode).apply(padded, np.random.default_rng(seed), 1.0, spm_rate)
    found = result.tolist()
    return found[1 : found.index(tokenizer.eos_id)]


@pytest.mark.parametrize("spm", [False, True])
def test_1_fim_adds_three_control_tokens_and_no_space(tokenizer: Tokenizer, spm: bool) -> None:
    rng = random.Random(1)
    wrong = 0
    for seed in range(200):
        text = code(rng)
        ids = list(tokenizer.encode_document(text))
        prefix, middle, suffix = fim_parts(tokenizer, rearrange(tokenizer, "local", ids, seed, float(spm)), spm)
        assert tokenizer.decode_fragment(prefix + middle + suffix).removeprefix(" ") == text
        if not spm:
            parts = tokenizer.decode(prefix), tokenizer.decode_fragment(middle), tokenizer.decode_fragment(suffix)
            whole = [tokenizer.encode_document(parts[0]) if prefix else [], *map(tokenizer.encode_fragment, parts[1:])]
            assert [prefix, middle, suffix] == list(map(list, whole)), "the ids of the parts, each tokenised whole"
        published = fim_parts(tokenizer, rearrange(tokenizer, "crystal", ids, seed, float(spm)), spm)
        wrong += "".join(map(tokenizer.decode_fragment, published)).removeprefix(" ") != text
    assert wrong > 100, "the published way, kept as fim_mode=crystal, is seen to be wrong"


# 2. Repository and file names stayed plain text in segments without FIM


@pytest.fixture(scope="module")
def tagged(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run at FIM rate 0.3 on StarCoder's files, each document with all three tags."""
    root, rng = tmp_path_factory.mktemp("tagged"), random.Random(2)
    rows = [{"content": f"<reponame>owner/name<filename>file_{number}.py<gh_stars>{number}\n{code(rng)}",
             "id": str(number), "max_stars_repo_name": "owner/name"} for number in range(300)]
    (root / "raw" / "python").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "raw" / "python" / "train-0.parquet")
    os.symlink(world / "tokenizer.json", root / "tokenizer.json")
    os.symlink(world / "text", root / "text")
    prepare(SourceSpec("starcoder", (str(root / "raw"),)), "code", root / "tokenizer.json", root, Options(heldout=0.0))
    config = make_config(root)
    config.data.sequence_length = config.model.max_length = 128
    config.phases[1].fim_rate = config.phases[2].fim_rate = {"code": 0.3}
    return config


def test_2_metadata_are_control_tokens_with_fim_and_without(tagged: Config, tokenizer: Tokenizer) -> None:
    control = [tokenizer.encode_prompt(f"<|{name}|>")[-1] for name in ("reponame", "filename", "gh_stars")]
    documents = stored(Path(tagged.data.root) / "code")
    assert len(documents) == 300
    for ids in documents:
        assert ids[1] == control[0] and [token for token in ids.tolist() if token in control] == control
    batches = Batches(tagged, Stores(tagged))
    index = sorted(tagged.sources).index("code")
    with_fim = without = 0
    for step in range(len(batches)):
        batch = batches[step]
        for row in batch["inputs"][batch["source"] == index].tolist():
            assert "<reponame" not in tokenizer.decode([token for token in row if token not in control])
            with_fim += tokenizer.fim_prefix_id in row and control[1] in row
            without += tokenizer.fim_prefix_id not in row and control[1] in row
    assert with_fim > 5 and without > 5


def test_2_a_document_with_metadata_is_rearranged_as_often_as_one_without(tokenizer: Tokenizer) -> None:
    reponame, filename = (tokenizer.encode_prompt(f"<|{name}|>")[-1] for name in ("reponame", "filename"))
    rng = random.Random(3)
    for seed in range(100):
        text = code(rng)
        ids = [reponame, *tokenizer.encode_fragment("a/b"), filename, *tokenizer.encode_fragment(f"c.py\n{text}")]
        found = rearrange(tokenizer, "local", ids, seed, 0.0)
        prefix, middle, suffix = fim_parts(tokenizer, found, spm=False)
        assert tokenizer.decode(prefix + middle + suffix) == f"<|reponame|>a/b<|filename|>c.py\n{text}"
        assert [token for token in prefix + middle + suffix if token in (reponame, filename)] == [reponame, filename]


# 3. Literal <s>, </s> and <unk> in text became special ids


def test_3_what_looks_like_a_special_token_stays_text(prepared: dict[str, np.ndarray], tokenizer: Tokenizer) -> None:
    for name, ids in prepared.items():
        first, *inner, last = ids.tolist()
        assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
        assert not set(inner) & set(tokenizer.special_ids), name


# 4. ftfy rewrote code


def test_4_no_character_is_rewritten(prepared: dict[str, np.ndarray], tokenizer: Tokenizer) -> None:
    for name, ids in prepared.items():
        assert tokenizer.decode(ids[1:-1].tolist()) == TEXTS[name], name


# 5. Tokenising in chunks of 2000 characters doubled a space at each cut


def test_5_a_long_document_has_the_ids_of_the_whole(prepared: dict[str, np.ndarray], tokenizer: Tokenizer) -> None:
    engine = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    engine.encode_special_tokens = True
    for name, ids in prepared.items():
        assert ids[1:-1].tolist() == engine.encode(TEXTS[name], add_special_tokens=False).ids, name


# 6. The last label of a window without FIM was overwritten with </s>


def test_6_the_last_label_is_the_token_that_follows(batches: Batches, tokenizer: Tokenizer) -> None:
    whole = 0
    for step in range(len(batches)):
        batch = batches[step]
        for draw in batches.draws(step):
            row = draw.reading.rows.read(np.array([draw.row]))[0][0]
            got = np.append(batch["inputs"][draw.slot], batch["targets"][draw.slot, -1])
            if tokenizer.fim_prefix_id not in got:
                assert np.array_equal(got, row) and batch["mask"][draw.slot].all()
                whole += 1
    assert whole > 80


# 7. A FIM rate of 0 crashed


def test_7_a_fim_rate_of_0_is_no_fim(world: Path) -> None:
    config = make_config(world)
    for phase in config.phases:
        phase.fim_rate = dict.fromkeys(phase.mix, 0.0)
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, fim_mode="none"))
    zero, none = (Batches(one, Stores(one)) for one in (config, plain))
    assert [batch_hash(zero[step]) for step in range(18)] == [batch_hash(none[step]) for step in range(18)]


# 8. Randomness was seeded anew per file and the files weren't sorted: the order can't be proven


HASHES = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from world import make_config
from crystal_jax.data.pipeline import Batches, Stores, batch_hash
config = make_config(Path(sys.argv[1]))
batches = Batches(config, Stores(config))
print(*(batch_hash(batches[step]) for step in reversed(range(len(batches)))))
"""


def test_8_another_process_reads_the_same_order(world: Path, batches: Batches) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    done = subprocess.run([sys.executable, "-c", HASHES, str(world)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == [batch_hash(batches[step]) for step in reversed(range(len(batches)))]


def test_8_inputs_are_in_one_order_however_the_folder_lists_them(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world / "raw" / "text"
    files = sorted(map(str, folder.iterdir()))
    expected = readers.list_inputs(SourceSpec("jsonl", (str(folder),)))
    assert [item.ordinal for item in expected] == [0, 1, 2, 3]
    assert readers.list_inputs(SourceSpec("jsonl", tuple(reversed(files)))) == expected
    real = os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda path=".": Backwards(sorted(
        real(path), key=lambda entry: entry.name, reverse=True)))
    assert readers.list_inputs(SourceSpec("jsonl", (str(folder),))) == expected


# 9. Errors were swallowed, and a second run wrote its lines again


def test_9_a_damaged_file_is_an_error_that_names_it(world: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write_lines(raw / "0.jsonl", ["good"])
    lines = "".join(json.dumps({"text": f"line {number} " * 40}) + "\n" for number in range(2000)).encode()
    damaged = raw / "1.jsonl.zst"
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    damaged.write_bytes(whole[: len(whole) // 2])
    arguments = (SourceSpec("jsonl", (str(raw),)), "one", world / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"1\.jsonl\.zst: truncated"):
        prepare(*arguments)
    assert not (tmp_path / "one" / "manifest.json").exists()
    damaged.write_bytes(whole)
    (manifest,) = prepare(*arguments)
    assert manifest["documents"]["read"] == manifest["documents"]["kept"] == 2001
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert prepare(*arguments) == [manifest], "a second run adds nothing"
    assert {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()} == before


# 10. No document boundaries, epochs or data positions were recorded


def test_10_every_row_is_known_by_document_epoch_and_place(batches: Batches, tokenizer: Tokenizer) -> None:
    for step in (0, 7, 17):
        batch = batches[step]
        for draw in batches.draws(step)[::3]:
            assert draw.epoch >= 0 and (step, draw.slot, draw.epoch) in batches.steps_of(draw.reading, draw.row)
            seen = []
            for piece in draw.reading.rows.pieces(draw.row):
                documents = draw.reading.store.documents("train", piece.shard)
                first = int(np.searchsorted(documents.ends, piece.start, side="right"))
                assert all(documents.identity(first))
                ends = documents.ends[(documents.ends > piece.start) & (documents.ends <= piece.start + piece.length)]
                seen += (ends - piece.start - 1).tolist()
            row = draw.reading.rows.read(np.array([draw.row]))[0][0]
            assert np.flatnonzero(row == tokenizer.eos_id).tolist() == seen, "</s> stands where a document ends"
            assert batch["source"][draw.slot] == draw.reading.index
