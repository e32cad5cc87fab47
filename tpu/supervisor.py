"""Keeps one run on capacity until it is done: looks, decides (decide.py), notes it in the bucket, acts, again.

Invariant: what it knows lies in the cloud, so that it may be killed at any moment and started again anywhere; each
action is noted before it is done, and two supervisors of one run never act at the same time.
"""

import argparse
import getpass
import os
import signal
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tpu.cloud import Answer, Cloud, Job, Lease, Lost, Resource
from tpu.decide import GONE, Action, Ledger, Limits, Seen, decide, spent

# Answers to a request that asking again won't change. An expired login isn't one: it may come back, and what is there
# couldn't be deleted either.
REFUSED = ("PERMISSION_DENIED", "INVALID_ARGUMENT", "launch.json: missing", "is reached through GKE", "is missing;")
EXHAUSTED = ("RESOURCE_EXHAUSTED", "uota")
DIRTY = "refusing"  # what a host's heartbeat says when it may not start


@dataclass
class Watch:
    """What is remembered from look to look; losing it costs time only."""

    changed: dict[int, tuple[Any, float, bool]] = field(default_factory=dict)
    """Host to (its heartbeat, when that changed, whether it changed while we looked)."""
    exhausted: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    stop: str = ""
    wake: threading.Event = field(default_factory=threading.Event)

    def answered(self, zone: str, answer: Answer, zones: tuple[str, ...]) -> None:
        """Takes in how a request for capacity ended."""
        if not answer.code or "ALREADY_EXISTS" in answer.error:
            self.exhausted = {}
        elif any(text in answer.error for text in EXHAUSTED):
            self.exhausted[zone] = answer.error
            if set(self.exhausted) >= set(zones):
                self.refused = answer.error
        elif answer.code == 2 or any(text in answer.error for text in REFUSED):
            self.refused = answer.error

    def ages(self, beats: dict[int, dict[str, Any]], now: float) -> dict[int, float]:
        """Seconds since each host's heartbeat was first seen as it is: our clock alone, whatever the hosts' say."""
        for host, beat in beats.items():
            known = self.changed.get(host)
            if known is None or known[0] != beat:
                self.changed[host] = (beat, now, known is not None)
        return {host: now - self.changed[host][1] for host in beats}


def look(cloud: Cloud, watch: Watch, ledger: Ledger, zones: tuple[str, ...]) -> Seen:
    """One look at every zone that was ever asked, and at the bucket."""
    found = {zone: cloud.describe(zone) for zone in (*zones, *(zone for zone in ledger.used if zone not in zones))}
    return see(found, cloud.job(), watch, ledger.incarnation, time.time())


def see(found: dict[str, Resource], job: Job, watch: Watch, incarnation: str, now: float) -> Seen:
    """What was found, as the decision takes it; heartbeats of other incarnations don't count."""
    there = [resource.incarnation for resource in found.values() if resource.state]
    wanted = set(filter(None, there)) or ({incarnation} if not there else set())
    beats = {host: beat for host, beat in (job.beats or {}).items()
             if not wanted or str(beat.get("incarnation")) in wanted}
    ages = watch.ages(beats, now)
    main = beats.get(0, {})
    return Seen(
        now=now,
        resources={zone: resource.state for zone, resource in found.items()},
        incarnation=next(filter(None, there), ""),
        end=job.end if job.known else "unknown",
        ages=ages,
        hosts_known=job.known,
        dirty=tuple(host for host, beat in beats.items() if beat.get("state") == DIRTY and watch.changed[host][2]),
        step=max((_number(beat.get("step")) for beat in beats.values()), default=-1),
        last_beat=max((float(beat.get("time") or 0) for beat in beats.values()), default=0),
        crashes=tuple(map(_number, main.get("crashes", ()))),
        refused=watch.refused,
        foreign=next((zone for zone, resource in found.items() if not resource.ours), ""),
        stop=watch.stop,
    )


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def act(action: Action, cloud: Cloud, watch: Watch, limits: Limits) -> None:
    """Does it; what went wrong is said, and seen again at the next look."""
    if action.kind == "create":
        answer = cloud.create(action.zone)
        watch.answered(action.zone, answer, limits.zones)
    elif action.kind in ("delete", "reset"):
        answer = getattr(cloud, action.kind)(action.zone)
    else:
        return
    if answer.code:
        say(f"  {action.kind} in {action.zone} failed: {answer.error[:400]}")


