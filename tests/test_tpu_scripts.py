"""The scripts in tpu/ against the scripted gcloud: what they ask for, what they refuse, and in which words."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tpu_pods import ROOT, ZONE, Pod, make_pod, normal

GOLDEN = Path(__file__).with_name("gcloud_argv.txt")
SCRIPTS = ("create", "status", "list", "ssh", "push", "logs", "delete")
RESOURCES = "compute tpus queued-resources"
LOGIN = "ERROR: (gcloud) You do not currently have an active account selected.\nPlease run:\n  $ gcloud auth login"
UNAVAILABLE = "ERROR: (gcloud) UNAVAILABLE: 503 The service is currently unavailable."


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return make_pod(tmp_path)


def pushed(pod: Pod) -> None:
    pod.put("launch.json", "{}")


def test_what_gcloud_is_asked_for(pod: Pod) -> None:
    """The golden file; when a change is wanted, delete the file and run this twice."""
    cases = {
        "v4-512, spot": "TPU_TYPE=v4-512",
        "v5e-256, on demand": "TPU_TYPE=v5litepod-256 CAPACITY=on-demand",
        "v5p-256, reserved": "CAPACITY=reserved",
        "v6e-256, two slices": "TPU_TYPE=v6e-256 SLICES=2 FLAG_SET=async",
    }
    pushed(pod)
    found = []
    for title, settings in cases.items():
        pod.write(settings.replace(" ", "\n"))
        before = len(pod.cloud.calls())
        result = pod("create", "--incarnation=3")
        assert result.returncode == 0, result.stderr
        pod("delete")
        found += [f"# create and delete, {title}", *map(normal, pod.cloud.calls()[before:])]
    pod.write()
    pod("create")
    pod.cloud.set_state("crystal-7b", "ACTIVE")
    pod.put("heartbeats/0", "{}")
    for script, *args in (("status",), ("list",), ("ssh",), ("ssh", "--worker=all", "--", "sudo", "reboot"),
                          ("logs", "--host=0")):
        before = len(pod.cloud.calls())
        pod(script, *args)
        found += [f"# {shlex.join([script, *args])}", *map(normal, pod.cloud.calls()[before:])]
    text = "\n".join(found) + "\n"
    if not GOLDEN.exists():
        GOLDEN.write_text(text)
        pytest.fail(f"{GOLDEN} is new: read it")
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(pod: Pod, script: str) -> None:
    result = pod(script, "--help")
    assert result.returncode == 0
    assert f"\n  tpu/{script}" in result.stdout
    assert "--dry-run" in result.stdout


def test_shellcheck() -> None:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip("needs shellcheck: pip install -r requirements/dev.txt")
    scripts = [path for path in sorted((ROOT / "tpu").rglob("*")) if path.is_file() and (
        path.suffix in (".sh", ".env") or path.read_bytes().startswith(b"#!/usr/bin/env bash"))]
    assert len(scripts) > len(SCRIPTS)
    result = subprocess.run([found, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "push"])
def test_a_dry_run_prints_what_would_run_and_runs_nothing(pod: Pod, script: str) -> None:
    result = pod(script, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert pod.cloud.calls() == []
    for line in result.stdout.splitlines():
        assert shlex.split(line)[0] == "gcloud"


def test_the_printed_command_is_the_one_that_runs(pod: Pod) -> None:
    pushed(pod)
    pod.write("OWNER=me")
    printed = pod("create", "--dry-run", "--incarnation=7").stdout.splitlines()
    pod("create", "--incarnation=7")
    assert [normal(shlex.split(line)[1:]) for line in printed] == [normal(argv) for argv in pod.cloud.calls()[1:]]


@pytest.mark.parametrize(("settings", "says"), [
    ("PROJECT=My_Project", "gcloud projects list"),
    ("ZONES=(us-east5)", "gcloud compute tpus locations list"),
    ("ZONES=(us-east5-a nowhere)", "gcloud compute tpus locations list"),
    ("ZONES=()", "one at least"),
    ("TPU_TYPE=v5p-100", "v5p-128"),
    ("TPU_TYPE=tpu7x-256", "tpu/gke"),
    ("FLAG_SET=fastest", "default"),
    ("BUCKET=gs://b", "without gs://"),
    ("RUN='a b'", "lowercase"),
    ("SLICES=0", "a number of slices"),
    ("CAPACITY=cheap", "spot, on-demand or reserved"),
    ("unset SERVICE_ACCOUNT", "SERVICE_ACCOUNT is missing"),
    ("unset TRAIN_ARGS", "TRAIN_ARGS"),
    ("MAX_HOURS=2.5", "a whole number of hours"),
    ("MAX_HOURS=24", "more than WAIT_HOURS=24"),
    ("RUN=(", "quote what has spaces"),
])
def test_a_wrong_setting_is_one_line_and_creates_nothing(pod: Pod, settings: str, says: str) -> None:
    pushed(pod)
    before = len(pod.cloud.calls())
    pod.write(settings)
    result = pod("create")
    assert result.returncode == 1
    assert says in result.stderr.splitlines()[-1]
    assert len(pod.cloud.calls()) == before


@pytest.mark.parametrize(("command", "error", "says"), [
    ("storage ls", LOGIN, "gcloud auth login"),
    ("storage ls", "ERROR: (gcloud.storage.ls) HTTPError 403: a@b.c does not have permission to access b instance "
     "[my-bucket] (or it may not exist)", "get-iam-policy"),
    ("storage ls", "ERROR: (gcloud.storage.ls) gs://my-bucket not found: 404.", "gcloud storage buckets create"),
    (f"{RESOURCES} create", "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5P' has been exceeded.", "quotas"),
    (f"{RESOURCES} create", "ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "docs/tpu.md"),
    (f"{RESOURCES} create", "ERROR: (gcloud) INVALID_ARGUMENT: Accelerator v5p-256 not found", "accelerator-types"),
    (f"{RESOURCES} create", "ERROR: (gcloud) INVALID_ARGUMENT: Location us-east5-q is not found", "locations list"),
    (f"{RESOURCES} create", UNAVAILABLE, "tpu/status"),
])
def test_what_gcloud_refuses_is_one_line_with_what_mends_it(pod: Pod, command: str, error: str, says: str) -> None:
    pushed(pod)
    pod.cloud.answer(command, stderr=error, code=1)
    result = pod("create")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr
    assert pod.cloud.resources() == {}


def test_a_name_in_use_is_left_alone(pod: Pod) -> None:
    pushed(pod)
    assert pod("create").returncode == 0
    result = pod("create")
    assert result.returncode == 1
    assert "in use" in result.stderr
    assert len(pod.cloud.resources()) == 1


@pytest.mark.parametrize("marker", ["DONE", "FATAL"])
def test_a_run_that_has_ended_isnt_asked_for(pod: Pod, marker: str) -> None:
    pushed(pod)
    pod.put(marker, "{}")
    result = pod("create")
    assert result.returncode == 1
    assert f"pod/{marker}" in result.stderr
    assert pod.cloud.resources() == {}


def test_nothing_is_asked_for_before_the_push(pod: Pod) -> None:
    pod.put("other", "")
    assert "tpu/push" in pod("create").stderr
    assert pod.cloud.resources() == {}


def test_delete_waits_until_it_is_known_to_be_gone(pod: Pod) -> None:
    pushed(pod)
    pod("create")
    for error in (LOGIN, UNAVAILABLE, "ERROR: (gcloud) NOT_FOUND: Project not found"):
        pod.cloud.answer(f"{RESOURCES} describe", stderr=error, code=1, times=1)
    result = pod("delete")
    assert result.returncode == 0, result.stderr
    assert pod.cloud.resources() == {}
    described = [argv for argv in pod.cloud.calls() if argv[3] == "describe"]
    assert len(described) == 3 + 2 + 1
    assert pod("delete").returncode == 0  # what is gone already


def test_every_zone_is_looked_at_and_emptied(pod: Pod) -> None:
    """Where the supervisor has moved to costs money too."""
    pushed(pod)
    assert pod("create", "--zone=us-east5-b").returncode == 0
    pod.write(f"ZONES=({ZONE} us-east5-b)")
    assert pod("status").stdout.splitlines()[:2] == [f"crystal-7b in {ZONE}: doesn't exist",
                                                     "crystal-7b in us-east5-b: ACCEPTED"]
    pod.cloud.answer(f"{RESOURCES} delete", stderr=UNAVAILABLE, code=1, times=1)  # in the first zone
    result = pod("delete")
    assert result.returncode == 1
    assert f"tpu/delete: {ZONE}: " in result.stderr and "us-east5-b: gone" in result.stderr
    assert pod.cloud.resources() == {}


def test_delete_that_may_not_is_one_line(pod: Pod) -> None:
    pushed(pod)
    pod("create")
    pod.cloud.answer(f"{RESOURCES} delete", stderr=LOGIN, code=1)
    result = pod("delete")
    assert result.returncode == 1
    assert "gcloud auth login" in result.stderr


def test_status_and_list(pod: Pod) -> None:
    pushed(pod)
    assert "doesn't exist" in pod("status").stdout
    pod("create")
    pod.cloud.set_state("crystal-7b", "ACTIVE")
    beat = {"host": 0, "incarnation": 5, "state": "training", "why": "", "step": 12, "crashes": [7],
            "time": time.time()}
    pod.put("heartbeats/0", json.dumps(beat) + "\n")
    pod.put("heartbeats/1", json.dumps({**beat, "host": 1, "step": -1}) + "\n")
    result = pod("status")
    assert result.returncode == 0, result.stderr
    assert "ACTIVE" in result.stdout
    assert "training" in result.stdout.splitlines()[2]
    pod.put("FATAL", '{"exit_code": 4, "why": "loss"}')
    assert 'FATAL: {"exit_code": 4' in pod("status").stdout
    listing = pod("list").stdout
    assert "1 x v5p-256" in listing
    assert "<=" in listing


def test_only_what_is_ours_and_over_is_reaped(pod: Pod) -> None:
    pushed(pod)
    for name, labels in (("ours", "crystal-run=ours,crystal-expires=1"), ("theirs", "team=other,crystal-expires=1"),
                         ("young", f"crystal-run=young,crystal-expires={int(time.time()) + 9999}")):
        subprocess.run(["gcloud", *RESOURCES.split(), "create", name, f"--zone={ZONE}", f"--node-id={name}",
                        "--accelerator-type=v5p-8", "--runtime-version=x", f"--labels={labels}"],
                       env=pod.environment, check=True)
    result = pod("list", "--reap")
    assert result.returncode == 0, result.stderr
    states = pod.cloud.resources()
    assert states[f"{ZONE}/ours"] == "DELETING"
    assert "DELETING" not in (states[f"{ZONE}/theirs"], states[f"{ZONE}/young"])
    assert "theirs" not in result.stdout


AWKWARD = ["two words", "it's", '"quoted"', "$HOME `id` $(id)", "a;b && c | d", "line\nbreak", "*", "", "-", "é"]


def test_ssh_keeps_each_argument_as_it_was(pod: Pod) -> None:
    pushed(pod)
    pod("create")
    pod.cloud.set_state("crystal-7b", "ACTIVE")
    hook = pod.cloud.hooks / "ssh"
    hook.write_text('#!/bin/bash\nexec bash -c "$3"\n')
    hook.chmod(0o755)
    result = pod("ssh", "--", "printf", "%s\\0", *AWKWARD)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"{argument}\0" for argument in AWKWARD)


def test_an_ssh_that_breaks_runs_twice_and_starts_the_unit_once(pod: Pod, tmp_path: Path) -> None:
    """gcloud repeats a command whose ssh ended with 255; starting a unit that runs changes nothing."""
    pushed(pod)
    pod("create")
    pod.cloud.set_state("crystal-7b", "ACTIVE")
    hook = pod.cloud.hooks / "ssh"
    # systemd's rule: a unit that runs isn't started again. The first reply is lost.
    hook.write_text(f'#!/bin/bash\necho "$3" >>{tmp_path}/asked\nmkdir {tmp_path}/running 2>/dev/null && '
                    f'echo started >>{tmp_path}/started\n(($(wc -l <{tmp_path}/asked) > 1)) || exit 255\n')
    hook.chmod(0o755)
    assert pod("ssh", "--", "sudo", "systemctl", "start", "crystal").returncode == 0
    assert len((tmp_path / "asked").read_text().splitlines()) == 2
    assert (tmp_path / "started").read_text() == "started\n"


@pytest.mark.parametrize(("args", "says"), [
    (["--worker=x"], "a number or all"), (["--slice=1"], "there are 1"), (["--worker=all"], "needs a command"),
    (["ls"], "after --"),
])
def test_mistakes_in_ssh(pod: Pod, args: list[str], says: str) -> None:
    result = pod("ssh", *args)
    assert result.returncode == 1
    assert says in result.stderr


def test_logs_print_each_byte_once(pod: Pod) -> None:
    pod.put("logs/0/1-0000", "one\ntwo\n")
    pod.put("logs/1/1-0000", "other\n")
    assert pod("logs").stdout == "0: one\n0: two\n1: other\n"
    assert pod("logs", "--host=1").stdout == "1: other\n"
    script = [str(ROOT / "tpu" / "logs"), f"--env={pod.folder / 'pod.env'}", "--follow", "--host=0"]
    with subprocess.Popen(script, env=pod.environment, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        assert [follower.stdout.readline() for _ in range(2)] == ["0: one\n", "0: two\n"]
        pod.put("logs/0/1-0000", "one\ntwo\nthree\n")
        pod.put("logs/0/2-0000", "four\n")
        assert {follower.stdout.readline(), follower.stdout.readline()} == {"0: three\n", "0: four\n"}
        follower.terminate()
