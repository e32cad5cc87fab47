"""What the supervisor does next, as a pure function of what is seen and what it noted before.

Invariant: capacity is asked for only where every zone is known to hold none, and a zone whose state is unknown is left
alone. Nothing is remembered but the ledger, which lies in the bucket: a supervisor that was killed goes on from there.
"""

from dataclasses import dataclass, field, replace

GONE = ""
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
ENDED = ("SUSPENDED", "FAILED")  # a preempted queued resource is SUSPENDED and never comes back
LEAVING = ("SUSPENDING", "DELETING")
CRASHES = 3  # at the same step: a restart won't get past it
RESETS = 2  # of one attempt
CODES = {"done": 0, "refused": 1, "foreign": 1, "fatal": 4, "crash loop": 4, "limit": 5, "interrupted": 130}


@dataclass(frozen=True)
class Limits:
    """Of a run; seconds, unless a name says otherwise."""

    zones: tuple[str, ...]
    hosts: int
    hours: float
    dollars: float
    dollars_per_hour: float
    settle: float = 180  # until a request whose answer was lost must have become visible
    startup: float = 1800  # from ACTIVE to the first heartbeats
    silence: float = 900  # of a host, before it counts as dirty
    patience: float = 4 * 3600  # in the queue of a zone, where there is another zone
    backoff: float = 60
    longest_backoff: float = 1800


@dataclass(frozen=True)
class Ledger:
    """What must outlive the supervisor; written before each action."""

    started: float = 0
    attempt: int = 0
    zone: str = ""
    used: tuple[str, ...] = ()  # each zone that was ever asked
    incarnation: str = ""  # what the hosts of the attempt report
    asked: float = 0  # when the attempt's capacity was asked for; 0: not yet
    appeared: bool = False
    active: float = 0
    resets: int = 0
    reset_at: float = 0
    paid: float = 0  # seconds of ACTIVE
    charged_to: float = 0  # 0: not being charged
    barren: int = 0  # attempts in a row that gained no step
    from_step: int = -1  # when the attempt began
    step: int = -1  # the newest that a host reported
    crashes: tuple[int, ...] = ()  # steps at which trainers of finished attempts crashed, newest last


@dataclass(frozen=True)
class Seen:
    """One look at the world. `resources`: zone to state, GONE, or None where it couldn't be learned."""

    now: float
    resources: dict[str, str | None]
    incarnation: str = ""
    end: str = ""  # "done" or "fatal", from the marker in the bucket; "unknown": the bucket couldn't be read
    ages: dict[int, float] = field(default_factory=dict)  # host to seconds since its heartbeat changed
    hosts_known: bool = True
    dirty: tuple[int, ...] = ()  # hosts that say that they can't start
    step: int = -1
    last_beat: float = 0  # when a host last wrote, by the hosts' clock
    crashes: tuple[int, ...] = ()  # of this attempt
    refused: str = ""  # the answer to a request that can't be granted however often it is asked
    foreign: str = ""  # a zone where somebody else's resource has our name
    stop: str = ""  # "", "leave" or "delete": what an interruption asks for


@dataclass(frozen=True)
class Action:
    """`kind`: wait, create, delete, reset or finish (with `code`)."""

    kind: str
    why: str
    zone: str = ""
    code: int = 0


def decide(seen: Seen, ledger: Ledger, limits: Limits) -> tuple[Ledger, Action]:
    """The next action, and the ledger to write before it is done."""
    ledger = account(seen, ledger)
    outcome, why = find_outcome(seen, ledger, limits)
    if seen.stop == "leave" or outcome == "foreign":
        return ledger, Action("finish", why, code=CODES[outcome])
    there = {zone: state for zone, state in seen.resources.items() if state}
    unknown = [zone for zone, state in seen.resources.items() if state is None]
    if outcome:
        return ledger, end(seen, ledger, limits, outcome, why)
    if unknown:
        return ledger, Action("wait", f"state unknown in {', '.join(unknown)}: nothing is done")
    if not there:
        return ask(seen, ledger, limits)
    if len(there) > 1:
        extra = next(zone for zone in there if zone != ledger.zone)
        return ledger, Action("delete", f"capacity in {len(there)} zones; the attempt's is {ledger.zone}", extra)
    zone, state = next(iter(there.items()))
    ledger = replace(ledger, zone=zone, appeared=True, asked=ledger.asked or seen.now,
                     incarnation=seen.incarnation or ledger.incarnation, used=tuple(sorted({*ledger.used, zone})))
    if state == "ACTIVE":
        return watch(seen, ledger, limits)
    if state in ENDED:
        return ledger, Action("delete", f"{state}, at step {ledger.step}: preempted or failed", zone)
    impatient = state in WAITING and len(limits.zones) > 1 and seen.now - ledger.asked > limits.patience
    if impatient:
        return ledger, Action("delete", f"{state} for {(seen.now - ledger.asked) / 3600:.1f} h: the next zone", zone)
    return ledger, Action("wait", state if state in WAITING + LEAVING else f"{state}: a state that isn't known")


