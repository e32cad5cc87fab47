"""`plan` against programs made for TPUs that aren't here; skipped without libtpu, which holds their compiler."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crystal_jax import plan as planning
from crystal_jax.ahead import Compiled, Refused, compile_step
from crystal_jax.buffers import PARTS, memory, read_allocations
from crystal_jax.config import Config
from crystal_jax.config_file import load_config
from crystal_jax.cost import ASSUMED, GIB, Machine, timeline
from crystal_jax.errors import UserError
from crystal_jax.generations import FLAG_SETS, GENERATIONS, find_slice
from crystal_jax.hlo import Collective, Done, Loop, Op, Program, Start, total
from crystal_jax.plan_text import render, render_sweep
from crystal_jax.topology import ENVIRONMENT, MISSING, is_installed

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(not is_installed(), reason=MISSING)
SMALL = ("--config.model.embed_dim=512", "--config.model.num_heads=4", "--config.model.mlp_dim=1024",
         "--config.model.num_layers=3", "--config.model.vocab_size=2048", "--config.model.max_length=512",
         "--config.data.sequence_length=512", "--config.training.dtype=bfloat16", "--config.training.mesh.fsdp=4",
         *(f"--config.phases[{phase}].global_batch_size=8" for phase in range(3)))
SLICE = "v5e:2x2"


def small(*overrides: str) -> Config:
    return load_config("configs/crystal_tiny.py", [*SMALL, *overrides])


@pytest.fixture(scope="session")
def compiled() -> Compiled:
    if not is_installed():
        pytest.skip(MISSING)
    return compile_step(small(), find_slice(SLICE), machine_code=False)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the compiler's process in /proc")
def test_the_compiler_ends_with_a_plan_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crystal_jax", "plan", "--config=configs/crystal_tiny.py", *SMALL,
               f"--topology={SLICE}"]

    def is_compiler(path: Path) -> bool:
        try:
            return str(folder) in path.read_text()
        except OSError:  # it has ended
            return False

    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as process:
        while not (found := list(tmp_path.glob("*/dump/*.jit_train_step.*"))) and process.poll() is None:
            time.sleep(0.1)
        folder = found[0].parents[1]
        child, = filter(is_compiler, Path("/proc").glob("[0-9]*/cmdline"))
        process.kill()
    while is_compiler(child):
        time.sleep(0.1)
    assert "code_bytes" not in json.loads((folder / "said.json").read_text()), "cut off before it was done"


def test_flops_are_those_of_the_model(compiled: Compiled) -> None:
    """By hand: 2 a parameter and token forward, 4 backward, and what full remat computes again: all but the last
    product of the MLP, whose result nothing in the backward pass reads."""
    config = small()
    model, tokens = config.model, 8 * 512 / 4
    mlp = 3 * model.embed_dim * model.mlp_dim
    layer = 4 * model.embed_dim**2 + mlp
    head = model.vocab_size * model.embed_dim
    matrices = tokens * (model.num_layers * (8 * layer - 2 * mlp / 3) + 6 * head)
    work = total(Program(compiled.program).events)
    # Splash in one block of 512: q k and p v, both again, and five products backward.
    kernels = tokens * model.num_layers * 2 * (2 * 2 + 5) * model.embed_dim * 512
    assert work.kernel_flops == pytest.approx(kernels)
    # The rest is the rotary product of q and k with a matrix [head, head].
    assert work.flops == pytest.approx(matrices, rel=0.05) and work.flops >= matrices


def test_memory_is_the_states_and_sums_up(compiled: Compiled) -> None:
    config, program = small(), Program(compiled.program)
    parts = memory(program, compiled.buffers, compiled.live_ranges, config.model.num_layers)
    assert set(parts) == set(PARTS) and min(parts.values()) >= 0
    count = 3 * (4 * 512**2 + 3 * 512 * 1024) + 2048 * 512
    assert parts["parameters"] == pytest.approx(count * 4 / 4, rel=0.05)
    assert parts["moments"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    found = read_allocations(compiled.buffers)
    assert sum(parts.values()) == found.total


BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <1 x @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 0, shape |f32[2,16,32]| at ShapeIndex {}, maybe-live-out:
 value: <2 w @0> (size=4096,offset=0): f32[2,16,32]{2,1,0}
allocation 2: size 64, output shape is |(f32[2,16,32])|, maybe-live-out:
allocation 3: size 9000, color 1, preallocated-temp:
 value: <3 fast @1> (size=9000,offset=0): f32[2,999]{1,0:S(1)}
allocation 4: size 20000, preallocated-temp:
 value: <4 saved{2} (phi) @0> (size=8192,offset=0): bf16[2,4,512]{2,1,0}
 value: <5 alias{} @0> (size=8192,offset=0): bf16[2,4,512]{2,1,0}
 value: <6 grad @0> (size=2048,offset=8192): f32[16,32]{1,0}
 value: <7 logits{} @0> (size=4000,offset=12000): f32[10,100]{1,0}
 value: <8 gone @0> (size=4000,offset=16000): f32[10,100]{1,0}
"""
LIVE = "HloLiveRange (max 9):\n  Live ranges at 5 (peak):\n" + "".join(
    f"    {name}: {size} bytes (cumulative: 1 bytes)\n" for name, size in
    (("w{}", 4096), ("saved{2}", 8192), ("alias{}", 8192), ("grad{}", 2048), ("logits{}", 4000)))
