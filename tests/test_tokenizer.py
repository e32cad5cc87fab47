"""The tokenizer: exact round trips, ids that don't depend on where text is cut, and the command that trains one."""

import json
import random
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax.data import readers, tokenizer_training
from crystal_jax.data.tokenizer import BYTE_TOKENS, CONTROL_TOKENS, SMALLEST, SPACE, Tokenizer, train_tokenizer
from crystal_jax.errors import UserError

VOCAB = 1000
TRICKY = [
    "", " ", "  leading", "trailing  ", "\n", "\t\tx\r\n", "a b", "<s>old</s> <unk> <|fim_prefix|>", "naïve café 🙂",
    f"a{SPACE}b", f"{SPACE}", f"{SPACE} x{SPACE}{SPACE}", "0123456789 x1y2", "\x00\x7f\x85\u2028\u3000\ufeff", "é" * 50,
    "def f(n):\n    return n * 2  # double\n", "<0x0A>▁<0xFF>", "\U0010ffff\ue000",
]  # fmt: skip
anything = st.text(st.characters(exclude_categories=["Cs"]))
spaced = st.text(st.sampled_from(f" \n\tab(.é语1{SPACE}"), max_size=60)


def corpus() -> list[str]:
    source = readers.SourceSpec("pystd-code")
    return [doc.text for doc in readers.read_input(source, readers.list_inputs(source)[3])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(corpus()[:20], VOCAB).save(str(path))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def released(reference: Path) -> Tokenizer:
    return Tokenizer.load(reference / "crystalcoder_hf" / "tokenizer.json")


# What every tokenizer of the family does


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_come_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode_document(text)) == text
    assert trained.decode_fragment(trained.encode_fragment(text)) == text


@given(text=anything | spaced)
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode_document(text)
    assert trained.decode(ids) == text
    assert trained.decode_fragment(trained.encode_fragment(text)) == text
    assert not {trained.unk_id, trained.bos_id, trained.eos_id} & set(ids)
    assert b"".join(map(trained.piece_bytes, trained.encode_fragment(text))) == text.encode()


def test_released_round_trips(released: Tokenizer) -> None:
    for text in TRICKY:
        assert released.decode(released.encode_document(text)) == text
        assert released.decode_fragment(released.encode_fragment(text)) == text


@given(text=spaced)
def test_a_document_is_a_fragment_after_the_dummy_space(trained: Tokenizer, text: str) -> None:
    prefix = "" if text.startswith(SPACE) or not text else " "
    assert trained.encode_document(text) == trained.encode_fragment(prefix + text)


@given(texts=st.lists(anything, max_size=5))
def test_a_batch_is_its_documents(trained: Tokenizer, texts: list[str]) -> None:
    assert trained.encode_documents(texts) == [trained.encode_document(text) for text in texts]
    arrays = [trained.document_array(text) for text in texts]
    assert [array.tolist() for array in arrays] == trained.encode_documents(texts)
    assert {array.dtype.name for array in arrays} <= {"int32"}


def test_special_tokens_are_text_in_documents_and_ids_in_prompts(trained: Tokenizer) -> None:
    text = "a<s>b</s><|fim_pad|>"
    special = {trained.bos_id, trained.eos_id, trained.fim_pad_id}
    assert not special & set(trained.encode_document(text)) and not special & set(trained.encode_fragment(text))
    ids = trained.encode_prompt(text)
    assert special <= set(ids)
    assert trained.decode(ids) == "a<s> b</s><|fim_pad|>"  # as released: each run of text has its dummy space
    assert trained.decode(ids, skip_special=True) == "a b"
    assert trained.piece_bytes(trained.bos_id) == b"" and trained.piece_bytes(10**6) == b""


def test_broken_bytes_decode_to_replacement_characters(trained: Tokenizer) -> None:
    (first, *_) = trained.encode_fragment("🙂")
    assert trained.decode_fragment([first]) == "\ufffd"


