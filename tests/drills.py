"""The table of drills: what was done to the product, how often, and what it cost; docs/reliability.md shows it.

A drill's numbers are counted by the test that does the harm, and travel with its report, so that a failed drill is in
the table too, and workers of pytest-xdist count together.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest

BEGIN, END = "<!-- drills -->", "<!-- /drills -->"
PROPERTY = "drill"
HEADINGS = ("drill", "what is done", "tried", "survived", "lost")


@dataclass
class Drill:
    """One row, or a part of one: rows with equal `id` and `done` are added up."""

    id: str
    done: str
    tried: int = 0
    survived: int = 0
    lost: str = "nothing"
    """What the harm cost at worst, such as "4 steps of 5 between saves"."""

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Counts what is inside as tried, and as survived if it raises nothing."""
        self.tried += 1
        yield
        self.survived += 1


DrillRecord = Callable[[str, str], Drill]


@pytest.fixture
def drill_record(request: pytest.FixtureRequest) -> Iterator[DrillRecord]:
    """drill_record(id, what is done) -> Drill, whose numbers become a row of the table when the test ends.

    `with drill_record("F7", "kill -9 of the coordinator").attempt(): ...` is the shortest use.
    """
    made: list[Drill] = []

    def record(name: str, done: str) -> Drill:
        made.append(Drill(name, done))
        return made[-1]

    yield record
    request.node.user_properties.extend((PROPERTY, asdict(drill)) for drill in made)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drills-table", type=Path, help="a file whose table of drills is written anew: made for a run "
                                                       "of all drills, since it then holds this run's and no others")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found
               if getattr(report, "when", None) == "teardown"]
    found = [Drill(**value) for report in reports for name, value in report.user_properties if name == PROPERTY]
    if not found:
        return
    text = table(added(found))
    terminalreporter.section("drills")
    terminalreporter.write_line(text)
    if path := config.getoption("--drills-table"):
        path.write_text(replaced(path.read_text(encoding="utf-8"), text), encoding="utf-8")


def added(drills: list[Drill]) -> list[Drill]:
    """One row for each (id, what is done), by the number in the id."""
    rows: dict[tuple[str, str], Drill] = {}
    for drill in drills:
        row = rows.setdefault((drill.id, drill.done), Drill(drill.id, drill.done, lost=""))
        row.tried, row.survived = row.tried + drill.tried, row.survived + drill.survived
        costs = dict.fromkeys(filter(None, [*row.lost.split("; "), drill.lost]))
        row.lost = "; ".join(cost for cost in costs if cost != "nothing" or len(costs) == 1)
    return sorted(rows.values(), key=lambda row: (re.sub(r"\d+", "", row.id), _number(row.id), row.done))


def _number(name: str) -> int:
    return int("".join(re.findall(r"\d+", name)) or 0)


def table(rows: list[Drill]) -> str:
    """Markdown."""
    cells = [[str(getattr(row, field.name)) for field in fields(Drill)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEADINGS, ["---"] * len(HEADINGS), *cells])


def replaced(document: str, text: str) -> str:
    """The document with another table between its two marks.

    Raises:
      ValueError: it lacks them.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the table of drills: the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"
