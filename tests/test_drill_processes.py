"""Drills with several processes: one is killed, frozen or hung; runs go on on other meshes and numbers of processes.

What counts: the others end soon, with a code that means restart, and the same command goes on from there.
"""

import shutil
import signal
import time
from pathlib import Path

import pytest
from drills import DrillRecord
from pods import Pod, start_pod
from test_processes import arguments, cache, final, lines, same_as  # noqa: F401, fixtures

pytestmark = pytest.mark.drill

HEARTBEAT = 6
HANG = 6
QUICK = {"CRYSTAL_HEARTBEAT_SECONDS": str(HEARTBEAT)}
MEANS_RESTART = {70, -signal.SIGABRT, -signal.SIGALRM}
VICTIMS = ((1, 8, "a worker"), (0, 24, "the coordinator"))
"""Which process, after which step."""


@pytest.fixture(scope="module")
def pair(arguments: list[str], cache: dict[str, str],  # noqa: F811
         tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes of one device each that nothing disturbed."""
    folder = tmp_path_factory.mktemp("pair")
    pod = start_pod(folder / "run", folder / "logs", arguments, 2, 1, env=cache)
    assert pod.codes() == [0, 0], pod.said(0) + pod.said(1)
    return folder / "run"


def ended_within(pod: Pod, survivor: int, since: float, seconds: float) -> None:
    code = pod.processes[survivor].wait(120)
    took = time.monotonic() - since
    pod.kill()
    assert code in MEANS_RESTART, (code, pod.said(survivor))
    assert took < seconds, f"the survivor took {took:.1f} s to end"


def goes_on(run_dir: Path, logs: Path, arguments: list[str], cache: dict[str, str],  # noqa: F811
            undisturbed: Path) -> None:
    """The same command ends the run, with the same bits."""
    pod = start_pod(run_dir, logs, arguments, 2, 1, env=cache)
    assert pod.codes() == [0, 0], pod.said(0) + pod.said(1)
    assert final(run_dir) == final(undisturbed)


def test_f7_a_killed_process_ends_the_others(pair: Path, arguments: list[str], cache: dict[str, str],  # noqa: F811
                                             tmp_path: Path, drill_record: DrillRecord) -> None:
    for victim, step, name in VICTIMS:
        with drill_record("F7", f"kill -9 of {name}, 2 processes: the other ends within 5 s").attempt():
            pod = start_pod(tmp_path / "run", tmp_path, arguments, 2, 1, env=cache).wait_for(step)
            ended_within(pod, 1 - victim, pod.signal(victim, signal.SIGKILL), 5)
    goes_on(tmp_path / "run", tmp_path, arguments, cache, pair)


def test_f7_of_several_devices_each(arguments: list[str], cache: dict[str, str], tmp_path: Path,  # noqa: F811
                                    drill_record: DrillRecord) -> None:
    """A device may wait for its neighbour in the same process, which has failed: then no connection tells."""
    drill = drill_record("F7", "kill -9 of a worker, 2 processes of 2 devices: the other ends within heartbeat + 5 s")
    with drill.attempt():
        pod = start_pod(tmp_path / "run", tmp_path, arguments, 2, 2, env=cache | QUICK).wait_for(8)
        ended_within(pod, 0, pod.signal(1, signal.SIGKILL), HEARTBEAT + 5)


def test_f8_a_frozen_process_ends_the_others(pair: Path, arguments: list[str], cache: dict[str, str],  # noqa: F811
                                             tmp_path: Path, drill_record: DrillRecord) -> None:
    for victim, step, name in VICTIMS:
        drill = drill_record("F8", f"SIGSTOP of {name}, 2 processes: the other ends within heartbeat + 5 s")
        with drill.attempt():
            pod = start_pod(tmp_path / "run", tmp_path, arguments, 2, 1, env=cache | QUICK).wait_for(step)
            ended_within(pod, 1 - victim, pod.signal(victim, signal.SIGSTOP), HEARTBEAT + 5)
    goes_on(tmp_path / "run", tmp_path, arguments, cache, pair)


HUNG = """
import sys, threading, time
from crystal_jax import cli, train

taken = train.Run.words

def hangs_here(run, batch, step, *rest):
    if step == STEP:
        print("hung", time.monotonic(), flush=True)
        threading.Event().wait()
    return taken(run, batch, step, *rest)

train.Run.words = hangs_here
sys.exit(cli.main(sys.argv[1:]))
"""


def test_f9_a_hung_process_ends_all_and_names_the_line(pair: Path, arguments: list[str],  # noqa: F811
                                                       cache: dict[str, str], tmp_path: Path,  # noqa: F811
                                                       drill_record: DrillRecord) -> None:
    short = [*arguments, f"--config.training.hang_seconds={HANG}"]
    for victim, step, name in VICTIMS:
        drill = drill_record("F9", f"a hang in Python in {name}, 2 processes: both end within hang_seconds + 5 s, and "
                                   "the line is named")
        (tmp_path / "hung.py").write_text(HUNG.replace("STEP", str(step)))
        with drill.attempt():
            pod = start_pod(tmp_path / "run", tmp_path / name, short, 2, 1, env=cache,
                            program={victim: [str(tmp_path / "hung.py")]})
            assert set(pod.codes()) <= MEANS_RESTART, pod.said(0) + pod.said(1)
            ended = time.monotonic()
            since = float(pod.said(victim).split("hung ")[1].split()[0])
            assert ended - since < HANG + 5, f"they took {ended - since:.1f} s to end"
            assert "in hangs_here" in pod.said(victim)
    goes_on(tmp_path / "run", tmp_path, arguments, cache, pair)


@pytest.fixture(scope="module")
def stopped(arguments: list[str], cache: dict[str, str],  # noqa: F811
            tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that was stopped on the way."""
    folder = tmp_path_factory.mktemp("stopped")
    pod = start_pod(folder / "run", folder / "logs", arguments, 2, 1, env=cache).wait_for(12)
    pod.signal(1, signal.SIGTERM)
    assert pod.codes() == [3, 3], pod.said(0)
    return folder / "run"


@pytest.mark.parametrize("shape", [(1, 1, (1, 1, 1)), (1, 4, (2, 2, 1)), (4, 1, (1, 2, 2))], ids=str)
def test_f11_a_run_goes_on_on_another_mesh_and_number_of_processes(
        shape: tuple[int, int, tuple[int, int, int]], pair: Path, stopped: Path, arguments: list[str],  # noqa: F811
        cache: dict[str, str], tmp_path: Path, drill_record: DrillRecord) -> None:  # noqa: F811
    """shape: processes, devices of each, mesh.

    The restored state is compared with its fingerprint by the product itself, whatever the mesh.
    """
    processes, devices, mesh = shape
    shutil.copytree(stopped, tmp_path / "run")
    with drill_record("F11", "resumed on another mesh and number of processes").attempt():
        axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
        sizes = [f"--config.training.mesh.{axis}={size}" for axis, size in axes]
        pod = start_pod(tmp_path / "run", tmp_path, [*arguments, *sizes], processes, devices, env=cache)
        assert set(pod.codes()) == {0}, pod.said(0)
        started = [step for step, line in lines(tmp_path / "run", "start").items() if line["resumed"]]
        assert started and started[-1] >= 12
        same_as(tmp_path / "run", pair)
