"""The agent on each host: when it trains, what it reports, and what each way to end becomes."""

import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_host import BUCKET, RUN, Surroundings
from test_tpu_scripts import AWKWARD
from tpu_pods import ROOT

TRAINER = """
import json, os, signal, sys, time
folder, code = os.environ["FOLDER"], int(os.environ["CODE"])
def stop(number, frame):
    open(f"{folder}/signals", "a").write(f"{number}\\n")
    time.sleep(0.3)
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
json.dump({"args": sys.argv[1:], "flags": os.environ.get("LIBTPU_INIT_ARGS")}, open(f"{folder}/seen", "w"))
print("main 5/10, step 5/10, loss 1.0", flush=True)
print("last words", file=sys.stderr, flush=True)
if code == 999:
    time.sleep(60)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class Hosts:
    """Hosts with a trainer that ends as it is told."""

    def __init__(self, folder: Path, world: Surroundings) -> None:
        self.folder, self.world = folder, world
        (folder / "crystal_jax").mkdir()
        (folder / "crystal_jax" / "__main__.py").write_text(TRAINER)
        (folder / "crystal_jax" / "__init__.py").write_text("")
        # This one hides the checkout's, which the agent itself doesn't need.
        self.environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{folder}:{ROOT}", "NO_PROXY": "*",
                            **world.environment}

    def start(self, host: int = 0, ends: int = 0, **changes: Any) -> subprocess.Popen[str]:
        state = self.folder / f"host{host}"
        state.mkdir(exist_ok=True)
        pod = {"bucket": BUCKET, "run": RUN, "host": host, "hosts": 1, "incarnation": 3, "code": "c0de",
               "environment": "l0ck", "launch": {"args": AWKWARD, "variables": {"LIBTPU_INIT_ARGS": "--a=true"}},
               "state": str(state), "beat": 0.5, "patience": 60, "pause": 0, **changes}
        (state / "pod.json").write_text(json.dumps(pod))
        environment = {**self.environment, "FOLDER": str(state), "CODE": str(ends)}
        return subprocess.Popen([sys.executable, ROOT / "tpu" / "agent.py", f"--pod={state / 'pod.json'}"],
                                cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    def run(self, host: int = 0, ends: int = 0, **changes: Any) -> int:
        with self.start(host, ends, **changes) as process:
            print(process.communicate(timeout=60)[0])
        return process.returncode

    def seen(self, host: int = 0) -> Any:
        """What the trainer was given; None if it never ran."""
        file = self.folder / f"host{host}" / "seen"
        return json.loads(file.read_text()) if file.exists() else None


@pytest.fixture
def world() -> Iterator[Surroundings]:
    with Surroundings() as found:
        yield found


@pytest.fixture
def hosts(tmp_path: Path, world: Surroundings) -> Hosts:
    return Hosts(tmp_path, world)


def wait_until(holds: Any) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it doesn't come"
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "ends", "marker"), [
    (0, 0, "DONE"), (1, 1, "FATAL"), (4, 4, "FATAL"), (3, 3, None), (70, 70, None), (-9, 137, None),
])
def test_how_a_trainer_ends(hosts: Hosts, world: Surroundings, code: int, ends: int, marker: str | None) -> None:
    assert hosts.run(ends=code) == ends
    assert {"DONE", "FATAL"} & set(world.objects) == ({marker} if marker else set())
    if marker:
        found = world.json(marker)
        assert (found["exit_code"], found["step"], found["host"], found["incarnation"]) == (code, 5, 0, 3)
        assert found["why"] == ("last words" if code else "")
    beat = world.json("heartbeats/0")
    assert beat["state"] == ("stopping" if code == 3 else "ended")
    assert beat["crashes"] == ([5] if code in (70, -9) else [])
    log = next(data for key, data in world.objects.items() if key.startswith("logs/0/"))
    assert log == b"main 5/10, step 5/10, loss 1.0\nlast words\n"


def test_the_trainer_gets_its_arguments_as_they_were(hosts: Hosts) -> None:
    hosts.run()
    seen = hosts.seen()
    assert seen["args"] == ["train", *AWKWARD, f"--run_dir=gs://{BUCKET}/{RUN}"]
    assert seen["flags"] == "--a=true"


@pytest.mark.parametrize("marker", ["DONE", "FATAL"])
def test_nothing_runs_after_the_end(hosts: Hosts, world: Surroundings, marker: str) -> None:
    world.objects[marker] = b"{}"
    assert hosts.run() == 0
    assert hosts.seen() is None
    assert world.objects == {marker: b"{}"}


def test_only_host_0_says_done_and_the_first_fatal_stays(hosts: Hosts, world: Surroundings) -> None:
    with hosts.start(0, 0, hosts=2) as first, hosts.start(1, 4, hosts=2) as second:
        assert (first.wait(60), second.wait(60)) == (0, 4)
    assert world.json("FATAL")["host"] == 1
    assert world.json("DONE")["host"] == 0


@pytest.mark.parametrize("name", ["code", "environment", "launch"])
def test_hosts_that_differ_dont_train(hosts: Hosts, world: Surroundings, name: str) -> None:
    other = {"launch": {"args": [], "variables": {"LIBTPU_INIT_ARGS": "--a=false"}}}.get(name, "other")
    with hosts.start(0, hosts=2) as first, hosts.start(1, hosts=2, **{name: other}) as second:
        assert (first.wait(60), second.wait(60)) == (75, 75)
    assert (hosts.seen(0), hosts.seen(1)) == (None, None)
    for host in (0, 1):
        beat = world.json(f"heartbeats/{host}")
        assert beat["state"] == "refusing"
        assert f"host {1 - host}" in beat["why"]


def test_a_host_that_doesnt_come_is_named(hosts: Hosts, world: Surroundings) -> None:
    """One of the last incarnation, and one whose heartbeat has stopped, aren't there."""
    beat = {"host": 1, "incarnation": 2, "facts": {}, "time": time.time() + 60}
    world.objects["heartbeats/1"] = json.dumps(beat).encode()
    world.objects["heartbeats/2"] = json.dumps({**beat, "host": 2, "incarnation": 3, "time": 0}).encode()
    assert hosts.run(hosts=3, patience=0.5) == 75
    assert hosts.seen() is None
    assert "[1, 2]" in world.json("heartbeats/0")["why"]


