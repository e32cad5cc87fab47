"""A small run of three phases that is evaluated, and problems of code for it; conftest.py makes them fixtures."""

import json
from pathlib import Path

import pytest
from conftest import RunCli

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from world import make_config


def get_config():
    config = make_config(Path({world!r}))
    config.model.max_length, config.data.sequence_length = 128, 64
    config.checkpoints.export_dtype = "float32"
    return config
"""
# Whatever stands in the string between prompt and test, the first passes and the second doesn't.
PROBLEMS = [{"task_id": f"Made/{number}", "entry_point": "f", "prompt": 'def f():\n    return 1\n"""\n',
             "test": f'"""\ndef check(f):\n    assert f() == {number}\n'} for number in (1, 2)]


@pytest.fixture(scope="session")
def evaluated_run(world: Path, run_cli: RunCli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "config.py").write_text(CONFIG.format(tests=str(Path(__file__).parent), world=str(world)))
    result = run_cli("train", f"--config={folder / 'config.py'}", f"--run_dir={folder / 'run'}")
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def made_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "humaneval.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return path
