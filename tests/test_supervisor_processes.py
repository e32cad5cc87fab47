"""tpu/supervise as a process against the scripted gcloud: signals at random moments, two at once, bad answers."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from drills import DrillRecord
from running import seeded
from tpu_pods import ROOT, ZONE, Pod, make_pod

NAME = "crystal-7b"
FAST = ("--tick-seconds=0.05", "--settle-seconds=1", "--backoff-seconds=0.1", "--lease-seconds=2")
KILLS = 20
QUEUED = "compute tpus queued-resources"
LEASE = "gs://my-bucket/crystal-7b/pod/supervisor.json"


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    found = make_pod(tmp_path)
    found.put("launch.json", "{}")
    with found.cloud.state() as state:
        state.update(path=["CREATING", "ACTIVE"], deleting_polls=1)
    return found


def start(pod: Pod, *args: str) -> subprocess.Popen[str]:
    command = [str(ROOT / "tpu" / "supervise"), f"--env={pod.folder / 'pod.env'}", *FAST, *args]
    with open(pod.folder / "supervise.log", "a") as output:
        return subprocess.Popen(command, env=pod.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def log(pod: Pod) -> str:
    return (pod.folder / "supervise.log").read_text()


def until(pod: Pod, what: str, process: subprocess.Popen[str], seconds: float = 40) -> None:
    """Waits for a text in the log, from now on."""
    end = time.monotonic() + seconds
    while what not in log(pod):
        assert time.monotonic() < end and process.poll() is None, f"no {what!r} in:\n{log(pod)}"
        time.sleep(0.02)


def wiped(pod: Pod) -> list[list[str]]:
    """Calls that remove objects."""
    return [call for call in pod.cloud.calls() if call[:2] in (["storage", "rm"], ["storage", "mv"])]


def beat(pod: Pod, host: int, **found: object) -> None:
    pod.put(f"heartbeats/{host}", json.dumps({"host": host, "time": time.time_ns(), **found}))


def test_from_nothing_to_done_with_a_preemption(pod: Pod) -> None:
    process = start(pod)
    until(pod, "hosts alive", process)
    pod.cloud.set_state(NAME, "SUSPENDED")
    until(pod, "attempt 2", process)
    pod.put("DONE", "{}")
    assert process.wait(30) == 0, log(pod)
    assert pod.cloud.resources() == {}
    assert not wiped(pod)


def kill_sweep(pod: Pod, kills: int, draw: random.Random) -> None:
    """Signals at random moments, each followed by a new supervisor; the capacity is preempted now and then."""
    for number in range(kills):
        process = start(pod)
        time.sleep(draw.uniform(0.05, 1.5))
        process.send_signal(draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
        process.wait(20)
        resources = pod.cloud.resources()
        assert len(resources) <= 1, resources
        if number % 3 == 1 and "ACTIVE" in resources.values():
            pod.cloud.set_state(NAME, "SUSPENDED")
    pod.put("FATAL", "{}")
    process = start(pod)
    assert process.wait(40) == 4, log(pod)
    assert pod.cloud.resources() == {}, log(pod)
    assert not wiped(pod)


def test_killed_at_random_moments(pod: Pod) -> None:
    pod.write(f"ZONES=({ZONE} us-east5-b)")
    kill_sweep(pod, 4, random.Random(1))


@pytest.mark.drill
def test_killed_at_many_random_moments(pod: Pod, drill_record: DrillRecord) -> None:
    pod.write(f"ZONES=({ZONE} us-east5-b)")
    drill = drill_record("supervisor", "INT, TERM or KILL of tpu/supervise at a random moment; capacity preempted in "
                                       "between")
    drill.tried = KILLS
    kill_sweep(pod, KILLS, seeded("killed_at_many_random_moments"))
    drill.survived = KILLS


def test_interrupted_and_told_to_delete(pod: Pod) -> None:
    process = start(pod, "--delete-on-exit")
    until(pod, "wait: ", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, log(pod)
    assert pod.cloud.resources() == {}


def test_interrupted_it_leaves_the_capacity_and_says_so(pod: Pod) -> None:
    process = start(pod)
    until(pod, "hosts alive", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert pod.cloud.resources() == {f"{ZONE}/{NAME}": "ACTIVE"}
    assert "tpu/delete" in log(pod)


def test_a_second_supervisor_is_refused_in_one_line(pod: Pod) -> None:
    first = start(pod)
    until(pod, "wait: ", first)
    second = pod("supervise", *FAST)
    assert second.returncode == 1
    assert len(second.stderr.splitlines()) == 1 and "supervises this run" in second.stderr, second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    # Its process is gone from this machine: no need to watch for long.
    pod.put("DONE", "{}")
    assert pod("supervise", *FAST).returncode == 0


def test_interrupted_while_it_watches_anothers_lease_it_ends_at_once(pod: Pod) -> None:
    pod.put("supervisor.json", json.dumps({"holder": {"user": "ada", "host": "other", "pid": 1}, "beat": 1}))
    process = start(pod, "--lease-seconds=600")
    end = time.monotonic() + 40
    while ["storage", "objects", "describe", LEASE] not in [call[:4] for call in pod.cloud.calls()]:
        assert time.monotonic() < end, log(pod)
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130, log(pod)
    assert not [call for call in pod.cloud.calls() if call[:2] == ["compute", "tpus"]]


def test_one_whose_lease_was_taken_does_nothing_more(pod: Pod) -> None:
    process = start(pod)
    until(pod, "wait: ", process)
    process.send_signal(signal.SIGSTOP)
    pod.put("supervisor.json", json.dumps({"holder": {"user": "ada", "host": "other", "pid": 1}, "beat": 1}))
    before = len(pod.cloud.calls())
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 1
    assert "ada on other" in log(pod)
    verbs = [call[3] for call in pod.cloud.calls()[before:] if call[:2] == ["compute", "tpus"]]
    assert set(verbs) <= {"describe"}, verbs


# The real gcloud's answers to 401, 403 and 404 are read in test_gcloud_api.py.
@pytest.mark.parametrize("said", ["ERROR: (gcloud) NOT_FOUND: Project 'my-project' was not found", ""])
def test_a_state_that_isnt_known_creates_nothing(pod: Pod, said: str) -> None:
    pod.cloud.answer(f"{QUEUED} describe", stderr=said, code=1)
    process = start(pod)
    until(pod, "state unknown", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert not [call for call in pod.cloud.calls() if call[3:4] == ["create"]]


@pytest.mark.parametrize("said, mended_by", [
    ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded", "quotas"),
    ("INVALID_ARGUMENT: Accelerator type v5p-256 not found", "accelerator-types list"),
])
def test_a_request_that_is_refused_ends_it(pod: Pod, said: str, mended_by: str) -> None:
    pod.cloud.answer(f"{QUEUED} create", stderr=f"ERROR: (gcloud.create) {said}", code=1)
    process = start(pod)
    assert process.wait(30) == 1, log(pod)
    assert mended_by in log(pod)
    assert pod.cloud.resources() == {}


def test_a_lost_answer_makes_nothing_twice(pod: Pod) -> None:
    pod.write(f"ZONES=({ZONE} us-east5-b)")
    pod.cloud.answer(f"{QUEUED} create", stderr="ERROR: deadline exceeded", code=256 + 1, times=2)
    process = start(pod)
    until(pod, "hosts alive", process)
    assert len(pod.cloud.resources()) == 1
    pod.put("DONE", "{}")
    assert process.wait(30) == 0
    assert pod.cloud.resources() == {}


def test_silent_hosts_are_reset_and_crashes_at_one_step_end_it(pod: Pod) -> None:
    pod.write("TPU_TYPE=v5p-16")  # two hosts
    process = start(pod, "--startup-seconds=0.5", "--silence-seconds=2")
    until(pod, "reset", process)
    incarnation = json.loads(subprocess.run(
        ["gcloud", *QUEUED.split(), "describe", NAME, f"--zone={ZONE}", "--format=json"], env=pod.environment,
        capture_output=True, check=True).stdout)["tpu"]["nodeSpec"][0]["node"]["metadata"]["crystal-incarnation"]
    for host in range(2):
        beat(pod, host, incarnation=int(incarnation), step=7, crashes=[7, 7, 7], state="training")
    assert process.wait(30) == 4, log(pod)
    assert "3 crashes at step 7" in log(pod)
    assert pod.cloud.resources() == {}


def test_a_limit_of_dollars_ends_it(pod: Pod) -> None:
    pod.write("MAX_DOLLARS=1")  # at $215 an hour: 17 seconds
    process = start(pod, "--hours=0.001")
    assert process.wait(30) == 5, log(pod)
    assert pod.cloud.resources() == {}


def test_the_name_of_somebody_else(pod: Pod) -> None:
    with pod.cloud.state() as state:
        state["resources"][f"{ZONE}/{NAME}"] = {
            "name": NAME, "createTime": "", "state": {"state": "ACTIVE"}, "path": [],
            "tpu": {"nodeSpec": [{"nodeId": NAME, "node": {"labels": {"team": "other"}}}]}}
    process = start(pod)
    assert process.wait(30) == 1
    assert "choose another RUN" in log(pod)
    assert pod.cloud.resources() == {f"{ZONE}/{NAME}": "ACTIVE"}


def test_dry_run_prints_the_command(pod: Pod) -> None:
    result = pod("supervise", "--dry-run", "--hours=3")
    assert result.returncode == 0
    assert "-m tpu.supervisor" in result.stdout and "--hours=3" in result.stdout
    assert not [call for call in pod.cloud.calls() if call[:2] == ["compute", "tpus"]]
