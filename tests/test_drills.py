"""The table of drills: counted right, also where a drill fails and where workers share the tests."""

from pathlib import Path

import pytest
from drills import BEGIN, END, Drill, added, replaced, table

pytest_plugins = ["pytester"]
TESTS = """
import pytest

@pytest.mark.parametrize("which", [1, 2])
def test_parts(which, drill_record):
    drill = drill_record("F10", "kill -9")
    with drill.attempt():
        pass
    if which == 2:
        drill.lost = "3 steps of 5"

def test_that_fails(drill_record):
    drill = drill_record("F2", "a flipped bit")
    with drill.attempt():
        pass
    with drill.attempt():
        raise ValueError

def test_without_a_drill():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_table_is_of_all_tests_and_workers(workers: str, pytester: pytest.Pytester) -> None:
    pytester.makeconftest((Path(__file__).parent / "drills.py").read_text())
    pytester.makepyfile(TESTS)
    guide = pytester.path / "guide.md"
    guide.write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    result = pytester.runpytest_subprocess("-n", workers, f"--drills-table={guide}")
    result.assert_outcomes(passed=3, failed=1)
    rows = ["| F2 | a flipped bit | 2 | 1 | nothing |", "| F10 | kill -9 | 2 | 2 | 3 steps of 5 |"]
    result.stdout.fnmatch_lines([line.replace("[", "[[]") for line in rows])
    assert guide.read_text() == "\n".join(["Before.", "", BEGIN, "| drill | what is done | tried | survived | lost |",
                                           "| --- | --- | --- | --- | --- |", *rows, END, "", "After.", ""])


def test_costs_are_listed_once() -> None:
    found = added([Drill("F1", "x", 1, 1, cost) for cost in ("nothing", "a", "b", "a")])
    assert table(found).splitlines()[-1] == "| F1 | x | 4 | 4 | a; b |"
    assert added([Drill("F1", "x", 1, 1), Drill("F1", "x", 1, 1)]) == [Drill("F1", "x", 2, 2)]


def test_a_guide_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        replaced("text", "table")
