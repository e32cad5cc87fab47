"""Python's standard library as two corpora that every machine has: its code, and its docstrings and help topics.

This file owns which files belong to them. Its invariant: a module's docstrings have the group of its code, so both are
held out together.
"""

import ast
import importlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from crystal_jax.data.readers.base import Document, Documents, Dropped, Input, Reader, SourceSpec
from crystal_jax.data.readers.listing import File, deal, look_at
from crystal_jax.data.readers.text import whole_file
from crystal_jax.errors import UserError

TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
TOPICS = "pydoc_data/topics.py"
"""English held in a Python file: text of pystd-text, so no code of pystd-code."""


def list_inputs(source: SourceSpec) -> list[Input]:
    """The library's modules, the same for both kinds."""
    if source.inputs:
        raise UserError(f"--input: {','.join(source.inputs)}: --source={source.kind} reads Python's standard library; "
                        "leave --input out")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in TEST_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        files += [File(str(path), path.relative_to(root).as_posix(), *look_at(str(path))) for path in paths]
    return deal(source.kind, sorted(files, key=lambda file: file.name))


def read_code(_: SourceSpec, item: Input) -> Documents:
    """A document per module."""
    for path, name in item.files:
        if name != TOPICS:
            yield whole_file(path, name)


def read_text(_: SourceSpec, item: Input) -> Documents:
    """A document per module and one per help topic."""
    for path, name in item.files:
        if name == TOPICS:
            topics = importlib.import_module("pydoc_data.topics").topics
            for topic, text in sorted(topics.items()):
                yield Document(f"{name}#{topic}", text, name, group=f"{name}#{topic}")
            continue
        code = whole_file(path, name)
        yield docstrings(code) if isinstance(code, Document) else code


def docstrings(code: Document) -> Document | Dropped:
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


CODE = Reader(list_inputs, read_code, "Python's standard library without its tests")
TEXT = Reader(list_inputs, read_text, "its docstrings and help topics, one document a module")
