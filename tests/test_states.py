"""Rolling states: damage is seen and gone around, what was interrupted is invisible, silent corruption has a name."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from crystal_jax import files, sharding, trees
from crystal_jax.config import CheckpointConfig, MeshConfig, ModelConfig, digest, to_dict
from crystal_jax.errors import FatalError, HardwareError, RestartError, UserError
from crystal_jax.fingerprint import _mix, _program, dispatch, fingerprint
from crystal_jax.model import Crystal, abstract_params, init_params
from crystal_jax.states import RollingStates, newest_state, remove_folder, saved_states
from crystal_jax.trees import DamageError

MODEL = ModelConfig(vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=16, rotary_dim=4)
SPECS = Crystal(MODEL).specs()
MESHES = {"data": MeshConfig(8, 1, 1), "mixed": MeshConfig(2, 2, 2), "fsdp": MeshConfig(1, 8, 1)}


def make_state(mesh: jax.sharding.Mesh, seed: int = 1) -> dict[str, Any]:
    count = jax.device_put(np.int32(7), sharding.replicated(mesh))
    mu, nu = (init_params(SPECS, seed + more, mesh) for more in (1, 2))
    return {"params": init_params(SPECS, seed, mesh), "moments": {"count": count, "mu": mu, "nu": nu}}


def abstract(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    params = abstract_params(SPECS, mesh)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return {"params": params, "moments": {"count": count, "mu": params, "nu": params}}


def accept(step: int, position: dict[str, Any]) -> None:
    assert position["step"] == step


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def save(kept: RollingStates, mesh: jax.sharding.Mesh, *steps: int) -> None:
    for step in steps:
        kept.save(step, make_state(mesh, step), {"model": to_dict(MODEL), "step": step, "plan_hash": "abc"})


def opened(run: Any, keep_last: int = 4, keep: tuple[int, ...] = (), **options: Any) -> RollingStates:
    return RollingStates(files.as_path(run) / "checkpoints", CheckpointConfig(keep_last=keep_last, **options), [*keep])


def saved_run(run: Path, mesh: jax.sharding.Mesh, *steps: int) -> Path:
    """A run with the states of these steps."""
    kept = opened(run)
    save(kept, mesh, *steps)
    kept.close()
    return run


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(MESHES["mixed"])


@pytest.fixture(scope="module")
def saved(mesh: jax.sharding.Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the states 1, 2 and 3."""
    return saved_run(tmp_path_factory.mktemp("saved"), mesh, 1, 2, 3)


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


# Fingerprints


def test_a_fingerprint_is_the_same_on_every_mesh_and_on_the_host() -> None:
    found = {name: fingerprint(init_params(SPECS, 1, sharding.make_mesh(mesh))) for name, mesh in MESHES.items()}
    host = fingerprint(jax.tree.map(np.asarray, init_params(SPECS, 1, sharding.make_mesh(MESHES["data"]))))
    assert host == found["data"] == found["mixed"] == found["fsdp"]
    assert all(len(value) == 16 for value in host.values()) and len(host) == 21


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_flipped_bit_every_swap_and_every_hole_shows(dtype: str) -> None:
    rng = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(rng.standard_normal((40, 2000)) * 1000).astype(dtype))
    original = fingerprint({"x": array})
    for _ in range(200):
        changed = array.copy()
        view = changed.reshape(-1).view(f"u{array.itemsize}")
        at = int(rng.integers(view.size))
        view[at] ^= np.asarray(1 << int(rng.integers(8 * array.itemsize)), view.dtype)
        assert fingerprint({"x": changed}) != original, f"bit at {at}"
    swapped, holed = array.copy(), array.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    holed[7, 100:200] = 0
    assert original not in (fingerprint({"x": swapped}), fingerprint({"x": holed}))


