"""The processes of a run, one for each host: how they find each other, wait for each other, and end together.

None goes on alone: one that fails leaves at once, without the farewell for which JAX would wait, and that ends the
others; one that hangs is ended by timers that need no Python.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from crystal_jax.errors import RestartError, UserError, explain, first_line

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECONDS = 30
"""Without a sign of life, after which a process counts as dead and the others end."""
INIT_SECONDS = 300
"""To wait for the others at the start, and at the end."""
GRACE_SECONDS = 2.0
"""That the coordinator, whose end is the others' end, stays after a mistake that they'll find as well."""
KILL_SECONDS = 2
"""From the stacks of a hung process to its end."""
SLOW = 10
"""How much longer than a step compiling, evaluating, saving and restoring may take."""


@contextlib.contextmanager
def together(command: str) -> Iterator[None]:
    """Joins the other processes of the run; an error in this one ends it there and then, as `command` would end.

    Raises:
      UserError: see `start`.
    """
    start()
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = explain(command, error)
        if is_main() and isinstance(error, UserError):
            time.sleep(GRACE_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start() -> None:
    """Joins the processes that the environment names, or those that JAX finds on TPUs, Slurm and Kubernetes.

    Where there are none, this one is its own coordinator, at a local port.

    Raises:
      UserError: an environment that is no such thing.
      RestartError: a coordinator that can't be reached.
    """
    if jax.distributed.is_initialized():
        return
    # JAX's own notice of a preemption would take SIGTERM from progress.Signals.
    jax.config.update("jax_enable_preemption_service", False)
    named = _named()
    wait = _seconds("CRYSTAL_INIT_SECONDS", INIT_SECONDS)
    times: dict[str, Any] = {"initialization_timeout": wait, "shutdown_timeout_seconds": wait,
                             "heartbeat_timeout_seconds": _seconds("CRYSTAL_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)}
    try:
        jax.distributed.initialize(*named, **times)
    except ValueError as error:
        if named or "coordinator_address should be defined" not in str(error):
            raise
        _start_alone(times)
    except RuntimeError as error:
        if not named and "before any JAX calls" in str(error):
            return  # in a program that uses JAX already, a notebook or a test: one process
        raise RestartError(f"JAX_COORDINATOR_ADDRESS={named[0] if named else 'found by JAX'}: process "
                           f"{named[2] if named else ''} of the run can't join there ({first_line(error)}); start all "
                           f"of them within {wait} s, with the address of process 0 and a port that is free there"
                           ) from error


def _named() -> tuple[Any, ...]:
    """(coordinator's address, number of processes, own number) from the environment, or nothing."""
    given = {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}
    if not given:
        return ()
    if missing := [name for name in ENVIRONMENT if name not in given]:
        raise UserError(f"{', '.join(given)}: set, but {', '.join(missing)} isn't; set all three, or none for one "
                        "process")
    address, count, number = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT of process 0")
    if not count.isdigit() or not number.isdigit() or int(number) >= int(count):
        raise UserError(f"JAX_PROCESS_ID={number}, JAX_NUM_PROCESSES={count}: must be whole numbers, the first from 0 "
                        "to one less than the second")
    return address, int(count), int(number)


def _seconds(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdigit() or not int(text):
        raise UserError(f"{name}={text}: must be a whole number of seconds above 0")
    return int(text)


def _start_alone(times: dict[str, Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # CPU devices of one process need no sockets between them.
    jax.config.update("jax_cpu_collectives_implementation", None)
    # No one else waits for its signs of life, and a run that was suspended for an hour goes on.
    times = times | {"heartbeat_timeout_seconds": 10**6}
    jax.distributed.initialize(address, 1, 0, coordinator_bind_address=address, **times)


def is_main() -> bool:
    """Whether this is the process that writes files and says how it goes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; who doesn't come is left to heartbeats and the Watchdog."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class _Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


SILENT: Any = _Silent()
"""Stands in for what only the main process has: every method does nothing."""


class Watchdog:
    """Ends this process if it hangs, also inside a library that keeps Python's lock: the stacks of all threads go to
    stderr, and SIGALRM kills it. To be armed again with each step.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._steps: deque[float] = deque(maxlen=64)
        self._since: float | None = None

    def __enter__(self) -> "Watchdog":
        self._old = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self.slow()
        return self

    def __exit__(self, *_: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._old)

    def step(self) -> None:
        """A step begins: it may take ten times as long as the others, and at least `seconds`."""
        now = time.monotonic()
        if self._since is not None:
            self._steps.append(now - self._since)
        self._since = now
        self._arm(max(self.seconds, 10 * statistics.median(self._steps)) if self._steps else self.seconds)

    def slow(self, seconds: float = 0) -> None:
        """Something begins that takes longer than a step: SLOW times what a step may, or what gives up by itself
        after `seconds`."""
        self._since = None
        self._arm(max(SLOW * self.seconds, seconds + self.seconds))

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, file=sys.__stderr__ or sys.stderr)
        signal.setitimer(signal.ITIMER_REAL, seconds + KILL_SECONDS)
