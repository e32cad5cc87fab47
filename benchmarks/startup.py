"""CPU seconds and peak memory from process start to the end of the first training step, ours against the plain program.

    python -m benchmarks.startup [--rounds=3]

Each line is a fresh process: imports, initial values, compiling, one step of the comparison shape. Cold is without a
compilation cache, warm with one that an earlier process filled. "imports" stops after importing what `train` imports.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SETUP = "import sys, os; sys.path[:0] = [{here!r}, {root!r}]; os.environ['JAX_PLATFORMS'] = 'cpu'; "
STEP = ("import numpy as np; t = np.random.default_rng(0).integers(0, ts.VOCAB, (ts.BATCH, ts.LENGTH + 1))"
        ".astype(np.int32); run(t)")
PROGRAMS = {
    "ours, imports": "import crystal_jax.train",
    "ours, first step": "import crystal_jax.train, train_step as ts; run = ts.ours('float32', 'full', 1); " + STEP,
    "plain, first step": "import train_step as ts; run = ts.the_plain('float32', True); " + STEP,
}


def measure(code: str, cache: str | None) -> tuple[float, float]:
    """(CPU seconds, peak MB) of a process."""
    environment = dict(os.environ)
    if cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    report = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    setup = SETUP.format(here=str(HERE), root=str(HERE.parent))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", setup + code + report]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for code in PROGRAMS.values():
            measure(code, cache)
        for _ in range(args.rounds):
            for name, code in PROGRAMS.items():
                for label, folder in (("cold", None), ("warm", cache)):
                    if "imports" not in name or label == "cold":
                        found.setdefault(f"{name}, {label}", []).append(measure(code, folder))
    for name, values in found.items():
        cpu, memory = (sorted(column)[len(column) // 2] for column in zip(*values, strict=True))
        print(f"{name:26} {cpu:6.2f} CPU-s   {memory:6.0f} MB   (median of {len(values)})")


if __name__ == "__main__":
    main()
