"""A bucket that refuses, stalls, breaks off and lies, behind the proxy of faults.py: saved whole, or not counted."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drills import Drill, DrillRecord
from faults import ANY, DOWNLOAD, MEDIA, UPLOAD, Faults, Rule, faults
from gcs import Emulator
from running import Recipe, assert_same, committed, copied, reached, starts, under_way

pytestmark = pytest.mark.drill
STATES = "(POST|PUT) /upload/.*checkpoints.*"
EXPORTS = "(POST|PUT) /upload/.*exports.*"
STATE_DATA = "POST /upload/.*uploadType=media.*checkpoints.*(%2F|/)d(%2F|/).*"
EXPORT_DATA = "POST /upload/.*uploadType=media.*exports.*(%2F|/)d(%2F|/).*"
"""Data files of OCDBT, those with the arrays."""
STATE_DELETE = "DELETE .*checkpoints.*(%2F|/)d(%2F|/).*"


@pytest.fixture(scope="module")
def proxy(gcs: Emulator) -> Iterator[Faults]:
    with faults(gcs, seed=5) as started:
        yield started


@pytest.fixture(scope="module")
def remote(recipe: Recipe, proxy: Faults) -> Recipe:
    return recipe.using({**proxy.environment, "CRYSTAL_LEASE_SECONDS": "2"})


@pytest.fixture(scope="module")
def halfway(recipe: Recipe, undisturbed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after some states; without what the kill left unfinished, which is another drill's."""
    run_dir = tmp_path_factory.mktemp("halfway") / "run"
    trainer = recipe.start(run_dir)
    assert trainer.wait_until(lambda: len(committed(run_dir)) >= 2)
    trainer.kill()
    for name in under_way(run_dir):
        shutil.rmtree(run_dir / name)
    return run_dir


@pytest.mark.parametrize("rules", [
    [Rule("refuse", ANY, 0.05, status=503), Rule("refuse", ANY, 0.05, status=429),
     Rule("refuse", UPLOAD, 0.05, status=500)],
    # The emulator, other than Google's storage, forgets a resumable upload that is done: only those in one request.
    [Rule("reset", ANY, 0.05), Rule("unanswered", MEDIA, 0.1), Rule("truncate", DOWNLOAD, 0.1)],
    [Rule("delay", ANY, 0.05, seconds=2)],
], ids=["refused", "broken-off", "slow"])
def test_what_passes_is_waited_out(rules: list[Rule], remote: Recipe, halfway: Path, undisturbed: dict[str, Any],
                                   proxy: Faults, gcs: Emulator, drill_record: DrillRecord) -> None:
    """From a saved state to the end, with permanent checkpoints, all the while under faults."""
    drill = drill_record("F3", "503, 429 and 500; connections reset, before or after the work was done, or in mid-"
                               "download; answers that take 2 s: each all the while")
    run_dir = copied(halfway, gcs.folder())
    proxy.set(*rules)
    with drill.attempt():
        remote.finish(run_dir)
        counts = proxy.counts()
        print(counts)
        assert all(counts.get(rule.kind, 0) >= 3 for rule in rules), counts
        assert_same(run_dir, undisturbed)


def fails_and_goes_on(remote: Recipe, run_dir: Path | str, rule: Rule, proxy: Faults, undisturbed: dict[str, Any],
                      drill: Drill) -> None:
    proxy.set(rule)
    before = committed(run_dir)
    with drill.attempt():
        code, said = remote.start(run_dir).end()
        last = reached(run_dir)
        print(f"exit code {code} after step {last}, states {before} -> {committed(run_dir)}: "
              f"{said.strip().splitlines()[-1]}")
        assert proxy.counts().get(rule.kind, 0) and code not in (0, 3), said
        proxy.set()
        newest = max(committed(run_dir))
        remote.finish(run_dir)
        assert starts(run_dir)[-1] == newest
        assert_same(run_dir, undisturbed)


@pytest.mark.parametrize(("name", "match"), [("states", STATES), ("permanent checkpoints", EXPORTS)])
def test_what_is_refused_ends_the_run(name: str, match: str, remote: Recipe, halfway: Path, undisturbed: dict[str, Any],
                                      proxy: Faults, gcs: Emulator, drill_record: DrillRecord) -> None:
    drill = drill_record("F4", f"403 on each upload of {name}: the run ends, and goes on when it is allowed again")
    run_dir = copied(halfway, gcs.folder())
    fails_and_goes_on(remote, run_dir, Rule("refuse", match, status=403), proxy, undisturbed, drill)


@pytest.mark.parametrize(("name", "match"), [("state", STATE_DATA), ("permanent checkpoint", EXPORT_DATA)])
def test_half_an_upload_that_is_called_whole(name: str, match: str, remote: Recipe, halfway: Path,
                                             undisturbed: dict[str, Any], proxy: Faults, gcs: Emulator,
                                             drill_record: DrillRecord) -> None:
    drill = drill_record("F4", f"half a file of a {name} is stored and called a success")
    run_dir = copied(halfway, gcs.folder())
    fails_and_goes_on(remote, run_dir, Rule("shorten", match, times=1), proxy, undisturbed, drill)


@pytest.mark.parametrize("times", [1, None], ids=["once", "to the end"])
def test_deletes_are_refused(times: int | None, remote: Recipe, halfway: Path, undisturbed: dict[str, Any],
                             proxy: Faults, gcs: Emulator, drill_record: DrillRecord) -> None:
    drill = drill_record("F16", "403 on deletes, so that an old state on gs:// is torn: it doesn't count, and the next "
                                "save removes it if it may")
    run_dir = copied(halfway, gcs.folder())
    proxy.set(Rule("refuse", STATE_DELETE, status=403, times=times))
    with drill.attempt():
        said = remote.finish(run_dir)
        torn = set(re.findall("(checkpoints/[^/ ]+): can't be removed", said))
        assert proxy.counts()["refuse"] and torn, said
        assert under_way(run_dir) == ([] if times else sorted(torn))
        assert not torn & {f"checkpoints/{step}" for step in committed(run_dir)}
        assert_same(run_dir, undisturbed)
