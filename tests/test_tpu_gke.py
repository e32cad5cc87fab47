"""The GKE recipe: the JobSet against the schema of its custom resource, the XPK line against XPK's own parser.

jobset_schema.json is the part that a JobSet of ours touches of config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml
in github.com/kubernetes-sigs/jobset at 08dfbdf (August 2026): properties, types, choices, bounds, what is required.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_tpu_scripts import AWKWARD
from tpu_pods import Pod, make_pod

SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    made = make_pod(tmp_path)
    made.write("IMAGE=us-docker.pkg.dev/my-project/crystal/train:1")
    return made


def problems(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Where a value leaves its schema; a property that the schema doesn't have is a problem."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{path}: neither a number nor a string"]
    if not isinstance(value, TYPES[schema["type"]]):
        return [f"{path}: {value!r} isn't of type {schema['type']}"]
    found = [f"{path}: {name} is missing" for name in schema.get("required", ()) if name not in value]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{path}: {value} is out of bounds")
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += problems(item, schema["items"], f"{path}[{index}]")
    if isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            found += problems(item, inner, f"{path}.{name}") if inner else [f"{path}.{name}: isn't in the schema"]
    return found


def jobset(pod: Pod, *args: str) -> Any:
    result = pod("gke/manifest", *args)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(("settings", "hosts", "accelerator", "topology"), [
    ("TPU_TYPE=tpu7x-128 QUEUE=crystal", 16, "tpu7x", "4x4x4"),
    ("TPU_TYPE=v6e-256 SLICES=2", 64, "tpu-v6e-slice", "16x16"),
    ("TPU_TYPE=v5p-256 CAPACITY=reserved", 32, "tpu-v5p-slice", "4x4x8"),
    ("TPU_TYPE=v5litepod-256 CAPACITY=on-demand", 64, "tpu-v5-lite-podslice", "16x16"),
    ("TPU_TYPE=v4-512", 64, "tpu-v4-podslice", "4x8x8"),
])
def test_the_jobset_fits_its_schema(pod: Pod, settings: str, hosts: int, accelerator: str, topology: str) -> None:
    pod.write("IMAGE=a/b:1\n" + settings.replace(" ", "\n"))
    made = jobset(pod)
    assert problems(made, SCHEMA) == []
    job = made["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    assert job["replicas"] == (2 if "SLICES" in settings else 1)
    assert spec["parallelism"] == spec["completions"] == hosts
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    assert ("cloud.google.com/gke-spot" in selector) == ("CAPACITY" not in settings)
    assert spec["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


def test_the_schema_notices() -> None:
    made = {"apiVersion": "v1", "kind": "JobSet", "metadata": {}, "spec": {
        "replicatedJob": [], "failurePolicy": {"rules": [{"action": "Fail"}], "maxRestarts": "3"}}}
    assert len(problems(made, SCHEMA)) == 4  # a misspelt property, an action, its name, a type


def test_exit_codes_and_arguments(pod: Pod) -> None:
    words = " ".join(map(shlex.quote, AWKWARD))
    pod.write(f"IMAGE=a/b:1\nTRAIN_ARGS=({words})")
    spec = jobset(pod)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [1, 4]}}]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # or Kubernetes refuses the policy
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert "PodFailurePolicy" in spec["failurePolicy"]["rules"][0]["onJobFailureReasons"]
    command = [word.replace("$$", "$") for word in job["template"]["spec"]["containers"][0]["command"]]
    assert command == ["python", "-m", "crystal_jax", "train", *AWKWARD, "--run_dir=gs://my-bucket/crystal-7b"]


def test_no_image_is_one_line(pod: Pod) -> None:
    pod.write()
    result = pod("gke/manifest")
    assert result.returncode == 1
    assert "IMAGE" in result.stderr


def xpk_line(pod: Pod) -> list[str]:
    result = pod("gke/manifest", "--xpk=shared")
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def test_the_xpk_line_keeps_the_arguments(pod: Pod) -> None:
    words = " ".join(map(shlex.quote, AWKWARD))
    pod.write(f"IMAGE=a/b:1\nTRAIN_ARGS=({words})")
    command = next(word.removeprefix("--command=") for word in xpk_line(pod) if word.startswith("--command="))
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    assert shown.stdout.split("\0")[5:-2] == AWKWARD


@pytest.mark.skipif(not (os.environ.get("XPK") or shutil.which("xpk")), reason="needs xpk (1.16), or XPK=FILE")
@pytest.mark.parametrize("settings", ["TPU_TYPE=tpu7x-128", "TPU_TYPE=v6e-256 SLICES=2", "CAPACITY=on-demand"])
def test_xpk_understands_it(pod: Pod, tmp_path: Path, settings: str) -> None:
    pod.write("IMAGE=a/b:1\n" + settings.replace(" ", "\n"))
    argv = [os.environ.get("XPK") or "xpk", *xpk_line(pod)[1:], "--dry-run", "--skip-validation"]
    result = subprocess.run(argv, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True,
                            check=False, timeout=120, cwd=tmp_path)
    assert "error: " not in result.stderr, result.stderr
    made = result.stdout + result.stderr
    assert "kind: JobSet" in made
    # It lists what doesn't fail the set.
    restarting = re.search(r"operator: NotIn\s+values: \[([0-9,]+)\]", made)
    assert restarting
    assert set(range(256)) - set(map(int, restarting[1].split(","))) == {0, 1, 4}
