"""What the supervisor decides: single cases, and long histories of faults against a model of the cloud."""

import dataclasses
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu.cloud import Answer, Job, Resource, read_ledger, read_many
from tpu.decide import (
    CRASHES,
    ENDED,
    GONE,
    LEAVING,
    RESETS,
    WAITING,
    Action,
    Ledger,
    Limits,
    Seen,
    decide,
    spent,
)
from tpu.supervisor import Watch, see

ZONES = ("us-east5-a", "us-east5-b")
LIMITS = Limits(zones=ZONES, hosts=2, hours=1000, dollars=1e6, dollars_per_hour=100)
ALIVE = {0: 1.0, 1: 2.0}
TICK = 60.0


def seen(state: str | None = GONE, other: str | None = GONE, now: float = 1000.0, **rest) -> Seen:
    return Seen(now=now, resources=dict(zip(ZONES, (state, other), strict=True)), **rest)


def running(**rest) -> Ledger:
    ledger = Ledger(started=1, attempt=1, zone=ZONES[0], used=ZONES[:1], asked=1, appeared=True, active=1)
    return replace(ledger, **rest)


def test_an_empty_cloud_is_asked_once_and_waited_for() -> None:
    ledger, action = decide(seen(), Ledger(), LIMITS)
    assert (action.kind, action.zone, ledger.attempt) == ("create", ZONES[0], 1)
    # Not visible yet: the request may have been heard.
    ledger, action = decide(seen(now=1060), ledger, LIMITS)
    assert action.kind == "wait"
    for state in WAITING:
        ledger, action = decide(seen(state, now=1120), ledger, LIMITS)
        assert action == Action("wait", state)


@pytest.mark.parametrize("state", ["", "SUSPENDED", "ACTIVE"])
def test_an_unknown_zone_holds_everything_back(state: str) -> None:
    _, action = decide(seen(state, None), running() if state else Ledger(), LIMITS)
    assert action.kind == "wait"
    assert ZONES[1] in action.why


@pytest.mark.parametrize("state", ENDED)
def test_what_was_preempted_goes_and_the_next_zone_is_asked(state: str) -> None:
    ledger, action = decide(seen(state), running(step=7), LIMITS)
    assert (action.kind, action.zone) == ("delete", ZONES[0])
    ledger, action = decide(seen("DELETING"), ledger, LIMITS)
    assert action.kind == "wait"
    ledger, action = decide(seen(step=7), ledger, LIMITS)
    assert (action.kind, action.zone) == ("create", ZONES[1])
    assert (ledger.attempt, ledger.from_step, ledger.barren) == (2, 7, 0)


@pytest.mark.parametrize("state", [*WAITING, *LEAVING, "HIBERNATING"])
def test_nothing_is_deleted_that_merely_isnt_active(state: str) -> None:
    assert decide(seen(state), running(), LIMITS)[1].kind == "wait"


def test_a_full_zone_is_left_for_the_next_but_a_single_one_is_waited_for() -> None:
    late = 1001 + LIMITS.patience
    assert decide(seen("WAITING_FOR_RESOURCES", now=late), running(active=0), LIMITS)[1].kind == "delete"
    alone = replace(LIMITS, zones=ZONES[:1])
    only = Seen(now=late, resources={ZONES[0]: "WAITING_FOR_RESOURCES"})
    assert decide(only, running(active=0), alone)[1].kind == "wait"


def test_silent_hosts_are_reset_and_then_replaced() -> None:
    now = 2 * LIMITS.startup
    ledger = running()
    for resets in range(RESETS):
        ledger, action = decide(seen("ACTIVE", now=now, ages={0: 1.0}), ledger, LIMITS)
        assert (action.kind, ledger.resets) == ("reset", resets + 1)
        assert "[1]" in action.why
        # They get the time of a start.
        assert decide(seen("ACTIVE", now=now + 1), ledger, LIMITS)[1].kind == "wait"
        now += LIMITS.startup
    assert decide(seen("ACTIVE", now=now, ages={0: 1.0}), ledger, LIMITS)[1].kind == "delete"
    assert decide(seen("ACTIVE", now=now, ages=ALIVE), ledger, LIMITS)[1].kind == "wait"
    assert decide(seen("ACTIVE", now=now, hosts_known=False), ledger, LIMITS)[1].kind == "wait"


def test_hosts_that_refuse_are_reset_and_then_end_it() -> None:
    look = seen("ACTIVE", now=2 * LIMITS.startup, ages=ALIVE, dirty=(1,))
    ledger, action = decide(look, running(), LIMITS)
    assert action.kind == "reset"
    ledger = replace(ledger, resets=RESETS)
    # What they said before the reset.
    assert decide(replace(look, now=look.now + 60), ledger, LIMITS)[1].kind == "wait"
    look = replace(look, now=look.now + LIMITS.startup)
    _, action = decide(look, ledger, LIMITS)
    assert action.kind == "delete"
    _, action = decide(replace(look, resources=seen().resources), ledger, LIMITS)
    assert (action.kind, action.code) == ("finish", 1)


