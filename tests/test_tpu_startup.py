"""startup.sh and watchdog.sh in a sandbox: another root, a metadata server, a systemctl that takes notes."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_host import TOKEN, Surroundings
from test_tpu_scripts import AWKWARD
from tpu_pods import ROOT

FAKE_PYTHON = """#!/bin/bash
# Makes what `python -m venv` makes, and writes down what pip is asked for.
if [[ $2 == venv ]]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; else echo "$@" >>"$CRYSTAL_PREFIX/pip"; fi
"""


def archive(files: dict[str, bytes], mode: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Host:
    """A host's file system and its two scripts."""

    def __init__(self, folder: Path, world: Surroundings) -> None:
        self.root, self.world = folder / "root", world
        (folder / "bin").mkdir(parents=True)
        for name in ("systemctl", "sleep"):
            script = folder / "bin" / name
            script.write_text(f'#!/bin/bash\necho "$@" >>"{folder}/{name}"\n')
            script.chmod(0o755)
        (folder / "bin" / "python3").symlink_to(os.path.realpath(sys.executable))
        self.calls = folder / "systemctl"
        self.environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CRYSTAL_PREFIX": str(self.root),
                            "NO_PROXY": "*", **world.environment}

    def run(self, script: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["/bin/bash", ROOT / "tpu" / script], env=self.environment, timeout=timeout,
                              capture_output=True, text=True, check=False)

    def systemctl(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def files(self) -> dict[str, tuple[int, bytes]]:
        return {str(path.relative_to(self.root)): (path.stat().st_mtime_ns, path.read_bytes())
                for path in sorted(self.root.rglob("*")) if path.is_file()}


def push(world: Surroundings, args: list[str]) -> None:
    """What tpu/push leaves in the bucket."""
    code = archive({"tpu/crystal.service": (ROOT / "tpu" / "crystal.service").read_bytes()}, "w:gz")
    packages = archive({"python/bin/python3": FAKE_PYTHON.encode(), "requirements.txt": b"", "wheels/a.whl": b""}, "w")
    world.objects |= {f"code/{sha256(code)}.tar.gz": code, "environment/abc.tar": packages}
    world.objects["launch.json"] = json.dumps({
        "code": sha256(code), "environment": {"lock": "abc", "sha256": sha256(packages)}, "args": args,
        "variables": {"JAX_PLATFORMS": "tpu,cpu", "LIBTPU_INIT_ARGS": "--a=true"}}).encode()


@pytest.fixture
def world() -> Iterator[Surroundings]:
    with Surroundings(crystal_watchdog=(ROOT / "tpu" / "watchdog.sh").read_text()) as found:
        yield found


@pytest.fixture
def host(tmp_path: Path, world: Surroundings) -> Host:
    return Host(tmp_path, world)


def test_twice_is_the_same_as_once(host: Host, world: Surroundings) -> None:
    world.attributes |= {"crystal-hosts": "4", "crystal-slices": "2", "agent-worker-number": "3",
                         "tpu-env": "ACCELERATOR_TYPE: 'v6e-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"}
    push(world, AWKWARD)
    first = host.run("startup.sh")
    assert first.returncode == 0, first.stderr
    files, calls = host.files(), host.systemctl()
    pod = json.loads((host.root / "etc/crystal/pod.json").read_text())
    assert (pod["host"], pod["hosts"], pod["incarnation"]) == (7, 8, 3)
    assert pod["launch"]["args"] == AWKWARD
    assert (host.root / "etc/crystal/watchdog.sh").read_text() == (ROOT / "tpu" / "watchdog.sh").read_text()
    assert calls[:2] == ["daemon-reload", "enable --now crystal-watchdog.timer"]
    assert calls[-1] == "start crystal.service"
    assert (host.root / "pip").read_text().count("--require-hashes") == 1
    second = host.run("startup.sh")
    assert second.returncode == 0, second.stderr
    assert host.files() == files
    assert host.systemctl() == calls * 2
    assert TOKEN.encode() not in b"".join(data for _, data in files.values())


def test_new_code_is_taken_at_the_next_start(host: Host, world: Surroundings) -> None:
    push(world, ["--one"])
    host.run("startup.sh")
    push(world, ["--two"])
    host.run("startup.sh")
    assert json.loads((host.root / "etc/crystal/pod.json").read_text())["launch"]["args"] == ["--two"]


@pytest.mark.parametrize(("damage", "says"), [("launch.json", "tpu/push"), ("environment/abc.tar", "sha256")])
def test_what_cant_be_installed_is_reported_and_the_timer_runs(
        host: Host, world: Surroundings, damage: str, says: str) -> None:
    push(world, [])
    if damage == "launch.json":
        del world.objects[damage]
    else:
        world.objects[damage] += b"x"
    with subprocess.Popen(["/bin/bash", ROOT / "tpu" / "startup.sh"], env=host.environment, start_new_session=True,
                          stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while "heartbeats/0" not in world.objects and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert process.poll() is None  # it tries again
        os.killpg(process.pid, signal.SIGKILL)
    assert host.systemctl() == ["daemon-reload", "enable --now crystal-watchdog.timer"]
    beat = world.json("heartbeats/0")
    assert (beat["state"], beat["incarnation"]) == ("refusing", 3)
    assert says in beat["why"]
    assert not (host.root / "opt/crystal/environment-abc").exists()


@pytest.mark.parametrize("end", ["DONE", "FATAL", "hours"])
def test_the_watchdog_stops_the_trainer_and_then_releases_the_capacity(
        host: Host, world: Surroundings, end: str) -> None:
    assert host.run("watchdog.sh").returncode == 0
    assert host.systemctl() == []
    if end == "hours":
        world.attributes["crystal-expires"] = "1000000000"
    else:
        world.objects[end] = b"{}"
    assert host.run("watchdog.sh").returncode == 0
    assert (host.systemctl(), world.deleted) == (["stop crystal.service"], [])
    result = host.run("watchdog.sh")
    assert "HTTP 200" in result.stdout
    assert world.deleted == ["/v2/projects/my-project/locations/us-east5-a/queuedResources/crystal-7b?force=true"]


def test_a_bucket_that_cant_be_read_releases_nothing(host: Host, world: Surroundings) -> None:
    world.objects["DONE"] = b"{}"
    world.failing = 100
    for _ in range(3):
        assert host.run("watchdog.sh").returncode == 0
    assert (host.systemctl(), world.deleted) == ([], [])
