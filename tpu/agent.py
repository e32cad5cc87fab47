"""Runs the trainer on one host of a pod: what crystal.service starts, and starts again.

Its invariant: the trainer runs only while every host of this incarnation reports the same code, lock, packages and
flags, and never after a terminal marker. What it keeps under gs://BUCKET/RUN/pod/:

    heartbeats/HOST       every 30 s; HOST counts all hosts from 0, slice after slice. One line of JSON: host,
                          incarnation (as given at creation), state (waiting, refusing, training, stopping, ended),
                          why (of refusing), step (newest printed, -1: none), crashes (steps at which the trainer ended
                          in a way that asks for a restart, of this incarnation), time, facts (what must agree)
    DONE, FATAL           written once, never replaced: exit_code, step, host, why, incarnation, time
    logs/HOST/START-PART  what the trainer printed, in parts of a mebibyte

Exit codes are the trainer's: 0 became DONE, 1 and 4 became FATAL; systemd starts it again after any other, of which
75 is no crash: what is needed isn't there yet, such as the storage, or the lease that a host before us still holds.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu.bucket import Bucket

FINAL = (1, 4)
"""The trainer's codes that a restart can't help."""
PREEMPTED = 3
TEMPORARY = 75
"""Another start may help: the hosts differ or haven't all come, the bucket is away, another trainer holds the run."""
REFUSALS = 5
"""Of the trainer, one soon after another, until this host says that it refuses, which gets it reset."""
PART = 1 << 20
"""Bytes of an object of the log, which is written anew until it is full."""
STEP = re.compile(rb"\bstep (\d+)/")
STOPPED = 4
"""Beats; without one for so long a host counts as absent."""
SHORT = 600
"""Seconds; a trainer that ended sooner counts as failing, and is started again later and later."""
LONGEST_PAUSE = 600


@dataclass(frozen=True)
class Pod:
    """What the startup script found out about this host."""

    bucket: str
    run: str
    host: int
    hosts: int
    incarnation: int
    code: str
    environment: str
    launch: dict[str, Any]
    """What tpu/push wrote: args, variables, flags."""
    state: Path
    """A folder that outlives a restart of the host."""
    beat: float = 30.0
    patience: float = 1800.0
    """Seconds between heartbeats, and until all hosts must have come."""
    pause: float = 10.0
    """Seconds before the start that follows a short run; doubled with each."""


def read_pod(path: Path) -> Pod:
    """The file that the startup script wrote."""
    found = json.loads(path.read_text())
    return Pod(**{**found, "state": Path(found["state"])})


def find_facts(pod: Pod) -> dict[str, str]:
    """What must be equal on all hosts."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    launch = hashlib.sha256(json.dumps(pod.launch, sort_keys=True).encode()).hexdigest()
    variables = find_variables(pod)
    return {"code": pod.code, "lock": pod.environment, "launch": launch, "jax": version("jax"),
            "libtpu": version("libtpu"), "python": platform.python_version(),
            "flags": " ".join(variables.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")).strip()}


def find_variables(pod: Pod) -> dict[str, str]:
    """The trainer's environment."""
    return {**os.environ, "EPATH_USE_TF": "false", "PYTHONUNBUFFERED": "1", **pod.launch.get("variables", {})}


@dataclass
class Reporter:
    """Heartbeats and the log, from a thread of their own; a storage that can't be reached is tried again."""

    pod: Pod
    bucket: Bucket
    facts: dict[str, str]
    log: Path
    status: str = "waiting"
    why: str = ""
    crashes: list[int] = field(default_factory=list)
    step: int = -1
    _sent: int = 0
    _beaten: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _end: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._loop, daemon=True).start()

    def say(self, status: str, why: str = "") -> None:
        """A change of state, reported at once."""
        self.status, self.why, self._beaten = status, why, 0.0
        print(f"agent: {status} {why}".rstrip(), flush=True)
        self.report()

    def finish(self) -> None:
        self._end.set()
        self.report()

    def report(self) -> None:
        with self._lock:
            try:
                self._send_log()
                if time.monotonic() - self._beaten >= self.pod.beat or not self._beaten:
                    self.bucket.write_json(f"heartbeats/{self.pod.host}", self._heartbeat())
                    self._beaten = time.monotonic()
            except (OSError, ValueError) as error:
                print(f"agent: the bucket can't be reached: {error}", file=sys.stderr, flush=True)

    def _loop(self) -> None:
        while not self._end.wait(min(self.pod.beat, 10.0)):
            self.report()

    def _heartbeat(self) -> dict[str, Any]:
        return {"host": self.pod.host, "incarnation": self.pod.incarnation, "state": self.status, "why": self.why,
                "step": self.step, "crashes": self.crashes, "time": round(time.time(), 1), "facts": self.facts}

    def _send_log(self) -> None:
        """The parts that have grown since."""
        size = self.log.stat().st_size if self.log.exists() else 0
        while self._sent < size:
            part = self._sent // PART
            with open(self.log, "rb") as file:
                file.seek(part * PART)
                data = file.read(PART)
            if found := STEP.findall(data):
                self.step = int(found[-1])
            self.bucket.write(f"logs/{self.pod.host}/{self.log.stem}-{part:04d}", data)
            self._sent = part * PART + len(data)


def find_end(bucket: Bucket) -> str:
    """DONE, FATAL, or nothing."""
    return next((name for name in ("DONE", "FATAL") if bucket.read(name) is not None), "")