STEP = """ENTRY %main (w: f32[2,16,32]) -> f32[2,16,32] {
  ROOT %w = f32[2,16,32]{2,1,0} parameter(0), metadata={op_name="state.params[\\'layers\\'][\\'w\\']"}
}
"""


def test_what_lies_in_memory_at_the_fullest_moment() -> None:
    parts = memory(Program(STEP), BUFFERS, LIVE, layers=2)
    assert parts == {"parameters": 4096, "moments": 0, "inputs": 0, "gradients": 2048, "activations": 8192,
                     "temporaries": 64 + 4000, "unused": 20000 - 8192 - 2048 - 4000}


def test_collectives_are_on_the_axis_that_needs_them(compiled: Compiled) -> None:
    machine = Machine(find_slice(SLICE), compiled.mesh, compiled.places)
    line = timeline(Program(compiled.program).events, machine)
    gathered = sum(row.gb for row in line.traffic.values() if row.kind == "all-gather")
    # Each layer's weights once forward and once backward, in bfloat16.
    assert gathered * 1e9 == pytest.approx(2 * 2 * 3 * (4 * 512**2 + 3 * 512 * 1024), rel=0.25)
    assert {row.axis for row in line.traffic.values() if row.gb > 1e-4} == {"fsdp"}
    assert line.seconds >= line.computing + line.kernels + line.exposed - 1e-9


@needs_compiler
def test_gradients_come_back_in_parts() -> None:
    """Reduce-scattered over fsdp, then summed over the copies, a quarter each: no whole weight is all-reduced."""
    config = small("--config.model.embed_dim=2048", "--config.model.num_heads=16", "--config.model.mlp_dim=8192",
                   "--config.training.mesh.data=4",
                   *(f"--config.phases[{phase}].global_batch_size=16" for phase in range(3)))
    compiled = compile_step(config, find_slice("v5p:2x2x4"), machine_code=False)
    line = timeline(Program(compiled.program).events, Machine(find_slice("v5p:2x2x4"), compiled.mesh, compiled.places))
    # In bfloat16: three layers, and the embedding as input and as output.
    weights = 2 * (3 * (4 * 2048**2 + 3 * 2048 * 8192) + 2 * 2048 * 2048)
    moved = {(row.kind, row.axis): row.gb * 1e9 for row in line.traffic.values()}
    assert moved["reduce-scatter", "fsdp"] == pytest.approx(weights, rel=0.05)
    assert moved["all-reduce", "data"] == pytest.approx(weights / 4, rel=0.05)
    assert sum(size for (kind, _), size in moved.items() if kind == "all-reduce") < weights / 4 * 1.05


def test_the_text_and_the_json_are_the_same_plan(compiled: Compiled) -> None:
    config, piece = small(), find_slice(SLICE)
    found = {"name": "x", "topology": SLICE, "slices": 1, "chips": 4, "flags": "default", "libtpu": "0",
             "compile_seconds": 1.0, **planning.describe(compiled, config, piece, 1)}
    assert json.loads(json.dumps(found)) == found
    text = render(found)
    assert max(map(len, text.splitlines())) <= 120
    assert f"{found['memory']['used'] / GIB:.2f}" in text and f"MFU {found['step']['mfu']:.1%}" in text
    assert "predicted, not measured" in text and "on demand" in text
    dollars = found["recipe"]["dollars"]["on_demand"][0]
    assert dollars == pytest.approx(found["recipe"]["days"] * 24 * 4 * GENERATIONS["v5e"].on_demand)


