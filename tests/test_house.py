"""The house rules that a machine can read: sizes, what lies where, light imports, and locks that agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"matplotlib", "seqio", "tensorflow", "tensorflow_datasets", "torch", "transformers"}
TOP_LEVEL = {
    ".ci", ".gitignore", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "benchmarks", "configs", "crystal_jax",
    "docs", "pyproject.toml", "requirements", "requirements.txt", "tests", "tpu",
}


def project_files() -> list[Path]:
    """Files that are, or would be, in the repository."""
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True)
    return [Path(line) for line in listing.stdout.splitlines() if (ROOT / line).exists()]


PYTHON_FILES = sorted(path for path in project_files() if path.suffix == ".py")
SOURCE = [path for path in PYTHON_FILES if path.parts[0] in ("crystal_jax", "configs")]


def test_nothing_new_at_the_top() -> None:
    found = {path.parts[0] for path in project_files()}
    assert found <= TOP_LEVEL, f"{sorted(found - TOP_LEVEL)}: put it into a folder, or add it to TOP_LEVEL"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=str)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= 400, f"{path}: {lines} lines, more than 400; split it by what its parts own"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno}: {node.name} has {length} lines, more than 60"


@pytest.mark.parametrize("path", SOURCE, ids=str)
def test_each_module_says_what_it_owns(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path}: no docstring"


@pytest.mark.parametrize("module", ["cli", "train"])
def test_starting_is_light(module: str) -> None:
    program = f"import sys, crystal_jax.{module}; print(*sorted(set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    heavy = HEAVY & set(result.stdout.split())
    assert not heavy, f"importing crystal_jax.{module} also imports {sorted(heavy)}; see: python -X importtime"


def locked(name: str) -> dict[str, str]:
    """Package to version, of a locked requirements file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return {name.lower(): version for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.M)}


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_lock_satisfies_the_project() -> None:
    project = pyproject()
    wanted = {"requirements.txt": project["project"]["dependencies"],
              "requirements/dev.txt": project["dependency-groups"]["dev"],
              "requirements/torch.txt": project["project"]["optional-dependencies"]["torch"],
              "requirements/data.txt": [requirement for extra in ("seqio", "beam", "gcs", "fast", "gguf", "eval")
                                        for requirement in project["project"]["optional-dependencies"][extra]],
              "requirements/tpu.txt": project["project"]["optional-dependencies"]["tpu"]}
    for file, requirements in wanted.items():
        versions = locked(file)
        for requirement in map(Requirement, requirements):
            version = versions.get(requirement.name.lower())
            assert version, f"{file}: lacks {requirement.name}; run `make lock`"
            assert requirement.specifier.contains(version), f"{file}: {requirement.name} {version}, not {requirement}"


def test_the_locks_agree() -> None:
    base = locked("requirements.txt")
    for file in ("requirements/dev.txt", "requirements/torch.txt", "requirements/data.txt", "requirements/tpu.txt"):
        differing = {name: version for name, version in locked(file).items() if base.get(name, version) != version}
        assert not differing, f"{file}: {differing}, other than in requirements.txt"


def test_locks_are_hashed_and_name_no_host() -> None:
    for file in ("requirements.txt", "requirements/data.txt", "requirements/dev.txt", "requirements/tpu.txt"):
        text = (ROOT / file).read_text(encoding="utf-8")
        packages = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
        assert packages
        assert all("--hash=sha256:" in package for package in packages), f"{file}: a package without a hash"
        assert not re.search(r"://|^-", text, re.M), f"{file}: names a host or an option of one machine"
