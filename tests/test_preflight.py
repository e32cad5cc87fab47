"""tpu/preflight: the arithmetic against the published table, and each check against what the cloud may answer."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from stores import make_store
from tpu_pods import Pod, make_pod

from crystal_jax.config import Config
from crystal_jax.config_file import load_config
from crystal_jax.errors import UserError
from crystal_jax.generations import Slice, find_slice
from tpu import preflight
from tpu.cloud import Answer
from tpu.preflight import BAD, DOUBTFUL, GOOD, Job

ACCOUNT = "crystal-trainer@my-project.iam.gserviceaccount.com"
DATA = "--config.data.root=gs://my-bucket/data"


def make_job(kind: str = "v5p-128", *overrides: str, capacity: str = "spot") -> Job:
    return Job("my-project", "us-east5-a", "my-bucket", "crystal-7b", find_slice(kind), 1, capacity, ACCOUNT, "crystal",
               load_config("configs/crystal_7b.py", [DATA, *overrides]), "default")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """Beginning of a question to its answer; what isn't here says that it isn't there."""
    found: dict[str, Answer] = {}

    def ask(*argv: str) -> Answer:
        text = " ".join(argv)
        return next((answer for start, answer in found.items() if text.startswith(start)),
                    Answer(1, "", f"ERROR: (gcloud) NOT_FOUND: {text}"))

    monkeypatch.setattr(preflight, "ask", ask)
    return found


def said(value: object) -> Answer:
    return Answer(0, value if isinstance(value, str) else json.dumps(value), "")


@pytest.mark.parametrize("kind, days", [("v4-512", 19.6), ("v5p-256", 23.5), ("v6e-256", 5.9), ("v5litepod-256", 27.4)])
def test_days_are_those_of_the_notes(kind: str, days: float) -> None:
    """1.39T tokens at 50% MFU, 4.27e10 FLOPs a token."""
    job = make_job(kind)
    assert preflight.flops_per_token(job.config) == pytest.approx(4.27e10, rel=0.01)
    assert preflight.seconds_per_step(job, 0.5, int(1.39e12)) / 86400 == pytest.approx(days, rel=0.02)


def planned(used: float, fits: bool) -> dict:
    return {"memory": {"used": used * 2**30, "usable": 95.74 * 2**30, "fits": fits},
            "step": {"seconds": 1.5, "mfu": 0.5}}


def test_memory_is_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_plan(config: Config, piece: Slice, slices: int, flags: str) -> dict:
        asked.append((config.training.mesh.slice, piece.chips, slices, flags))
        return planned(11.1, True) if config.training.mesh.fsdp == -1 else planned(120.0, False)

    monkeypatch.setattr(preflight, "compile_plan", compile_plan)
    (level, text), = preflight.check_fit(make_job())
    assert level == GOOD and "11.1 of 95.74 GiB" in text and "predicted: 1.50 s" in text
    job = replace(make_job("v5p-128", "--config.training.mesh.fsdp=1"), slices=2, flags="async")
    (level, text), = preflight.check_fit(job)
    assert level == BAD and "out of memory" in text and "plan --sweep" in text
    assert asked == [(1, 64, 1, "default"), (2, 64, 2, "async")]


def test_a_mesh_that_does_not_fit_is_bad_and_no_compiler_is_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "config.phases[0].global_batch_size: 2112 doesn't divide into 128 equal parts"

    def refuse(*_: object) -> dict:
        raise UserError(said)

    monkeypatch.setattr(preflight, "compile_plan", refuse)
    assert list(preflight.check_fit(make_job())) == [(BAD, said)]
    monkeypatch.undo()
    monkeypatch.setattr("crystal_jax.topology.is_installed", lambda: False)
    (level, text), = preflight.check_fit(make_job())
    assert level == DOUBTFUL and "isn't known" in text and "requirements/tpu.txt" in text


def test_rolling_states_must_be_often_on_spot() -> None:
    assert [level for level, _ in preflight.check_cost(make_job())] == [GOOD, BAD]
    often = make_job("v5p-128", "--config.checkpoints.every_minutes=15")
    assert [level for level, _ in preflight.check_cost(often)] == [GOOD, GOOD]
    assert preflight.check_cost(make_job(capacity="on-demand")).__next__()[1].count("$") == 1


@pytest.mark.parametrize("check, start, good, bad", [
    (preflight.check_type, "compute tpus accelerator-types", "v5p-8\nv5p-128\n", "v5p-8\n"),
    (preflight.check_network, "compute networks subnets", "True\n", "False\n"),
    (preflight.check_bucket, "storage buckets describe", {"location": "US-EAST5"}, {"location": "EUROPE-WEST4"}),
    (preflight.check_bucket, "storage buckets describe", {"location": "US"},
     {"location": "US", "softDeletePolicy": {"retentionDurationSeconds": "604800"}}),
])
def test_each_answer(answers: dict[str, Answer], check, start: str, good: object, bad: object) -> None:
    answers[start] = said(good)
    assert [level for level, _ in check(make_job())] == [GOOD]
    answers[start] = said(bad)
    assert BAD in [level for level, _ in check(make_job())]
    answers[start] = Answer(1, "", "503 backend error")
    assert [level for level, _ in check(make_job())] == [DOUBTFUL]
    del answers[start]
    assert [level for level, _ in check(make_job())] == [BAD]


def test_each_zone_is_checked(answers: dict[str, Answer], capsys: pytest.CaptureFixture[str],
                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the supervisor may go when capacity is lost."""
    monkeypatch.setattr(preflight, "compile_plan", lambda *_: planned(11.1, True))
    answers["compute tpus accelerator-types list --zone=us-east5-a"] = said("v5p-128\n")
    code = preflight.main(["--project=p", "--zones=us-east5-a,europe-west4-b", "--bucket=my-bucket", "--run=r",
                           "--type=v5p-128", "--slices=1", "--capacity=spot", f"--service-account={ACCOUNT}",
                           "--subnetwork=crystal", "--flag-set=default", "--", "--config=configs/crystal_7b.py", DATA])
    lines = [line for line in capsys.readouterr().out.splitlines() if " type " in line]
    assert code == 1
    assert [line.split()[0] for line in lines] == [GOOD, BAD] and "europe-west4-b" in lines[1]


