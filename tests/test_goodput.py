"""Where time goes: a ledger that loses none of it, accounts over restarts, and what the devices are used for."""

import json
import math
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax import __version__, goodput, snapshot, utilisation
from crystal_jax.config import ModelConfig
from crystal_jax.errors import UserError
from crystal_jax.goodput import ACTIVITIES, MADE_AGAIN, Ledger, Rates, account, process_age
from crystal_jax.model import Crystal
from crystal_jax.progress import Profile, parse_profile
from crystal_jax.utilisation import Utilisation, device_memory, flops_per_token, peak_tflops, program_memory

from configs import crystal_7b


class Clock:
    """Stands in for time.perf_counter."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput.time, "perf_counter", clock)
    return clock


def test_each_second_is_of_one_activity(clock: Clock) -> None:
    ledger = Ledger(before=3.0)
    clock.now += 1
    with ledger.doing("stepping"):
        clock.now += 10
        with ledger.doing("saving"):
            clock.now += 2
        with pytest.raises(KeyError), ledger.doing("data"):
            clock.now += 4
            raise KeyError
        clock.now += 20
    clock.now += 0.5
    assert ledger.spent() == {**dict.fromkeys(ACTIVITIES, 0.0), "initialising": 4.5, "stepping": 30, "saving": 2,
                              "data": 4}
    assert ledger.rounded() == {"initialising": 4.5, "stepping": 30, "saving": 2, "data": 4}


def test_a_compilation_counts_wherever_it_happens() -> None:
    @jax.jit
    def doubled(x: jax.Array) -> jax.Array:
        return jax.jit(lambda y: jnp.sin(y) + y)(x) * 2

    with Ledger() as ledger:
        with ledger.doing("evaluating"):
            doubled(jnp.ones(17))
        spent = ledger.spent()
        other = threading.Thread(target=lambda: jax.jit(lambda x: x + 17)(jnp.ones(19)))
        other.start()
        other.join()
        assert ledger.spent()["compiling"] == spent["compiling"], "training doesn't wait for other threads"
    assert 0 < ledger.programs["doubled"].seconds <= spent["compiling"] and spent["evaluating"] > 0
    assert ledger.programs["doubled"].cache == "off"
    known = set(ledger.programs)
    jax.jit(lambda x: x - 17)(jnp.ones(23))
    assert set(ledger.programs) == known, "nothing is heard any more"


def test_the_age_of_the_process_is_that_of_its_imports_too(monkeypatch: pytest.MonkeyPatch) -> None:
    age = process_age()
    assert 0 < age < 3600 * 24
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert 0 < process_age() <= age + 1


def test_rates_leave_out_pauses_and_the_first_update(clock: Clock) -> None:
    ledger = Ledger()
    rates = Rates(ledger)
    with ledger.doing("stepping"):
        for seconds in (50.0, 2.0, 4.0):
            clock.now += seconds
            with ledger.doing("saving"):
                clock.now += 1000
            rates.took(600)
        first = rates.record()
        assert first["step_seconds"] == 3 and first["seconds_of_steps"] == [2.0, 4.0]
        assert first["tokens_per_second"] == 200
        assert first["smoothed_tokens_per_second"] == pytest.approx(600 * 1.98 / (2 * 0.98 + 4))
        assert rates.record() == {}
        clock.now += 1
        rates.took(600)
    second = rates.record()
    assert second["tokens_per_second"] == 600 and 200 < second["smoothed_tokens_per_second"] < 600


def line(kind: str, step: int, time: float, spent: dict[str, float] | None = None) -> dict[str, Any]:
    return {"kind": kind, "step": step, "time": time, **({} if spent is None else {"spent": spent})}


def test_what_a_restart_takes_back_is_lost() -> None:
    found = account([
        line("start", 0, 1010, {"initialising": 8.0, "compiling": 2.0}),
        line("train", 10, 1110, {"initialising": 8.0, "compiling": 22.0, "stepping": 80.0}),
        line("eval", 10, 1111),
        line("train", 20, 1200, {"initialising": 8.0, "compiling": 22.0, "stepping": 160.0, "evaluating": 10.0}),
        # Killed after that; a minute later the next one goes on from the state of step 15.
        line("start", 15, 1270, {"initialising": 6.0, "restoring": 4.0}),
        line("end", 20, 1320, {"initialising": 6.0, "restoring": 4.0, "stepping": 50.0}),
    ])
    assert found is not None and found.processes == 2
    assert {name: seconds for name, seconds in found.seconds.items() if seconds} == {
        "initialising": 14, "restoring": 4, "compiling": 22, "stepping": 170, "evaluating": 5, "lost": 45, "down": 60}
    assert found.total == found.wall == 320 and found.goodput == 170 / 320


def test_a_state_may_be_of_a_process_before_the_last() -> None:
    """The second process went on from 10, and the third, since that state was damaged, from 5."""
    found = account([
        line("start", 0, 0, {}), line("train", 10, 100, {"stepping": 100.0}),
        line("start", 10, 100, {}), line("train", 20, 200, {"stepping": 100.0}),
        line("start", 5, 200, {}), line("end", 30, 450, {"stepping": 250.0}),
    ])
    assert found is not None and found.seconds["lost"] == 150 and found.seconds["stepping"] == 300


def test_processes_that_kept_no_ledger_are_left_out() -> None:
    old = [line("start", 0, 0), line("train", 10, 50)]
    assert account([]) is None and account(old) is None
    found = account([*old, line("start", 10, 100, {"initialising": 5.0}), line("end", 20, 110, {"initialising": 5.0,
                                                                                              "stepping": 10.0})])
    assert found is not None and found.processes == 1 and found.wall == found.total == 15


pieces = st.lists(st.tuples(st.sampled_from(sorted(ACTIVITIES)), st.floats(0, 1000)), max_size=6)


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 5000), st.lists(pieces, min_size=1, max_size=5)), min_size=1,
                max_size=6))
def test_the_account_sums_to_the_wall_time(processes: list[tuple[int, float, list[Any]]]) -> None:
    """Whatever the processes did, from whichever step they went on, and however long nothing ran in between."""
    now, lines = 0.0, []
    for start, gap, intervals in processes:
        now += gap if lines else 0.0
        spent: dict[str, float] = {}
        for index, interval in enumerate(intervals):
            for activity, seconds in interval:
                spent[activity] = spent.get(activity, 0.0) + seconds
                now += seconds
            lines.append(line("train" if index else "start", start + index, now, dict(spent)))
    found = account(lines)
    assert found is not None and found.processes == len(processes)
    assert found.total == pytest.approx(found.wall, rel=1e-9, abs=1e-6)
    assert all(seconds >= -1e-6 for seconds in found.seconds.values())
    kept = {name for name in ACTIVITIES if name not in MADE_AGAIN}
    assert sum(found.seconds[name] for name in kept) == pytest.approx(
        sum(seconds for *_, intervals in processes for interval in intervals for name, seconds in interval
            if name in kept))


def test_a_token_of_the_7b_takes_the_published_flops() -> None:
    model = crystal_7b.get_config().model
    found = flops_per_token(model, 2048)
    matrices, scores = 6 * 6_575_278_720, 12 * 32 * 4096 * 2048
    assert found == {"palm": matrices + scores, "causal": matrices + scores / 2}
    assert found["palm"] == pytest.approx(4.27e10, rel=2e-3) and found["causal"] == pytest.approx(4.1e10, rel=2e-3)


@pytest.mark.parametrize("family", ["crystal", "llama", "starcoder"])
def test_six_flops_for_each_number_of_a_matrix(family: str) -> None:
    """Counted from the declared parameters: but for vectors, each is used in a product, or looked up only."""
    model = ModelConfig(family, vocab_size=512, embed_dim=256, num_layers=3, num_heads=4, mlp_dim=688, max_length=128,
                        rotary_dim=0 if family == "starcoder" else 64)
    specs = Crystal(model).specs()
    looked_up = {"crystal": [], "llama": ["embed"], "starcoder": ["positions"]}[family]
    matrices = sum(math.prod(spec.shape) for path, spec in jax.tree_util.tree_flatten_with_path(
        specs, is_leaf=lambda node: hasattr(node, "axes"))[0] if path[0].key not in looked_up)
    found = flops_per_token(model, 128)
    assert found["palm"] == 6 * matrices + 12 * 3 * 256 * 128 and found["causal"] == 6 * matrices + 6 * 3 * 256 * 128


@pytest.mark.parametrize("kind, peak", [("TPU v5p", 459), ("TPU v5 lite", 197), ("TPU7x", 1153.5), ("cpu", None),
                                        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
                                        ("NVIDIA H200", 989), ("NVIDIA GeForce RTX 4090", None)])
def test_peaks_are_of_one_device(kind: str, peak: float | None) -> None:
    assert peak_tflops(kind) == peak


def test_mfu_only_where_the_peak_is_known() -> None:
    known = Utilisation({"palm": 4e10, "causal": 3e10}, 64, 459.0)
    assert known.at(64 * 459e12 / 4e10) == pytest.approx({"tflops_per_device": 459, "mfu": 1})
    here = Utilisation.of(ModelConfig(), 2048)
    assert here.peak_tflops is None and here.devices == jax.device_count() and set(here.at(10)) == {"tflops_per_device"}


def test_memory_of_a_program_counts_what_is_donated_once() -> None:
    x = jnp.ones(1024)
    step = jax.jit(lambda x, y: (x + y, y.sum()), donate_argnums=0)
    found = program_memory(step.lower(x, x).compile())
    assert found["arguments"] == 8192 and found["aliased"] == 4096 and found["outputs"] >= 4096
    assert found["total"] == sum(found[name] for name in ("arguments", "outputs", "temporaries", "code")) - 4096


def test_memory_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory() == {}
    stats = [{"bytes_in_use": 1, "peak_bytes_in_use": 5, "bytes_limit": 9}, {"bytes_in_use": 3, "peak_bytes_in_use": 7}]
    monkeypatch.setattr(utilisation.jax, "local_devices",
                        lambda: [SimpleNamespace(memory_stats=lambda found=found: found) for found in [*stats, None]])
    assert device_memory() == {"in_use": 3, "peak": 7}


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "5:5", "20:10", "1:2:3", "90:101", "101", "1.5"])
def test_a_profile_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--profile=.*: is a number of updates, such as 5, or FIRST:LAST.*has 100"):
        parse_profile(text, 100)


@pytest.mark.parametrize("text, start, traced", [("20:25", 0, range(20, 25)), ("20:25", 23, range(23, 25)),
                                                 ("20:25", 25, range(0)), ("5", 0, range(1, 6)),
                                                 ("5", 40, range(41, 46)), ("0:1", 0, range(1)),
                                                 ("48:50", 0, range(48, 50))])
def test_a_profile_is_of_the_updates_that_were_asked_for(
        text: str, start: int, traced: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    profile = Profile(epath.Path(tmp_path), parse_profile(text, 50), start, Ledger())
    found, folders = [], []
    for step in range(start, 50):
        if profile.due(step):
            folders.append(profile.turn(step))
        found += [step] * profile.under_way
    if profile.under_way:
        folders.append(profile.turn(50))
    assert found == list(traced) and not profile.under_way
    expected = f"profile/plugins/profile/steps_{traced.start + 1}-{traced.stop}"
    assert folders == ([None, expected] if traced else [])


def test_a_trace_lies_where_tensorboard_looks_for_it(tmp_path: Path) -> None:
    ledger = Ledger()
    profile = Profile(epath.Path(tmp_path), (0, 1), 0, ledger)
    profile.turn(0)
    jax.jit(lambda x: jnp.cos(x) @ x)(jnp.ones((64, 64))).block_until_ready()
    folder = tmp_path / str(profile.turn(1))
    assert folder == tmp_path / "profile/plugins/profile/steps_1-1"
    assert {path.suffix for path in folder.iterdir()} == {".pb", ".gz"} and ledger.spent()["profiling"] > 0


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a package of two files, in place of ours."""
    folder = tmp_path / "checkout" / "crystal_jax"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("one = 1\n")
    (folder / "data" / "rows.py").write_text("two = 2\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "rows.pyc").write_text("no")
    monkeypatch.setattr(snapshot, "PACKAGE", folder)
    monkeypatch.setattr(snapshot, "_sources", snapshot._sources.__wrapped__)
    monkeypatch.setattr(snapshot, "code_hash", snapshot.code_hash.__wrapped__)
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=folder, check=True,
                   capture_output=True)