def test_a_stop_reaches_the_trainer_once_and_leaves_it_time(hosts: Hosts, world: Surroundings) -> None:
    with hosts.start(ends=999) as process:
        wait_until(lambda: world.objects.get("heartbeats/0") and world.json("heartbeats/0")["step"] == 5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3
    assert (hosts.folder / "host0" / "signals").read_text() == f"{signal.SIGTERM.value}\n"
    assert "FATAL" not in world.objects


def test_crashes_are_counted_within_an_incarnation(hosts: Hosts, world: Surroundings) -> None:
    for _ in range(3):
        hosts.run(ends=70)
    assert world.json("heartbeats/0")["crashes"] == [5, 5, 5]
    hosts.run(ends=70, incarnation=4)
    assert world.json("heartbeats/0")["crashes"] == [5]


def test_what_isnt_there_yet_is_no_crash(hosts: Hosts, world: Surroundings) -> None:
    """75: a lease that another trainer holds, say. Asked for again and again, and then the host says so."""
    for _ in range(4):
        assert hosts.run(ends=75) == 75
    beat = world.json("heartbeats/0")
    assert (beat["state"], beat["crashes"]) == ("ended", [])
    hosts.run(ends=75)
    beat = world.json("heartbeats/0")
    assert (beat["state"], beat["why"], beat["crashes"]) == ("refusing", "last words", [])
    assert "FATAL" not in world.objects


def test_an_error_of_the_agent_isnt_taken_for_the_trainers(hosts: Hosts, world: Surroundings) -> None:
    """1 and 4 would keep systemd from starting it again."""
    world.failing = 1  # at the look for a terminal marker
    assert hosts.run() == 75
    assert hosts.seen() is None
    assert hosts.run() == 0


def test_a_storage_that_is_away_for_a_while(hosts: Hosts, world: Surroundings) -> None:
    with hosts.start(ends=999) as process:
        wait_until(lambda: world.objects.get("heartbeats/0") and world.json("heartbeats/0")["step"] == 5)
        world.failing = 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3


def test_the_unit_restarts_by_the_exit_codes() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "tpu" / "crystal.service")
    service = unit["Service"]
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "1 4")
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) >= 600
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert "Install" not in unit  # startup.sh starts it, when its code is there


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tpu" / "crystal.service", tmp_path)
    result = subprocess.run(["systemd-analyze", "verify", tmp_path / "crystal.service"], capture_output=True, text=True,
                            check=False)
    assert "Unknown" not in result.stderr
