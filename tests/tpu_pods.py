"""A run's settings, the scripts in tpu/ as processes, and a scripted gcloud on their PATH."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fake_gcloud import Cloud

ROOT = Path(__file__).resolve().parents[1]
ZONE = "us-east5-a"


@dataclass
class Pod:
    """One run `crystal-7b` on gs://my-bucket, with the cloud that its scripts see."""

    folder: Path
    cloud: Cloud
    environment: dict[str, str]

    def write(self, text: str = "", root: Path = ROOT) -> None:
        """The settings: the example's, then these lines."""
        example = (root / "tpu" / "example.env").read_text()
        (self.folder / "pod.env").write_text(f"{example}\n{text}\n")

    def __call__(self, script: str, *args: str, timeout: float = 120, root: Path = ROOT,
                 **environment: str) -> subprocess.CompletedProcess[str]:
        """`tpu/SCRIPT --env=... ARGS`; the exit code is the test's to check."""
        command = [str(root / "tpu" / script), f"--env={self.folder / 'pod.env'}", *args]
        return subprocess.run(command, env={**self.environment, **environment}, timeout=timeout, cwd=self.folder,
                              capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)

    def put(self, key: str, text: str) -> None:
        """An object in the run's pod/ folder."""
        source = self.folder / "object"
        source.write_text(text)
        subprocess.run(["gcloud", "storage", "cp", source, f"gs://my-bucket/crystal-7b/pod/{key}"],
                       env=self.environment, check=True, capture_output=True)


def make_pod(folder: Path) -> Pod:
    """With the example's settings."""
    cloud = Cloud(folder / "cloud")
    base = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": sys.executable, "POLL_SECONDS": "0"}
    pod = Pod(folder, cloud, cloud.install(folder / "bin", base))
    pod.write()
    return pod


def normal(argv: list[str]) -> str:
    """A command as it could be typed, without what changes from day to day or place to place."""
    text = shlex.join(argv).replace(str(ROOT), "ROOT")
    return re.sub(r"\b1[789]\d{8}\b", "SECONDS", text)