def test_the_code_lies_in_the_run_as_it_ran(package: Path, tmp_path: Path) -> None:
    run_dir = epath.Path(tmp_path / "run")
    snapshot.record_code(run_dir)
    snapshot.record_code(run_dir)
    before = snapshot.code_hash()
    (package / "data" / "rows.py").write_text("two = 3\n")
    snapshot.record_code(run_dir)
    written = sorted(path.name for path in (run_dir / "code").iterdir())
    assert before != snapshot.code_hash() and len(written) == 4
    for name, two in ((before, 2), (snapshot.code_hash(), 3)):
        with zipfile.ZipFile(run_dir / "code" / f"{name}.zip") as archive:
            assert {file: archive.read(file).decode() for file in archive.namelist()} == {
                "crystal_jax/__init__.py": "one = 1\n", "crystal_jax/data/rows.py": f"two = {two}\n"}
    about = [json.loads((run_dir / "code" / name).read_text()) for name in written if name.startswith("environment-")]
    assert {found["code"] for found in about} == {before, snapshot.code_hash()}
    assert about[0]["packages"]["jax"] == jax.__version__ and "XLA_FLAGS" in about[0]["flags"]
    assert about[0]["commit"] is None and about[0]["changed"] is None, "it is in no checkout"


def test_the_commit_and_what_differs_from_it(package: Path) -> None:
    git(package.parent, "init", "-q")
    assert snapshot.commit() == {"commit": None, "changed": None}, "not of that project"
    git(package.parent, "add", "crystal_jax/__init__.py", "crystal_jax/data")
    git(package.parent, "commit", "-q", "-m", "first")
    (package.parent / "elsewhere.py").write_text("")
    (package / "__pycache__" / "rows.pyc").unlink()
    found = snapshot.commit()
    assert len(found["commit"]) == 40 and found["changed"] == []
    (package / "data" / "rows.py").write_text("two = 3\n")
    (package / "new.py").write_text("")
    assert snapshot.commit()["changed"] == [" M crystal_jax/data/rows.py", "?? crystal_jax/new.py"]


def test_our_own_code_is_named_once() -> None:
    assert len(snapshot.code_hash()) == 16 and __version__ in snapshot._sources()["crystal_jax/__init__.py"].decode()