def find_outcome(seen: Seen, ledger: Ledger, limits: Limits) -> tuple[str, str]:
    """(a key of CODES, why) if the run is over; ("", "") otherwise."""
    hours, dollars = spent(seen, ledger, limits)
    crashes = (*ledger.crashes, *seen.crashes)[-CRASHES:]
    stuck = len(crashes) == CRASHES and len(set(crashes)) == 1 and seen.step <= crashes[-1]
    reasons = (
        ("foreign", seen.foreign, f"{seen.foreign}: the name is in use by somebody else; choose another RUN"),
        ("interrupted", seen.stop, "interrupted"),
        ("done", seen.end == "done", "the run is done"),
        ("fatal", seen.end == "fatal", "the trainer ended with what a restart can't help"),
        ("refused", seen.refused, seen.refused),
        ("refused", seen.dirty and ledger.resets >= RESETS and not starting(seen, ledger, limits),
         f"hosts {list(seen.dirty)} refuse to start"),
        ("crash loop", stuck, f"{CRASHES} crashes at step {crashes[-1] if crashes else -1}"),
        ("limit", hours >= limits.hours, f"{hours:.1f} h of {limits.hours:g} h are over"),
        ("limit", dollars >= limits.dollars, f"${dollars:,.0f} of ${limits.dollars:,.0f} are spent, by estimate"),
    )
    return next(((outcome, why) for outcome, holds, why in reasons if holds), ("", ""))


def end(seen: Seen, ledger: Ledger, limits: Limits, outcome: str, why: str) -> Action:
    """Nothing that costs is left: whatever is known to be there goes first."""
    for zone, state in seen.resources.items():
        if state and state != "DELETING":
            return Action("delete", why, zone)
    if late := [zone for zone, state in seen.resources.items() if state is None or state]:
        return Action("wait", f"{why}; until nothing is left in {', '.join(late)}")
    if unsettled(seen, ledger, limits):
        return Action("wait", f"{why}; a late answer to the last request may still appear")
    return Action("finish", why, code=CODES[outcome])


def ask(seen: Seen, ledger: Ledger, limits: Limits) -> tuple[Ledger, Action]:
    """Every zone is known to be empty: close the last attempt, wait if it is too soon, ask."""
    if seen.end == "unknown":
        return ledger, Action("wait", "the bucket can't be read: whether the run has ended isn't known")
    if unsettled(seen, ledger, limits):
        return ledger, Action("wait", "the last request may still appear")
    zones = limits.zones
    following = zones[(zones.index(ledger.zone) + 1) % len(zones)] if ledger.zone in zones else zones[0]
    if ledger.asked:
        gained = ledger.step > ledger.from_step
        barren = 0 if gained else ledger.barren + 1
        pause = 0 if gained else min(limits.backoff * 2.0 ** (barren - 1), limits.longest_backoff)
        if seen.now < ledger.asked + pause:
            return ledger, Action("wait", f"{barren} attempts gained no step: not before {pause:.0f} s have passed")
        crashes = (*ledger.crashes, *seen.crashes)[-CRASHES:]
        moved_on = crashes and seen.step > crashes[-1]
        ledger = replace(ledger, barren=barren, crashes=() if moved_on else crashes)
    ledger = replace(
        ledger, attempt=ledger.attempt + 1, zone=following, incarnation="", asked=seen.now, appeared=False, active=0,
        resets=0, reset_at=0, from_step=ledger.step, used=tuple(sorted({*ledger.used, following})))
    return ledger, Action("create", f"attempt {ledger.attempt}", following)


def watch(seen: Seen, ledger: Ledger, limits: Limits) -> tuple[Ledger, Action]:
    """ACTIVE: are the hosts alive?"""
    if not seen.hosts_known or seen.end == "unknown":
        return ledger, Action("wait", "ACTIVE; the bucket can't be read")
    silent = [host for host in range(limits.hosts) if seen.ages.get(host, limits.silence) >= limits.silence]
    if starting(seen, ledger, limits) or not (silent or seen.dirty):
        alive = limits.hosts - len(silent)
        return ledger, Action("wait", f"ACTIVE, {alive} of {limits.hosts} hosts alive, step {ledger.step}")
    who = f"hosts {list(seen.dirty or silent)} {'refuse to start' if seen.dirty else 'are silent'}"
    if ledger.resets >= RESETS:
        return ledger, Action("delete", f"{who}, after {RESETS} resets", ledger.zone)
    return replace(ledger, resets=ledger.resets + 1, reset_at=seen.now), Action("reset", who, ledger.zone)


def starting(seen: Seen, ledger: Ledger, limits: Limits) -> bool:
    """Whether the hosts still have the time of a start, in which old heartbeats say nothing."""
    return seen.now - max(ledger.active, ledger.reset_at) < limits.startup


def account(seen: Seen, ledger: Ledger) -> Ledger:
    """The time that ACTIVE capacity was paid for; after a gap in the watching, up to the last heartbeat at least."""
    ledger = replace(ledger, started=ledger.started or seen.now, step=max(ledger.step, seen.step))
    active = any(state in ("ACTIVE", "SUSPENDING") for state in seen.resources.values())
    if active:
        charged = seen.now - ledger.charged_to if ledger.charged_to else 0
        return replace(ledger, paid=ledger.paid + charged, charged_to=seen.now, active=ledger.active or seen.now)
    if ledger.charged_to and None not in seen.resources.values():
        charged = min(max(seen.last_beat, ledger.charged_to), seen.now) - ledger.charged_to
        return replace(ledger, paid=ledger.paid + charged, charged_to=0)
    return ledger


def spent(seen: Seen, ledger: Ledger, limits: Limits) -> tuple[float, float]:
    """(hours since the first start, dollars, an estimate by list prices)."""
    return (seen.now - ledger.started) / 3600, ledger.paid / 3600 * limits.dollars_per_hour


def unsettled(seen: Seen, ledger: Ledger, limits: Limits) -> bool:
    """Whether the last request may have been heard without being visible yet."""
    return bool(ledger.asked) and not ledger.appeared and seen.now - ledger.asked < limits.settle