def wait_for_hosts(pod: Pod, bucket: Bucket, reporter: Reporter) -> str:
    """Until all hosts of this incarnation report; nothing if they agree, else what differs or who is missing.

    A heartbeat that has stopped is of a host that starts again, maybe with other code: it has to come back first.
    """
    end = time.monotonic() + pod.patience
    while True:
        try:
            beats = [bucket.read_json(f"heartbeats/{host}") for host in range(pod.hosts)]
        except OSError as error:
            beats = []
            reporter.why = f"the bucket can't be reached: {error}"
        here = {beat["host"]: beat["facts"] for beat in beats if beat and beat["incarnation"] == pod.incarnation
                and time.time() - beat["time"] < STOPPED * pod.beat}
        for host, facts in sorted(here.items()):
            for name, value in sorted(reporter.facts.items()):
                if facts.get(name) != value:
                    return (f"{name} is {value!r} on host {pod.host}, {facts.get(name)!r} on host {host}; restart all "
                            f"hosts: gcloud compute tpus queued-resources reset {pod.run}")
        missing = sorted(set(range(pod.hosts)) - set(here))
        if not missing:
            return ""
        if time.monotonic() > end:
            return f"hosts {missing} haven't come in {pod.patience:.0f} s"
        time.sleep(min(pod.beat, 5.0))


def train(pod: Pod, log: Path, reporter: Reporter) -> int:
    """One run of the trainer; SIGTERM and SIGINT are passed on, and it has the time that systemd gives."""
    command = [sys.executable, "-m", "crystal_jax", "train", *pod.launch["args"],
               f"--run_dir=gs://{pod.bucket}/{pod.run}"]
    stops: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def stop(received: int, frame: object) -> None:
        # Once: a second signal makes the trainer stop without saving.
        stops.append(received)
        if child and len(stops) == 1:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with open(log, "ab") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                 env=find_variables(pod), start_new_session=True)
    if stops:
        child.send_signal(signal.SIGTERM)
    reporter.say("training")
    code = child.wait()
    if stops and code not in (0, *FINAL):
        return PREEMPTED  # cut short before it could save, or left by its peers: no crash of its own
    return code if code >= 0 else 128 - code


def last_line(log: Path) -> str:
    """Of what the trainer printed: the line of a mistake."""
    lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    return lines[-1][-500:] if lines else ""


def write_marker(pod: Pod, bucket: Bucket, reporter: Reporter, code: int, log: Path) -> None:
    """DONE by host 0, FATAL by whoever has it; tried until it is there, since the capacity is released by it."""
    name = "FATAL" if code else "DONE"
    if name == "DONE" and pod.host:
        return
    marker = {"exit_code": code, "step": reporter.step, "host": pod.host, "why": last_line(log) if code else "",
              "incarnation": pod.incarnation, "time": int(time.time())}
    while True:
        try:
            bucket.write_json(name, marker, generation=0)
            return
        except OSError as error:
            print(f"agent: {name} can't be written: {error}", file=sys.stderr, flush=True)
            time.sleep(pod.beat)


def load_crashes(pod: Pod) -> tuple[list[int], int]:
    """The steps of this incarnation's crashes, and how many short runs there were in a row."""
    try:
        found = json.loads((pod.state / "crashes.json").read_text())
    except (OSError, ValueError):
        found = {}
    return (found["steps"], found["short"]) if found.get("incarnation") == pod.incarnation else ([], 0)


def save_crashes(pod: Pod, steps: list[int], short: int) -> None:
    partial = pod.state / "crashes.partial"
    partial.write_text(json.dumps({"incarnation": pod.incarnation, "steps": steps, "short": short}))
    partial.replace(pod.state / "crashes.json")


def main(argv: list[str] | None = None) -> int:
    """One start of the agent; returns its exit code, of which an error of its own is never one of the trainer's."""
    try:
        return run(argv)
    except Exception:
        traceback.print_exc()
        return TEMPORARY


def run(argv: list[str] | None) -> int:
    """From the look for a terminal marker to the next one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pod", type=Path, default=Path("/etc/crystal/pod.json"), help="what the startup script wrote")
    pod = read_pod(parser.parse_args(argv).pod)
    # Until there is a trainer, a stop is just that.
    signal.signal(signal.SIGTERM, lambda received, frame: sys.exit(PREEMPTED))
    bucket = Bucket(pod.bucket, f"{pod.run}/pod")
    if ended := find_end(bucket):
        print(f"agent: the run has ended: gs://{pod.bucket}/{pod.run}/pod/{ended}", flush=True)
        return 0
    pod.state.mkdir(parents=True, exist_ok=True)
    log = pod.state / f"{time.time_ns() // 1000}.log"
    crashes, short = load_crashes(pod)
    reporter = Reporter(pod, bucket, find_facts(pod), log, crashes=crashes)
    reporter.say("waiting")
    reporter.start()
    if problem := wait_for_hosts(pod, bucket, reporter):
        reporter.say("refusing", problem)
        time.sleep(2 * pod.beat)
        return TEMPORARY
    began = time.monotonic()
    code = train(pod, log, reporter)
    reporter.report()
    if code == 0 or code in FINAL:
        write_marker(pod, bucket, reporter, code, log)
    pause, status, why = 0.0, "stopping" if code == PREEMPTED else "ended", f"exit code {code}"
    if code not in (0, PREEMPTED, *FINAL):
        short = short + 1 if time.monotonic() - began < SHORT else 0
        reporter.crashes = crashes if code == TEMPORARY else [*crashes, reporter.step][-10:]
        save_crashes(pod, reporter.crashes, short)
        pause = min(pod.pause * 2.0 ** min(max(short - 1, 0), 10), LONGEST_PAUSE)
        if code == TEMPORARY and short >= REFUSALS:
            status, why = "refusing", last_line(log)
    reporter.say(status, why)
    reporter.finish()
    log.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(pause)
    return code


if __name__ == "__main__":
    sys.exit(main())
