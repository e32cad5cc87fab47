"""`convert export` from stored checkpoints: streamed, one or a run's calendar, resumable, within a bound of memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_convert import INFO, TINY, random_params, refused, write_tokenizer
from test_stream import upload

from crystal_jax import checkpoint, files, sharding, stream
from crystal_jax.config import CheckpointConfig, MeshConfig, ModelConfig, to_dict
from crystal_jax.convert import calendar, command, folder, importer, parity
from crystal_jax.convert.export import export
from crystal_jax.convert.made import Options
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, init_params
from crystal_jax.states import RollingStates

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("code/step_000003", "text/step_000002", "text/step_000004")


def write(place: Path, seed: int, **changes: Any) -> None:
    """A permanent checkpoint with its tokenizer."""
    place.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(place.parents[2] / "tokenizer.json")
    checkpoint.save_weights(place, random_params(TINY, seed), TINY, tokenizer, INFO | changes)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with three permanent checkpoints."""
    for seed, name in enumerate(NAMES):
        write(tmp_path / "run" / "exports" / name, seed, name=name)
    return tmp_path / "run"


def snapshot(place: Path) -> dict[str, tuple[int, bytes]]:
    return {path.relative_to(place).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
            for path in place.rglob("*") if path.is_file()}


def contents(place: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in snapshot(place).items()}


def exported(run_dir: Path | str, output: Path, *, to: str = "crystal", **options: Any) -> list[dict[str, Any]]:
    return list(calendar.export_all(str(run_dir), to, output, Options(**options)))


# One


