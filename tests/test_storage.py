"""What is wrong with gs://, in one line: bucket, permission, credentials; what only takes time is none of it."""

import re

import pytest
from faults import ANY, Rule, faults

from crystal_jax import cli, files, storage
from crystal_jax.errors import UserError, explain, refusal


def test_what_can_be_used_passes(gcs, tmp_path) -> None:
    storage.check(gcs.folder())
    storage.check(files.as_path(gcs.folder()))
    storage.check(tmp_path / "nothing" / "there")


def test_a_bucket_that_is_not_there(gcs) -> None:
    with pytest.raises(UserError, match=r"^gs://no-such-bucket/run: no such bucket; create it, or correct the name$"):
        storage.check("gs://no-such-bucket/run")


@pytest.mark.parametrize(("said", "means"), [
    ("PERMISSION_DENIED: x does not have storage.objects.get access [http_response_code='403']", "no permission"),
    ("UNAUTHENTICATED: Invalid Credentials", "no valid credentials"),
    ("Anonymous caller does not have storage.objects.list access, 401", "no valid credentials"),
    ("UNAVAILABLE: 503", None),
    ("[Errno 2] No such file or directory: 'checkpoints/403/401'", None),
])
def test_what_the_clients_say(said: str, means: str | None) -> None:
    found = refusal(ValueError(said))
    assert found is None if means is None else found is not None and found.startswith(means)


COMMANDS = [
    ("report", "--run_dir={run}"),
    ("inspect", "--run_dir={run}", "--counts"),
    ("generate", "--checkpoint={run}", "--prompt=x"),
    ("convert", "export", "--to=llama", "--checkpoint={run}", "--output={here}/out"),
]


def one_line(stderr: str) -> str:
    """But for what TensorStore's C++ logs of the emulator's credentials."""
    (line,) = [line for line in stderr.splitlines() if "google_auth" not in line]
    return line


@pytest.mark.parametrize(("status", "means"), [(403, "no permission"), (401, "no valid credentials")])
def test_storage_that_refuses(gcs, run_cli, status: int, means: str) -> None:
    with faults(gcs) as proxy:
        proxy.set(Rule("refuse", ANY, status=status))
        result = run_cli("report", f"--run_dir={gcs.folder()}", env=proxy.environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert one_line(result.stderr).startswith("crystal-jax report: gs://") and means in result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_command_looks_before_it_works(gcs, tmp_path, monkeypatch, capfd, command: tuple[str, ...]) -> None:
    class Refusing:
        def call(self, *_: object, **__: object) -> None:
            raise OSError("Forbidden: b/crystal/o\nx does not have storage.objects.list access")

    monkeypatch.setattr(files, "gcsfs", Refusing)
    assert cli.main([part.format(run=gcs.folder(), here=tmp_path) for part in command]) == 1
    assert "no permission for this" in one_line(capfd.readouterr().err)


def test_a_refusal_in_mid_work_is_one_line_too(capsys) -> None:
    assert explain("train", OSError("Forbidden: b/crystal/o/run%2Fmetrics.jsonl/compose\nmay not")) == 1
    line = one_line(capsys.readouterr().err)
    assert line.startswith("crystal-jax train: gs://: no permission") and "metrics.jsonl/compose may not" in line


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_folder_that_is_no_run(gcs, tmp_path, capfd, command: tuple[str, ...]) -> None:
    assert cli.main([part.format(run=gcs.folder(), here=tmp_path) for part in command]) == 1
    assert re.search(r"no run \(there is no config.json\)|neither a run with a saved", one_line(capfd.readouterr().err))
