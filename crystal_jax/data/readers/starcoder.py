"""StarCoderData as published: a folder of parquet files per language, metadata written into the text.

This file owns its folders and which literal tags stand for control tokens. Its invariant: a tag becomes one only where
the published preparation wrote it: at the head of a document, and anywhere in the folders that have tags of their
own; elsewhere it is text that somebody wrote.
"""

import os
import re
from typing import Any

from crystal_jax.config import nearest
from crystal_jax.data.readers import parquet, records
from crystal_jax.data.readers.base import Document, Documents, Dropped, Input, Reader, SourceSpec
from crystal_jax.data.readers.listing import group, list_files
from crystal_jax.errors import UserError

TEXT, IDENTITY, REPOSITORY = "content", "id", "max_stars_repo_name"

LANGUAGES = (
    "ada", "agda", "alloy", "antlr", "applescript", "assembly", "augeas", "awk", "batchfile", "bluespec", "c",
    "c-sharp", "clojure", "cmake", "coffeescript", "common-lisp", "cpp", "css", "cuda", "dart", "dockerfile",
    "elixir", "elm", "emacs-lisp", "erlang", "f-sharp", "fortran", "git-commits-cleaned",
    "github-issues-filtered-structured", "glsl", "go", "groovy", "haskell", "html", "idris", "isabelle", "java",
    "java-server-pages", "javascript", "json", "julia", "jupyter-scripts-dedup-filtered",
    "jupyter-structured-clean-dedup", "kotlin", "lean", "literate-agda", "literate-coffeescript",
    "literate-haskell", "lua", "makefile", "maple", "markdown", "mathematica", "matlab", "ocaml", "pascal", "perl",
    "php", "powershell", "prolog", "protocol-buffer", "python", "r", "racket", "restructuredtext", "rmarkdown",
    "ruby", "rust", "sas", "scala", "scheme", "shell", "smalltalk", "solidity", "sparql", "sql", "stan",
    "standard-ml", "stata", "systemverilog", "tcl", "tcsh", "tex", "thrift", "typescript", "verilog", "vhdl",
    "visual-basic", "xslt", "yacc", "yaml", "zig",
)  # fmt: skip
"""The folders of bigcode/starcoderdata."""

HEAD = re.compile(r"(?=<(?:reponame|filename|gh_stars)>)(?:<(reponame)>[^\n]*?)?(?:<(filename)>[^\n]*?)?"
                  r"(?:<(gh_stars)>[^\n]*?)?(?:\n|\Z)")  # fmt: skip
"""<reponame>R<filename>F<gh_stars>S and a newline, each of the three optional."""
FOLDER_TAGS = {
    "jupyter-structured-clean-dedup": ("jupyter_start", "jupyter_text", "jupyter_code", "jupyter_output",
                                       "empty_output"),
    "git-commits-cleaned": ("commit_before", "commit_msg", "commit_after"),
    "github-issues-filtered-structured": ("issue_start", "issue_comment", "issue_closed"),
}  # fmt: skip
ANYWHERE = {folder: re.compile(f"<({'|'.join(tags)})>") for folder, tags in FOLDER_TAGS.items()}


def list_inputs(source: SourceSpec) -> list[Input]:
    """An input per file of the chosen languages."""
    for language in source.languages:
        if language not in LANGUAGES:
            raise UserError(f"--languages: {language!r} is no folder of StarCoderData{nearest(language, LANGUAGES)}")
    files = list_files(source, parquet.FILES, parquet.CALLED)
    found = {language_of(file.path): file.path for file in files}
    for language, path in found.items():
        if language not in LANGUAGES:
            raise UserError(f"--input: {path}: {language!r} is no folder of StarCoderData"
                            f"{nearest(language, LANGUAGES)}")
    for language in source.languages:
        if language not in found:
            raise UserError(f"--languages: {language!r}: no file of it among {', '.join(found)}")
    chosen = [file for file in files if not source.languages or language_of(file.path) in source.languages]
    return group(chosen, range(len(chosen)), source.files_per_input)


def language_of(path: str) -> str:
    """The name of the folder that a file lies in."""
    return os.path.basename(os.path.dirname(path))


def read(_: SourceSpec, item: Input) -> Documents:
    """Documents called language/id and grouped by their repository."""
    for path, name in item.files:
        language = language_of(path)
        for row, record in enumerate(parquet.rows(path, {"--text_key": TEXT}, optional=(IDENTITY, REPOSITORY))):
            identity = f"{language}/{os.path.basename(path)}:{row}"
            yield _document(record, language, f"{path}: row {row}", name, identity)


def _document(record: dict[str, Any], language: str, place: str, file: str, identity: str) -> Document | Dropped:
    # The folders of issues, commits and notebooks lack some columns.
    if record.get(IDENTITY) is not None:
        identity = f"{language}/{records.plain(record[IDENTITY])}"
    try:
        text = records.text_of(record, TEXT, place)
    except UnicodeDecodeError:
        return Dropped(identity, "not_utf8")
    if text is None:
        return Dropped(identity, "no_text")
    group = str(records.plain(record.get(REPOSITORY) or identity))
    return Document(identity, text, file, group, tags=tags(text, language))


def tags(text: str, language: str) -> tuple[tuple[int, int, str], ...]:
    """The literal tags of a document that stand for control tokens; see Document.tags."""
    head = HEAD.match(text)
    found = [(head.start(name) - 1, head.end(name) + 1, head[name]) for name in (1, 2, 3) if head[name]] if head else []
    if language in ANYWHERE:
        found += [(*match.span(), match[1]) for match in ANYWHERE[language].finditer(text)]
    return tuple(sorted(found))


READER = Reader(list_inputs, read, "its LANGUAGE/*.parquet, with their metadata as control tokens",
                frozenset({"languages", "files_per_input"}))
