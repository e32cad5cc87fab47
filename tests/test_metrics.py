"""The log: append-only lines, the same numbers as TensorBoard events, intervals that survive a resume."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from crystal_jax.config import TrainingConfig, to_dict
from crystal_jax.errors import FatalError
from crystal_jax.goodput import Ledger
from crystal_jax.history import read_metrics
from crystal_jax.metrics import Interval, MetricsLog
from crystal_jax.phases import Plan, make_plan
from crystal_jax.progress import Clock, Progress, Signals, _duration
from crystal_jax.spikes import Window

SOURCES = ["code", "text"]


def metrics(loss: float, finite: bool = True, tokens: tuple[int, int] = (10, 30)) -> dict[str, np.ndarray]:
    counts = np.array(tokens, np.float32)
    return {"loss": np.float32(loss), "grad_norm": np.float32(loss / 2), "taken": np.bool_(finite),
            "nll_per_source": counts * np.float32(loss), "tokens_per_source": counts,
            "words": np.array([0, 0, 0x01234567, 0x89ABCDEF], np.uint32)}


def events(folder: Path) -> list[Event]:
    """TensorBoard's record format: length, checksum, message, checksum."""
    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_records_are_lines_and_tensorboard_has_the_same_scalars(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", 10, loss=2.5, loss_per_source={"text": 2.0}, phase="phase1")
    log.write("eval", 10, heldout={"code": {"loss": 3.0, "tokens": 5}})
    log.close()
    train, evaluated = read_metrics(tmp_path / "metrics.jsonl")
    assert (train["step"], train["loss"], evaluated["heldout"]["code"]["loss"]) == (10, 2.5, 3.0)
    scalars = {(event.step, value.tag): value.simple_value for event in events(tmp_path / "tensorboard")
               for value in event.summary.value}
    assert scalars == {(10, "train/loss"): 2.5, (10, "train/loss_per_source/text"): 2.0,
                       (10, "eval/heldout/code/loss"): 3.0, (10, "eval/heldout/code/tokens"): 5.0}


def test_a_line_cut_off_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "time": 0}\n{"kind": "tra')
    log = MetricsLog(tmp_path)
    log.write("start", 1, resumed=True)
    log.write("train", 2, loss=1.0)
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2]


def test_an_interval_is_the_mean_of_its_steps_and_survives_json() -> None:
    interval = Interval(SOURCES)
    interval.add(metrics(2.0))
    interval = Interval(**json.loads(json.dumps(to_dict(interval))))
    interval.add(metrics(4.0, tokens=(30, 10)))
    assert interval.record() == {"skipped": 0, "loss": 3.0, "grad_norm": 1.5,
                                 "loss_per_source": {"code": (20 + 120) / 40, "text": (60 + 40) / 40}}


def test_a_skipped_step_is_counted_and_spoils_no_mean() -> None:
    interval = Interval(SOURCES)
    interval.add(metrics(float("nan"), finite=False))
    assert interval.record() == {"skipped": 1}
    interval.add(metrics(2.0, tokens=(0, 8)))
    assert interval.record() == {"skipped": 1, "loss": 2.0, "grad_norm": 1.0, "loss_per_source": {"text": 2.0}}


@pytest.fixture
def plan() -> Plan:
    from configs.crystal_tiny import get_config

    return make_plan(get_config("60"))


def test_the_clock_reports_step_n_after_step_n_plus_1_and_at_phase_ends(plan: Plan) -> None:
    reported: list[int] = []
    clock = Clock(TrainingConfig(log_every=10), plan, (Interval(SOURCES), Window()),
                  lambda done, record: reported.append(done), Ledger())
    for done in range(1, plan.total_steps + 1):
        clock.dispatched(done, metrics(1.0))
        assert done not in reported, "the metrics of this step aren't fetched yet"
    clock.settle()
    ends = {placed.end for placed in plan.phases}
    assert reported == sorted({*range(10, plan.total_steps + 1, 10), *ends})


def test_too_many_nonfinite_steps_in_a_row_end_the_run(plan: Plan) -> None:
    clock = Clock(TrainingConfig(skips_in_a_row=2), plan, (Interval(SOURCES), Window()), lambda *_: None, Ledger())
    pattern = [False, False, True, False, False, False]
    with pytest.raises(FatalError, match=r"step 6: loss inf not finite, .*: 3 updates in a row were skipped") as caught:
        for done, finite in enumerate([*pattern, True], 1):
            clock.dispatched(done, metrics(1.0 if finite else float("inf"), finite))
    assert caught.value.exit_code == 4


def test_off_a_terminal_progress_is_a_line_with_phase_step_rate_and_time_left(
        plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(plan, 0)
    progress.show(10, {"loss": 3.25, "tokens_per_second": 1234.5})
    progress.show(20, {"tokens_per_second": 1.0})
    progress.note("a remark")
    progress.close()
    first, second, remark = capsys.readouterr().err.splitlines()
    assert first.startswith("phase1 10/15, step 10/60, loss 3.250, 1,234 tok/s, ") and first.endswith(" left")
    assert "phase2 5/40" in second and "loss nan" in second and remark == "a remark"


def test_durations_read_as_clocks() -> None:
    assert [_duration(seconds) for seconds in (0.4, 61, 3661, 90061)] == ["0:00", "1:01", "1:01:01", "25:01:01"]


def test_the_second_signal_stops_at_once_and_handlers_are_put_back() -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
