"""The supervisor's eyes and hands: calls of gcloud, and what their answers mean.

Invariant: an answer that isn't understood means "unknown". Only NOT_FOUND that names our own resource means that it is
gone: an expired login, a lost network and a wrong project end with the same exit code.
"""

import json
import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tpu.decide import GONE, Ledger

CALL_SECONDS = 300
# A bucket that is missing is named without an object: that isn't an object that is missing.
NO_OBJECT = re.compile(r"matched no objects|gs://[^/\s]+/\S+ not found: 404")


class Lost(Exception):
    """Another supervisor holds the run; the text says which."""


@dataclass(frozen=True)
class Answer:
    """How a call of gcloud ended; code -1: it was still running after its time, or couldn't be started."""

    code: int
    out: str
    error: str


@dataclass(frozen=True)
class Resource:
    """A queued resource: its state (GONE; None: unknown), whose it is, and what its hosts were told to report."""

    state: str | None
    ours: bool = True
    incarnation: str = ""


@dataclass(frozen=True)
class Job:
    """What the hosts wrote into the bucket."""

    known: bool
    end: str = ""
    beats: dict[int, dict[str, Any]] | None = None


def call(argv: list[str], text: str | None = None, seconds: float = CALL_SECONDS) -> Answer:
    """Runs a command in a session of its own: Ctrl-C in the terminal doesn't cut it off half way."""
    try:
        done = subprocess.run(argv, input=text, stdin=None if text is not None else subprocess.DEVNULL, text=True,
                              capture_output=True, timeout=seconds, start_new_session=True, check=False)
    except subprocess.TimeoutExpired:
        return Answer(-1, "", f"no answer within {seconds:.0f} s")
    except OSError as error:
        return Answer(-1, "", f"{argv[0]}: {error.strerror}")
    return Answer(done.returncode, done.stdout, " ".join(done.stderr.split()))


@dataclass
class Cloud:
    """One run's capacity and objects."""

    project: str
    run: str
    pod: str  # gs://BUCKET/RUN/pod
    create_command: list[str]

    def describe(self, zone: str) -> Resource:
        answer = call(self._queued("describe", zone, "--format=json"))
        if answer.code:
            gone = answer.code > 0 and "NOT_FOUND" in answer.error and f"queuedResources/{self.run}'" in answer.error
            return Resource(GONE if gone else None)
        try:
            found = json.loads(answer.out)
            node = found["tpu"]["nodeSpec"][0]["node"]
            return Resource(found["state"]["state"], node.get("labels", {}).get("crystal-run") == self.run,
                            node.get("metadata", {}).get("crystal-incarnation", ""))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Resource(None)

    def create(self, zone: str) -> Answer:
        return call([*self.create_command, f"--zone={zone}"])

    def delete(self, zone: str) -> Answer:
        return call(self._queued("delete", zone, "--force", "--quiet", "--async"))

    def reset(self, zone: str) -> Answer:
        return call(self._queued("reset", zone, "--quiet", "--async"))

    def _queued(self, verb: str, zone: str, *flags: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.run, f"--project={self.project}",
                f"--zone={zone}", *flags]

    def job(self) -> Job:
        """The terminal marker and the heartbeats, by host."""
        for marker in ("DONE", "FATAL"):
            answer = call(["gcloud", "storage", "cat", f"{self.pod}/{marker}"])
            if not answer.code:
                return Job(True, marker.lower())
            if not _no_object(answer):
                return Job(False)
        answer = call(["gcloud", "storage", "cat", f"{self.pod}/heartbeats/*"])
        if answer.code and not _no_object(answer):
            return Job(False)
        beats = {}
        for beat in read_many(answer.out):
            if isinstance(beat.get("host"), int):
                beats[beat["host"]] = beat
        return Job(True, beats=beats)


@dataclass
class Lease:
    """The one object that makes this supervisor the only one, and holds its ledger."""

    name: str
    holder: dict[str, Any]
    generation: str = "0"
    beat: int = 0

    def take(self, watch_seconds: float, step_seconds: float = 5) -> Ledger:
        """Becomes the holder.

        Raises:
          Lost: somebody else is at work, or the bucket can't be used.
        """
        before = self._read()
        if not self._is_free(before):
            end = time.monotonic() + watch_seconds
            while time.monotonic() < end:
                time.sleep(min(step_seconds, watch_seconds))
                if self._read()["generation"] != before["generation"]:
                    raise Lost(f"{who(before)} supervises this run; end that one first")
        self.generation = before["generation"]
        self.beat = before.get("beat", 0)
        ledger = read_ledger(before.get("ledger", {}))
        if not self.write(ledger):
            raise Lost(f"{self.name}: can't be written")
        return ledger

    def write(self, ledger: Ledger, released: bool = False) -> bool:
        """Renews the lease; False if the bucket can't be reached, in which case nothing may be done.

        Raises:
          Lost: somebody else took over.
        """
        self.beat += 1
        text = json.dumps({"holder": self.holder, "beat": self.beat, "released": released, "ledger": asdict(ledger)})
        answer = call(["gcloud", "storage", "cp", "-", self.name, f"--if-generation-match={self.generation}",
                       "--print-created-message"], text)
        created = re.search(rf"Created: {re.escape(self.name)}#(\d+)", answer.error)
        if not answer.code and created:
            self.generation = created[1]
            return True
        found = self._read_or_nothing()
        if found is None:
            return False
        if found.get("holder", self.holder) != self.holder:
            raise Lost(f"{who(found)} took over")
        self.generation = found["generation"]
        return found.get("beat") == self.beat

    def _read_or_nothing(self) -> dict[str, Any] | None:
        try:
            return self._read()
        except Lost:
            return None

    def _read(self) -> dict[str, Any]:
        # In this order: whatever changes after the generation was read makes the next write fail.
        described = call(["gcloud", "storage", "objects", "describe", self.name, "--format=value(generation)"])
        if described.code:
            if _no_object(described):
                return {"generation": "0", "released": True}
            raise Lost(f"{self.name}: {described.error[:300]}")
        content = call(["gcloud", "storage", "cat", self.name])
        if content.code:
            raise Lost(f"{self.name}: {content.error[:300]}")
        try:
            return {**json.loads(content.out), "generation": described.out.strip()}
        except ValueError as error:
            raise Lost(f"{self.name}: isn't ours ({error}); delete it, or choose another RUN") from error

    def _is_free(self, found: dict[str, Any]) -> bool:
        if found.get("released"):
            return True
        holder = found.get("holder", {})
        return holder.get("host") == self.holder["host"] and not Path(f"/proc/{holder.get('pid')}").exists() and (
            os.path.isdir("/proc"))


def read_many(text: str) -> list[dict[str, Any]]:
    """JSON objects one after another, up to the first that isn't whole: its host counts as silent."""
    found, decoder, text = [], json.JSONDecoder(), text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            break
        found.append(value)
        text = text[end:].strip()
    return [value for value in found if isinstance(value, dict)]


def read_ledger(found: dict[str, Any]) -> Ledger:
    """A ledger from JSON."""
    known = {field.name for field in fields(Ledger)}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                              for name, value in found.items() if name in known}
    return Ledger(**values)


def who(found: dict[str, Any]) -> str:
    """The holder of a lease, for a message."""
    holder = found.get("holder", {})
    return f"{holder.get('user', '?')} on {holder.get('host', '?')} (process {holder.get('pid', '?')})"


def _no_object(answer: Answer) -> bool:
    return answer.code > 0 and bool(NO_OBJECT.search(answer.error))
