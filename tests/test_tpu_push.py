"""tpu/push in a repository of its own, with a scripted uv; what it leaves in the bucket is what startup.sh installs."""

import hashlib
import io
import json
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from fake_host import Surroundings
from test_tpu_scripts import AWKWARD
from test_tpu_startup import FAKE_PYTHON, Host
from tpu_pods import ROOT, Pod, make_pod

UV = """#!/bin/bash
echo "uv $*" >>"$LOG"
for argument; do [[ $argument == --install-dir=* ]] && folder=${argument#*=}/cpython-3.11.18-linux-x86_64-gnu/bin; done
mkdir -p "$folder" && cp "$FAKE_PYTHON" "$folder/python3"
"""
UVX = """#!/bin/bash
echo "uvx $*" >>"$LOG"
for argument; do [[ $argument == --dest=* ]] && folder=${argument#*=}; done
mkdir -p "$folder" && touch "$folder/a-1-py3-none-any.whl"
"""


def git(root: Path, *args: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", root, *who, *args], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with what the scripts need."""
    root = tmp_path / "it's a checkout"
    shutil.copytree(ROOT / "tpu", root / "tpu", ignore=shutil.ignore_patterns("__pycache__", "pod.env"))
    (root / "crystal_jax").mkdir()
    for name in ("__init__", "errors", "generations"):
        shutil.copy(ROOT / "crystal_jax" / f"{name}.py", root / "crystal_jax")
    (root / "requirements").mkdir()
    (root / "requirements" / "tpu.txt").write_text("a==1 --hash=sha256:00\n")
    (root / ".gitignore").write_text("/build/\n__pycache__/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=one")
    return root


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    pod = make_pod(tmp_path)
    for name, text in (("uv", UV), ("uvx", UVX), ("../fake-python", FAKE_PYTHON)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    pod.environment |= {"LOG": str(tmp_path / "log"), "FAKE_PYTHON": str(tmp_path / "fake-python")}
    return pod


def objects(pod: Pod) -> dict[str, bytes]:
    """Key under the run's pod/ to bytes."""
    folder = pod.cloud.folder / "objects"
    prefix = "my-bucket%2Fcrystal-7b%2Fpod%2F"
    return {file.name.removeprefix(prefix).replace("%2F", "/"): file.read_bytes()
            for file in folder.iterdir()} if folder.exists() else {}


def test_what_is_pushed_is_what_the_hosts_install(pod: Pod, root: Path, tmp_path: Path) -> None:
    pod.write(f"TRAIN_ARGS=({shlex.join(AWKWARD)})\nFLAG_SET=async")
    result = pod("push", root=root)
    assert result.returncode == 0, result.stderr
    found = objects(pod)
    launch = json.loads(found["launch.json"])
    code = found[f"code/{launch['code']}.tar.gz"]
    assert hashlib.sha256(code).hexdigest() == launch["code"]
    with tarfile.open(fileobj=io.BytesIO(code)) as archive:
        assert "tpu/agent.py" in archive.getnames()
    assert launch["args"] == AWKWARD
    assert "--xla_tpu" in launch["variables"]["LIBTPU_INIT_ARGS"]
    with Surroundings(crystal_watchdog="true") as world:
        world.objects = found
        host = Host(tmp_path / "host", world)
        started = host.run("startup.sh")
        assert started.returncode == 0, started.stderr
        written = json.loads((host.root / "etc/crystal/pod.json").read_text())
        assert written["launch"]["args"] == AWKWARD
        assert "--no-index" in (host.root / "pip").read_text()
        assert (host.root / "opt/crystal/code/tpu/agent.py").read_bytes() == (ROOT / "tpu" / "agent.py").read_bytes()


def test_packages_are_sent_once_and_whole(pod: Pod, root: Path) -> None:
    pod.cloud.answer("storage cp * gs://*.sha256", stderr="ERROR: UNAVAILABLE", code=1, times=1)
    assert pod("push", root=root).returncode == 1
    assert "launch.json" not in objects(pod)
    assert pod("push", root=root).returncode == 0
    log = pod.folder / "log"
    assert log.read_text().count("uvx ") == 2  # the first one wasn't known to be whole
    first = objects(pod)["launch.json"]
    assert pod("push", root=root).returncode == 0
    assert log.read_text().count("uvx ") == 2
    assert objects(pod)["launch.json"] == first


def test_only_committed_code_is_pushed(pod: Pod, root: Path) -> None:
    (root / "crystal_jax" / "errors.py").write_text("")
    result = pod("push", root=root)
    assert result.returncode == 1
    assert result.stderr.startswith("tpu/push: crystal_jax/errors.py: changed")
    assert objects(pod) == {}


def test_a_dry_run_builds_and_sends_nothing(pod: Pod, root: Path) -> None:
    result = pod("push", "--dry-run", root=root)
    assert result.returncode == 0, result.stderr
    words = [shlex.split(line)[0] for line in result.stdout.splitlines()]
    assert {"gcloud", "uv", "uvx", "tar"} <= set(words)
    assert not (pod.folder / "log").exists()
    assert pod.cloud.calls() == []
