"""The lease on gs://: one holder, who is told apart from one that is gone without comparing clocks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crystal_jax import files, lease, objects
from crystal_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"CRYSTAL_LEASE_SECONDS": "0.2"}
HOLDER = """
import sys, time
from crystal_jax import files
from crystal_jax.lease import held
with held(files.as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(gcs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CRYSTAL_LEASE_SECONDS", "0.2")
    return files.as_path(gcs.folder()) / ".lock"


@contextlib.contextmanager
def holder(path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, env={**os.environ, **QUICK},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def test_it_is_there_while_it_is_held_and_renewed(path) -> None:
    with lease.held(path):
        first, generation = objects.read(path)
        assert json.loads(first)["process"] == os.getpid()
        while objects.read(path)[1] == generation:
            time.sleep(0.05)
    assert not files.exists(path)


def test_it_is_given_back_after_an_error(path) -> None:
    with pytest.raises(ZeroDivisionError), lease.held(path):
        raise ZeroDivisionError
    assert not files.exists(path)


def test_a_second_process_is_refused_in_one_line(path) -> None:
    with holder(path) as process:
        says = rf"{path.parent}: another process is training there \(process {process.pid} on .*, since 2.*\); wait for"
        with pytest.raises(UserError, match=says), lease.held(path):
            pass
        assert files.exists(path) and process.poll() is None


def test_that_of_a_dead_process_is_taken_over(path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(path) as process:
        process.kill()
        process.wait()
        with lease.held(path):
            assert json.loads(objects.read(path)[0])["process"] == os.getpid()
    said = capsys.readouterr().err
    assert f"{path}: held by process {process.pid}" in said and "looking for 1 s" in said
    assert not files.exists(path)


def test_a_process_that_was_frozen_ends_when_it_wakes(path) -> None:
    with holder(path) as process:
        process.send_signal(signal.SIGSTOP)
        with lease.held(path):
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate(timeout=60)
            assert process.returncode == lease.LOST
            assert f"{path}: taken over by another process" in said
        assert not files.exists(path)


def test_the_wait_is_the_holders(path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer with another setting doesn't take a living lease over."""
    with holder(path):
        monkeypatch.setenv("CRYSTAL_LEASE_SECONDS", "0.01")
        with pytest.raises(UserError, match="is training there"), lease.held(path):
            pass


def test_one_that_is_given_back_while_it_is_watched_is_free(path) -> None:
    objects.change(path, json.dumps({"host": "h", "process": 1, "since": "s", "every": 20}).encode(), objects.MISSING)
    watcher = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, env={**os.environ, **QUICK},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watcher.stderr is not None and watcher.stdout is not None
    while "looking for 60 s" not in watcher.stderr.readline():
        pass
    files.remove(path)
    assert watcher.stdout.readline() == "held\n"
    watcher.kill()
    watcher.communicate()


def test_an_empty_one_copied_from_a_disk_is_nobodys(path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lease.NOBODY, "every", 0.1)
    for data in (b"", b"[1]", b"3"):
        files.write_bytes(path, data)
        with lease.held(path):
            assert json.loads(objects.read(path)[0])["process"] == os.getpid()


def test_of_many_that_come_at_once_one_gets_it(path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, env={**os.environ, **QUICK},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in processes:
        process.kill()
    said = [process.communicate() for process in processes]
    assert [out for out, _ in said].count("held\n") == 1
    assert sum("is training there" in err for _, err in said) == 2