@pytest.mark.parametrize("value, level", [(64, BAD), (128, GOOD), (None, DOUBTFUL)])
def test_quota(answers: dict[str, Answer], value: int | None, level: str) -> None:
    def quota(name: str, limit: int) -> dict:
        return {"quotaDisplayName": name, "quotaId": name, "dimensionsInfos": [
            {"dimensions": {"zone": "us-east5-a"}, "details": {"value": str(limit)}}]}

    others = [quota("TPU v5p cores per project per zone", 4096), quota("Preemptible TPU v6e cores", 4096)]
    wanted = [quota("Preemptible TPU v5p cores per project per zone", value)] if value is not None else []
    answers["beta quotas info list"] = said([*others, *wanted])
    assert [found for found, _ in preflight.check_quota(make_job())] == [level]


def test_rights(answers: dict[str, Answer]) -> None:
    answers["iam service-accounts"] = said(ACCOUNT)
    answers["storage buckets get-iam-policy"] = said({"bindings": [
        {"role": "roles/storage.objectUser", "members": [f"serviceAccount:{ACCOUNT}"]}]})
    answers["projects get-iam-policy"] = said({"bindings": []})
    assert [level for level, _ in preflight.check_rights(make_job())] == [GOOD, DOUBTFUL]
    answers["storage buckets get-iam-policy"] = said({})
    level, text = next(preflight.check_rights(make_job()))
    assert level == BAD and "add-iam-policy-binding" in text


def test_objects(answers: dict[str, Answer], tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", [[5, 9]])
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    job = make_job()
    pod = "gs://my-bucket/crystal-7b/pod"
    answers["storage ls gs://my-bucket/crystal-7b"] = said(f"{pod}/launch.json\n")
    answers["storage cat"] = said(manifest)
    for store in {source.store for source in job.config.sources.values()}:
        root = f"gs://my-bucket/data/{store}"
        answers[f"storage ls --long --recursive {root}/"] = said("".join(
            f"{path.stat().st_size}  2026-01-01T00:00:00Z  {root}/{path.relative_to(tmp_path / 'store')}\n"
            for path in files))
    assert {level for level, _ in preflight.check_objects(job)} == {GOOD}
    answers[f"storage ls --long --recursive {root}/"] = said("TOTAL: 0 objects, 0 bytes (0B)")
    assert [level for level, _ in preflight.check_objects(job)].count(BAD) == 1
    answers["storage ls gs://my-bucket/crystal-7b"] = said(f"{pod}/FATAL\n")
    assert [level for level, _ in preflight.check_objects(job)].count(BAD) == 3
    local = replace(job, config=load_config("configs/crystal_7b.py", []))
    assert "gs://" in list(preflight.check_objects(local))[-1][1]


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud isn't installed")
def test_the_real_gcloud_takes_every_question(answers: dict[str, Answer], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(preflight, "compile_plan", lambda *_: planned(11.1, True))
    answers["iam service-accounts"] = said(ACCOUNT)
    inner = preflight.ask
    monkeypatch.setattr(preflight, "ask", lambda *argv: (asked.append(argv), inner(*argv))[1])
    job = make_job()
    for check in preflight.CHECKS.values():
        list(check(job))
    list(preflight.check_store("gs://my-bucket/data/x", {"splits": {}}))
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    # One of each kind: a call takes a second.
    for argv in {argv[:3] if argv[0] != "storage" else argv[:2]: argv for argv in asked}.values():
        result = subprocess.run(["gcloud", *argv], env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 1 and "active account" in result.stderr, (argv, result.stderr)


def test_the_script_refuses_creates_nothing_and_asks_only_when_all_is_well(tmp_path: Path) -> None:
    pod: Pod = make_pod(tmp_path)
    pod.cloud.answer("*", stderr="ERROR: (gcloud) You do not currently have an active account selected.", code=1)
    result = pod("preflight")
    assert result.returncode == 1, result.stderr
    assert "nothing was created" in result.stderr
    remote = [line for line in result.stdout.splitlines() if line.split()[1] not in preflight.LOCAL]
    assert remote == ["BAD  login    gcloud auth login; not looked at: 6 checks need a login: type, quota, bucket, "
                      "rights, network, objects"]
    assert not [call for call in pod.cloud.calls() if "create" in call]
    pod.write("TRAIN_ARGS=(--config=nowhere.py)")
    result = pod("preflight")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
