"""One process at a time: a lease, the object RUN/.lock on gs://, that its holder renews and anyone can take over.

Its invariant: no two machines' clocks are compared. A newcomer watches, by its own clock, whether the object changes;
three renewals without a change mean that its holder is gone. A holder that was frozen meanwhile ends as soon as it
finds the object changed, and its log takes no line more (objects.py).
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from crystal_jax import objects
from crystal_jax.errors import RestartError

RENEW_SECONDS = 5.0
RENEWALS = 3
"""That a holder may miss."""
NOBODY: dict[str, Any] = {"host": "an unknown machine", "process": "?", "since": "?", "every": RENEW_SECONDS}
LOST = 72
"""Exit code of a process that lost its lease: a restart finds out whether another one trains."""


def renew_seconds() -> float:
    """Of this process; a newcomer reads its holder's in the lease."""
    return float(os.environ.get("CRYSTAL_LEASE_SECONDS", RENEW_SECONDS))


@contextmanager
def held(path: epath.Path) -> Iterator[None]:
    """Takes the lease, renews it in the background and gives it back.

    Raises:
      RestartError: another process holds it.
    """
    lease = _Lease(path)
    lease.take()
    thread = threading.Thread(target=lease.keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        lease.ended.set()
        thread.join()
        lease.release()


def _read(found: bytes) -> dict[str, Any]:
    """What a holder says of itself; a folder that was copied from a disk brings an empty file."""
    try:
        return {**NOBODY, **json.loads(found)}
    except (ValueError, TypeError):
        return NOBODY


class _Lease:
    def __init__(self, path: epath.Path):
        self.path, self.every, self.ended = path, renew_seconds(), threading.Event()
        self._holder = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8),
                        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "every": self.every}
        self._renewed = 0
        self._generation = objects.MISSING

    def take(self) -> None:
        while True:
            found, self._generation = objects.read(self.path)
            if self._generation != objects.MISSING and self._is_given_back(found):
                continue
            try:
                self._renew()
                return self._renew()  # an object that is there: needs the permission to delete, as all later ones do
            except objects.Changed:
                pass  # someone else was quicker, and is watched now

    def _is_given_back(self, found: bytes) -> bool:
        """Watches a lease until it is old, or gone.

        Raises:
          RestartError: it was renewed.
        """
        holder = _read(found)
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
        seconds = RENEWALS * holder["every"]
        print(f"{self.path}: held by {who}; looking for {seconds:.0f} s whether it is renewed", file=sys.stderr,
              flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, holder["every"] / 2))
            now = objects.read(self.path)[1]
            if now == objects.MISSING:
                return True
            if now != self._generation:
                raise RestartError(f"{self.path.parent}: another process is training there ({who}); wait for it, or "
                                "stop it")
        return False

    def _renew(self) -> None:
        self._renewed += 1
        data = json.dumps({**self._holder, "renewed": self._renewed}) + "\n"
        self._generation = objects.change(self.path, data.encode(), self._generation)

    def keep(self) -> None:
        """Renews until the end; a process that has lost the lease ends at once."""
        while not self.ended.wait(self.every):
            try:
                self._renew()
            except objects.Changed:
                print(f"\n{self.path}: taken over by another process while this one didn't renew it; stopping at once",
                      file=sys.stderr, flush=True)
                os._exit(LOST)
            except Exception as error:  # storage is away: nobody else can take it over either
                print(f"\n{self.path}: can't be renewed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def release(self) -> None:
        try:
            objects.change(self.path, None, self._generation)
        except Exception as error:
            print(f"{self.path}: stays behind: {error}; the next one waits", file=sys.stderr)
