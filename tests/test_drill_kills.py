"""`train` killed at any moment, on a disk and on gs://, ends as if nothing had happened."""

import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drills import Drill, DrillRecord
from gcs import Emulator
from running import Recipe, assert_same, committed, left_behind, reached, seeded, starts, under_way

EVERY = 10
"""Steps between saves; a step takes some hundredths of a second."""
LONG = ("--config.phases[0].steps=30", "--config.phases[1].steps=40", "--config.phases[2].tokens=7680",
        "--config.phases[0].checkpoint_every=10", "--config.phases[1].checkpoint_every=15",
        f"--config.checkpoints.every_steps={EVERY}", "--config.training.log_every=1", "--config.training.eval_every=25")


class Kills:
    """Kills a run again and again at random moments, and checks each time from which step it goes on."""

    def __init__(self, recipe: Recipe, place: Callable[[], Path | str], rng: random.Random):
        self.recipe, self.place, self.rng = recipe, place, rng
        self.lost, self.lost_in_save = [0], [0]
        """Steps to do again, after kills without and with a save under way."""
        self.anew()

    def anew(self) -> None:
        """From now on another run."""
        self.run_dir, self.expected = self.place(), 0

    def once(self) -> bool:
        """Starts it and kills it; False where it came to its end instead."""
        before = len(starts(self.run_dir))
        trainer = self.recipe.start(self.run_dir)
        if self.rng.random() < 0.15:
            time.sleep(self.rng.uniform(0, 4))  # while it starts
        else:
            trainer.wait_until(lambda: len(starts(self.run_dir)) > before)
            begun = reached(self.run_dir)
            wanted = begun + self.rng.uniform(0, 3 * EVERY)
            trainer.wait_until(lambda: reached(self.run_dir) >= wanted)
            time.sleep(self.rng.uniform(0, 0.2))
        trainer.process.kill()
        code, said = trainer.end()
        assert code in (0, -signal.SIGKILL), said
        self.judge(before)
        return code != 0

    def judge(self, before: int) -> None:
        """It had gone on from the newest whole state, and the kill cost no more than the steps since the next."""
        begun = starts(self.run_dir)
        if len(begun) > before:
            assert begun[-1] == self.expected, f"went on from {begun[-1]}, not {self.expected}"
        whole, last = max(committed(self.run_dir), default=0), reached(self.run_dir)
        torn = under_way(self.run_dir)
        self.expected = whole
        if len(begun) > before:
            (self.lost_in_save if torn else self.lost).append(last - whole)
            # A second save waits for the first: no more than two intervals, and one only where none is under way.
            assert last - whole <= (2 * EVERY if torn else EVERY), f"lost {last - whole}: {torn}"
        print(f"killed after step {last}, whole {whole}, being written: {torn}")


def kill_and_compare(harm: Kills, kills: int, expected: dict[str, Any], drill: Drill) -> None:
    while drill.tried < kills:
        with drill.attempt():
            again = harm.once()
        if not again:  # it was done before the kill came
            drill.tried, drill.survived = drill.tried - 1, drill.survived - 1
            assert_same(harm.run_dir, expected)
            harm.anew()
    harm.recipe.finish(harm.run_dir)
    assert_same(harm.run_dir, expected)
    drill.lost = (f"{max(harm.lost)} steps at most, {EVERY} being between saves; {max(harm.lost_in_save)} where a save "
                  "was under way")


@pytest.fixture(scope="module")
def long(recipe: Recipe) -> Recipe:
    return recipe.using({}, *LONG)


@pytest.fixture(scope="module")
def long_undisturbed(long: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("long") / "run"
    long.finish(run_dir)
    return left_behind(run_dir)


@pytest.mark.drill
def test_killed_twenty_times_on_a_disk(long: Recipe, long_undisturbed: dict[str, Any], tmp_path: Path,
                                       drill_record: DrillRecord) -> None:
    drill = drill_record("F1", "kill -9 at random moments, run on a disk; then equal to an undisturbed run")
    numbers = itertools.count()
    kill_and_compare(Kills(long, lambda: tmp_path / str(next(numbers)), seeded("F1")), 20, long_undisturbed, drill)


@pytest.mark.drill
def test_killed_ten_times_on_gs(long: Recipe, long_undisturbed: dict[str, Any], gcs: Emulator,
                                drill_record: DrillRecord) -> None:
    drill = drill_record("F2", "kill -9 at random moments of three phases, run on gs://; then equal to an undisturbed "
                               "run in parameters, calendar and metrics")
    remote = long.using({**gcs.environment, "CRYSTAL_LEASE_SECONDS": "1"})
    kill_and_compare(Kills(remote, gcs.folder, seeded("F2")), 10, long_undisturbed, drill)
