"""Readers of raw documents: one table from a source's kind to what lists its inputs and what reads one.

This file owns what a document of each kind is and how it is named. Its invariants: the inputs of a source come in the
same order on every machine, and a damaged input is never read as a shorter one.
"""

import ast
import glob
import importlib
import json
import os
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from crystal_jax.config import nearest
from crystal_jax.errors import UserError

DEALT_INPUTS = 16
"""Inputs that a folder of files is dealt into, so that its even and odd halves exist."""
READ_BYTES = 1 << 20
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
TOPICS = "pydoc_data/topics.py"
"""English held in a Python file: text of pystd-text, so no code of pystd-code."""


@dataclass(frozen=True)
class SourceSpec:
    """What a user names as a source."""

    kind: str
    inputs: tuple[str, ...] = ()
    """Files, folders or globs; none for a kind that knows its own."""
    text_key: str = "text"
    id_key: str | None = None
    """Without one a line of JSON is named by its file and number."""


@dataclass(frozen=True)
class Input:
    """One task of `prepare`, which becomes one shard."""

    name: str
    files: tuple[tuple[str, str], ...]
    """(path, name that doesn't depend on where the data lie)."""
    bytes: int


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    source: str
    """The file it comes from."""
    group: str
    """Documents of one group are held out together."""


@dataclass(frozen=True)
class Dropped:
    id: str
    reason: str


Documents = Iterator[Document | Dropped]


@dataclass(frozen=True)
class Reader:
    list_inputs: Callable[[SourceSpec], list[Input]]
    read: Callable[[SourceSpec, Input], Documents]
    help: str


def list_inputs(source: SourceSpec) -> list[Input]:
    """The inputs of a source, in order.

    Raises:
      UserError: an unknown kind, a missing file, the same file twice, nothing to read.
    """
    return _reader(source.kind).list_inputs(source)


def read_input(source: SourceSpec, item: Input) -> Documents:
    """The documents of one input, in order.

    Raises:
      UserError: a damaged file, by name.
    """
    return _reader(source.kind).read(source, item)


def _reader(kind: str) -> Reader:
    if kind not in READERS:
        raise UserError(f"--source: {kind!r} must be one of {', '.join(READERS)}{nearest(kind, READERS)}")
    return READERS[kind]


def split_commas(values: Iterable[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part]


def guess_source(item: str, text_key: str) -> SourceSpec:
    """The source that one --input of `tokenizer train` names: a kind without inputs, JSON lines or text."""
    if item.startswith("pystd") and not os.path.exists(item):
        return SourceSpec(item)
    kind = "jsonl" if item.removesuffix(".gz").removesuffix(".zst").endswith(JSONL_ENDING) else "text"
    return SourceSpec(kind, (item,), text_key=text_key)


# Listing of files


def _files(source: SourceSpec, endings: tuple[str, ...]) -> list[tuple[str, str]]:
    """(path, name) of every file of the source, sorted by name; names are relative to the common folder."""
    if not source.inputs:
        raise UserError(f"--input: --source={source.kind} needs at least one file, folder or glob")
    paths = [path for item in source.inputs for path in _expand(item, endings)]
    paths = [os.path.abspath(path) for path in paths]
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"--input: {path} is listed twice (also as {seen[real]}); name it once")
        seen[real] = path
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return sorted(((path, os.path.relpath(path, common)) for path in paths), key=lambda file: file[1])


def _expand(item: str, endings: tuple[str, ...]) -> list[str]:
    if os.path.isdir(item):
        inside = glob.glob(os.path.join(glob.escape(item), "**"), recursive=True)  # leaves hidden files out
        found = [path for path in inside if path.endswith(endings)]
    else:
        found = [item] if os.path.exists(item) else glob.glob(item, recursive=True)
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        state = "holds no file to read" if os.path.isdir(item) else "no such file"
        raise UserError(f"--input: {item}: {state}; give an existing file, folder or glob")
    return found


def _deal(kind: str, files: list[tuple[str, str]]) -> list[Input]:
    """Files dealt in turn into at most DEALT_INPUTS inputs."""
    count = min(DEALT_INPUTS, len(files))
    hands = [tuple(files[start::count]) for start in range(count)]
    return [
        Input(f"{kind}/{index:02d}", hand, sum(os.path.getsize(path) for path, _ in hand))
        for index, hand in enumerate(hands)
    ]


# Python's standard library


def _pystd_inputs(source: SourceSpec) -> list[Input]:
    if source.inputs:
        raise UserError(f"--input: {','.join(source.inputs)}: --source={source.kind} reads Python's standard library; "
                        "leave --input out")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in TEST_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        files += [(str(path), path.relative_to(root).as_posix()) for path in paths]
    return _deal(source.kind, sorted(files, key=lambda file: file[1]))


