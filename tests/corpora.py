"""Small but real corpora in the published shapes, from files that every machine has: Python's standard library.

    python tests/corpora.py OUTPUT_DIR --mb 4

writes OUTPUT_DIR/slimpajama and OUTPUT_DIR/starcoder of about 4 MB of text each. It needs nothing of this
package. The same Python writes the same documents.
"""

import argparse
import ast
import functools
import hashlib
import html
import importlib
import io
import itertools
import json
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.cache
def library() -> tuple[Path, ...]:
    """The modules of the standard library without its tests, in the order of a hash: any first few are mixed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in TESTS]
        found += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    return tuple(sorted(found, key=lambda path: draw(path.as_posix())))


def draw(key: str) -> int:
    """A number of 64 bits that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


class Module:
    """A module's code and the English in it."""

    def __init__(self, path: Path) -> None:
        self.name = path.as_posix()
        self.code = (Path(sysconfig.get_paths()["stdlib"]) / path).read_text(encoding="utf-8", errors="replace")
        self.nodes: list[Definition] = []
        """Classes, their methods and functions, in the order of the file."""
        self.doc = ""
        self.documented: list[tuple[Definition, str]] = []
        """(definition, its docstring)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(self.code)
            except (SyntaxError, ValueError):
                return
        self.doc = ast.get_docstring(tree) or ""
        for node in tree.body:
            inside = node.body if isinstance(node, ast.ClassDef) else []
            self.nodes += [found for found in (node, *inside) if isinstance(found, Definition)]
        self.documented = [(node, doc) for node in self.nodes if (doc := ast.get_docstring(node))]

    def comments(self) -> str:
        lines = []
        try:
            for token in tokenize.generate_tokens(io.StringIO(self.code).readline):
                if token.type == tokenize.COMMENT and len(token.string) > 30:
                    lines.append(token.string.lstrip("#: "))
        except (tokenize.TokenError, SyntaxError):
            pass
        return "\n".join(lines)


module = functools.cache(Module)


def modules() -> Iterator[Module]:
    return map(module, library())


# SlimPajama


def arxiv() -> Iterator[str]:
    for item in modules():
        parts = [f"\\section{{{node.name}}}\n{doc}"
                 for node, doc in item.documented if isinstance(node, ast.ClassDef)]
        if parts:
            yield f"\\title{{{item.name}}}\n\\begin{{document}}\n" + "\n\n".join(parts) + "\n\\end{document}"


def book() -> Iterator[str]:
    stream = modules()
    while some := list(itertools.islice(stream, 4)):
        chapters = [f"Chapter {item.name}\n\n{item.comments()}" for item in some if item.comments()]
        if chapters:
            yield "\n\n\n".join(chapters)


def c4() -> Iterator[str]:
    yield from (doc for item in modules() for _, doc in item.documented if len(doc) > 100)


def common_crawl() -> Iterator[str]:
    for item in modules():
        docs = [item.doc, *(f"{node.name}: {doc}" for node, doc in item.documented)]
        if any(docs):
            yield "\n\n".join(doc for doc in docs if doc)


def stack_exchange() -> Iterator[str]:
    for item in modules():
        for node, doc in item.documented:
            yield f"Q: What does {node.name} of {item.name} do?\n\nA: {doc}"


def wikipedia() -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[key] for key in sorted(topics))


SLIMPAJAMA: dict[str, tuple[Callable[[], Iterator[str]], float]] = {
    "RedPajamaArXiv": (arxiv, 0.043),
    "RedPajamaBook": (book, 0.041),
    "RedPajamaC4": (c4, 0.267),
    "RedPajamaCommonCrawl": (common_crawl, 0.533),
    "RedPajamaGithub": (lambda: (item.code for item in modules() if item.code), 0.05),
    "RedPajamaStackExchange": (stack_exchange, 0.032),
    "RedPajamaWikipedia": (wikipedia, 0.034),
}
"""Source to its documents and its share of phase 1."""


def mixed(sources: dict[str, tuple[Callable[[], Iterator[Any]], float]], size: float) -> Iterator[tuple[str, Any]]:
    """(source, document) in about the sources' shares until `size` characters are out or all sources are empty."""
    streams = {name: make() for name, (make, _) in sources.items()}
    taken = dict.fromkeys(sources, 0.0)
    total = 0
    while streams and total < size:
        name = min(streams, key=lambda source: taken[source] / sources[source][1])
        document = next(streams[name], None)
        if document is None:
            del streams[name]
            continue
        length = len(document if isinstance(document, str) else document["content"])
        total += length
        taken[name] += length
        yield name, document


