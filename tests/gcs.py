"""gs:// without a cloud: the storage emulator as a process, and the environment that leads each client to it."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BUCKET = "crystal"
START_SECONDS = 60


@dataclass
class Emulator:
    """A running emulator."""

    environment: dict[str, str]
    """For a process of its own (`run_cli(..., env=gcs.environment)`); this process has it already."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def folder(self) -> str:
        """gs://BUCKET/NAME of a folder that nobody else uses."""
        return f"gs://{BUCKET}/{os.getpid()}-{next(self._numbers)}"


def environment(port: int) -> dict[str, str]:
    address = f"http://localhost:{port}"
    return {
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
        "STORAGE_EMULATOR_HOST": address,
        "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def emulator(folder: Path) -> Iterator[Emulator]:
    """Starts it on a free port, sets this process's environment, and ends it.

    TensorStore reads its address once per process: one emulator must serve all tests of a session.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    server = Path(__file__).with_name("gcs_server.py")
    command = [sys.executable, str(server), "-d", str(folder), "start", "--port", str(port), "--default-bucket", BUCKET,
               "-q"]
    variables = environment(port)
    before = {name: os.environ.get(name) for name in variables}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process, port)
        os.environ.update(variables)
        yield Emulator(variables)
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/storage/v1/b/{BUCKET}", timeout=5):
                return
        except OSError as error:
            assert process.poll() is None and time.monotonic() < end, f"the emulator doesn't answer: {error}"
            time.sleep(0.05)