@pytest.mark.parametrize("to", ["crystal", "llm360", "stablelm"])
def test_streamed_is_what_the_whole_tree_gives(to: str, run_dir: Path, tmp_path: Path) -> None:
    place = run_dir / "exports" / NAMES[0]
    options = Options(dtype="bfloat16", max_shard_size=20_000)
    found = calendar.export_checkpoint(str(place), to, tmp_path / "out", options)
    line = calendar.command_line(str(place), to, tmp_path / "out", options)
    weights = checkpoint.load_weights(place)
    whole = export(weights, to, tmp_path / "whole", dtype="bfloat16", max_shard_size=20_000, command=line)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert found == whole | {"output": str(tmp_path / "out")}
    assert found["parity"]["relative_difference"] <= found["parity"]["bar"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert calendar.export_checkpoint(str(place), to, tmp_path / "out", options)["unchanged"]


def test_a_newest_state_exports_too(run_dir: Path, tmp_path: Path) -> None:
    """Under its step, as a run gives it."""
    params = init_params(Crystal(TINY).specs(), 9, sharding.make_mesh(MeshConfig()))
    kept = RollingStates(run_dir / "checkpoints", CheckpointConfig(), [])
    kept.save(5, {"params": params, "moments": {"mu": params}}, {"model": to_dict(TINY), "step": 5})
    kept.close()
    calendar.export_checkpoint(str(run_dir), "crystal", tmp_path / "out", Options())
    assert "| Step of the run | 5 |" in (tmp_path / "out" / "README.md").read_text()


def test_from_gs_to_a_folder(run_dir: Path, gcs: Any, tmp_path: Path) -> None:
    place = files.as_path(gcs.folder())
    upload(run_dir, place)
    found = exported(str(place), tmp_path / "out")
    assert [Path(summary["output"]).relative_to(tmp_path / "out").as_posix() for summary in found] == list(NAMES)
    exported(run_dir, tmp_path / "local")
    for name in NAMES:
        weights = f"{name}/model.safetensors"
        assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()
    assert all("passed_over" in summary for summary in exported(str(place), tmp_path / "out"))


def test_the_command_that_the_card_quotes_makes_it() -> None:
    options = Options(dtype="float16", max_shard_size=10**9, heads=5)
    line = calendar.command_line("my run", "stablelm", Path("out"), options)
    assert line == ("crystal-jax convert export --to=stablelm '--checkpoint=my run' --output=out --dtype=float16 "
                    "--max_shard_size=1000000000 --heads=5")
    assert command.parse_size("1000000000") == options.max_shard_size
    assert calendar.command_line("c", "crystal", Path("o"), Options()).endswith("--checkpoint=c --output=o")


def test_what_can_be_is_refused_before_anything_is_copied(run_dir: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.Tree, "copy", None)
    place = str(run_dir / "exports" / NAMES[0])
    for to, options, part in (("llama", Options(), "model.family"), ("crystal", Options(heads=4), "--heads=4"),
                              ("crystal", Options(dtype="q8_0"), "q8_0 is for --to=gguf alone"),
                              ("stablelm", Options(dtype="q8_0"), "q8_0 is for --to=gguf alone"),
                              ("cristal", Options(), "crystal"),
                              ("llm360", Options(max_shard_size=0), "--max_shard_size=0")):
        assert part in refused(calendar.export_checkpoint, place, to, tmp_path / "out", options)
    write_tokenizer(run_dir / "exports" / NAMES[0] / "tokenizer.json", 62)
    assert "62 ids" in refused(calendar.export_checkpoint, place, "crystal", tmp_path / "out", Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_is_refused_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    params = random_params(TINY, 1)
    params["layers"]["mlp"]["up"][1, 2, 3] = np.nan
    checkpoint.save_weights(tmp_path / "nan", params, TINY, None, INFO)
    before = sorted(path.name for path in tmp_path.iterdir())
    args: tuple[Any, ...] = (str(tmp_path / "nan"), "crystal", tmp_path / "out", Options())
    assert "model.layers.1.mlp.up_proj.weight (from layers.mlp.up): 1 of 888 values are NaN" in refused(
        calendar.export_checkpoint, *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused(calendar.export_checkpoint, *args)
    assert "no permanent checkpoints" in refused(exported, tmp_path / "nowhere", tmp_path / "many")
    with stream.locked(tmp_path / ".free.scratch"):
        assert "in use" in refused(calendar.export_checkpoint, args[0], "crystal", tmp_path / "free", Options())


# A run's calendar


def test_all_exports_each_once(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    found = exported(run_dir, out)
    assert [Path(summary["output"]) for summary in found] == [out / name for name in NAMES]
    assert sorted(path.name for path in out.iterdir()) == ["code", "exports.json", "text"]
    before = snapshot(out)
    assert all("passed_over" in summary for summary in exported(run_dir, out))
    assert snapshot(out) == before
    write(run_dir / "exports" / "text" / "step_000006", 6)
    shutil.rmtree(out / NAMES[0])
    again = exported(run_dir, out)
    assert ["passed_over" in summary for summary in again] == [False, True, True, False]
    assert {name: content for name, (_, content) in before.items() if name != "exports.json"}.items() <= contents(
        out).items()


def test_an_export_of_another_kind_in_its_place_is_named(run_dir: Path, tmp_path: Path) -> None:
    exported(run_dir, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    message = refused(exported, run_dir, tmp_path / "out", dtype="bfloat16")
    assert str(tmp_path / "out" / NAMES[0]) in message
    shutil.rmtree(run_dir / "exports" / NAMES[1])
    write(run_dir / "exports" / NAMES[1], 7)
    assert str(tmp_path / "out" / NAMES[1]) in refused(exported, run_dir, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


def damage(name: str, change: Any) -> Any:
    return lambda place: change(place / name)


@pytest.mark.parametrize(("spoil", "named"), [
    (damage("model.safetensors", lambda path: os.truncate(path, 100)), "model.safetensors"),
    (damage("config.json", lambda path: path.write_text("{}")), "config.json"),
    (damage("generation_config.json", lambda path: path.unlink()), "generation_config.json"),
    (shutil.rmtree, None),
])
def test_a_damaged_folder_is_not_passed_over(spoil: Any, named: str | None, run_dir: Path, tmp_path: Path) -> None:
    exported(run_dir, tmp_path / "out")
    spoil(tmp_path / "out" / NAMES[0])
    if named:
        message = refused(exported, run_dir, tmp_path / "out")
        assert str(tmp_path / "out" / NAMES[0]) in message and named in message
    else:
        assert ["passed_over" in summary for summary in exported(run_dir, tmp_path / "out")] == [False, True, True]


def test_a_card_of_ones_own_is_no_damage(run_dir: Path, tmp_path: Path) -> None:
    exported(run_dir, tmp_path / "out")
    (tmp_path / "out" / NAMES[0] / "README.md").write_text("mine")
    assert exported(run_dir, tmp_path / "out")[0]["unchanged"]
    assert all("passed_over" in summary for summary in exported(run_dir, tmp_path / "out"))
    assert (tmp_path / "out" / NAMES[0] / "README.md").read_text() == "mine"


def test_the_same_export_spelled_differently(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = run_dir / "exports" / NAMES[0]
    calendar.export_checkpoint(str(place), "crystal", tmp_path / "out", Options())
    monkeypatch.chdir(tmp_path)
    assert calendar.export_checkpoint("run/exports/./" + NAMES[0], "crystal", Path("out"), Options())["unchanged"]


def test_outputs_in_odd_places(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, file = str(run_dir / "exports" / NAMES[0]), tmp_path / "file"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    calendar.export_checkpoint(place, "crystal", tmp_path / "link", Options())
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()
    file.write_text("mine")
    assert f"{file}: is a file" in refused(exported, run_dir, file)
    assert f"{file}" in refused(calendar.export_checkpoint, place, "crystal", file / "a" / "b", Options())
    assert f"{file}" in refused(exported, run_dir, file / "a")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mount")
    assert "mount point" in refused(calendar.export_checkpoint, place, "crystal", tmp_path / "mount", Options())
    assert "mount point" in refused(importer.import_checkpoint, "crystal", tmp_path / "real", tmp_path / "mount")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "real", "run"]


def test_of_gs_only_what_the_network_interrupted_is_kept(run_dir: Path, gcs: Any, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    place = files.as_path(gcs.folder())
    upload(run_dir / "exports" / NAMES[0], place)
    args: tuple[Any, ...] = (str(place), "crystal", tmp_path / "out", Options())
    copy, copied = stream.Tree.copy, []

    def interrupted(self: stream.Tree, array: stream.Array, target: np.ndarray) -> None:
        copy(self, array, target)
        copied.append(array.name)
        if len(copied) == 3:
            raise ValueError(outcome)

    monkeypatch.setattr(stream.Tree, "copy", interrupted)
    outcome = "UNAVAILABLE: connection reset"
    assert outcome in refused(calendar.export_checkpoint, *args)
    assert (tmp_path / ".out.scratch" / copied[0]).exists()
    copied.clear()
    outcome = "embed/c/0/0 is missing"
    assert outcome in refused(calendar.export_checkpoint, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    largest = max((run_dir / "exports" / NAMES[0]).rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    os.truncate(largest, 100)
    args: tuple[Any, ...] = (str(run_dir / "exports" / NAMES[0]), "crystal", tmp_path / "out", Options())
    assert "damaged" in refused(calendar.export_checkpoint, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Killed(BaseException):
    """What no one catches."""


EVENTS = ((stream.Tree, "copy"), (files, "write_json"), (folder, "write_safetensors"), (folder, "open_tensors"),
          (parity, "check"), (os, "replace"), (shutil, "rmtree"), (calendar, "clear"))


def count(patch: pytest.MonkeyPatch, last: int) -> list[str]:
    """The events of an export from now on; number `last` never happens."""
    seen: list[str] = []

    def counted(name: str, original: Any) -> Any:
        def event(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == last:
                raise Killed
            return original(*args, **kwargs)

        return event

    for owner, name in EVENTS:
        patch.setattr(owner, name, counted(name, getattr(owner, name)))
    return seen


def test_a_kill_anywhere_loses_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES[1:]:
        shutil.rmtree(run_dir / "exports" / name)
    for place in ("whole", "again"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    with monkeypatch.context() as patch:
        events = count(patch, 0)
        exported(run_dir, Path("out"))
    monkeypatch.chdir(tmp_path / "again")
    for last in [*range(1, len(events), 9), *range(len(events) - 9, len(events) + 1)]:
        with monkeypatch.context() as patch:
            count(patch, last)
            with pytest.raises(Killed):
                exported(run_dir, Path("out"))
        with monkeypatch.context() as patch:
            rest = count(patch, 0)
            exported(run_dir, Path("out"))
        assert contents(Path("out")) == contents(tmp_path / "whole" / "out"), events[last - 1]
        if "write_safetensors" in events[:last] and "clear" not in events[: last - 1]:
            assert "copy" not in rest
        shutil.rmtree("out")


def test_a_real_kill_of_the_command(run_dir: Path, tmp_path: Path) -> None:
    """At the second checkpoint's arrays: the first is passed over, the copies that are whole are used."""
    script = (
        "import os, signal, sys\nfrom crystal_jax import cli, stream\ncopy, seen = stream.Tree.copy, []\n"
        "def killed(self, *args):\n    seen.append(args)\n    copy(self, *args)\n"
        "    if len(seen) == int(os.environ['LAST']): os.kill(os.getpid(), signal.SIGKILL)\nstream.Tree.copy = killed\n"
        "code = cli.main(sys.argv[1:])\nprint(len(seen), file=sys.stderr)\nsys.exit(code)")
    argv = ["convert", "export", "--to=crystal", f"--checkpoint={run_dir}", f"--output={tmp_path / 'out'}", "--all",
            "--json"]

    def run(last: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LAST": str(last)}
        return subprocess.run([sys.executable, "-c", script, *argv], env=environment, capture_output=True, text=True,
                              check=False)

    first, second = run(30), run(0)
    assert (first.returncode, first.stdout.count("\n")) == (-9, 1)
    assert second.returncode == 0, second.stderr
    assert ["passed_over" in json.loads(line) for line in second.stdout.splitlines()] == [True, False, False]
    leaves = len(stream.Tree(files.as_path(run_dir / "exports" / NAMES[0] / "params")).arrays)
    assert int(second.stderr.splitlines()[-1]) == 3 * leaves - 29
    assert sorted(path.name for path in (tmp_path / "out").rglob(".*")) == []


# Space and memory


def test_space_is_checked_once_before_anything_is_written(run_dir: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    args: tuple[Any, ...] = (str(run_dir / "exports" / NAMES[0]), "crystal", tmp_path / "out", Options())
    size = sum(leaf.nbytes for leaf in folder_leaves(random_params(TINY)))
    usage, written = shutil.disk_usage(tmp_path), stream.new_file
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size - 1))
        patch.setattr(stream, "new_file", None)
        message = refused(calendar.export_checkpoint, *args)
        assert f"{2 * size - 1:,} bytes free, {2 * size:,} needed for the export ({size:,})" in message
        assert f"a copy of the checkpoint's arrays ({size:,}, of which 0 are there)" in message
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
        patch.setattr(stream, "new_file", written)
        calendar.export_checkpoint(*args)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))  # nothing is written any more
        assert calendar.export_checkpoint(*args)["unchanged"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """260 MiB in chunks of at most 60 MiB."""
    model = ModelConfig(vocab_size=8000, embed_dim=768, num_layers=8, num_heads=6, mlp_dim=2500, rotary_dim=4)
    params = random_params(model)
    assert sum(leaf.nbytes for leaf in folder_leaves(params)) >= 256 << 20
    place = tmp_path_factory.mktemp("large") / "w"
    checkpoint.save_weights(place, params, model, world / "tokenizer.json", INFO)
    return place


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
@pytest.mark.parametrize("to", ["crystal", "stablelm", "gguf"])
def test_memory_does_not_grow_with_the_checkpoint(to: str, large: Path) -> None:
    """A7: twice the largest chunk, or 128 MiB, and 64 more are allowed."""
    if to == "gguf":
        pytest.importorskip("gguf")
    script = ("import sys\nfrom pathlib import Path\nfrom benchmarks.export import measure\n"
              "found = measure('streamed', Path(sys.argv[1]), sys.argv[2])\n"
              "print(found['highest'] - found['before'])")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script, str(large), to], env=environment, capture_output=True,
                          text=True, check=True)
    assert float(done.stdout) <= 128 + 64


@pytest.mark.drill
def test_memory_at_the_shape_of_7b(tmp_path: Path) -> None:
    """A7 with two of its layers, whose chunks are as 64 devices write them: less than 64 MiB."""
    argv = ["benchmarks.export", "--full", "--layers=2", "--rounds=1", f"--folder={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout.split("| streamed")[1].split("|")[3]) <= 128 + 64


def folder_leaves(params: Any) -> list[np.ndarray]:
    if not isinstance(params, dict):
        return [params]
    return [leaf for value in params.values() for leaf in folder_leaves(value)]


def test_an_interrupted_copy_is_kept_and_a_refused_one_is_not(run_dir: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    args: tuple[Any, ...] = (str(run_dir / "exports" / NAMES[0]), "crystal", tmp_path / "out", Options())

    def check(*_: Any) -> Any:
        raise outcome

    monkeypatch.setattr(parity, "check", check)
    outcome: BaseException = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        calendar.export_checkpoint(*args)
    assert (tmp_path / ".out.scratch" / "embed").exists()
    outcome = UserError("logits differ")
    assert "logits differ" in refused(calendar.export_checkpoint, *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
