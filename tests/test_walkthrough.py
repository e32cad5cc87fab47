"""docs/data_walkthrough.sh, as a reader runs it, and the config that it trains."""

import argparse
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OUTER_ENVIRONMENT

from crystal_jax.errors import UserError
from crystal_jax.phases import make_plan
from crystal_jax.rules import validate

from configs import crystal_7b, crystal_small

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "data_walkthrough.sh"


def test_the_small_config_has_the_sources_and_shares_of_the_full_one() -> None:
    small, full = validate(crystal_small.get_config()), crystal_7b.get_config()
    assert small.sources == full.sources
    assert make_plan(small).total_steps == 10
    for one, other in zip(small.phases, full.phases, strict=True):
        assert one.mix == pytest.approx(other.mix) and math.isclose(sum(one.mix.values()), 1)
        assert (one.subset, one.fim_rate, one.spm_rate) == (
            {name: other.subset.get(name, one.subset[name]) for name in one.mix}, other.fim_rate, other.spm_rate)
        quotas = make_plan(small).phases[full.phases.index(other)].quotas
        assert min(quotas.values()) >= 1, "every source is seen"


@pytest.mark.parametrize("variant", ["", "ten", "-1"])
def test_a_variant_is_a_number_of_steps(variant: str) -> None:
    with pytest.raises(UserError, match=r"the variant is a number of steps, such as 100"):
        crystal_small.get_config(variant)


def test_the_script_names_existing_commands_and_files() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    from crystal_jax.cli import COMMANDS

    assert set(re.findall(r"^ *(?:if )?crystal ([a-z]+)", text, re.M)) <= set(COMMANDS)
    for path in re.findall(r"(?:configs|tests)/\w+\.py", text):
        assert (ROOT / path).is_file()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder, stdout, stderr) of the whole script."""
    folder = tmp_path_factory.mktemp("walkthrough") / "all"
    done = subprocess.run(["bash", SCRIPT, folder], cwd=folder.parent, capture_output=True, text=True, check=False,
                          env={**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done.stdout, done.stderr


@pytest.mark.drill
def test_it_prepares_the_sources_and_trains_all_phases(shown: tuple[Path, str, str]) -> None:
    folder, stdout, _ = shown
    for name in (*(source.store for source in crystal_7b.get_config().sources.values()),):
        assert (folder / "stores" / name / "manifest.json").is_file()
        assert f"{name}: " in stdout
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "batch_hash" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))


@pytest.mark.drill
def test_it_shows_what_a_step_saw_and_finds_the_document_again(shown: tuple[Path, str, str]) -> None:
    _, stdout, _ = shown
    step = stdout.split("== What step 4 saw")[1].split("\n== ")[0]
    assert "the log has the same" in step and "PSM" in step and "<|fim_prefix|>" in step
    again = stdout.split("== A document of that step")[1].split("\n== ")[0]
    document = re.search(r"--document=(\S+)", again)
    assert document and document[1].split(":")[0].split("/")[-1] in step
    assert re.search(r"^ +4  phase2", again, re.M), "step 4 is among those that saw it"


@pytest.mark.drill
def test_it_names_the_broken_file_and_mends_it(shown: tuple[Path, str, str]) -> None:
    folder, stdout, stderr = shown
    broken = stdout.split("== One bit of one file")[1].split("\n== ")[0]
    assert "C4/train/00001.tokens: its contents changed" in broken
    assert "C4/train/00001.tokens: block 0" in stderr
    from crystal_jax.data.verify import verify

    assert verify(folder / "stores" / "slimpajama" / "C4") == []


# docs/data.md


DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def commands_of(text: str) -> list[list[str]]:
    """The arguments of each `crystal-jax` command in blocks of code, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = re.sub(r"(\s+#| \.\.\.$|;).*", "", "\n".join(blocks), flags=re.M)
    quoted = re.sub(r"'[^']*'", lambda match: match[0].replace("\n", " "), lines)
    return [shlex.split(line)[1:] for line in map(str.strip, quoted.splitlines()) if line.startswith("crystal-jax ")]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of its actions."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for inner in action.choices.values() for flag in flags_of(inner)}
    return found


def test_the_guide_names_existing_commands_and_flags() -> None:
    from crystal_jax.cli import COMMANDS

    found = commands_of(DATA)
    assert {name for name, *_ in found} >= {"prepare", "inspect", "train", "recipe"}
    for name, *arguments in found:
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        for argument in arguments:
            flag = argument.partition("=")[0].strip("[]")
            if flag.startswith("--config."):
                assert flag.split(".")[1] in vars(crystal_small.get_config()), argument
            elif flag.startswith("--"):
                assert flag in flags_of(parser), f"{name} {argument}"


def test_the_guide_names_options_that_beam_has() -> None:
    pytest.importorskip("apache_beam", reason="needs apache-beam: pip install -r requirements/data.txt")
    from apache_beam.options.pipeline_options import PipelineOptions

    options = [argument.partition("=")[2] for command in commands_of(DATA) for argument in command
               if argument.startswith("--beam_options=")]
    assert len(options) == 3
    known = PipelineOptions([]).get_all_options()
    for line in options:
        names = [item.partition("=")[0].removeprefix("--") for item in shlex.split(line)]
        assert names[0] == "runner" and set(names) <= set(known), set(names) - set(known)


def test_the_guide_names_existing_files() -> None:
    for path in re.findall(r"`((?:tests|docs|benchmarks|configs)/[\w./]+)`", DATA):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((\w[\w./-]+)\)", DATA):
        assert (ROOT / "docs" / path).is_file(), path
