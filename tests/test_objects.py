"""Changes of objects on gs://: made once, refused where another process was there, the same lines under every fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import ANY, Rule, faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crystal_jax import files, metrics, objects
from crystal_jax.history import read_metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(gcs):
    return files.as_path(gcs.folder()) / "metrics.jsonl"


def lines(path) -> list[bytes]:
    return files.read_bytes(path).splitlines()


def test_a_change_names_the_generation_that_it_changes(path) -> None:
    assert objects.read(path) == (b"", objects.MISSING)
    first = objects.change(path, b"a", objects.MISSING)
    second = objects.change(path, b"b", first)
    assert objects.read(path) == (b"b", second)
    for stale in (objects.MISSING, first):
        for data in (b"c", None):
            with pytest.raises(objects.Changed, match=f"{path}: another process has written to it"):
                objects.change(path, data, stale)
    objects.change(path, None, second)
    assert not files.exists(path)


def test_a_change_that_was_made_and_is_asked_for_again_is_made(path) -> None:
    """What a client does whose answer was lost."""
    first = objects.change(path, b"a", objects.MISSING)
    assert objects.change(path, b"a", objects.MISSING) == first
    objects.change(path, None, first)
    assert objects.change(path, None, first) == objects.MISSING


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text(alphabet="ab\u00e9", max_size=20), max_size=6), max_size=4))
def test_lines_are_there_in_order_over_many_processes(gcs, runs: list[list[str]]) -> None:
    path = files.as_path(gcs.folder()) / "log.jsonl"
    for run in runs:
        log = objects.Appender(path)
        for line in run:
            log.write(line.encode() + b"\n")
        log.close()
    expected = "".join(line + "\n" for run in runs for line in run).encode()
    assert (files.read_bytes(path) if files.exists(path) else b"") == expected
    assert files.list_files(path.parent) <= {"log.jsonl"}


def test_a_line_counts_once_flush_returns(path) -> None:
    log = objects.Appender(path)
    for number in range(3):
        log.write(b"%d\n" % number)
        log.flush()
        assert lines(path)[-1] == b"%d" % number
    log.close()


def test_half_a_line_copied_from_a_disk_spoils_no_other(path) -> None:
    files.write_bytes(path, b'{"kind": "train", "step": 1}\n{"kind": "tra')
    log = metrics.MetricsLog(path.parent)
    log.write("start", 1, resumed=True)
    log.close()
    assert [line["kind"] for line in read_metrics(path)] == ["train", "start"]


def test_two_writers_lose_no_line_and_the_later_one_hears_of_it(path) -> None:
    one, other = objects.Appender(path), objects.Appender(path)
    one.write(b"one\n")
    one.flush()
    other.write(b"other\n")
    with pytest.raises(objects.Changed, match="another process has written to it"):
        other.flush()
    one.write(b"one again\n")
    one.close()
    assert lines(path) == [b"one", b"one again"]
    with pytest.raises(objects.Changed):
        other.write(b"more\n")
    with pytest.raises(objects.Changed):
        other.close()


PROGRAM = """
import sys
from crystal_jax import files
from crystal_jax.objects import Appender
log = Appender(files.as_path(sys.argv[1]))
for number in range(10):
    log.write(b"%d\\n" % number)
    if number % 3 == 0:
        log.flush()
log.close()
"""


def append(path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, text=True, timeout=300,
                          env={**os.environ, **environment}, capture_output=True, check=False)


@pytest.mark.parametrize("rules", [
    [Rule("unanswered", "POST .*(compose|metrics).*", times=2)],
    [Rule("refuse", ANY, 0.2, 503, times=2), Rule("refuse", ANY, 0.2, 429, times=2), Rule("reset", ANY, 0.2, times=2)],
], ids=["answers lost", "503, 429 and resets"])
def test_each_line_is_there_once_after_faults(gcs, path, rules: list[Rule]) -> None:
    with faults(gcs) as proxy:
        proxy.set(*rules)
        result = append(path, proxy.environment)
        assert len(proxy.counts()) > 1, "no fault came"
    assert result.returncode == 0, result.stderr
    assert lines(path) == [b"%d" % number for number in range(10)]


def test_a_denied_append_ends_the_next_write(gcs, path) -> None:
    with faults(gcs) as proxy:
        proxy.set(Rule("refuse", "POST .*compose.*", status=403))
        result = append(path, proxy.environment)
    assert result.returncode == 1 and "OSError: Forbidden" in result.stderr
    assert lines(path) == [b"0"]


def test_an_append_is_two_requests(gcs, path) -> None:
    """However long the file: part and composition; opening asks for size and last byte, closing removes the part."""
    with faults(gcs) as proxy:
        proxy.set()
        append(path, proxy.environment)
        before = proxy.counts()["all"]
        append(path, proxy.environment)
        counted = proxy.counts()["all"] - before
    appends = 4 + 1
    assert counted <= 2 * appends + 4
