"""What every test shares: eight CPU devices, strict array promotion, and the command line as a real process.

Owns the environment that JAX reads when it is first imported, so this file must not import JAX before setting it.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from gcs import Emulator
    from running import Recipe

pytest_plugins = ["drills", "evaluated"]
if threading.current_thread() is threading.main_thread():
    # A shell ignores it for what it starts in the background, and so would every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
OUTER_ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Eight devices; and programs that compile in a quarter of the time, since tests run each only a few times.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
         "--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# No deadline: the first example often compiles. In CI the examples are fixed, so a red run is the change's.
settings.register_profile("crystal", deadline=None, max_examples=50, derandomize="CI" in os.environ,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crystal")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and not importlib.util.find_spec("transformers"):
        pytest.skip("needs PyTorch and transformers: pip install -r requirements/torch.txt")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The published Crystal files and the values computed from them, next to the checkout."""
    path = ROOT.parent / "shared" / "reference"
    if not path.is_dir():
        pytest.skip("needs ../shared/reference (published files and reference values), which isn't in the repository")
    return path


RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """`crystal-jax ARGS` as a process of its own, on one CPU device; paths in `configs/` are found by default.

    run_cli(*args, env={}, cwd=checkout, timeout=600) -> CompletedProcess with text stdout and stderr; the exit code is
    the test's to check.
    """

    def run(*args: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT,
            timeout: float = 600) -> subprocess.CompletedProcess[str]:
        clean = {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **(env or {})}
        command = [sys.executable, "-m", "crystal_jax", *map(str, args)]
        return subprocess.run(command, env=clean, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and the stores `text` and `code`; see world.py."""
    from world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> "Recipe":
    """The three phases of world.py as a command that a drill can give again and again; see running.py."""
    from running import Recipe
    from world import write_config

    folder = tmp_path_factory.mktemp("recipe")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return Recipe(write_config(world, folder / "world_config.py"), cache)


@pytest.fixture(scope="session")
def undisturbed(recipe: "Recipe", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `recipe` leaves behind where nothing disturbs it; see running.py."""
    from running import left_behind

    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    recipe.finish(run_dir)
    return left_behind(run_dir)


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Emulator"]:
    """A gs:// of its own, of which `gcs.folder()` gives an unused folder; see gcs.py."""
    pytest.importorskip("gcsfs", reason="needs gcsfs and gcp-storage-emulator: pip install -r requirements/data.txt")
    from gcs import emulator

    with emulator(tmp_path_factory.mktemp("gcs")) as started:
        yield started
