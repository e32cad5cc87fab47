"""MB per CPU-second of tokenising, in turn in one process: Hugging Face's engine, ours, the fast engine, sentencepiece.

    python -m benchmarks.tokenise [--tokenizer=tokenizer.json] [--rounds=3] [--megabytes=0]

Over Python's standard library: its code, and its docstrings and help topics; documents with a literal "▁" are left out,
since ours alone keeps it apart from a space. A round makes each engine anew: none begins with words that it has met.
"again" is a second pass of the same documents. Ids are compared with Hugging Face's, document by document. Without
--tokenizer, one of 8192 rows is trained on the code first.
"""

import argparse
import importlib.util
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # read at import

import numpy as np
import tokenizers

from benchmarks.measure import clocked, memory_mb
from crystal_jax.data import readers
from crystal_jax.data.fast_tokenizer import make_encoder
from crystal_jax.data.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer, train_tokenizer
from crystal_jax.data.words import SPACE

VOCAB = 8192
TRAINING_DOCUMENTS = 400
Encode = Callable[[list[str]], Iterable]


def hugging_face(tokenizer: Tokenizer) -> Encode:
    engine = tokenizers.Tokenizer.from_str(tokenizer.json)
    engine.encode_special_tokens = True
    return lambda texts: [one.ids for one in engine.encode_batch_fast(texts, add_special_tokens=False)]


def ours(tokenizer: Tokenizer) -> Encode:
    return make_encoder(Tokenizer.load(tokenizer.path), "reference").encode_documents


def fast(tokenizer: Tokenizer) -> Encode:
    return make_encoder(Tokenizer.load(tokenizer.path), "fast").encode_documents


def sentencepiece(tokenizer: Tokenizer) -> Encode:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=_sentencepiece_model(json.loads(tokenizer.json)["model"])).encode


PROGRAMS = {"HF tokenizers": ("tokenizers", hugging_face), "ours": ("tokenizers", ours),
            "ours, fast engine": ("gigatoken", fast), "sentencepiece": ("sentencepiece", sentencepiece)}


def _sentencepiece_model(model: dict) -> bytes:
    """The same pieces, by the rank of their merges, in protobuf by hand: the package's own wants one protobuf."""

    def field(number: int, value: "int | float | bytes") -> bytes:
        if isinstance(value, float):
            return _varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, bytes):
            return _varint(number << 3 | 2) + _varint(len(value)) + value
        return _varint(number << 3) + _varint(value)

    kinds = dict.fromkeys(BYTE_TOKENS, 6) | dict(zip(SPECIAL_TOKENS, (2, 3, 3), strict=True))
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    pieces = (field(1, piece.encode()) + field(2, -float(ranks.get(piece, 1e9))) + field(3, kinds.get(piece, 1))
              for piece in sorted(model["vocab"], key=model["vocab"].get))
    trainer = field(3, 2) + field(35, 1)  # BPE, byte_fallback
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)  # dummy prefix, spaces kept, escaped
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def _varint(value: int) -> bytes:
    low = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([part | 0x80 for part in low[:-1]] + low[-1:])


def corpus(kind: str, megabytes: float) -> list[str]:
    source = readers.SourceSpec(kind)
    documents = (one.text for item in readers.list_inputs(source) for one in readers.read_input(source, item)
                 if isinstance(one, readers.Document))
    found, size = [], 0
    for text in documents:
        if text and SPACE not in text and not (megabytes and size > megabytes * 1e6):
            found.append(text)
            size += len(text.encode())
    return found


def compare(name: str, texts: list[str], tokenizer: Tokenizer, rounds: int) -> None:
    size = sum(len(text.encode()) for text in texts) / 1e6
    reference = hugging_face(tokenizer)(texts)
    print(f"\n{name}: {size:.1f} MB, {len(texts)} documents, {sum(map(len, reference)) / 1e6:.2f}M tokens; medians")
    programs = {label: make for label, (package, make) in PROGRAMS.items() if importlib.util.find_spec(package)}
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in programs}
    equal: dict[str, int] = {}
    for _ in range(rounds):
        for label, make in programs.items():
            encode = make(tokenizer)
            with clocked() as first:
                found = encode(texts)
            with clocked() as again:
                encode(texts)
            seconds[label].append((first.cpu, again.cpu))
            equal[label] = sum(np.array_equal(ids, right) for ids, right in zip(found, reference, strict=True))
    base = np.array(seconds["HF tokenizers"])
    for label, (package, _) in PROGRAMS.items():
        if label not in seconds:
            print(f"{label:20} not installed ({package})")
            continue
        cpu = np.array(seconds[label])
        speed, ratio = size / np.median(cpu, 0), np.median(base / cpu, 0)
        print(f"{label:20} {speed[0]:6.1f} MB/s, again {speed[1]:6.1f}   {ratio[0]:5.1f} of HF's speed, again "
              f"{ratio[1]:5.1f}   ids equal in {equal[label]} of {len(texts)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=0, help="of each corpus; 0: all of it")
    args = parser.parse_args()
    code, text = (corpus(kind, args.megabytes) for kind in ("pystd-code", "pystd-text"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.tokenizer or Path(folder, "tokenizer.json"))
        if not args.tokenizer:
            train_tokenizer(code[:TRAINING_DOCUMENTS], VOCAB).save(str(path))
        with clocked() as loading:
            tokenizer = Tokenizer.load(path)
        print(f"{path.name}, {tokenizer.vocab_size} rows, loaded in {loading.cpu:.2f} CPU-s; {args.rounds} rounds")
        compare("Python code", code, tokenizer, args.rounds)
        compare("English text", text, tokenizer, args.rounds)
    print(f"\npeak memory {memory_mb('VmHWM'):.0f} MB")


if __name__ == "__main__":
    main()
