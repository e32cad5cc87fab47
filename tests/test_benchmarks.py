"""Benchmarks: each runs from a plain checkout by the command that its docstring gives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rounds import Worker

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
RUN_BY_OTHERS = {"levanter_rows", "levanter_step", "maxtext_step"}
"""With the Python of a peer's own environment."""
COMMANDS = [path for path in BENCHMARKS if "__main__" in path.read_text() and path.stem not in RUN_BY_OTHERS]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_the_docstring_gives_the_command(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"    python -m benchmarks.{path.stem}" in docstring


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_modules_beside_it_are_imported_from_the_package(path: Path) -> None:
    """`import measure` would find it only if the file itself is run, and then not the package crystal_jax."""
    beside = {other.stem for other in BENCHMARKS}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not beside & set(names), f"line {node.lineno}"


@pytest.mark.drill
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_the_command_starts(path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}", "--help"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_a_worker_takes_its_turns(tmp_path: Path) -> None:
    program = """
import itertools
from benchmarks.rounds import turns
print("what a library prints")
count = itertools.count()
for _ in turns(lambda: {"taken": next(count)}):
    if next(count) == 4:
        raise SystemExit("too many")
"""
    worker = Worker([sys.executable, "-c", program], tmp_path / "log")
    answer = worker.take(2)
    assert answer["taken"] == 2 and answer["cpu"] >= 0 and answer["wall"] > 0
    with pytest.raises(RuntimeError, match="too many"):
        worker.take(2)
    worker.stop()
