"""The command line: every command has help, every mistake is one line, exit codes are a contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OUTER_ENVIRONMENT, ROOT, RunCli

from crystal_jax import cli
from crystal_jax.config_file import load_config
from crystal_jax.errors import FatalError, UserError


def test_help_names_every_command(run_cli: RunCli) -> None:
    result = run_cli("--help")
    assert result.returncode == 0 and all(name in result.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize(("arguments", "said"), [
    ("trian --run_dir=x", ": unknown command trian; did you mean train? see crystal-jax --help"),
    ("train --run_dri=x", " train: unknown flag --run_dri; did you mean --run_dir? see crystal-jax train --help"),
    ("train --config=x --run_dir=y --dry-run",
     " train: unknown flag --dry-run; did you mean --dry_run? see crystal-jax train --help"),
    ("recipe show --confg=x",
     " recipe: unknown flag --confg; did you mean --config? see crystal-jax recipe show --help"),
    ("verify x --config.a=1", " verify: unknown flag --config.a; known: --help, -h; see crystal-jax verify --help"),
    ("verify x y", " verify: unrecognized arguments: y; see crystal-jax verify --help"),
    ("inspect --config=configs/crystal_tiny.py", " inspect: give --step=N, --document=ID or --counts"),
])
def test_a_mistyped_command_or_flag_is_answered_with_the_nearest(
        arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 1
    assert capsys.readouterr().err == f"crystal-jax{said}\n"


def test_a_value_with_a_space_may_look_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--prompt", "--verbose is a flag"]) == 1
    assert "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0 and command in capsys.readouterr().out


def test_only_the_asked_command_is_imported(run_cli: RunCli) -> None:
    """`crystal-jax recipe` must not wait for JAX."""
    code = ("import sys; from crystal_jax.cli import main; main(['recipe', 'show', '--config=configs/crystal_7b.py']); "
            "sys.exit('jax' in sys.modules)")
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("error", "code"), [(UserError("x: 1 must be 2"), 1), (FatalError("step 3: not finite"), 4)])
def test_errors_become_one_line_and_their_exit_code(
        error: UserError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import crystal_jax.data.verify as verify

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(verify, "main", fail)
    assert cli.main(["verify", "store"]) == code
    assert capsys.readouterr().err == f"crystal-jax verify: {error}\n"


def test_a_full_disk_is_one_line_and_other_system_errors_are_ours(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    import crystal_jax.data.verify as verify

    def fail(_: object) -> None:
        raise OSError(number, "text", "some/file")

    monkeypatch.setattr(verify, "main", fail)
    number = errno.ENOSPC
    assert cli.main(["verify", "store"]) == 1
    assert "some/file: no space left" in capsys.readouterr().err
    number = errno.EIO
    assert cli.main(["verify", "store"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import crystal_jax.data.verify as verify

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "main", interrupt)
    assert cli.main(["verify", "store"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


INTERRUPTED = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp
from crystal_jax import cli
import crystal_jax.data.verify as verify

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def compiles(_):
    def long(x):
        for _ in range(3000):
            x = jnp.sin(x @ x)
        threading.Timer(1.5, interrupt).start()
        return x
    jax.jit(long)(jnp.ones((8, 8)))

class Swallows:
    def __del__(self):
        interrupt()
        time.sleep(1)

def collects(_):
    Swallows()
    time.sleep(60)

verify.main = {body}
sys.argv[1:] = ["verify", "store"]
cli.start()
"""


@pytest.mark.parametrize("body", ["compiles", "collects"])
def test_an_interrupt_ends_a_process_wherever_it_comes(body: str) -> None:
    """While XLA compiles in a thread of its own, which must not outlive its client; and where Python raises nothing."""
    environment = {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.replace("{body}", body)], env=environment, cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "crystal-jax verify: interrupted; the same command goes on where it was\n"


def test_a_reader_that_closes_our_output_is_no_error(run_cli: RunCli) -> None:
    root = Path(__file__).parents[1]
    script = f"{sys.executable} -m crystal_jax recipe show --config=configs/crystal_7b.py --calendar | head -1"
    result = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert result.stdout.count("\n") == 1 and result.stderr == ""


@pytest.mark.parametrize(("text", "said"), [
    ("def get_config():\n    return 5\n", "get_config() returned int, not a crystal_jax Config"),
    ("def get_config():\n    raise ValueError('bad weather')\n", "bad weather"),
    ("from crystal_jax.config import Config\ndef get_config():\n    return Config()\n", "config.phases: empty"),
    ("from crystal_jax.config import Config\ndef get_config():\n    return Config(nmae='x')\n", "nmae"),
])
def test_a_bad_config_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(file))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_config_file_is_named() -> None:
    with pytest.raises(UserError, match=r"--config=configs/crystal_8b\.py: no such file"):
        load_config("configs/crystal_8b.py")