@pytest.mark.parametrize("rest, code", [
    ({"end": "done"}, 0), ({"end": "fatal"}, 4), ({"refused": "INVALID_ARGUMENT"}, 1), ({"stop": "delete"}, 130),
    ({"crashes": (9,) * CRASHES, "step": 9}, 4), ({"now": LIMITS.hours * 3600 + 2}, 5),
])
def test_each_end_leaves_nothing_behind(rest: dict, code: int) -> None:
    ledger, action = decide(seen("ACTIVE", **rest), running(), LIMITS)
    assert (action.kind, action.zone) == ("delete", ZONES[0])
    assert decide(seen("DELETING", **rest), ledger, LIMITS)[1].kind == "wait"
    assert decide(seen(GONE, None, **rest), ledger, LIMITS)[1].kind == "wait"
    assert decide(seen(None, "ACTIVE", **rest), ledger, LIMITS)[1].kind == "delete"
    _, action = decide(seen(**rest), ledger, LIMITS)
    assert (action.kind, action.code) == ("finish", code)


def test_an_interruption_leaves_the_capacity_unless_it_is_told_otherwise() -> None:
    _, action = decide(seen("ACTIVE", stop="leave"), running(), LIMITS)
    assert (action.kind, action.code) == ("finish", 130)


def test_crashes_count_over_attempts_until_the_step_is_passed() -> None:
    two = running(crashes=(9, 9), step=9)
    assert decide(seen("ACTIVE", ages=ALIVE, crashes=(9,), step=9), two, LIMITS)[1].kind == "delete"
    assert decide(seen("ACTIVE", ages=ALIVE, crashes=(9,), step=12), two, LIMITS)[1].kind == "wait"
    assert decide(seen("ACTIVE", ages=ALIVE, crashes=(8,), step=8), two, LIMITS)[1].kind == "wait"
    ledger, _ = decide(seen(crashes=(9,), step=12), two, LIMITS)
    assert ledger.crashes == ()


def test_attempts_that_gain_nothing_are_made_later_and_later() -> None:
    ledger, pauses = Ledger(), []
    now = 1000.0
    for _ in range(8):
        begun = now
        while True:
            ledger, action = decide(seen(now=now), ledger, LIMITS)
            if action.kind == "create":
                break
            now += 10
        pauses.append(now - begun)
        ledger = replace(ledger, appeared=True)
    assert pauses == [0, 60, 120, 240, 480, 960, 1800, 1800]


def test_money_counts_active_time_and_stops() -> None:
    ledger = Ledger()
    for now in range(1, 7202, 60):
        ledger, _ = decide(seen("ACTIVE", now=now, ages=ALIVE), ledger, LIMITS)
    assert spent(seen(now=7201), ledger, LIMITS) == (2.0, 200.0)
    # Unwatched for two hours, at the end of which it is gone: up to the last heartbeat.
    ledger, _ = decide(seen(now=7201 + 7200, last_beat=7201 + 3600), ledger, LIMITS)
    assert ledger.paid == 3 * 3600
    assert decide(seen("ACTIVE", now=20000), ledger, replace(LIMITS, dollars=300))[1].kind == "delete"


def test_capacity_of_somebody_else_is_never_touched() -> None:
    found = {ZONES[0]: Resource("ACTIVE", ours=False), ZONES[1]: Resource(GONE)}
    look = see(found, Job(True, beats={}), Watch(), "", 1000.0)
    _, action = decide(look, Ledger(), LIMITS)
    assert (action.kind, action.code) == ("finish", 1)


def test_capacity_made_by_hand_is_adopted() -> None:
    ledger, action = decide(seen(GONE, "WAITING_FOR_RESOURCES", now=1e6), Ledger(), LIMITS)
    assert action.kind == "wait"
    assert (ledger.zone, ledger.appeared, ledger.used) == (ZONES[1], True, ZONES[1:])


def test_heartbeats_of_another_incarnation_dont_count() -> None:
    old = {"host": 0, "incarnation": 1, "state": "refusing", "step": 5, "crashes": [5, 5, 5]}
    found = {ZONES[0]: Resource("ACTIVE", incarnation="2")}
    look = see(found, Job(True, beats={0: old}), Watch(), "1", 0.0)
    assert (look.ages, look.crashes, look.dirty, look.step) == ({}, (), (), -1)
    # With nothing there they are the last attempt's.
    assert see({ZONES[0]: Resource(GONE)}, Job(True, beats={0: old}), Watch(), "1", 0.0).crashes == (5, 5, 5)


def test_a_hosts_clock_doesnt_matter() -> None:
    watch = Watch()
    beat = {"host": 0, "time": 1e12}
    assert watch.ages({0: beat}, 100.0) == {0: 0.0}
    assert watch.ages({0: dict(beat)}, 150.0) == {0: 50.0}
    assert watch.ages({0: {**beat, "time": 5}}, 160.0) == {0: 0.0}


