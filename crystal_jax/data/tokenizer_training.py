"""The command `tokenizer train`: a tokenizer.json for a corpus of one's own.

This file owns which part of a corpus a tokenizer is trained on. The same input gives the same file, byte for byte.
"""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tqdm import tqdm

from crystal_jax.data import readers
from crystal_jax.data.tokenizer import SMALLEST, check_vocab_size, train_tokenizer
from crystal_jax.errors import UserError

TRAINING_BYTES = 32_000_000
"""A larger corpus is thinned to about this size by a hash of the document id; more changes few merges."""


def train(inputs: list[str], vocab_size: int, output: str | Path, text_key: str = "text") -> tokenizers.Tokenizer:
    """Trains a tokenizer on `inputs` (pystd-code, pystd-text, files of JSON lines, folders of text) and writes it.

    Raises:
      UserError: an input that is missing or damaged, an output that can't be written or is another file already, a
        wrong vocab_size.
    """
    output = Path(output)
    check_vocab_size(vocab_size)
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; name the file, such as {output / 'tokenizer.json'}")
    sources = [readers.guess_source(item, text_key) for item in inputs]
    listed = [(source, item) for source in sources for item in readers.list_inputs(source)]
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        engine = train_tokenizer(_training_texts(listed), vocab_size)
        partial.write_text(engine.to_str(pretty=True), encoding="utf-8")
        if output.exists() and output.read_bytes() != partial.read_bytes():
            raise UserError(f"--output: {output} is another file already, perhaps the tokenizer of stores; give "
                            "another name, or remove it")
        partial.replace(output)
    except OSError as error:
        raise UserError(f"--output: {output} can't be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return engine


def _training_texts(listed: list[tuple[readers.SourceSpec, readers.Input]]) -> Iterator[str]:
    total = sum(item.bytes for _, item in listed)
    share = min(1.0, TRAINING_BYTES / max(total, 1))
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", mininterval=1) as bar:
        for source, item in listed:
            for document in readers.read_input(source, item):
                if isinstance(document, readers.Document) and _fraction(document.id) < share:
                    yield document.text.encode("utf-8", errors="replace").decode("utf-8")
            bar.update(item.bytes)


def _fraction(key: str) -> float:
    digest = hashlib.sha256(b"tokenizer:" + key.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    command = actions.add_parser("train", help="a BPE tokenizer.json with Crystal's special tokens")
    command.add_argument("--input", required=True, action="append",
                         help="pystd-code, pystd-text, .jsonl(.gz, .zst) files or folders of text; commas or repeated")
    command.add_argument("--vocab_size", type=int, default=4096, help=f"rows in all, at least {SMALLEST}")
    command.add_argument("--output", required=True, help="the tokenizer.json to write")
    command.add_argument("--text_key", default="text", help="of JSON lines")


def main(args: argparse.Namespace) -> int:
    train(readers.split_inputs(args.input), args.vocab_size, args.output, args.text_key)
    print(f"{args.output}: {args.vocab_size} rows")
    return 0