def write_slimpajama(folder: Path, mb: float = 1.0, chunks: int = 2, files: int = 6) -> Path:
    """folder/train/chunkN/example_train_M.jsonl.zst and a holdout file, as published; returns folder.

    The numbers begin anew in each chunk.
    """
    import zstandard

    lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": source}}) + "\n"
             for source, text in mixed(SLIMPAJAMA, mb * 1e6)]
    numbers = [(1 + index * chunks // files, index - -(-(index * chunks // files) * files // chunks))
               for index in range(files)]
    places = [folder / f"train/chunk{chunk}/example_train_{number}.jsonl.zst" for chunk, number in numbers]
    places.append(folder / "validation/chunk1/example_holdout_0.jsonl.zst")
    for index, path in enumerate(places):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(
            "".join(lines[index :: len(places)]).encode()))
    return folder


# StarCoder


def as_html(item: Module) -> str:
    rows = "\n".join(f"<dt><code>{node.name}</code></dt>\n<dd><p>{html.escape(doc)}</p></dd>"
                     for node, doc in item.documented)
    return (f"<!DOCTYPE html>\n<html>\n<head><title>{item.name}</title></head>\n<body>\n"
            f"<p>{html.escape(item.doc)}</p>\n<dl>\n{rows}\n</dl>\n<p><s>struck out</s></p>\n</body>\n</html>\n")


def as_css(item: Module) -> str:
    rules = []
    for node in item.nodes:
        key = draw(node.name)
        rules.append(f".{node.name.strip('_').replace('_', '-')} {{\n  color: #{key % 2**24:06x};\n"
                     f"  margin: {key % 7}px {key % 13}px;\n}}\n")
    return "".join(rules)


JAVASCRIPT = ((r"\bself\b", "this"), (r"\bNone\b", "null"), (r"\bTrue\b", "true"), (r"\bFalse\b", "false"),
              (r"\band\b", "&&"), (r"\bor\b", "||"), (r"(?m)^(\s*)#", r"\1//"), (r"\belif\b", "else if"))


def as_javascript(item: Module) -> str:
    functions, lines = [], item.code.splitlines()
    for node in item.nodes:
        if isinstance(node, ast.FunctionDef):
            body = "\n".join(lines[node.body[0].lineno - 1 : node.end_lineno])
            for pattern, new in JAVASCRIPT:
                body = re.sub(pattern, new, body)
            names = ", ".join(argument.arg for argument in node.args.args if argument.arg != "self")
            functions.append(f"function {node.name}({names}) {{\n{body};\n}}\n")
    return "\n".join(functions)


def as_markdown(item: Module) -> str:
    sections = (f"\n## {node.name}\n\n{doc}\n" for node, doc in item.documented)
    return f"# {item.name}\n\n{item.doc}\n" + "".join(sections)


def as_notebook(item: Module) -> str:
    cells = [f"<jupyter_text>{doc}<jupyter_code>help({node.name})<jupyter_output>{doc.splitlines()[0]}"
             for node, doc in item.documented]
    return "<jupyter_start>" + "".join(cells) + "<jupyter_code>del help<jupyter_output><empty_output>" if cells else ""


def as_commit(item: Module) -> str:
    return f"<commit_before><commit_msg>Add {item.name}<commit_after>{item.code}" if item.code else ""