def test_two_changes_make_up_for_each_other_in_neither_sum() -> None:
    """A hundred thousand pairs, of which sums of weakly mixed values lose many: signs, low bits, swaps."""
    rng = np.random.default_rng(0)
    one, other = np.arange(1 << 17, dtype=np.uint32), rng.permutation(1 << 17).astype(np.uint32)
    bits = rng.standard_normal(1 << 17).astype(np.float32).view(np.uint32)
    apart = bits[one] != bits[other]
    for changed in (*(bits ^ np.uint32(1 << bit) for bit in (0, 1, 23, 30, 31)), None):
        then = (bits, bits) if changed is None else (changed, changed)
        pair = (other, one) if changed is None else (one, other)
        before = [sum(each) for each in zip(_mix(bits[one], one), _mix(bits[other], other), strict=True)]
        after = [sum(each) for each in zip(_mix(then[0][pair[0]], one), _mix(then[1][pair[1]], other), strict=True)]
        assert all((a != b)[apart].mean() > 0.9999 for a, b in zip(before, after, strict=True))


def test_a_fingerprint_takes_no_memory(mesh: jax.sharding.Mesh) -> None:
    params = init_params(SPECS, 1, mesh)["layers"]["mlp"]["up"]
    program = _program(mesh, params.sharding.spec).lower(params).compile()
    assert program.memory_analysis().temp_size_in_bytes < params.nbytes / 4


def corrupted(array: jax.Array, device: int) -> jax.Array:
    """With one bit of what one device has flipped."""
    shards = [shard.data for shard in array.addressable_shards]
    values = np.array(shards[device])
    values.view(np.uint32).flat[5] ^= 1 << 12
    shards[device] = jax.device_put(values, shards[device].device)
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def test_a_device_whose_copy_differs_is_named_and_nothing_is_saved(tmp_path: Path) -> None:
    spread = sharding.make_mesh(MESHES["data"])
    state = make_state(spread)
    state["moments"]["mu"]["embed"] = corrupted(state["moments"]["mu"]["embed"], 3)
    said = r"^moments.mu.embed: copies of it differ: device 3 of process 0 has \w{16}, the 7 others have \w{16}; "
    with pytest.raises(HardwareError, match=said) as caught:
        dispatch(state).leaves()
    assert caught.value.exit_code == 71
    kept = opened(tmp_path)
    kept.save(1, state, {"step": 1})
    with pytest.raises(HardwareError, match=said):
        kept.close()
    assert newest_state(tmp_path) is None


def test_two_copies_that_differ_are_both_named(mesh: jax.sharding.Mesh) -> None:
    bad = corrupted(init_params(SPECS, 1, mesh)["layers"]["mlp"]["up"], 0)
    with pytest.raises(HardwareError, match=r"device 0 of process 0 has \w+, device 4 of process 0 has \w+; the hard"):
        fingerprint({"up": bad})


# Damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def zero(file: Path) -> None:
    data = file.read_bytes()
    middle = len(data) // 3
    file.write_bytes(data[:middle] + bytes(min(4096, len(data) - middle)) + data[middle + 4096 :])


FAULTS: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip, "4 KB of zeros": zero, "cut in half": lambda file: file.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2]), "emptied": lambda file: file.write_bytes(b""),
    "deleted": Path.unlink}


def targets(state: Path) -> dict[str, Path]:
    """One file of each kind that decides what is restored."""
    def largest(item: str) -> Path:
        return max((state / item / "d").iterdir(), key=lambda file: file.stat().st_size)

    return {"parameters": largest("params"), "moments": largest("moments"),
            "database": state / "params" / "manifest.ocdbt", "names": state / "moments" / "_METADATA",
            "position": state / "position.json"}


