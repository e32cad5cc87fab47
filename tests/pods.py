"""Several processes of `crystal-jax train` that form one run on this machine, as hosts do on a pod."""

import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from conftest import OUTER_ENVIRONMENT, ROOT

from crystal_jax.history import read_metrics

END_SECONDS = 300


@dataclass
class Pod:
    """Started by `start_pod`; what process i says is in `said(i)`."""

    run_dir: Path
    logs: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def said(self, index: int) -> str:
        return (self.logs / f"{index}.log").read_text()

    def wait_for(self, step: int) -> "Pod":
        """Until the log has reached `step`."""
        path = self.run_dir / "metrics.jsonl"
        end = time.monotonic() + END_SECONDS
        while time.monotonic() < end and not (path.exists() and any(
                record["kind"] == "train" and record["step"] >= step for record in read_metrics(path))):
            assert all(process.poll() is None for process in self.processes), self.said(0) + self.said(-1)
            time.sleep(0.02)
        return self

    def signal(self, index: int, which: signal.Signals) -> float:
        """When it was sent."""
        self.processes[index].send_signal(which)
        return time.monotonic()

    def codes(self) -> list[int]:
        """How each process ended, once all have."""
        try:
            return [process.wait(END_SECONDS) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def start_pod(run_dir: Path, logs: Path, arguments: list[str], processes: int, devices: int, *,
              env: dict[str, str] | None = None, program: dict[int, list[str]] | None = None,
              command: str = "train") -> Pod:
    """`processes` of `devices` CPU devices each; `program` replaces `-m crystal_jax` in some of them."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    logs.mkdir(parents=True, exist_ok=True)
    pod = Pod(run_dir, logs)
    for index in range(processes):
        environment = {
            **OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index),
            **(env or {})}
        words = [sys.executable, *(program or {}).get(index, ["-m", "crystal_jax"]), command,
                 f"--run_dir={run_dir}", *arguments]
        with open(logs / f"{index}.log", "ab") as log:
            pod.processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=ROOT))
    return pod