def test_released_ids(reference: Path, released: Tokenizer) -> None:
    cases = json.loads((reference / "tokenizer_expected.json").read_text())["cases"]
    for case in cases:
        assert released.encode_prompt(case["text"]) == case["ids"]
        if "<" not in case["text"]:
            assert released.encode_document(case["text"]) == case["ids"]
    assert (released.unk_id, released.bos_id, released.eos_id, released.vocab_size) == (0, 1, 2, 32022)
    assert (released.fim_prefix_id, released.fim_middle_id, released.fim_suffix_id, released.fim_pad_id) == (
        32000, 32001, 32002, 32003
    )  # fmt: skip


# Loading


def test_fingerprint_is_of_the_contents(trained: Tokenizer, tmp_path: Path) -> None:
    spec = json.loads(trained.path.read_text())
    (tmp_path / "same.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path / "same.json").fingerprint == trained.fingerprint
    spec["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path / "other.json").fingerprint != trained.fingerprint


def test_settings_that_would_change_documents_are_ignored(trained: Tokenizer, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_file(str(trained.path))
    engine.enable_truncation(3)
    engine.enable_padding(length=50)
    engine.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").encode_document("a b c d e f") == trained.encode_document("a b c d e f")


def test_tokenizers_that_cannot_be_used_are_named(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer.json: No such file"):
        Tokenizer.load(path)
    for text in ("{", "[]", "{}", '{"model": {}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
            Tokenizer.load(path)
    spec = json.loads(trained.path.read_text())
    path.write_text(json.dumps({**spec, "normalizer": None}))
    with pytest.raises(UserError, match=r"another family"):
        Tokenizer.load(path)
    path.write_text(json.dumps({**spec, "added_tokens": [t for t in spec["added_tokens"] if t["content"] != "<s>"]}))
    with pytest.raises(UserError, match=r"has no <s>"):
        Tokenizer.load(path)
    plain = [*spec["added_tokens"][:-1], {**spec["added_tokens"][-1], "special": False}]
    path.write_text(json.dumps({**spec, "added_tokens": plain}))
    with pytest.raises(UserError, match=r"tokenizer.json: the added token '<\|sys_end\|>' isn't special"):
        Tokenizer.load(path)
    vocab = spec["model"]["vocab"]
    path.write_text(json.dumps({**spec, "model": {**spec["model"], "vocab": {**vocab, "<0xC3><0xA9>": VOCAB - 22}}}))
    with pytest.raises(UserError, match=r"tokenizer.json: the piece '<0xC3><0xA9>' joins bytes"):
        Tokenizer.load(path)
    spec["added_tokens"][-1]["id"] += 1
    path.write_text(json.dumps(spec))
    with pytest.raises(UserError, match=rf"<\|sys_end\|> has id {VOCAB}, where the engine gives it {VOCAB - 1}"):
        Tokenizer.load(path)


# Training


def test_rows_of_a_trained_tokenizer(trained: Tokenizer) -> None:
    vocab = json.loads(trained.path.read_text())["model"]["vocab"]
    assert trained.vocab_size == VOCAB
    assert sorted(vocab.values()) == list(range(VOCAB - len(CONTROL_TOKENS)))
    by_id = {index: piece for piece, index in vocab.items()}
    assert [by_id[index] for index in range(259)] == ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    engine = tokenizers.Tokenizer.from_file(str(trained.path))
    assert [engine.id_to_token(VOCAB - 22 + index) for index in range(22)] == list(CONTROL_TOKENS)
    assert trained.fim_prefix_id == VOCAB - 22


def test_pieces_of_a_trained_tokenizer(trained: Tokenizer) -> None:
    learned = [piece for piece, index in json.loads(trained.path.read_text())["model"]["vocab"].items() if index > 258]
    assert SPACE in learned and any(len(piece) > 4 and piece.startswith(SPACE) for piece in learned)
    for piece in learned:
        assert not any(char.isspace() for char in piece), repr(piece)
        assert SPACE not in piece.lstrip(SPACE), piece
        assert len(piece) == 1 or not any(char.isnumeric() for char in piece), piece
        words = re.sub(rf"^{SPACE}", "", piece).replace("_", "")
        assert words.isalpha() or not any(char.isalpha() for char in words), piece


def test_rare_characters_become_bytes_and_cross_no_piece() -> None:
    engine = train_tokenizer(["ab cd ef gh ij " * 5000 + "qéq " * 4], SMALLEST + 10)
    vocab = engine.get_vocab()
    assert "é" not in vocab and "qq" not in vocab
    frequent = train_tokenizer(["é ab" * 5000] * 3, SMALLEST + 3).get_vocab()
    assert "é" in frequent


def test_alphabet_leaves_room_for_merges() -> None:
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    engine = train_tokenizer([characters * 3, *corpus()[:2]], SMALLEST + 100)
    learned = [piece for piece, index in engine.get_vocab().items() if 258 < index < SMALLEST + 100 - 22]
    assert sum(len(piece) > 1 for piece in learned) >= 50
    assert 1 < sum(piece in characters for piece in learned) <= 50


def test_vocab_sizes_that_cannot_be_made() -> None:
    assert train_tokenizer(["ab"], SMALLEST).get_vocab_size(with_added_tokens=True) == SMALLEST
    with pytest.raises(UserError, match=rf"{SMALLEST - 1} is too small.*need {SMALLEST}"):
        train_tokenizer(["ab"], SMALLEST - 1)
    with pytest.raises(UserError, match=rf"ask for at most {SMALLEST + 2},"):
        train_tokenizer(["a b a b"], SMALLEST + 500)


def test_it_loads_in_transformers(trained: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(trained.path))
    text = "def f(x):\n    return x<|fim_pad|>"
    assert fast(text)["input_ids"] == trained.encode_prompt(text)
    assert fast.decode(trained.encode_document("é  f(x)\n"), clean_up_tokenization_spaces=False) == "é  f(x)\n"


# The command


def test_the_command_gives_the_same_file_twice(run_cli, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(corpus()[:10]):
        (folder / f"{index}.txt").write_text(text)
    (tmp_path / "more.jsonl").write_text(json.dumps({"body": "word " * 50}) + "\n")
    for output in ("a/tokenizer.json", "b/tokenizer.json"):
        inputs = (f"--input={folder}", f"--input={tmp_path / 'more.jsonl'}", "--text_key=body")
        done = run_cli("tokenizer", "train", *inputs, "--vocab_size=700", f"--output={tmp_path / output}")
        assert done.returncode == 0, done.stderr
        assert "700 rows" in done.stdout
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path / "a/tokenizer.json").vocab_size == 700


def test_the_command_refuses(run_cli, tmp_path: Path) -> None:
    done = run_cli("tokenizer", "train", "--input=missing.jsonl", f"--output={tmp_path / 't.json'}")
    assert done.returncode == 1 and "missing.jsonl: no such file" in done.stderr and not done.stdout
    with pytest.raises(UserError, match=r"pystd-cod.*must be one of.*pystd-code"):
        tokenizer_training.train(["pystd-cod"], 400, tmp_path / "t.json")
    with pytest.raises(UserError, match="is a folder"):
        tokenizer_training.train(["pystd-text"], 400, tmp_path)
    with pytest.raises(UserError, match="too small"):
        tokenizer_training.train(["pystd-text"], 300, tmp_path / "t.json")
    (tmp_path / "file").write_text("x" * 5)
    with pytest.raises(UserError, match="can't be written"):
        tokenizer_training.train([str(tmp_path / "file")], SMALLEST, tmp_path / "file" / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_tokenizer_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abba " * 50)
    output, train = tmp_path / "t.json", tokenizer_training.train
    for _ in range(2):
        train([str(tmp_path / "a.txt")], SMALLEST, output)
    before = output.read_bytes()
    with pytest.raises(UserError, match=r"--output: .*t\.json is another file already.*another name, or remove it"):
        train([str(tmp_path / "a.txt")], SMALLEST + 2, output)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "t.json"]


def test_a_large_corpus_is_thinned_by_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"document {index}"}) for index in range(2000)]
    random.Random(1).shuffle(lines)
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(lines))
    monkeypatch.setattr(tokenizer_training, "TRAINING_BYTES", path.stat().st_size // 4)
    source = readers.guess_source(str(path), "text")
    listed = [(source, item) for item in readers.list_inputs(source)]
    kept = list(tokenizer_training._training_texts(listed))
    assert kept == list(tokenizer_training._training_texts(listed))
    assert 400 < len(kept) < 600
