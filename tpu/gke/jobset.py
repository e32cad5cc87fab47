"""The JobSet of a run, as JSON, which kubectl takes like YAML.

Its invariant: the trainer's exit codes decide as on TPU VMs. 1 and 4 fail the whole set at once; 3 and any other start
all its pods again, from the newest state; 0 of all pods completes it.
"""

import argparse
import json
from typing import Any

RESTARTS = 100
"""Of the whole set; each preemption is one."""
GRACE_SECONDS = 900
"""To save in; a preempted spot node leaves less."""


def make_jobset(args: argparse.Namespace) -> dict[str, Any]:
    """jobset.x-k8s.io/v1alpha2."""
    selector = {"cloud.google.com/gke-tpu-accelerator": args.accelerator,
                "cloud.google.com/gke-tpu-topology": args.topology}
    if args.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        # Kubernetes replaces $(NAME) in them; a doubled $ is a plain one.
        "name": "train", "image": args.image, "command": [word.replace("$", "$$") for word in args.command],
        "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}, {"name": "LIBTPU_INIT_ARGS", "value": args.flags},
                {"name": "EPATH_USE_TF", "value": "false"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8482}],  # libtpu's and the coordinator's
        "resources": {"limits": {"google.com/tpu": str(args.chips)}},
    }
    pod = {"spec": {"restartPolicy": "Never", "nodeSelector": selector, "serviceAccountName": "crystal-trainer",
                    "terminationGracePeriodSeconds": GRACE_SECONDS, "containers": [container]}}
    job = {
        "parallelism": args.hosts, "completions": args.hosts, "completionMode": "Indexed", "backoffLimit": 0,
        "activeDeadlineSeconds": args.hours * 3600,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {
            "containerName": "train", "operator": "In", "values": [1, 4]}}]},
        "template": pod,
    }
    never = {"name": "noRestart", "action": "FailJobSet",
             "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"]}
    metadata: dict[str, Any] = {
        "name": args.run,
        # One slice for each job: its pods get a node pool of their own.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}}
    if args.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": args.queue}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": {
        "failurePolicy": {"maxRestarts": RESTARTS, "rules": [never]},
        "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": {"spec": job}}]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "topology", "accelerator", "capacity", "image", "queue", "flags"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("slices", "hosts", "chips", "hours"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("command", nargs="+")
    print(json.dumps(make_jobset(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