@pytest.mark.parametrize("target", ["parameters", "moments", "database", "names", "position"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_seen_and_the_state_before_is_gone_on_from(
        fault: str, target: str, run: Path, mesh: jax.sharding.Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    file = targets(run / "checkpoints" / "3")[target]
    FAULTS[fault](file)
    kept = opened(run)
    if (fault, target) == ("deleted", "position"):
        assert kept.steps() == [1, 2], "as one that was never finished"
        return
    try:
        step, state, position = kept.restore_newest(abstract(mesh), accept)
    except FatalError:
        pytest.fail("fell behind the state before")
    assert bits(state) == bits(make_state(mesh, step)), "never anything but what was saved"
    if step == 3 and target == "names":
        return  # in a part that decides nothing
    said = capfd.readouterr().err
    assert step == position["step"] == 2 and "DAMAGED STATE" in said and "going on from step 2" in said
    assert (run / "damaged" / "3").is_dir() and kept.steps() == [1, 2]
    assert newest_state(run) == 2


def test_two_damaged_states_are_gone_around_and_three_end_the_run(run: Path, mesh: jax.sharding.Mesh) -> None:
    for step in (3, 2):
        flip(targets(run / "checkpoints" / str(step))["parameters"])
    (run / "damaged" / "3").mkdir(parents=True)
    (run / "damaged" / "3" / "kept").write_text("of the last time")
    kept = opened(run)
    found = kept.restore_newest(abstract(mesh), accept)
    assert found is not None and found[0] == 1
    assert sorted(entry.name for entry in (run / "damaged").iterdir()) == ["2", "3", "3-2"]
    save(kept, mesh, 2, 3)  # again, over the same steps
    kept.close()
    for step in (1, 2, 3):
        flip(targets(run / "checkpoints" / str(step))["parameters"])
    again = opened(run)
    with pytest.raises(FatalError, match="none of the newest states 3, 2, 1 can be used") as caught:
        again.restore_newest(abstract(mesh), accept)
    assert "\n" not in str(caught.value) and saved_states(run) == [1, 2, 3], "moved only once another is restored"


def test_a_leaf_that_is_missing_left_over_or_misshaped_is_named_and_gone_around(
        run: Path, mesh: jax.sharding.Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    """Written whole, but of another structure: Orbax restores some of these in silence."""
    other = {**make_state(mesh), "params": init_params(
        Crystal(ModelConfig(**{**to_dict(MODEL), "mlp_dim": 32})).specs(), 1, mesh)}
    kept = opened(run)
    kept.save(4, other, {"step": 4})
    kept.close()
    found = opened(run).restore_newest(abstract(mesh), accept)
    assert found is not None and found[0] == 3
    said = "leaf layers.mlp.down is float32[2, 32, 16], but the model wants float32[2, 24, 16]"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("error, kind, says", [
    (ValueError("UNAVAILABLE: no answer"), RestartError, "can't be read now"),
    (MemoryError(), RestartError, "can't be read now"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes"), RestartError, "can't be read now"),
    (PermissionError(13, "Permission denied"), UserError, "no permission to read it"),
    (ValueError("PERMISSION_DENIED: Error opening"), UserError, "no permission to read it")])
def test_what_says_nothing_of_the_files_is_no_damage(
        error: Exception, kind: type[UserError], says: str, run: Path, mesh: jax.sharding.Mesh,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    for place, name in ((files, "read_bytes"), (trees, "check_tree")):
        with monkeypatch.context() as patch, pytest.raises(kind, match=says) as caught:
            patch.setattr(place, name, fail)
            opened(run).restore_newest(abstract(mesh), accept)
        assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert saved_states(run) == [1, 2, 3] and not (run / "damaged").exists()


def test_another_run_and_a_newer_format_are_no_damage(run: Path, mesh: jax.sharding.Mesh) -> None:
    def refuse(step: int, position: dict[str, Any]) -> None:
        raise UserError("of another run")

    with pytest.raises(UserError, match="of another run"):
        opened(run).restore_newest(abstract(mesh), refuse)
    path = run / "checkpoints" / "3" / "position.json"
    for known in ({"format": 2}, {**json.loads(path.read_text()), "format": 2}):
        known.pop("digest", None)
        files.write_json(path, known | {"digest": digest(known)} if len(known) > 1 else known)
        with pytest.raises(UserError, match="format 2, but this version reads 1"):
            opened(run).restore_newest(abstract(mesh), accept)
    assert saved_states(run) == [1, 2, 3] and not (run / "damaged").exists()


# What is kept


def test_a_torn_deletion_is_neither_listed_nor_restored(run: Path, monkeypatch: pytest.MonkeyPatch,
                                                        mesh: jax.sharding.Mesh) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    kept = opened(run, keep_last=2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", denied)
        save(kept, mesh, 4)
        kept.wait()
    assert [note.split(": ")[1][:16] for note in kept.check()] == ["can't be removed"] * 2 and kept.check() == []
    assert {"1", "2"} <= {entry.name for entry in (run / "checkpoints").iterdir()}
    assert kept.steps() == saved_states(run) == [3, 4]
    save(kept, mesh, 5)
    kept.close()
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["4", "5"], "tried again"


def test_a_slow_save_is_said(tmp_path: Path, mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    wait = trees.Writer.wait
    monkeypatch.setattr(trees.Writer, "wait", lambda writer: go.wait(60) and wait(writer))
    kept = opened(tmp_path, slow_save_seconds=0.1)
    save(kept, mesh, 1)
    while not (said := kept.check()):
        pass
    assert "checkpoints/1: being saved since" in said[0] and "slow_save_seconds = 0.1" in said[0]
    go.set()
    kept.wait()
    assert kept.check() == []


def test_an_error_in_the_background_is_raised_at_the_next_look(tmp_path: Path, mesh: jax.sharding.Mesh,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(writer: trees.Writer) -> None:
        raise ConnectionResetError("the storage went away")

    monkeypatch.setattr(trees.Writer, "wait", fail)
    kept = opened(tmp_path)
    save(kept, mesh, 1)
    assert kept._thread
    kept._thread.join()
    with pytest.raises(ConnectionResetError, match="went away"):
        kept.check()
    assert newest_state(tmp_path) is None


# gs://


def test_states_on_gs(gcs: Any, mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch,
                      capfd: pytest.CaptureFixture[str]) -> None:
    """Saved, collected, damaged, restored on another mesh, and a deletion that was cut off."""
    run = files.as_path(gcs.folder())
    assert newest_state(run) is None
    kept = opened(run, keep_last=2, keep=(1,))
    save(kept, mesh, 1, 2, 3, 4)
    kept.close()
    assert saved_states(run) == [1, 3, 4]
    names = files.list_files(run / "checkpoints" / "4" / "params")
    data = max((name for name in names if name.startswith("d/")),
               key=lambda name: len(files.read_bytes(run / "checkpoints" / "4" / "params" / name)))
    path = run / "checkpoints" / "4" / "params" / data
    whole = bytearray(files.read_bytes(path))
    whole[len(whole) // 2] ^= 1
    files.write_bytes(path, bytes(whole))
    alone = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    kept = opened(run, keep_last=1)
    found = kept.restore_newest(abstract(alone), accept)
    assert found is not None and found[0] == 3 and bits(found[1]) == bits(make_state(mesh, 3))
    assert f"moved to {run}/damaged/4" in capfd.readouterr().err and saved_states(run) == [1, 3]
    assert len(files.list_files(run / "damaged" / "4" / "params")) == len(names)

    remove, calls = files.remove, []

    def cut_off(path: Any) -> None:
        calls.append(str(path))
        if len(calls) > 3:
            raise OSError("Forbidden: 403")
        remove(path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="403"):
        patch.setattr(files, "remove", cut_off)
        remove_folder(run / "checkpoints" / "1", "position.json")
    assert saved_states(run) == [3] and len(files.list_files(run / "checkpoints" / "1")) > 3
    save(kept, mesh, 5)
    kept.close()
    assert {name.split("/")[0] for name in files.list_files(run / "checkpoints")} == {"5"}


def test_no_bucket_is_one_line(gcs: Any, mesh: jax.sharding.Mesh) -> None:
    with pytest.raises(UserError) as caught:
        saved_states("gs://no-such-bucket-here/run")
    assert "\n" not in str(caught.value)


def test_damage_of_another_process_ends_ours_too(run: Path, mesh: jax.sharding.Mesh,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crystal_jax.states._everywhere", lambda fine: False)
    with pytest.raises(DamageError, match="another process can't read"):
        RollingStates(epath.Path(run / "checkpoints"), CheckpointConfig(), []).restore(3, abstract(mesh))
