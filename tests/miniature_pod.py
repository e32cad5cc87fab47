"""A pod on this machine: tpu/supervise and tpu/create, a scripted gcloud, hosts as processes, storage on an emulator.

    python tests/miniature_pod.py FOLDER [--hosts=2] [--preemptions=5] [--seed=N]

trains a tiny recipe once undisturbed and once while the capacity is taken away at random, tells what happens, and
compares what the two left behind, bit for bit; `MiniaturePod` is the same for a test. A host is what systemd makes of
it: tpu/agent.py, started again unless it ended with 0, 1 or 4.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fake_gcloud import Cloud
from tpu_pods import ROOT, ZONE, Pod

from tpu.bucket import Bucket

if TYPE_CHECKING:
    from running import Recipe

NAME = "crystal-7b"
FAST = ("--tick-seconds=0.3", "--settle-seconds=8", "--backoff-seconds=1", "--lease-seconds=8", "--startup-seconds=300",
        "--silence-seconds=120")
# One device and one program for all hosts and starts, compiled quickly; equal bits are compared among such only.
QUICK = {"CRYSTAL_LEASE_SECONDS": "1", "CRYSTAL_HEARTBEAT_SECONDS": "10", "JAX_PLATFORMS": "cpu",
         "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
END_SECONDS = 1200
BEAT_SECONDS = 0.3
# world.py's recipe, longer, so that there is time to be disturbed in; and saved often, so that each start gets ahead.
LONGER = ("--config.phases[0].steps=14", "--config.phases[1].steps=18", "--config.checkpoints.every_steps=3",
          "--config.training.log_every=1")
STEPS = 36
ENDS = (14, 32, STEPS)
"""The last steps of its phases."""
MARK = "MINIATURE_POD"


@dataclass
class MiniaturePod:
    """One run of `hosts` processes; `environment` is what leads to the storage, `arguments` are the trainer's."""

    folder: Path
    bucket: str
    environment: dict[str, str]
    arguments: list[str]
    hosts: int = 2
    pod: Pod = field(init=False)
    said: int = 0
    preempted: int = 0
    supervisor: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        # What conftest.py sets for this process isn't for the trainers.
        from conftest import OUTER_ENVIRONMENT

        cloud = Cloud(self.folder / "cloud")
        base = {**OUTER_ENVIRONMENT, **self.environment, **QUICK, "PYTHON": sys.executable,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        with cloud.state() as state:
            state.update(path=["CREATING", "ACTIVE"], deleting_polls=1)
        self.pod = Pod(self.folder, cloud, cloud.install(self.folder / "bin", base))
        self.pod.write(f"BUCKET={self.bucket}\nZONES=({ZONE} us-east5-b)\nTPU_TYPE=v5p-{8 * self.hosts}")
        for hook in ("active", "gone", "reset"):
            script = cloud.hooks / hook
            script.write_text(f'#!/bin/sh\nexport PYTHONPATH="{base["PYTHONPATH"]}"\n'
                              f'exec "{sys.executable}" "{__file__}" --hook={hook} "{self.folder}" "$1"\n')
            script.chmod(0o755)
        launch = {"code": "0", "environment": {"lock": "0", "sha256": "0"}, "args": self.arguments, "variables": {}}
        settings = {"bucket": self.bucket, "hosts": self.hosts, "launch": launch}
        (self.folder / "pod.json").write_text(json.dumps(settings))
        self.put("launch.json", launch)

    @property
    def run_dir(self) -> str:
        return f"gs://{self.bucket}/{NAME}"

    def put(self, key: str, found: object) -> None:
        subprocess.run(["gcloud", "storage", "cp", "-", f"{self.run_dir}/pod/{key}"], input=json.dumps(found).encode(),
                       env=self.pod.environment, check=True, capture_output=True)

    def beat(self) -> dict[str, Any]:
        """What host 0 said last."""
        return Bucket(self.bucket, f"{NAME}/pod").read_json("heartbeats/0") or {}

    def start(self) -> subprocess.Popen[bytes]:
        """tpu/supervise; what it says goes to FOLDER/supervise.log."""
        command = [str(ROOT / "tpu" / "supervise"), f"--env={self.folder / 'pod.env'}", *FAST]
        with open(self.folder / "supervise.log", "ab") as log:
            self.supervisor = subprocess.Popen(command, env=self.pod.environment, stdin=subprocess.DEVNULL, stdout=log,
                                               stderr=log)
        return self.supervisor

    def log(self) -> str:
        file = self.folder / "supervise.log"
        return file.read_text() if file.exists() else ""

    def show(self) -> None:
        """What the supervisor has said since."""
        text = self.log()
        print(text[self.said:], end="", flush=True)
        self.said = len(text)

    def preempt(self, gently: bool) -> bool:
        """Takes the capacity away, with or without a warning to the processes; False if there is none."""
        if "ACTIVE" not in self.pod.cloud.resources().values():
            return False
        (self.folder / "gently").write_text("1" if gently else "")
        self.pod.cloud.set_state(NAME, "SUSPENDING")  # until the processes are gone
        self.pod.cloud.set_state(NAME, "SUSPENDED")
        return True

    def disturbed(self, preemptions: int, draw: random.Random) -> int:
        """To the end, taken away so many times while it trains; the supervisor's exit code."""
        supervisor, done, incarnation, end = self.start(), 0, None, time.monotonic() + END_SECONDS
        wanted = self.moment(done, preemptions, draw)
        while supervisor.poll() is None:
            assert time.monotonic() < end, self.log()
            self.show()
            beat = self.beat()
            training = beat.get("state") == "training" and beat["incarnation"] != incarnation
            if done < preemptions and training and beat["step"] >= wanted:
                time.sleep(draw.uniform(0, 0.5 if wanted >= 0 else 8))  # the latter: while it starts and restores
                gently = draw.random() < 0.5
                if supervisor.poll() is None and self.preempt(gently):
                    incarnation, done = beat["incarnation"], done + 1
                    said = f"at step {beat['step']}" if beat["step"] >= 0 else "before its first step"
                    print(f"--- preemption {done}, {said}, {'gently' if gently else 'without a warning'}", flush=True)
                    wanted = self.moment(done, preemptions, draw)
                if draw.random() < 0.4:
                    supervisor.send_signal(signal.SIGKILL)
                    supervisor.wait()
                    print("--- the supervisor is killed, and started again", flush=True)
                    supervisor = self.start()
            time.sleep(0.1)
        self.show()
        stop(self.folder, 0)
        self.preempted = done
        return supervisor.returncode

    @staticmethod
    def moment(done: int, preemptions: int, draw: random.Random) -> int:
        """The step at which it is taken away next, so that all times fit into the run; -1: before the first."""
        each = (STEPS - 6) // preemptions if preemptions else 0
        return -1 if draw.random() < 0.3 else done * each + draw.randint(1, max(each, 1))

    def end(self) -> None:
        """Nothing of it runs on, however a test ended."""
        if self.supervisor and self.supervisor.poll() is None:
            self.supervisor.kill()
            self.supervisor.wait()
        stop(self.folder, 0)


# What a hook does: the life of the hosts.

def hosts_of(folder: Path) -> list[Path]:
    count = json.loads((folder / "pod.json").read_text())["hosts"]
    return [folder / "hosts" / str(number) for number in range(count)]


def begin(folder: Path, node: str) -> None:
    """Starts each host in a session of its own, so that it outlives the call of gcloud."""
    found = json.loads((folder / "pod.json").read_text())
    with Cloud(folder / "cloud").state() as state:
        spec = next(resource["tpu"]["nodeSpec"][0] for key, resource in state["resources"].items()
                    if key.endswith(f"/{NAME}"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for number, host in enumerate(hosts_of(folder)):
        (host / "state").mkdir(parents=True, exist_ok=True)
        (host / "pod.json").write_text(json.dumps({
            "bucket": found["bucket"], "run": NAME, "host": number, "hosts": found["hosts"],
            "incarnation": int(spec["node"]["metadata"]["crystal-incarnation"]), "code": "0", "environment": "0",
            "launch": found["launch"], "state": str(host / "state"), "beat": BEAT_SECONDS,
            "pause": 0.5}))
        environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": str(number),
                       "JAX_NUM_PROCESSES": str(found["hosts"]), MARK: str(folder)}
        with open(host / "log", "ab") as log:
            process = subprocess.Popen([sys.executable, __file__, "--host", str(host)], env=environment, stdout=log,
                                       stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT)
        (host / "pid").write_text(str(process.pid))


def processes(folder: Path) -> list[int]:
    """Of all hosts, by their environment, as a machine that goes takes with it whatever ran on it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended, or isn't ours
        if f"{MARK}={folder}".encode() in variables:
            found.append(int(process.name))
    return found


def stop(folder: Path, seconds: float) -> None:
    """Ends each host: SIGTERM to what systemd would tell, so many seconds, SIGKILL to everything."""
    end = time.monotonic() + seconds
    for host in hosts_of(folder):
        if seconds and (host / "pid").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((host / "pid").read_text()), signal.SIGTERM)
    while time.monotonic() < end and processes(folder):
        time.sleep(0.1)
    while left := processes(folder):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def run_hook(hook: str, folder: Path, node: str) -> None:
    if hook != "active":
        gently = (folder / "gently").exists() and (folder / "gently").read_text() == "1"
        stop(folder, 20 if gently else 0)
    if hook != "gone":
        begin(folder, node)


def run_host(host: Path) -> None:
    """crystal.service: again after any end but 0, 1 and 4; told to stop, it doesn't start again."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    while not stopped:
        code = subprocess.call([sys.executable, str(ROOT / "tpu" / "agent.py"), f"--pod={host / 'pod.json'}"])
        print(f"agent.py ended with {code}", flush=True)
        if code in (0, 1, 4):
            return
        time.sleep(0.5)


def run_together(recipe: "Recipe", run_dir: Path, hosts: int) -> None:
    """The same processes, which nothing disturbs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    trainers = [recipe.using({**QUICK, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts),
                              "JAX_PROCESS_ID": str(number)}).start(run_dir) for number in range(hosts)]
    for trainer in trainers:
        code, said = trainer.end()
        assert code == 0, said


def compare(pod: MiniaturePod, expected: dict[str, Any]) -> None:
    """Whether the pod left what undisturbed processes did, and nothing that costs."""
    from running import assert_same, reached

    assert_same(pod.run_dir, expected, ENDS)
    assert reached(pod.run_dir) == STEPS
    assert pod.pod.cloud.resources() == {}
    assert not [call for call in pod.pod.cloud.calls() if call[:2] == ["storage", "rm"]]


def main() -> int:
    """One command with a readable log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("node", nargs="?")
    parser.add_argument("--hook", help=argparse.SUPPRESS)
    parser.add_argument("--host", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--preemptions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    args = parser.parse_args()
    if args.hook:
        run_hook(args.hook, args.folder, args.node)
        return 0
    if args.host:
        run_host(args.folder)
        return 0
    import gcs
    from running import Recipe, left_behind
    from world import make_world, write_config

    logging.getLogger("absl").setLevel(logging.ERROR)
    folder = args.folder.resolve()
    folder.mkdir(parents=True)
    recipe = Recipe(write_config(make_world(folder / "data"), folder / "config.py"), {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}, LONGER)
    print(f"{args.hosts} hosts, {STEPS} steps, {args.preemptions} preemptions, --seed={args.seed}\n"
          "--- undisturbed", flush=True)
    run_together(recipe, folder / "undisturbed", args.hosts)
    expected = left_behind(folder / "undisturbed")
    with gcs.emulator(folder / "storage") as storage:
        pod = MiniaturePod(folder, gcs.BUCKET, {**storage.environment, **recipe.environment},
                           [f"--config={recipe.config}", *LONGER], args.hosts)
        try:
            code = pod.disturbed(args.preemptions, random.Random(args.seed))
            print(f"--- tpu/supervise ended with {code} after {pod.preempted} preemptions", flush=True)
            if not code:
                compare(pod, expected)
                print(f"--- as undisturbed, bit for bit: {len(expected)} arrays, positions and lines of the log; "
                      "nothing is left in the cloud")
        finally:
            pod.end()
    return code


if __name__ == "__main__":
    sys.exit(main())