def test_one_that_does_not_fit_says_so_with_numbers_and_what_does(
        monkeypatch: pytest.MonkeyPatch, compiled: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    from crystal_jax import cli

    def compile_one(config: Config, *_: Any) -> Compiled:
        too_much = config.training.remat != "full" or config.training.accumulate == 1
        return dataclasses.replace(compiled, refused="Ran out of memory on HBM" if too_much else "")

    monkeypatch.setattr(planning, "compile_step", compile_one)
    code = cli.main(["plan", "--config=configs/crystal_tiny.py", f"--topology={SLICE}", *SMALL,
                     "--config.training.remat=none"])
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]
    assert code == 1 and not out
    assert "out of memory" in last and "of 15.75 GiB" in last
    assert "this fits" in last and "--config.training.remat=full" in last and "--config.training.accumulate=2" in last


def test_a_sweep_ranks_what_fits_and_says_why_the_rest_does_not(monkeypatch: pytest.MonkeyPatch,
                                                               compiled: Compiled) -> None:
    def compile_one(config: Config, *_: Any) -> Compiled:
        mesh = config.training.mesh
        if mesh.tensor == 2:
            raise Refused("config.model.num_heads: 5 doesn't divide into 2 equal parts")
        sizes = {"slice": 1, "data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
        return dataclasses.replace(compiled, mesh=sizes, refused="Ran out of memory" if mesh.data == 2 else "")

    monkeypatch.setattr(planning, "compile_step", compile_one)
    rows = planning.sweep(small(), find_slice(SLICE))
    meshes = [tuple(row["mesh"][axis] for axis in ("data", "fsdp", "tensor")) for row in rows]
    assert {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)} <= set(meshes)
    fitting = [row for row in rows if "refused" not in row]
    assert rows[:len(fitting)] == fitting and {row["remat"] for row in fitting} > {"full", "none"}
    text = render_sweep(rows)
    assert "out of memory: " in text and "doesn't divide" in text and "the first: --config" in text
    huge = small("--config.model.num_layers=10000")
    assert all("alone are" in row["refused"] for row in planning.sweep(huge, find_slice("v5e:1x1")))


def test_arguments_reach_the_compiler_and_the_budget_stays(
        monkeypatch: pytest.MonkeyPatch, compiled: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    from crystal_jax import cli
    from crystal_jax.phases import make_plan

    asked: list[tuple[Config, tuple[Any, ...]]] = []
    monkeypatch.setattr(planning, "compile_step", lambda config, *rest: (asked.append((config, rest)), compiled)[1])
    argv = ["plan", "--config=configs/crystal_tiny.py", *SMALL, "--config.training.mesh.data=1", "--quick", "--json"]
    assert cli.main([*argv, "--topology=v6e:2x4", "--slices=2", "--batch_per_chip=3", "--flags=async"]) == 0
    found = json.loads(capsys.readouterr().out)
    (config, (piece, slices, flags, machine_code, _)), = asked
    assert (config.training.mesh.slice, piece.chips, slices, machine_code) == (2, 8, 2, False)
    assert flags == FLAG_SETS["async"]["v6e"]
    assert {phase.global_batch_size for phase in config.phases} == {3 * 8 * 2}
    before, after = make_plan(small()), make_plan(config)
    assert after.tokens(after.total_steps) == pytest.approx(before.tokens(before.total_steps), rel=0.1)
    assert found["batch"]["sequences_per_chip"] == 3 and found["chips"] == 16


def test_a_layout_in_words() -> None:
    assert planning.layout(small("--config.training.mesh.data=-1"), 64) == "data 16 x fsdp 4, remat full"
    assert planning.layout(small("--config.training.mesh.fsdp=1"), 1) == "one device, remat full"


@pytest.mark.parametrize(("argv", "said"), [
    (["--topology=v9:2x2"], "generations: v4, v5e"),
    (["--topology=v5e:3x3"], "v5e comes as"),
    (["--topology=v5e:2x2", "--flags=fast"], "for v5e there is default"),
    (["--topology=v5e:2x2", "--slices=0"], "--slices=0: must be above 0"),
    (["--topology=v5e:2x2", "--batch_per_chip=-1"], "--batch_per_chip=-1: must be above 0"),
])
def test_mistakes_are_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from crystal_jax import cli

    assert cli.main(["plan", "--config=configs/crystal_tiny.py", *argv]) == 1
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1]


