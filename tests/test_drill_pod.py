"""A pod on this machine, by the real scripts: taken away five times at random, it ends as an undisturbed run does."""

import os
from pathlib import Path

import pytest
from drills import DrillRecord
from miniature_pod import LONGER, MiniaturePod, compare, run_together
from running import Recipe, left_behind, seeded

pytestmark = pytest.mark.drill
HOSTS = 2
PREEMPTIONS = int(os.environ.get("CRYSTAL_DRILL_PREEMPTIONS", "5"))


def test_preempted_at_random(recipe: Recipe, gcs, tmp_path: Path, drill_record: DrillRecord) -> None:
    recipe = recipe.using({}, *LONGER)
    run_together(recipe, tmp_path / "undisturbed", HOSTS)
    expected = left_behind(tmp_path / "undisturbed")
    drill = drill_record("pod", f"{HOSTS} hosts under tpu/supervise: the capacity taken away at a random moment, the "
                                "supervisor killed in between")
    drill.tried = PREEMPTIONS
    pod = MiniaturePod(tmp_path, "crystal", {**gcs.environment, **recipe.environment},
                       [f"--config={recipe.config}", *LONGER], HOSTS)
    try:
        assert pod.disturbed(PREEMPTIONS, seeded("preempted_at_random")) == 0, pod.log()
    finally:
        pod.end()
    compare(pod, expected)
    assert pod.preempted == PREEMPTIONS, pod.log()
    drill.survived = PREEMPTIONS
