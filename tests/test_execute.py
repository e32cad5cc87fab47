"""Running generated code: each attack is a real program, and what it wanted is looked at from outside."""

import contextlib
import gzip
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, RunCli
from hypothesis import given
from hypothesis import strategies as st

from crystal_jax import cli, execute, sandbox
from crystal_jax.errors import UserError

HELD = all(sandbox.layers()[name] for name in execute.REQUIRED)
needs_sandbox = pytest.mark.skipif(not HELD, reason=f"needs Landlock and seccomp; this is {platform.platform()}")
LAYERS = [name for name, there in sandbox.layers().items() if there]


def run(program: str, seconds: float = 2.0) -> str:
    return execute.run_program(program, seconds, 1 << 30, LAYERS)["result"]


ATTACKS = {
    "endless loop": ("while True: pass", "timed out"),
    "sleep": ("import time; time.sleep(1000)", "timed out"),
    "ignores signals": ("import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n"
                        "  except OSError: pass\nwhile True: pass", "timed out"),
    "memory": ("held = bytearray(8 << 30)", "failed: MemoryError"),
    "os._exit(0)": ("import os; os._exit(0)", "failed: ended early"),
    "sys.exit(0)": ("import sys; sys.exit(0)", "failed: SystemExit"),
    "crash": ("import ctypes; ctypes.string_at(0)", "failed: ended early"),
    "recursion": ("def f(): f()\nf()", "failed: RecursionError"),
    "writes outside": ("open('{outside}/new', 'w').write('x')", "failed: PermissionError"),
    "overwrites outside": ("open('{outside}/precious', 'w')", "failed: PermissionError"),
    "deletes outside": ("import os; os.remove('{outside}/precious')", "failed: PermissionError"),
    "deletes a tree": ("import shutil; shutil.rmtree('{outside}')", "failed: PermissionError"),
    "reads outside": ("open('{outside}/precious').read()", "failed: PermissionError"),
    "reads /etc/passwd": ("open('/etc/passwd').read()", "failed: PermissionError"),
    "reads our environment": ("open('/proc/{parent}/environ', 'rb').read()", "failed: PermissionError"),
    "a link to outside": ("import os; os.symlink('{outside}/precious', 'a'); open('a').read()",
                          "failed: PermissionError"),
    "tcp": ("import socket; socket.create_connection(('127.0.0.1', {tcp}), 1)", "failed: PermissionError"),
    "listens": ("import socket; socket.create_server(('127.0.0.1', 0))", "failed: PermissionError"),
    "udp": ("import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', {udp}))",
            "failed: PermissionError"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", "failed: PermissionError"),
    "kills everything": ("import os; os.kill(-1, 9)", "failed: PermissionError"),
    "fork": ("import os; os.fork()", "failed: PermissionError"),
    "fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "timed out"),
    "double fork": ("import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)",
                    "failed: PermissionError"),
    "executes": ("import os; os.execv('/bin/sh', ['sh', '-c', 'true'])", "failed: PermissionError"),
    "thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
                    "failed: RuntimeError"),
    "endless output": ("while True: print('x' * 10000)", "timed out"),
    "a large file": ("open('f', 'wb').write(bytes(200 << 20))", "failed: OSError"),
    "many files": ("n = 0\nwhile True:\n  open(str(n), 'wb').write(bytes(8 << 20)); n += 1",
                   "failed: more than 64 MiB"),
    "many handles": ("held = [open('/dev/null') for _ in range(10000)]", "failed: OSError"),
    "mounts": ("import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
               "assert libc.mount(b'x', b'/', b'tmpfs', 0, None) == 0, os.strerror(ctypes.get_errno())",
               "failed: AssertionError: Operation not permitted"),
    "becomes another user": ("import os; os.setuid(1)", "failed: PermissionError"),
    "traces": ("import ctypes; assert ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0", "failed: AssertionError"),
    "writes the verdict": ("import os; os.write(3, b'passed'); os._exit(0)", "failed: ended early"),
}


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_held(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("still here")
    for path in (tmp_path, precious):
        path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        program, expected = ATTACKS[name]
        for word, value in {"outside": tmp_path, "parent": os.getpid(), "tcp": tcp.getsockname()[1],
                            "udp": udp.getsockname()[1]}.items():
            program = program.replace(f"{{{word}}}", str(value))
        result = run(program)
        assert result.startswith(expected), result
        for listening in (tcp, udp):
            listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            tcp.accept()
        with pytest.raises(BlockingIOError):
            udp.recv(1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert precious.read_text() == "still here"


FORKS = """
import os, sys
sys.path.insert(0, {folder!r})
import sandbox
if os.getuid() == 0:  # whom the kernel doesn't hold to the limit
    os.setgid(65534)
    os.setuid(65534)
sandbox.limit({{"seconds": 20, "memory": 1 << 30}})
made, end = 0, os.pipe()
try:
    while made < 1000:
        if os.fork() == 0:
            os.close(end[1])
            os.read(end[0], 1)  # until the parent ends
            os._exit(0)
        made += 1
except BlockingIOError:
    print(made)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_NPROC counts as Linux does")
def test_processes_are_limited_without_seccomp_too() -> None:
    program = FORKS.format(folder=str(Path(sandbox.__file__).parent))
    result = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 1 <= int(result.stdout) <= sandbox.MAX_PROCESSES + 8, "others of this user may end meanwhile"


@needs_sandbox
@pytest.mark.parametrize("program", [
    "x = 1", "open('a', 'w').write('x'); assert open('a').read() == 'x'", "import tempfile; tempfile.TemporaryFile()",
    "import collections, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math, random, re",
    "import threading; t = threading.Thread(target=print); t.start(); t.join()", "print('out'); input_missing = True",
    "import os; assert 'SECRET' not in os.environ", "import ctypes, sqlite3, socket, subprocess, typing, zoneinfo",
    "assert __name__ == '__main__'",
], ids=lambda program: program[:30])
def test_what_an_honest_program_needs_works(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert run(program, seconds=20) == "passed"


@needs_sandbox
def test_nothing_is_left_behind_when_the_caller_is_killed(tmp_path: Path) -> None:
    program = f"import time, os; time.sleep(1000)  # {tmp_path}"
    job = json.dumps({"program": program, "seconds": 500, "memory": 1 << 30, "layers": LAYERS})
    caller = ("import subprocess, sys; p = subprocess.Popen([sys.executable, '-I', '-S', sys.argv[1]], "
              "stdin=subprocess.PIPE); p.stdin.write(sys.argv[2].encode()); p.stdin.close(); print(p.pid, flush=True);"
              "p.wait()")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", caller, str(execute.SANDBOX), job], stdout=subprocess.PIPE, text=True,
                          env=environment) as process:
        assert process.stdout is not None
        warden = int(process.stdout.readline())
        _until(lambda: any(tmp_path.iterdir()) and sandbox.descendants(warden))
        children = sandbox.descendants(warden)
        process.send_signal(signal.SIGKILL)
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in [warden, *children]))
    assert not any(tmp_path.iterdir())


def _until(condition: object) -> None:
    end = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PROBLEMS = [
    {"task_id": "H/0", "prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"},
    {"task_id": 11, "text": "Return two.", "code": "", "test_list": ["assert two() == 2"], "test_setup_code": "k = 2"},
    {"task_id": "12", "prompt": "Return pi.", "code": "", "test_list": ["assert math.floor(pi()) == 3"],
     "test_imports": ["import math"]},
]
SAMPLES = [
    {"task_id": "H/0", "completion": "    return 1"}, {"task_id": "H/0", "completion": "    return 2"},
    {"task_id": 11, "completion": "def two(): return k"}, {"task_id": "11", "completion": "def two(): return 3"},
    {"task_id": "12", "completion": "def pi(): return math.pi"}, {"task_id": "12", "completion": "def pi(: syntax"},
]


@needs_sandbox
def test_the_command_scores_both_formats_and_goes_on_where_it_was(run_cli: RunCli, tmp_path: Path) -> None:
    problems, samples = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "s.jsonl", SAMPLES)
    command = ["execute", f"--samples={samples}", f"--problems={problems}", "--json"]
    refused = run_cli(*command)
    assert refused.returncode == 1 and "--run_untrusted_code" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and len(list(tmp_path.iterdir())) == 2
    done = run_cli(*command, "--run_untrusted_code")
    assert done.returncode == 0, done.stderr
    assert "landlock files on" in done.stderr
    summary = json.loads(done.stdout)
    assert (summary["problems"], summary["samples"], summary["pass@1"]) == (3, 6, 0.5)
    results = tmp_path / "s.results.jsonl"
    lines = results.read_text().splitlines()
    found = {line["sample"]: line["result"].split(":")[0] for line in map(json.loads, lines)}
    assert found == {0: "passed", 1: "failed", 2: "passed", 3: "failed", 4: "passed", 5: "failed"}
    results.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # as a kill leaves it
    again = run_cli(*command, "--run_untrusted_code")
    assert json.loads(again.stdout) == summary
    assert results.read_text().splitlines()[:3] == lines[:3]
    assert len(results.read_text().splitlines()) == 7


@needs_sandbox
def test_a_glob_scores_each_file_but_results(run_cli: RunCli, tmp_path: Path) -> None:
    problems = write(tmp_path / "p.jsonl", PROBLEMS[:1])
    for number, sample in enumerate(SAMPLES[:2]):
        write(tmp_path / f"s-{number}.jsonl", [sample])
    for _ in range(2):  # the second time there are results, which the glob fits too
        done = run_cli("execute", "--samples=s-*.jsonl", f"--problems={problems}", "--json", "--run_untrusted_code",
                       cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [(line["results"], line["pass@1"]) for line in map(json.loads, done.stdout.splitlines())] == [
            ("s-0.results.jsonl", 1.0), ("s-1.results.jsonl", 0.0)]
    plain = run_cli("execute", "--samples=s-0.jsonl,s-1.jsonl", f"--problems={problems}", "--run_untrusted_code",
                    cwd=tmp_path)
    assert plain.stdout.count("pass@1") == 2 and plain.stdout.endswith("\nresults    s-1.results.jsonl\n")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--samples="], "--samples: names no file; give a JSONL file or a glob"),
    (["--samples=none-*.jsonl"], "--samples=none-*.jsonl: no such file; give an existing file or glob"),
    (["--samples=."], "--samples=.: a folder; give a JSONL file or a glob"),
    (["--samples=gs://bucket/s.jsonl"], "programs are run from local files; copy it here"),
    (["--samples=s-*.jsonl", "--output=o"], "--output=o: is for one file, and --samples names 2"),
])
def test_samples_that_are_not_there_are_one_line(arguments: list[str], said: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        write(tmp_path / f"s-{number}.jsonl", SAMPLES)
    assert cli.main(["execute", *arguments, "--problems=p.jsonl", "--run_untrusted_code"]) == 1
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""


@needs_sandbox
@pytest.mark.parametrize(("completion", "passes"), [
    (None, 164),
    *(pytest.param(f"    {line}\n", 0, marks=pytest.mark.drill)
      for line in ("pass", "import os; os._exit(0)", "import sys; sys.exit(0)")),
])
def test_humaneval(reference: Path, tmp_path: Path, completion: str | None, passes: int) -> None:
    path = reference / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as file:
        problems = [json.loads(line) for line in file]
    samples = write(tmp_path / "s.jsonl", [
        {"task_id": problem["task_id"], "completion": completion or problem["canonical_solution"]}
        for problem in problems])
    # The loaded machine of a test run may be slow; no program here waits for its time to be over.
    summary = execute.execute(samples, path, tmp_path / "out.jsonl", seconds=60)
    assert summary == {"problems": 164, "samples": 164, "pass@1": passes / 164}


@pytest.mark.parametrize(("problems", "samples", "said"), [
    ([{"task_id": "a"}], SAMPLES, "columns task_id fit no format"),
    ([PROBLEMS[0], PROBLEMS[0]], SAMPLES, "H/0 occurs twice"),
    (PROBLEMS, [{"task_id": "H/0"}], "line 1: has task_id; a sample is"),
    (PROBLEMS, [{"task_id": "H/1", "completion": ""}], "did you mean H/0?"),
    (PROBLEMS, [], "no sample in it"),
    ([], SAMPLES, "no problem in it"),
])
def test_files_that_do_not_fit_are_one_line(problems: list, samples: list, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        execute.read_programs(write(tmp_path / "s", samples), execute.read_problems(write(tmp_path / "p", problems)))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "1"])
def test_a_sample_that_is_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text('{"task_id": 1, "completion": ""}\n' + text)
    with pytest.raises(UserError, match="line 2"):
        execute.read_lines(tmp_path / "s", "--samples")


def test_a_machine_without_landlock_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    with pytest.raises(UserError, match=r"lacks landlock files .*--weak_sandbox"):
        execute.check_layers(weak=False)
    assert not execute.check_layers(weak=True)["landlock files"]


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws(drawn: tuple[int, int, int]) -> None:
    from itertools import combinations

    n, passed, k = drawn
    draws = list(combinations(range(n), k))
    share = sum(any(i < passed for i in draw) for draw in draws) / len(draws)
    assert execute.pass_at_k(n, passed, k) == pytest.approx(share)


def test_the_sandbox_needs_the_standard_library_only() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'crystal_jax')!r}); import sandbox"
    with contextlib.suppress(subprocess.CalledProcessError):
        done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
