"""The table of TPU generations against Google's pages, and its command line, which the scripts read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crystal_jax.errors import UserError
from crystal_jax.generations import (
    FLAG_SETS,
    GENERATIONS,
    by_device_kind,
    find_flags,
    find_slice,
    libtpu_arguments,
    main,
    topologies,
)

ROOT = Path(__file__).resolve().parents[1]

# Accelerator type to topology, chips and hosts, from Google's pages of each generation.
PUBLISHED = {
    "v4-8": ("2x2x1", 4, 1), "v4-16": ("2x2x2", 8, 2), "v4-32": ("2x2x4", 16, 4), "v4-64": ("2x4x4", 32, 8),
    "v4-512": ("4x8x8", 256, 64), "v4-1024": ("8x8x8", 512, 128), "v4-4096": ("8x16x16", 2048, 512),
    "v5p-8": ("2x2x1", 4, 1), "v5p-128": ("4x4x4", 64, 16), "v5p-256": ("4x4x8", 128, 32),
    "v5p-2048": ("8x8x16", 1024, 256), "v5p-8192": ("16x16x16", 4096, 1024),
    "v5p-384": None, "v5p:4x4x12": ("4x4x12", 192, 48), "v5p:16x16x24": ("16x16x24", 6144, 1536),
    "v5litepod-1": ("1x1", 1, 1), "v5litepod-8": ("2x4", 8, 1), "v5litepod-16": ("4x4", 16, 4),
    "v5e-32": ("4x8", 32, 8), "v5litepod-256": ("16x16", 256, 64),
    "v6e-4": ("2x2", 4, 1), "v6e-8": ("2x4", 8, 1), "v6e-128": ("8x16", 128, 32), "v6e-256": ("16x16", 256, 64),
    "tpu7x-8": ("2x2x1", 4, 1), "tpu7x-128": ("4x4x4", 64, 16),
    "v5p-7": None, "v5p-0": None, "v6e-512": None, "v5p:3x4x4": None, "v6e:4x4x4": None, "v5p": None, "": None,
    "h100-8": None, "v5p-128 ": None, "v5p:16x16x28": None,
}


@pytest.mark.parametrize("name, found", PUBLISHED.items())
def test_published_shapes(name: str, found: tuple[str, int, int] | None) -> None:
    if found is None:
        with pytest.raises(UserError, match="TPU t"):
            find_slice(name)
        return
    piece = find_slice(name)
    assert ("x".join(map(str, piece.topology)), piece.chips, piece.hosts) == found
    assert find_slice(piece.accelerator_type) == piece if ":" not in name else True


def test_each_shape_is_doubled_and_has_whole_hosts() -> None:
    for generation in GENERATIONS.values():
        for chips, topology in topologies(generation).items():
            piece = find_slice(f"{generation.name}:{'x'.join(map(str, topology))}")
            assert chips == piece.chips <= generation.largest
            assert piece.hosts * generation.chips_per_host == chips or piece.hosts == 1
            assert piece.devices == chips * generation.devices_per_chip


def test_rings() -> None:
    wraps = {"v5p-128": (True,) * 3, "v5p-64": (False,) * 3, "v6e-256": (True, True), "v6e-128": (False, True),
             "v5e-64": (False, False)}
    assert {name: find_slice(name).wrap for name in wraps} == wraps


def test_prices() -> None:
    assert find_slice("v5p-256").dollars_per_hour(spot=False) == (4.20 * 128, 4.20 * 128)
    low, high = find_slice("v5p-256").dollars_per_hour(spot=True) or (0, 0)
    assert (round(low, 2), round(high, 2)) == (119.04, 215.04)
    assert find_slice("tpu7x-8").dollars_per_hour(spot=True) is None


def test_flag_sets_are_off_unless_named() -> None:
    assert all(not find_flags("default", generation) for generation in GENERATIONS.values())
    text = libtpu_arguments(find_flags("async", GENERATIONS["v5p"]))
    assert "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true" in text
    assert "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false" in text
    assert all(set(flags) <= set(GENERATIONS) for flags in FLAG_SETS.values())
    with pytest.raises(UserError, match="for v5e there is default"):
        find_flags("async", GENERATIONS["v5e"])


def test_devices_by_jaxs_name() -> None:
    assert by_device_kind("TPU v5 lite") is GENERATIONS["v5e"]
    assert by_device_kind("cpu") is None


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["v5p-128", "--field=hosts"]) == 0
    assert capsys.readouterr().out == "16\n"
    assert main(["v6e-256", "--json", "--flags=async"]) == 0
    assert json.loads(capsys.readouterr().out)["runtime_version"] == "v2-alpha-tpuv6e"
    assert main(["v4-8"]) == 0
    assert "accelerator_type=v4-8\n" in capsys.readouterr().out
    for argv in (["v9-8"], ["v4-8", "--field=colour"], ["v4-8", "--flags=async"]):
        assert main(argv) == 1
        out, error = capsys.readouterr()
        assert not out and len(error.splitlines()) == 1


def test_it_needs_no_package() -> None:
    """A laptop that only launches has a bare Python."""
    result = subprocess.run([sys.executable, "-S", "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
                             "from crystal_jax.generations import main; sys.exit(main(['v4-8', '--field=chips']))"],
                            capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "4\n"), result.stderr
