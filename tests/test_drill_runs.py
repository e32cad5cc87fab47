"""What happens around a run: a full disk, a clock that jumps, two trainers on one folder, folders that are copied."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from drills import DrillRecord
from faults import faults
from gcs import Emulator
from running import Recipe, assert_same, committed, copied, records, starts

pytestmark = pytest.mark.drill
SLOW = ("--config.phases[0].steps=200", "--config.phases[1].steps=200", "--config.checkpoints.every_steps=100",
        "--config.phases[0].checkpoint_every=100", "--config.phases[1].checkpoint_every=100")
"""Long enough for two that start at the same time to meet."""


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of this size; `mount -o remount,size=` makes it larger."""
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                                           check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root, and to be allowed")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_the_disk_is_full(recipe: Recipe, undisturbed: dict[str, Any], tmp_path: Path,
                          drill_record: DrillRecord) -> None:
    drill = drill_record("F19", "the disk is full: while a run begins, in an export, in a save; then there is space")
    whole_run = 0
    for share in (0.0, 0.4, 0.8):  # of the space that a whole run takes, which the first one shows
        kib = 40 + int(share * whole_run / 1024)
        with small_disk(tmp_path / str(kib), f"{kib}k") as disk, drill.attempt():
            code, said = recipe.start(disk / "run").end()
            assert code == 1 and said.strip().splitlines()[-1].count("no space left") == 1, said
            assert "Traceback" not in said, said
            whole = committed(disk / "run") if (disk / "run").exists() else []
            print(f"{kib} KiB: {said.strip().splitlines()[-1]}; whole states: {whole}")
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            recipe.finish(disk / "run")
            whole_run = shutil.disk_usage(disk).used
            assert starts(disk / "run")[-1] == max(whole, default=0)
            assert_same(disk / "run", undisturbed)


BACK = "0,-10,-3600,-172800,-315360000"
FORWARD = "0,0,0,0,7200"


def test_the_clock_jumps(recipe: Recipe, undisturbed: dict[str, Any], tmp_path: Path,
                         drill_record: DrillRecord) -> None:
    def with_clock(offsets: str) -> Recipe:
        return replace(recipe, program=(str(ROOT / "tests" / "jumping_clock.py"), offsets))

    drill = drill_record("F20", "the clock jumps back by seconds, hours, days and years, also between two starts")
    with drill.attempt():
        with_clock(BACK).finish(tmp_path / "run")
        assert_same(tmp_path / "run", undisturbed)
        times = [record["time"] for record in records(tmp_path / "run")]
        assert max(times) - times[-1] > 300_000_000
    with drill.attempt():
        trainer = recipe.start(tmp_path / "stopped")
        trainer.wait_until(lambda: committed(tmp_path / "stopped"))
        trainer.kill()
        with_clock("-172800").finish(tmp_path / "stopped")
        assert_same(tmp_path / "stopped", undisturbed)
    # Orbax takes two hours that have passed for a save that hangs: the run may end, but not as if it were done.
    with drill_record("F20", "the clock jumps ahead by two hours; the same command again where it ended").attempt():
        code, said = with_clock(FORWARD).start(tmp_path / "ahead").end()
        assert code not in (1, 3, 4), said
        recipe.finish(tmp_path / "ahead")
        assert_same(tmp_path / "ahead", undisturbed)


def meet(recipe: Recipe, run_dir: Path | str, refused: int) -> None:
    """Two that start at once: one trains, the other says in one line that it can't."""
    both = [recipe.start(run_dir) for _ in range(2)]
    ended = sorted((trainer.end() for trainer in both), key=lambda end: end[0])
    assert [code for code, _ in ended] == [0, refused], ended
    assert "another process is training there" in ended[1][1].strip().splitlines()[-1]
    assert "Traceback" not in ended[1][1]
    assert starts(run_dir) == [0]


def test_two_trainers_at_once(recipe: Recipe, gcs: Emulator, tmp_path: Path, drill_record: DrillRecord) -> None:
    slow = recipe.using({}, *SLOW)
    drill = drill_record("F21", "two trainers start on one folder, on a disk and on gs://; the second refuses")
    for turn in range(2):
        with drill.attempt():
            meet(slow, tmp_path / str(turn), 1)
    with drill.attempt():
        meet(slow.using(gcs.environment), gcs.folder(), 75)


def test_a_trainer_that_was_frozen_finds_another_in_its_place(recipe: Recipe, undisturbed: dict[str, Any],
                                                              gcs: Emulator, drill_record: DrillRecord) -> None:
    """Its lease ran out meanwhile; what it would write on waking must not mix with the other's.

    Through the proxy, which waits for many at a time: the emulator waits for a request that the frozen one has begun.
    """
    with (faults(gcs) as proxy,
          drill_record("F22", "a trainer on gs:// is frozen, another takes its place, the first one "
                              "wakes").attempt()):
        remote = recipe.using({**proxy.environment, "CRYSTAL_LEASE_SECONDS": "2"})
        run_dir = gcs.folder()
        first = remote.start(run_dir)
        first.wait_until(lambda: committed(run_dir))
        first.signal(signal.SIGSTOP)
        second = remote.start(run_dir)
        second.wait_until(lambda: len(starts(run_dir)) == 2)
        first.signal(signal.SIGCONT)
        code, said = first.end()
        assert code not in (0, 1, 3, 4), said
        code, said = second.end()
        assert code == 0, said
        assert_same(run_dir, undisturbed)


def test_a_copy_of_the_folder_goes_on(recipe: Recipe, undisturbed: dict[str, Any], gcs: Emulator, tmp_path: Path,
                                      drill_record: DrillRecord) -> None:
    """Also beside the original that goes on itself, and on the other side: from a disk to a bucket and back."""
    drill = drill_record("F23", "a run's folder is copied, also to gs:// and back, and each copy goes on")
    run_dir = tmp_path / "run"
    trainer = recipe.start(run_dir)
    trainer.wait_until(lambda: len(committed(run_dir)) >= 2)
    trainer.kill()
    shutil.copytree(run_dir, tmp_path / "copy")
    with drill.attempt():
        recipe.finish(tmp_path / "copy")
        assert_same(tmp_path / "copy", undisturbed)
    with drill.attempt():
        remote = copied(run_dir, gcs.folder())
        recipe.using(gcs.environment).finish(remote)
        assert_same(remote, undisturbed)
    with drill.attempt():
        recipe.finish(run_dir)
        assert_same(run_dir, undisturbed)