def test_the_nearest_config_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("configs/__init__.py", "configs/crystal_tiny.py", "mine/run_one.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    for path, meant in (("configs/crystal_tni.py", "; did you mean configs/crystal_tiny.py?"),
                        ("crystal_tiny", "; did you mean configs/crystal_tiny.py?"),
                        ("crystal_tiny:60", "; did you mean configs/crystal_tiny.py?"),
                        ("mine/run_on.py", "; did you mean mine/run_one.py?"), ("init", "")):
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(caught.value) == f"--config={path}: no such file{meant}"


def test_a_mistake_in_a_file_that_is_built_on_names_the_users(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from configs import crystal_tiny\n\ndef get_config(steps='60'):\n"
                    "    return crystal_tiny.get_config(steps)\n")
    assert load_config(f"{mine}").name == "crystal_tiny"
    with pytest.raises(UserError) as caught:
        load_config(f"{mine}:abc")
    assert str(caught.value) == (f"--config={mine}:abc: the variant is a number of steps, such as 6000, not 'abc'")


@pytest.mark.parametrize(("override", "said"), [
    ("--config.phases[1].mix.starcode=0.5", "starcode"),
    ("--config.phases[7].steps=5", "phases[7]"),
    ("--config.phases[0].steps=5.5", "phases[0].steps"),
    ("--config.model.embed_dims=5", "did you mean embed_dim?"),
    ("--config.training.mesh.datas=5", "did you mean data?"),
    ("--config.modle.embed_dim=5", "modle"),
    ("--config.training.embed_dim=5", "no field embed_dim; did you mean --config.model.embed_dim?"),
    ("--config.model.seed=5", "did you mean --config.data.seed or --config.training.seed?"),
    ("--config.lr=5", "did you mean --config.phases[N].lr?"),
    ("--config.data.peak=5", "did you mean --config.phases[N].lr.peak?"),
    ("--config.data.domain=5", "did you mean --config.sources.NAME.domain?"),
    ("--config.model.embed_dim=102", "config.model.embed_dim: 102 must be a multiple of num_heads = 4"),
])
def test_a_wrong_override_is_one_line_that_names_it(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("configs/crystal_tiny.py", [override])
    assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_overrides_and_variants_reach_their_field() -> None:
    config = load_config("configs/crystal_tiny.py:60", [
        "--config.phases[0].mix.text=0.5", "--config.phases[0].mix.code=0.5", "--config.training.remat=full",
        "--config.phases[1].lr.peak=1e-3", "--config.phases[2].subset.text.first=0.25"])
    assert config.phases[0].mix == {"text": 0.5, "code": 0.5} and config.training.remat == "full"
    assert config.phases[1].lr.peak == 1e-3 and config.phases[2].subset["text"].first == 0.25
    assert sum(phase.steps or 0 for phase in config.phases) == 60


def test_a_compiler_for_absent_tpus_says_nothing() -> None:
    """libtpu, which `plan` needs, would tell every command at length that there is no TPU."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install -r requirements/dev.txt")
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    code = "from crystal_jax import cli; cli._use_no_missing_tpu(); import jax; print(jax.devices())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stderr == "" and "Device" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize(("before", "expected"), [
    (None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0")])
def test_train_begins_with_huge_pages(before: str | None, expected: str, tmp_path: Path) -> None:
    """And with the arguments that it was given; a setting of the user's stays."""
    seen = tmp_path / "a config.py"
    seen.write_text(f"import os, pathlib\npathlib.Path({str(tmp_path / 'seen')!r}).write_text(os.environ.get("
                    "'GLIBC_TUNABLES', '') + str(os.getpid()))\n")
    environment = OUTER_ENVIRONMENT | ({"GLIBC_TUNABLES": before} if before else {})
    with subprocess.Popen([sys.executable, "-m", "crystal_jax", "train", f"--config={seen}", "--run_dir=x"], cwd=ROOT,
                          env=environment, stderr=subprocess.PIPE, text=True) as process:
        said = process.communicate()[1]
    assert process.returncode == 1 and f"{seen}: " in said, said
    assert (tmp_path / "seen").read_text() == f"{expected}{process.pid}", "the process itself begins again"
