"""The modules form layers and import downward only; the table below is the design, the rest reads the imports."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "crystal_jax"

# Lowest first. A module may import its own layer (without a cycle) and those before it; `data` and `convert` are
# packages. A name that isn't written yet may stand here.
LAYERS = (
    ("__init__", "errors", "config", "rules", "phases", "mup", "generations", "hlo", "hlo_text", "buffers", "cost"),
    ("files", "storage", "objects", "lease", "sharding", "processes", "fingerprint", "config_file", "goodput",
     "history"),
    ("products", "kernels", "layers", "attention", "loss"),
    ("model", "optimizer", "data"),
    ("stream", "trees", "states", "exports", "checkpoint", "metrics", "recipe", "update",
     "utilisation", "snapshot", "topology", "ahead"),
    ("amend", "run_dir", "spikes", "progress", "convert", "score", "evaluate", "sampling", "scoring", "evaluation",
     "generate", "sandbox", "execute"),
    ("loop",),
    ("train",),
    ("report", "report_page", "plots", "plots_evaluations", "published", "compare", "inspect", "inspect_page", "replay",
     "plan", "plan_text", "coord_check", "plots_mup"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Stricter than the layer.
ONLY = {
    "data": {"__init__", "errors", "config", "phases", "files", "sharding", "data"},
    "convert": {"__init__", "errors", "config", "files", "kernels", "layers", "attention", "model", "stream", "exports",
                "checkpoint", "convert"},
}

# Optional or slow to import: inside the functions that need them. The files that a Hugging Face folder carries are
# PyTorch modules, read by whoever has it.
HEAVY = {"apache_beam", "gguf", "gigatoken", "h5py", "matplotlib", "pyarrow", "seqio", "tensorflow",
         "tensorflow_datasets", "torch", "transformers", "xllamacpp"}
PYTORCH_FILES = ("modeling_", "configuration_")

MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def unit(module: str) -> str:
    """data/store -> data; loss -> loss."""
    return module.split("/")[0]


def imports(module: str, nodes: str = "all") -> set[str]:
    """Dotted names that a module imports: anywhere in it, or (`nodes="top"`) when it is itself imported."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    inside = {child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
              for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if nodes == "top" and node in inside:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["crystal_jax", *module.split("/")][: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def own_imports(module: str) -> set[str]:
    """Modules of the package (in the form of MODULES) that a module imports."""
    found = set()
    for name in imports(module):
        parts = name.split(".")
        if parts[0] != "crystal_jax":
            continue
        # The longest prefix that is a module: the rest names something inside it.
        candidates = ["/".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        matches = [form for path in candidates for form in (path, f"{path}/__init__") if form in MODULES]
        found.add(matches[0] if matches else "__init__")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    name = unit(module)
    assert name in LEVEL, f"crystal_jax/{module}.py is in no layer: add {name!r} to LAYERS in {Path(__file__).name}"
    for other in sorted(own_imports(module)):
        target = unit(other)
        assert target in LEVEL, f"{target!r}, imported by crystal_jax/{module}.py, is in no layer"
        assert LEVEL[target] <= LEVEL[name], (
            f"crystal_jax/{module}.py (layer {LEVEL[name]}) imports {other} (layer {LEVEL[target]}): move what it "
            f"needs down, or change LAYERS and say why")
        allowed = ONLY.get(name, {target})
        assert target in allowed, f"crystal_jax/{module}.py imports {other}; {name}/ may import {sorted(allowed)}"


def test_there_is_no_cycle() -> None:
    graph = {module: own_imports(module) - {module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", [module for module in MODULES if unit(module) in LAYERS[0]])
def test_the_lowest_layer_needs_the_standard_library_only(module: str) -> None:
    allowed = {"crystal_jax", *sys.stdlib_module_names}
    outside = {name for name in imports(module) if name.split(".")[0] not in allowed}
    assert not outside, f"crystal_jax/{module}.py imports {sorted(outside)}"


@pytest.mark.parametrize("module", [name for name in MODULES if not name.split("/")[-1].startswith(PYTORCH_FILES)])
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    heavy = {name for name in imports(module, "top") if name.split(".")[0] in HEAVY}
    assert not heavy, f"crystal_jax/{module}.py imports {sorted(heavy)} at its top: move it into the function"


def test_the_reader_sees_each_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "store.py").write_text(
        "import crystal_jax.loss\nfrom crystal_jax import model, __version__\nfrom ..errors import UserError\n"
        "from . import mix\ndef f():\n    import torch.nn\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "MODULES", ["__init__", "loss", "model", "errors", "data/mix"])
    assert own_imports("data/store") == {"__init__", "loss", "model", "errors", "data/mix"}
    assert "torch.nn" in imports("data/store")
    assert "torch.nn" not in imports("data/store", "top")