def test_answers_to_a_request() -> None:
    watch = Watch()
    watch.answered(ZONES[0], Answer(1, "", "503 UNAVAILABLE"), ZONES)
    watch.answered(ZONES[0], Answer(1, "", "RESOURCE_EXHAUSTED: quota"), ZONES)
    watch.answered(ZONES[0], Answer(1, "", "You do not currently have an active account selected"), ZONES)
    assert not watch.refused
    watch.answered(ZONES[1], Answer(1, "", "RESOURCE_EXHAUSTED: quota"), ZONES)
    assert "quota" in watch.refused


def test_ledger_and_heartbeats_survive_their_text() -> None:
    ledger = running(crashes=(1, 2))
    assert read_ledger({**dataclasses.asdict(ledger), "crashes": [1, 2], "used": list(ledger.used), "x": 1}) == ledger
    assert read_many('{"host": 0}\n{"host": 1}{"ho') == [{"host": 0}, {"host": 1}]


# A model of the cloud in which everything goes wrong that may, and histories through it.

@dataclass
class World:
    """The truth, of which a supervisor sees a part; a late creation appears within the settling time."""

    now: float = 1e6
    states: dict[str, str] = field(default_factory=dict)
    late: list[tuple[float, str]] = field(default_factory=list)
    end: str = ""
    step: int = 0
    crashes: tuple[int, ...] = ()

    def pass_time(self, progress: int) -> None:
        self.now += TICK
        for at, zone in [entry for entry in self.late if entry[0] <= self.now]:
            self.late.remove((at, zone))
            self.states.setdefault(zone, "CREATING")
        for zone, state in list(self.states.items()):
            if state == "DELETING":
                del self.states[zone]
            elif state in WAITING and progress:
                self.states[zone] = [*WAITING, "ACTIVE"][WAITING.index(state) + 1]
        if progress and "ACTIVE" in self.states.values():
            self.step += progress

    def look(self, unknown: int, blind: bool, stop: str) -> Seen:
        resources = {zone: None if unknown & 1 << index else self.states.get(zone, GONE)
                     for index, zone in enumerate(ZONES)}
        return Seen(now=self.now, resources=resources, end="unknown" if blind else self.end,
                    ages={} if blind else ALIVE, hosts_known=not blind, step=-1 if blind else self.step,
                    crashes=() if blind else self.crashes, stop=stop)

    def do(self, action: Action, fate: str) -> None:
        """The action reaches the cloud, or doesn't, or does so after the answer was lost."""
        if action.kind == "create" and fate != "lost":
            if fate == "late":
                self.late.append((self.now + LIMITS.settle - 1, action.zone))
            else:
                self.states.setdefault(action.zone, "CREATING")
        elif action.kind == "delete" and fate != "lost" and action.zone in self.states:
            self.states[action.zone] = "DELETING"

    def strike(self, event: str) -> None:
        for zone, state in self.states.items():
            if event == "preempt" and state == "ACTIVE":
                self.states[zone] = "SUSPENDED"
            if event == "fail" and state in WAITING:
                self.states[zone] = "FAILED"
        if event in ("done", "fatal") and "ACTIVE" in self.states.values():
            self.end = event
        if event == "crash" and "ACTIVE" in self.states.values():
            self.crashes = (*self.crashes, self.step)[-CRASHES:]


TICKS = st.tuples(
    st.sampled_from(["", "", "", "", "preempt", "fail", "crash", "done", "fatal"]),
    st.sampled_from(["", "", "late", "lost"]),
    st.sampled_from([0, 0, 0, 1, 2, 3]),  # zones that can't be seen, as bits
    st.booleans(),  # the bucket can't be read
    st.sampled_from([0, 1, 5]),
    st.sampled_from(["", "", "", "before", "after"]),  # killed around the action, and started again
)


@settings(deadline=None, max_examples=400)
@given(st.lists(TICKS, max_size=60), st.sampled_from(["done", "fatal", "delete"]), st.sampled_from([400.0, 1e6]))
def test_histories(ticks: list, last: str, dollars: float) -> None:
    world, ledger, limits = World(), Ledger(), replace(LIMITS, dollars=dollars)

    def turn(fate: str, unknown: int, blind: bool, stop: str, killed: str) -> bool:
        nonlocal ledger
        look = world.look(unknown, blind, stop)
        ledger, action = decide(look, ledger, limits)
        if action.kind == "create":
            assert set(look.resources.values()) == {GONE}
            assert not world.late
            assert not world.end and not blind
        if action.kind == "delete" and look.end not in ("done", "fatal") and not stop:
            assert look.resources[action.zone] in (*ENDED, *WAITING, "ACTIVE")
        if action.kind == "finish":
            assert not world.states and not world.late
            return True
        if killed != "before":
            world.do(action, fate)
        assert len(world.states) + len(world.late) <= 1
        # A new supervisor knows what the ledger's text says, no more.
        ledger = read_ledger(dataclasses.asdict(ledger)) if killed else ledger
        return False

    for event, fate, unknown, blind, progress, killed in ticks:
        world.pass_time(progress)
        world.strike(event)
        if turn(fate, unknown, blind, "", killed):
            return
    world.end = last if last != "delete" else world.end
    for _ in range(12):
        world.pass_time(0)
        if turn("", 0, False, "delete" if last == "delete" else "", ""):
            return
    pytest.fail(f"not ended: {world}, {ledger}")
