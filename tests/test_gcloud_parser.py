"""Every recorded gcloud command through the real parser: unknown flags, wrong tracks, exclusive arguments.

It has no account, so a command that parses ends with 1 and says so; an argument error ends with 2.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tpu_pods import ROOT

GCLOUD = shutil.which("gcloud")
GOLDEN = Path(__file__).with_name("gcloud_argv.txt")
NO_ACCOUNT = "You do not currently have an active account selected"

pytestmark = pytest.mark.skipif(not GCLOUD, reason="needs the Google Cloud SDK on PATH")


def shapes() -> list[str]:
    """One command of each shape: what differs in values only is parsed once."""
    found: dict[str, str] = {}
    for line in GOLDEN.read_text().splitlines():
        # Creation goes further than the parser, in test_gcloud_api.py.
        if not line.startswith("#") and " create " not in line:
            words = [re.sub(r"=.*", "", word) if word.startswith("--") else word for word in shlex.split(line)]
            found.setdefault(" ".join(words), line)
    return list(found.values())


def parse(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    assert GCLOUD
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "CLOUDSDK_CONFIG": str(folder),
                   "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    argv = shlex.split(command.replace("ROOT", str(ROOT)).replace("SECONDS", "1790000000"))
    return subprocess.run([GCLOUD, *argv], env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("command", shapes(), ids=lambda command: " ".join(command.split()[:5]))
def test_the_real_gcloud_understands_it(tmp_path: Path, command: str) -> None:
    result = parse(tmp_path, command)
    assert result.returncode == 1, result.stderr
    assert NO_ACCOUNT in result.stderr


@pytest.mark.parametrize("command", [
    "compute tpus tpu-vm ssh run --zone=us-east5-a --tunnel-through-iap",
    "compute tpus queued-resources create run --zone=us-east5-a --runtime-version=x --spot --node-id=run",
])
def test_this_would_show_a_wrong_track_or_a_missing_flag(tmp_path: Path, command: str) -> None:
    assert parse(tmp_path, command).returncode == 2
