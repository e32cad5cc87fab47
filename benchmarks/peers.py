"""A training step of ours on the CPU beside MaxText's and Levanter's own trainers, in alternation.

    python -m benchmarks.peers [--maxtext=PYTHON] [--levanter=PYTHON] [--dtype=float32|bfloat16] [--rounds=5]

The comparison shape of benchmarks/train_step.py: 4 layers, 256 wide, 8 heads, MLP 688, vocabulary 4096, 256 long, batch
8, AdamW and clipping, tied embedding. Each program is a process of its own, which compiles once; they take turns of a
few steps, one at a time, the first of which isn't counted. Ratios are per round, so that a machine whose speed drifts
doesn't decide. Each peer runs with its own defaults (layers scanned, each computed again in the backward pass: "remat")
and without remat. PYTHON is the interpreter of an environment with the peer alone:

    uv venv --python=3.12 maxtext
    uv pip install --python=maxtext/bin/python --resolution=lowest "maxtext[tpu]==0.2.5"
    uv venv --python=3.12 levanter
    uv pip install --python=levanter/bin/python --prerelease=allow --exclude-newer=2025-10-20 \\
        levanter==1.2.dev1644 jax==0.7.2 gitpython chex

The first is MaxText's own rule, which takes the versions it was tested with (jax 0.11.1); the second, PyPI as of
Levanter's last release there, and the last jax that this runs with. Ours is Crystal, with biases, LayerNorm, loss per
source and a finiteness check; the peers' block is Llama 2's. Since compilers differ, ours runs in MaxText's environment
as well; Levanter's jax is too old for it. Ours begins with huge pages, as `train` does; the peers have them, too, with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command. Losses are printed to show that each program learns its batch.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.rounds import Worker, turns
from benchmarks.train_step import BATCH, DIM, HEADS, LAYERS, LENGTH, MLP, STEPS, VOCAB, ours
from crystal_jax.cli import use_huge_pages
from crystal_jax.errors import UserError

SHAPE = {"layers": LAYERS, "dim": DIM, "heads": HEADS, "mlp": MLP, "vocab": VOCAB, "length": LENGTH, "batch": BATCH}
BEST = "ours, no remat"
OURS = {"ours, remat full": ("full", 1), BEST: ("none", LAYERS)}
"""To remat and layers per iteration of the scan: ours by default, and as a model of this size is best run."""
PEERS = {"MaxText": "maxtext_step", "Levanter": "levanter_step"}

Taken = dict[str, list[dict[str, Any]]]
"""Program to what it answered in each round."""


def serve_ours(dtype: str, name: str) -> None:
    use_huge_pages()
    run = ours(dtype, *OURS[name])
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    losses: list[float] = []
    for _ in turns(lambda: {"loss": losses[-1], "jax": jax.__version__}):
        losses.append(run(tokens))


def commands(pythons: dict[str, str | None], dtype: str) -> dict[str, list[str]]:
    """Program to its command; a peer whose interpreter isn't given is left out."""

    def of_ours(python: str, name: str) -> list[str]:
        return [python, "-m", "benchmarks.peers", f"--dtype={dtype}", f"--serve={name}"]

    found = {name: of_ours(sys.executable, name) for name in OURS}
    if python := pythons["MaxText"]:
        found[f"{BEST}, MaxText's jax"] = of_ours(python, BEST)
    for peer, python in pythons.items():
        for remat, words in (("full", "its defaults: remat full"), ("none", "no remat")):
            if python:
                found[f"{peer}, {words}"] = [python, "-m", f"benchmarks.{PEERS[peer]}", dtype, remat, json.dumps(SHAPE)]
    return found


def measure(programs: dict[str, list[str]], rounds: int) -> Taken:
    """What each answered, the programs taking turns; the first round, which compiles, left out.

    Raises:
      UserError: a program ended; with its last line.
    """
    taken: Taken = {name: [] for name in programs}
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {}
        for number, (name, command) in enumerate(programs.items()):
            workers[name] = Worker(command, logs / str(number))
            stack.callback(workers[name].stop)
        for number in range(rounds + 1):
            for name, worker in workers.items():
                try:
                    answer = worker.take(STEPS)
                except RuntimeError as error:
                    raise UserError(f"{name}: {error}") from error
                if number:
                    taken[name].append(answer)
                print(f"round {number} of {rounds}, load {os.getloadavg()[0]:.1f}: {name}: {answer}", file=sys.stderr)
    return taken


def ratio(taken: Taken, name: str, base: str, clock: str) -> float:
    """The median over the rounds of what a step takes, of what it takes another program."""
    return statistics.median(one[clock] / other[clock] for one, other in zip(taken[name], taken[base], strict=True))


def render(taken: Taken) -> str:
    against = " | ".join(f"× {name}: CPU-s, tok/s" for name in OURS)
    lines = [f"| program | jax | CPU-s a step | tok/s | {against} | loss |",
             "|---|---|---|---|" + "---|" * (len(OURS) + 1)]
    for name, answers in taken.items():
        cpu, wall = (statistics.median(answer[clock] for answer in answers) for clock in ("cpu", "wall"))
        ratios = " | ".join(", ".join(f"{ratio(taken, name, base, clock):.2f}" for clock in ("cpu", "wall"))
                            for base in OURS)
        lines.append(f"| {name} | {answers[-1]['jax']} | {cpu:.3f} | {BATCH * LENGTH / wall:,.0f} | {ratios} | "
                     f"{answers[-1]['loss']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in PEERS:
        parser.add_argument(f"--{peer.lower()}", metavar="PYTHON", help=f"of an environment with {peer}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=OURS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_ours(args.dtype, args.serve)
        return
    programs = commands({peer: getattr(args, peer.lower()) for peer in PEERS}, args.dtype)
    taken = measure(programs, args.rounds)
    print(f"{args.dtype}, {os.cpu_count()} cores, {args.rounds} rounds of {STEPS} steps; medians; load "
          f"{os.getloadavg()[0]:.1f}\n\n{render(taken)}")


if __name__ == "__main__":
    main()