def _read_pystd_code(_: SourceSpec, item: Input) -> Documents:
    for path, name in item.files:
        if name != TOPICS:
            yield _whole_file(path, name)


def _read_pystd_text(_: SourceSpec, item: Input) -> Documents:
    for path, name in item.files:
        if name == TOPICS:
            topics = importlib.import_module("pydoc_data.topics").topics
            for topic, text in sorted(topics.items()):
                yield Document(f"{name}#{topic}", text, name, group=f"{name}#{topic}")
            continue
        code = _whole_file(path, name)
        yield _docstrings(code) if isinstance(code, Document) else code


def _docstrings(code: Document) -> Document | Dropped:
    """The docstrings of a module, its classes and functions, in order, as one document."""
    try:
        with warnings.catch_warnings():  # of odd escapes in the code that is read
            warnings.simplefilter("ignore")
            tree = ast.parse(code.text)
    except (SyntaxError, ValueError):
        return Dropped(code.id, "not_python")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in _in_order(tree) if isinstance(node, kinds)]
    text = "\n\n".join(docstring for docstring in found if docstring)
    return Document(code.id, text, code.source, code.group)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


# Files of text


def _text_inputs(source: SourceSpec) -> list[Input]:
    return _deal(source.kind, _files(source, endings=("",)))


def _read_text(_: SourceSpec, item: Input) -> Documents:
    for path, name in item.files:
        yield _whole_file(path, name)


def _whole_file(path: str, name: str) -> Document | Dropped:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return Dropped(name, "not_utf8")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    return Document(name, text, name, group=name)


# JSON lines


JSONL_ENDING = ".jsonl"


def _jsonl_inputs(source: SourceSpec) -> list[Input]:
    endings = (JSONL_ENDING, f"{JSONL_ENDING}.gz", f"{JSONL_ENDING}.zst")
    return [Input(name, ((path, name),), os.path.getsize(path)) for path, name in _files(source, endings)]


def _read_jsonl(source: SourceSpec, item: Input) -> Documents:
    ((path, name),) = item.files
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            record = _record(path, number, line)
            text = _value(record, source.text_key, "--text_key", f"{path}:{number}")
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: {source.text_key!r} holds {type(text).__name__}, not a string; "
                                "choose another --text_key")
            identity = f"{name}:{number}"
            if source.id_key is not None:
                identity = str(_value(record, source.id_key, "--id_key", f"{path}:{number}"))
            yield Document(identity, text, name, group=identity)


def _record(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # also what isn't UTF-8
        raise UserError(f"{path}:{number}: not a line of JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: a JSON {type(record).__name__}, not an object with a text; mend the line")
    return record


def _value(record: dict[str, Any], key: str, flag: str, place: str) -> Any:
    if key not in record:
        raise UserError(f"{place}: no key {key!r}; it has {', '.join(record) or 'none'}; choose with {flag}")
    return record[key]


def _lines(path: str) -> Iterator[bytes]:
    """Lines of a file, decompressed by its ending, with damage and truncation found."""
    ending = Path(path).suffix
    rest = b""
    try:
        with open(path, "rb") as file:
            for data in DECOMPRESS.get(ending, _plain)(iter(lambda: file.read(READ_BYTES), b"")):
                *lines, rest = (rest + data).split(b"\n")
                yield from lines
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except EOFError as error:
        raise UserError(f"{path}: truncated, the compressed data end too early; fetch the file again") from error
    except (zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged compressed data ({error}); fetch the file again") from error
    if rest:
        yield rest


def _plain(blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield from blocks


def _decompressed(blocks: Iterable[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """The contents of one compressed frame after another; EOFError when the last one isn't complete.

    zstandard's own stream reader ends a truncated file in silence.
    """
    frame, complete = make(), False  # an empty file isn't a frame
    for block in blocks:
        while block:
            yield frame.decompress(block)
            complete, block = frame.eof, frame.unused_data
            if complete:
                frame = make()
    if not complete:
        raise EOFError


DECOMPRESS: dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {
    ".gz": lambda blocks: _decompressed(blocks, lambda: zlib.decompressobj(wbits=31)),
    ".zst": lambda blocks: _decompressed(blocks, lambda: zstandard.ZstdDecompressor().decompressobj()),
}

READERS: dict[str, Reader] = {
    "pystd-code": Reader(_pystd_inputs, _read_pystd_code, "Python's standard library without its tests"),
    "pystd-text": Reader(_pystd_inputs, _read_pystd_text, "its docstrings and help topics, one document a module"),
    "jsonl": Reader(_jsonl_inputs, _read_jsonl, "an object with a text per line; also .gz, .zst"),
    "text": Reader(_text_inputs, _read_text, "a file is a document"),
}
"""Kind to its reader; a new kind is one line here."""