def as_issue(item: Module) -> str:
    talk = "".join(f"<issue_comment>username_1: {doc}" for _, doc in item.documented)
    return f"<issue_start><issue_comment>Title: {item.name}\nusername_0: {item.doc}{talk}<issue_closed>" if talk else ""


STARCODER: dict[str, Callable[[Module], str]] = {
    "css": as_css,
    "git-commits-cleaned": as_commit,
    "github-issues-filtered-structured": as_issue,
    "html": as_html,
    "javascript": as_javascript,
    "jupyter-structured-clean-dedup": as_notebook,
    "markdown": as_markdown,
    "python": lambda item: item.code,
}
"""Folder to what a module becomes in it."""
WITHOUT_METADATA = ("git-commits-cleaned", "github-issues-filtered-structured", "jupyter-structured-clean-dedup")


def starcoder_rows(language: str) -> Iterator[dict[str, Any]]:
    for number, item in enumerate(modules()):
        content = STARCODER[language](item)
        if not content:
            continue
        repository, stars, key = f"python/{item.name.split('/')[0]}", draw(item.name) % 500, draw(language + item.name)
        if language in WITHOUT_METADATA:
            yield {"content": content}
            continue
        tags = [f"<reponame>{repository}" * (key & 1), f"<filename>{item.name}" * (key >> 1 & 1),
                f"<gh_stars>{stars}" * (key >> 2 & 1)]
        head = "".join(tags)
        yield {"max_stars_repo_path": item.name, "max_stars_repo_name": repository, "max_stars_count": stars,
               "id": str(number), "content": f"{head}\n{content}" if head else content}


def write_starcoder(folder: Path, mb: float = 1.0, files: int = 2, checksums: bool = True) -> Path:
    """folder/LANGUAGE/train-NNNNN-of-NNNNN.parquet, as published; returns folder."""
    import pyarrow
    import pyarrow.parquet

    shares = {language: (functools.partial(starcoder_rows, language), 1.0) for language in STARCODER}
    rows: dict[str, list[dict[str, Any]]] = {language: [] for language in STARCODER}
    for language, row in mixed(shares, mb * 1e6):
        rows[language].append(row)
    for language, found in rows.items():
        for index in range(files):
            path = folder / language / f"train-{index:05d}-of-{files:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pyarrow.Table.from_pylist(found[index::files])
            pyarrow.parquet.write_table(table, path, row_group_size=20, write_page_checksum=checksums)
    return folder


# Datasets of other kinds, for tests


def published_rows(count: int, length: int, vocab_size: int = 400, seed: int = 0, full: bool = False) -> np.ndarray:
    """int32 [count, 3, length] of ids, mask and labels; every third row ends early unless they are `full`."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(3, vocab_size, (count, length + 1), dtype=np.int32)
    mask = np.ones((count, length), np.int32)
    for row in range(0, 0 if full else count, 3):
        mask[row, rng.integers(1, length) :] = 0
    return np.stack([stream[:, :-1] * mask, mask, stream[:, 1:] * mask], axis=1)


def write_crystal_h5(path: Path, rows: np.ndarray) -> Path:
    """A file as the published ones: dataset "data" of `published_rows`."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=rows, chunks=(1, *rows.shape[1:]), compression="gzip")
    return path


def write_tfds(data_dir: Path, examples: list[dict[str, Any]], shards: int = 3,
               file_format: str = "array_record") -> Any:
    """The TFDS dataset `small_text` with a split train of these examples in their order (text, and number)."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # read from its files, as anybody's

        class SmallText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({"text": tfds.features.Text(),
                                                       "number": tfds.features.Scalar(dtype=np.int64)})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, _: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                yield from enumerate(examples)

    builder = SmallText(data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    return builder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--mb", type=float, default=4.0, help="text of each corpus; at most what the library holds")
    args = parser.parse_args()
    for path in (write_slimpajama(args.output / "slimpajama", args.mb),
                 write_starcoder(args.output / "starcoder", args.mb)):
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        print(f"{path}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB compressed")


if __name__ == "__main__":
    main()