@needs_compiler
@pytest.mark.parametrize(("override", "said"), [
    ("--config.training.mesh.fsdp=3", "the sizes must multiply to 4"),
    ("--config.phases[0].global_batch_size=9", "doesn't divide into 4"),
])
def test_what_the_devices_do_not_take_is_the_configs_line(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        planning.plan(small("--config.training.mesh.data=1", override), find_slice(SLICE), machine_code=False)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"-r requirements/tpu\.txt$"):
        planning.plan(small(), find_slice(SLICE))


@needs_compiler
def test_every_flag_set_is_taken_by_the_pinned_compiler() -> None:
    """And one that it doesn't know is refused, so that the first says something."""
    sets = {name: {generation: flags for generation, flags in by.items() if flags} for name, by in FLAG_SETS.items()}
    program = f"""if True:
        import jax
        from crystal_jax.generations import find_slice
        from crystal_jax.topology import described
        for name, by in {sets!r}.items():
            for generation, flags in by.items():
                shape = "2x2x1" if find_slice(generation + "-8").generation.torus_dims == 3 else "2x2"
                device = described(find_slice(generation + ":" + shape))[0]
                where = jax.sharding.SingleDeviceSharding(device)
                lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8, 128), "float32", sharding=where))
                lowered.compile(compiler_options=flags)
                try:
                    lowered.compile(compiler_options={{"xla_tpu_no_such_flag": True}})
                except jax.errors.JaxRuntimeError as error:
                    print(name, generation, "No such" in str(error))
    """
    result = subprocess.run([sys.executable, "-c", program], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines() == [f"{name} {generation} True" for name, by in sets.items() for generation in by]

@needs_compiler
def test_what_the_guide_launches_can_be_laid_on_its_slices() -> None:
    """Each row of docs/tpu.md's table and the example's settings: mesh, batch and model."""
    rows = re.findall(r"^\| ((?:v\d|tpu)\S*) \|[^|]*\| (`.*?`) \|", (ROOT / "docs/tpu.md").read_text(), re.M)
    asked = [(kind, [f"--config.training.{field}" for field in re.findall(r"`(.*?)`", given)]) for kind, given in rows]
    example = (ROOT / "tpu/example.env").read_text()
    kind = re.search(r"^TPU_TYPE=(\S+)", example, re.M)
    given = re.findall(r"^  (--config\.training\.\S+)", example, re.M)
    assert len(asked) == 5 and kind and given
    program = f"""if True:
        from crystal_jax import sharding
        from crystal_jax.config import MeshConfig
        from crystal_jax.config_file import load_config
        from crystal_jax.errors import UserError
        from crystal_jax.generations import find_slice
        from crystal_jax.topology import described
        for kind, given in {[*asked, (kind[1], given)]!r}:
            config = load_config("configs/crystal_7b.py", given)
            mesh = sharding.make_mesh(config.training.mesh, described(find_slice(kind)))
            sharding.check_divisible(config, mesh)
            print(kind, mesh.shape["fsdp"])
        config.training.mesh = MeshConfig(data=16, fsdp=4, tensor=4)
        try:
            sharding.make_mesh(config.training.mesh, described(find_slice("v4:4x8x8")))
        except UserError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", program], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    *laid, refused = result.stdout.splitlines()
    assert [line.split()[0] for line in laid] == [kind for kind, _ in asked] + ["v5p-256"]
    assert refused == ("config.training.mesh: slice=1, data=16, fsdp=4, tensor=4 can't be laid on 4x8x8 chips: an axis "
                       "must be made of whole sides of them; `plan --sweep` lists the meshes that can")


MACHINE = Machine(find_slice("v5p:4x4x4"), {"slice": 1, "data": 4, "fsdp": 16, "tensor": 1},
                  [[0, x, y, z, 0] for x in range(4) for y in range(4) for z in range(4)])
WHOLE = Collective("all-gather", 10**9, tuple(range(16)), "gather")


def test_links_by_the_sides_of_the_torus() -> None:
    rate = ASSUMED["network"] * 180e9
    assert MACHINE.axis(range(16)) == "fsdp" and MACHINE.axis((0, 16, 32, 48)) == "data"
    assert MACHINE.axis(range(64)) == "data+fsdp"
    assert MACHINE.transfer(WHOLE) == pytest.approx(1e9 * 15 / 16 / (2 * rate))
    ring = Collective("all-reduce", 10**9, (0, 16, 32, 48), "sum")
    assert MACHINE.transfer(ring) == pytest.approx(2 * 1e9 * 3 / 4 / rate)
    half = Collective("all-gather", 10**9, (0, 1), "half")
    assert MACHINE.transfer(half) == pytest.approx(1e9 / 2 / rate)  # half a ring, but never below one side's links


def test_slices_exchange_their_parts_over_the_network() -> None:
    two = Machine(find_slice("v5p:2x2x1"), {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1},
                  [[piece, x, y, 0, 0] for piece in range(2) for x in range(2) for y in range(2)])
    both = Collective("all-reduce", 8 * 10**9, tuple(range(8)), "sum")
    inside = Collective("all-reduce", 8 * 10**9, (0, 1, 2, 3), "sum")
    apart = 2 * 2e9 / 2 / (ASSUMED["network"] * 6.25e9)
    assert two.transfer(both) == pytest.approx(two.transfer(inside) + apart)


def test_the_network_between_slices_is_another_than_the_links() -> None:
    two = Machine(find_slice("v5p:2x2x1"), {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1},
                  [[piece, x, y, 0, 0] for piece in range(2) for x in range(2) for y in range(2)])
    inside = Collective("all-reduce", 10**9, (0, 1, 2, 3), "inside")
    apart = Collective("all-reduce", 10**9, (0, 4), "apart")
    found = timeline((Start(apart, False), Start(inside, True), Done("apart")), two)
    assert found.seconds == pytest.approx(max(two.transfer(apart), two.transfer(inside)))
    assert two.transfer(apart) == pytest.approx(2 * 1e9 / 2 / (ASSUMED["network"] * 6.25e9))


def test_waiting_is_what_computing_does_not_cover() -> None:
    product = Op(flops=1e12, cycles=0)
    seconds = 1e12 / 1e12
    machine = copy.copy(MACHINE)
    object.__setattr__(machine, "seconds", lambda op: (op.flops / 1e12 or op.bytes, 0.0))
    object.__setattr__(machine, "transfer", lambda collective: 3.0)
    hidden = timeline((Start(WHOLE, False), product, product, Done("gather")), machine)
    assert (hidden.seconds, hidden.exposed) == (3.0, pytest.approx(3.0 - 2 * seconds))
    row, = hidden.traffic.values()
    assert (row.gb, row.synchronous_gb, row.bare_gb) == (1.0, 0.0, 0.0)
    bare = timeline((Start(WHOLE, False), Op(bytes=5.0), Done("gather")), machine)
    assert (bare.exposed, next(iter(bare.traffic.values())).bare_gb) == (0.0, 1.0)
    loop = timeline((Loop(4, (Start(WHOLE, True), product)),), machine)
    assert (loop.seconds, loop.exposed) == (4 * 4.0, 12.0)
    assert next(iter(loop.traffic.values())).synchronous_gb == 4.0
    queue = timeline((Start(WHOLE, False), Start(Collective("all-gather", 1, (0, 1), "b"), True)), machine)
    assert queue.seconds == 6.0  # one after the other


@pytest.mark.drill
@needs_compiler
@pytest.mark.parametrize(("slice_", "slices", "flags"), [
    ("v4:2x2x2", 1, "default"), ("v5e:4x4", 2, "default"), ("v5p:2x2x2", 1, "async"), ("v6e:4x4", 1, "async"),
    ("tpu7x:2x2x1", 1, "default")])
def test_every_generation(slice_: str, slices: int, flags: str) -> None:
    piece = find_slice(slice_)
    config = small("--config.training.mesh.fsdp=-1", "--config.training.mesh.data=1",
                   f"--config.training.mesh.slice={slices}",
                   *(f"--config.phases[{phase}].global_batch_size={piece.devices * slices}" for phase in range(3)))
    found = planning.plan(config, piece, slices, flags)
    assert found["memory"]["fits"] and found["assumed"]["from_cycles"] and 0 < found["step"]["mfu"] < 1
    assert (found["mesh"]["slice"], found["chips"]) == (slices, piece.chips * slices)
    exchanged = sum(row["gb"] for row in found["collectives"] if row["axis"] == "slice")
    # Each device's share of the gradients, in the compute dtype.
    shares = found["memory"]["parts"]["parameters"] / 2 / 1e9 if slices > 1 else 0
    assert shares <= exchanged <= 1.5 * shares
