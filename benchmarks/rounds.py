"""Programs in processes of their own that take turns: each compiles once, then takes so many steps at each word.

Standard library only, since the Python of a peer's own environment runs the worker's side.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, clocked

ANSWER = "taken "
"""Begins the lines that a worker answers with; what else its libraries print is passed over."""


def turns(finish: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """The worker's side: yields once for each step to take, as many as each line on stdin says.

    finish: waits for the steps' results and returns what else to answer, beside the seconds per step.
    """
    for line in sys.stdin:
        steps = int(line)
        with clocked() as clock:
            for _ in range(steps):
                yield
            found = finish()
        print(ANSWER + json.dumps(found | {"cpu": clock.cpu / steps, "wall": clock.wall / steps}), flush=True)


class Worker:
    """The other side of one such process, whose stderr goes to a file."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        with open(log, "w") as stderr:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=stderr, text=True)

    def take(self, steps: int) -> dict[str, Any]:
        """What `finish` gave after that many steps, and CPU seconds `cpu` and seconds `wall` per step.

        Raises:
          RuntimeError: the process ended.
        """
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError((self.log.read_text().strip() or "no message").splitlines()[-1])

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
