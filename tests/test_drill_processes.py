"""Drills with several processes: one is killed, frozen or hung; runs go on on other meshes and numbers of processes.

What counts: the others end soon, with a code that means restart, and the same command goes on from there.
"""

import signal
import time
from pathlib import Path

import pytest
from drills import DrillRecord
from pods import Pod, start_pod
from test_processes import arguments, cache, final, lines, same_as, two  # noqa: F401, fixtures

pytestmark = pytest.mark.drill

HEARTBEAT = 6
HANG = 6
QUICK = {"CRYSTAL_HEARTBEAT_SECONDS": str(HEARTBEAT)}
MEANS_RESTART = {70, -signal.SIGABRT, -signal.SIGALRM}


def ended_within(pod: Pod, survivor: int, since: float, seconds: float) -> None:
    code = pod.processes[survivor].wait(120)
    took = time.monotonic() - since
    pod.kill()
    assert code in MEANS_RESTART, (code, pod.said(survivor))
    assert took < seconds, f"the survivor took {took:.1f} s to end"


@pytest.mark.parametrize(("victim", "name"), [(1, "a worker"), (0, "the coordinator")])
def test_f7_a_killed_process_ends_the_others(victim: int, name: str, two: Path, arguments: list[str],  # noqa: F811
                                             cache: dict[str, str], tmp_path: Path,  # noqa: F811
                                             drill_record: DrillRecord) -> None:
    with drill_record("F7", f"kill -9 of {name}, 2 processes").attempt():
        pod = start_pod(tmp_path / "run", tmp_path, arguments, 2, 2, env=cache).wait_for(12)
        ended_within(pod, 1 - victim, pod.signal(victim, signal.SIGKILL), 5)
        assert start_pod(tmp_path / "run", tmp_path, arguments, 2, 2, env=cache).codes() == [0, 0]
        assert final(tmp_path / "run") == final(two)


@pytest.mark.parametrize("victim", [0, 1])
def test_f8_a_frozen_process_ends_the_others(victim: int, two: Path, arguments: list[str],  # noqa: F811
                                             cache: dict[str, str], tmp_path: Path,  # noqa: F811
                                             drill_record: DrillRecord) -> None:
    with drill_record("F8", "SIGSTOP of one of 2 processes").attempt():
        pod = start_pod(tmp_path / "run", tmp_path, arguments, 2, 2, env=cache | QUICK).wait_for(12)
        ended_within(pod, 1 - victim, pod.signal(victim, signal.SIGSTOP), HEARTBEAT + 5)
        assert start_pod(tmp_path / "run", tmp_path, arguments, 2, 2, env=cache).codes() == [0, 0]
        assert final(tmp_path / "run") == final(two)


HUNG = """
import sys, threading, time
from crystal_jax import cli, train

taken = train.Run.words

def hangs_here(run, batch, step, *rest):
    if step == 20:
        print("hung", time.monotonic(), flush=True)
        threading.Event().wait()
    return taken(run, batch, step, *rest)

train.Run.words = hangs_here
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_f9_a_hung_process_ends_all_and_names_the_line(victim: int, two: Path, arguments: list[str],  # noqa: F811
                                                       cache: dict[str, str], tmp_path: Path,  # noqa: F811
                                                       drill_record: DrillRecord) -> None:
    with drill_record("F9", "a hang in Python in one of 2 processes").attempt():
        (tmp_path / "hung.py").write_text(HUNG)
        short = [*arguments, f"--config.training.hang_seconds={HANG}"]
        pod = start_pod(tmp_path / "run", tmp_path, short, 2, 2, env=cache,
                        program={victim: [str(tmp_path / "hung.py")]})
        assert set(pod.codes()) <= MEANS_RESTART, pod.said(0) + pod.said(1)
        ended = time.monotonic()
        since = float(pod.said(victim).split("hung ")[1].split()[0])
        assert ended - since < HANG + 5, f"they took {ended - since:.1f} s to end"
        assert "in hangs_here" in pod.said(victim)
        assert start_pod(tmp_path / "run", tmp_path, arguments, 2, 2, env=cache).codes() == [0, 0]
        assert final(tmp_path / "run") == final(two)


@pytest.mark.parametrize(("processes", "devices", "mesh"), [(1, 1, (1, 1, 1)), (1, 4, (2, 2, 1)), (4, 1, (1, 2, 2))],
                         ids=str)
def test_f11_a_run_goes_on_on_another_mesh_and_number_of_processes(
        processes: int, devices: int, mesh: tuple[int, int, int], two: Path, arguments: list[str],  # noqa: F811
        cache: dict[str, str], tmp_path: Path, drill_record: DrillRecord) -> None:  # noqa: F811
    """The restored state is compared with its fingerprint by the product itself, whatever the mesh."""
    with drill_record("F11", "resumed on another mesh and number of processes").attempt():
        pod = start_pod(tmp_path / "run", tmp_path, arguments, 2, 2, env=cache).wait_for(12)
        pod.signal(1, signal.SIGTERM)
        assert pod.codes() == [3, 3]
        axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
        sizes = [f"--config.training.mesh.{axis}={size}" for axis, size in axes]
        pod = start_pod(tmp_path / "run", tmp_path, [*arguments, *sizes], processes, devices, env=cache)
        assert set(pod.codes()) == {0}, pod.said(0)
        started = [step for step, line in lines(tmp_path / "run", "start").items() if line["resumed"]]
        assert started and started[-1] >= 12
        same_as(tmp_path / "run", two)