def supervise(cloud: Cloud, limits: Limits, lease: Lease, ledger: Ledger, watch: Watch, tick_seconds: float) -> int:
    """Runs to the end; returns the exit code."""
    said = ""
    while True:
        seen = look(cloud, watch, ledger, limits.zones)
        noted, action = decide(seen, ledger, limits)
        written = lease.write(noted, released=action.kind == "finish")
        # What couldn't be noted isn't done, but for ending, which asks for nothing.
        ledger = noted if written else ledger
        line = f"{action.kind} {action.zone}: {action.why}" if action.zone else f"{action.kind}: {action.why}"
        if not written:
            line += " (not done: the bucket can't be written)"
        if line != said:
            hours, dollars = spent(seen, noted, limits)
            say(f"{line} · attempt {ledger.attempt}, {hours:.1f} h, estimated ${dollars:,.0f}")
            said = line
        if action.kind == "finish":
            if left := [zone for zone, state in seen.resources.items() if state != GONE]:
                say(f"capacity may be left in {', '.join(left)}; it costs until: tpu/delete --zone={left[0]}")
            return action.code
        if written:
            act(action, cloud, watch, limits)
        if not watch.wake.wait(tick_seconds):
            continue
        watch.wake.clear()


def say(text: str) -> None:
    """A line with the time."""
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; tpu/supervise gives those of the settings."""
    parser = argparse.ArgumentParser(prog="tpu/supervise", description=__doc__)
    for name in ("project", "run", "pod", "zones", "create", "settings"):
        parser.add_argument(f"--{name}", required=True, help=argparse.SUPPRESS)
    for name in ("hosts", "slices"):
        parser.add_argument(f"--{name}", type=int, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--price", type=float, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--dollars", type=float, required=True, help="stop when this much is spent, by estimate")
    parser.add_argument("--hours", type=float, default=24 * 60, help="stop this long after the first start")
    parser.add_argument("--delete-on-exit", action="store_true", help="Ctrl-C and TERM delete the capacity")
    parser.add_argument("--again", action="store_true", help="forget crashes, hours and dollars so far")
    parser.add_argument("--tick-seconds", type=float, default=60, help="between looks")
    parser.add_argument("--lease-seconds", type=float, default=420, help="how long to watch another supervisor's lease")
    for name in ("settle", "startup", "silence", "patience", "backoff"):
        parser.add_argument(f"--{name}-seconds", type=float, default=getattr(Limits, name), help="see tpu/decide.py")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a user's mistake, 4 fatal or a crash loop, 5 a limit, 130 interrupted."""
    args = parse(argv)
    cloud = Cloud(args.project, args.run, args.pod, [args.create, f"--env={args.settings}"])
    limits = Limits(
        zones=tuple(args.zones.split(",")), hosts=args.hosts, hours=args.hours, dollars=args.dollars,
        dollars_per_hour=args.price * args.slices,
        **{name: getattr(args, f"{name}_seconds") for name in ("settle", "startup", "silence", "patience", "backoff")})
    holder = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "user": getpass.getuser()}
    watch = Watch()

    def interrupt(number: int, frame: object) -> None:
        watch.stop = "delete" if args.delete_on_exit else "leave"
        watch.wake.set()

    lease = Lease(f"{args.pod}/supervisor.json", holder)
    try:
        ledger = lease.take(args.lease_seconds)
        # Until here an interruption may cut it off: nothing was done.
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
        return supervise(cloud, limits, lease, Ledger(used=ledger.used) if args.again else ledger, watch,
                         args.tick_seconds)
    except Lost as lost:
        print(f"tpu/supervise: {lost}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
