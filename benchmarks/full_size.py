"""A dry run of the full 7B recipe's data: three phases, 1.392T tokens, stores of the published sizes in sparse files.

    python -m benchmarks.full_size [--folder=DIR] [--json]

Needs a file system with sparse files (ext4, xfs, btrfs, APFS) and about 0.5 GB of it. The sizes are the ones that the
recipe's epochs imply: SlimPajama about 690B tokens, StarCoder about 291B. The files are holes, except where the rows
that are looked at lie: there the dry run first writes text, a function of (shard, offset), and what the batches then
read is compared with it. Invariant: every number that is printed is counted from the batches, not from the plan alone.
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import synthetic
from benchmarks.measure import clocked, memory_mb, reset_peak
from crystal_jax.config import Config, Subset
from crystal_jax.data.pipeline import Batches, Draw, Stores, batch_hash
from crystal_jax.data.tokenizer import Tokenizer
from crystal_jax.phases import PhasePlan, make_plan
from crystal_jax.sharding import Part

from configs import crystal_7b

HOSTS = 16
"""Of a pod: seeking is timed for the rows of one."""
SEEKS = 32
SHARDS = {**dict.fromkeys(crystal_7b.SLIMPAJAMA, 925), "StarCoder": 800, "python": 40, "javascript": 24, "html": 24,
          "css": 12}
"""Of each source: SlimPajama's 59,166 files with --files_per_input=64, StarCoder's about 0.36B tokens each."""


def store_sizes(config: Config, shards: dict[str, int]) -> dict[str, dict[int, int]]:
    """Source to (ordinal to tokens), so that each phase reads its subset exactly as often as the recipe states."""
    rng = np.random.default_rng(0)
    length, found = config.data.sequence_length, {name: {} for name in config.sources}
    for placed in make_plan(config).phases:
        for name, epochs in placed.phase.epochs.items():
            files = placed.phase.subset.get(name, Subset()).files
            first, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[files]
            ordinals = range(first, shards[name], step)
            tokens = math.ceil(placed.quotas[name] / epochs) * length + 1
            ends = np.cumsum(rng.uniform(0.8, 1.2, len(ordinals)))
            ends = np.round(ends / ends[-1] * tokens).astype(np.int64)
            found[name].update(zip(ordinals, np.diff(ends, prepend=0).tolist(), strict=True))
    return found


class DryRun:
    """The batches of a config over sparse stores in `root`, which are made here."""

    def __init__(self, root: Path, config: Config, shards: dict[str, int]) -> None:
        config.data.root, config.data.tokenizer = str(root), "tokenizer.json"
        self.config = config
        path = synthetic.make_tokenizer(root)
        self.tokenizer = Tokenizer.load(path)
        self.text = np.concatenate([ids for _, ids in synthetic.make_documents(path, modules=40)])
        self.sizes = store_sizes(config, shards)
        with clocked() as self.making:
            self.claimed = sum(synthetic.write_sparse(root, config.sources[name].store, self.tokenizer, sizes)
                               for name, sizes in self.sizes.items())
        reset_peak()
        self.before = memory_mb()
        with clocked() as self.opening:
            self.stores = Stores(config)
            self.batches = Batches(config, self.stores)

    def fill(self, draws: list[Draw]) -> None:
        """Writes the text of these rows into the holes."""
        for draw in draws:
            for piece in draw.reading.rows.pieces(draw.row):
                synthetic.write_at(draw.reading.store.path, self.tokenizer, self.text, piece.shard, piece.start,
                                   piece.length)

    def written(self, draw: Draw) -> np.ndarray:
        """int32 [T + 1]: what `fill` wrote for a row."""
        pieces = draw.reading.rows.pieces(draw.row)
        return np.concatenate([synthetic.text_at(self.text, piece.shard, piece.start, piece.length)
                               for piece in pieces])

    def look(self, step: int) -> dict[str, Any]:
        """A whole batch: its sources, its hash, whether each row is what lies at its place, and its hosts' parts."""
        draws = self.batches.draws(step)
        self.fill(draws)
        with clocked() as clock:
            batch = self.batches[step]
        rows = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
        same = [bool(np.array_equal(rows[draw.slot], self.written(draw))) for draw in draws]
        parts = [Batches(self.config, self.stores, Part(HOSTS, (host,), (host,)).slots)[step]
                 for host in (0, HOSTS - 1)]
        share = len(rows) // HOSTS
        names = sorted(self.config.sources)
        return {
            "step": step + 1,
            "hash": batch_hash(batch),
            "sources": dict(Counter(names[index] for index in batch["source"])),
            "as_written": sum(same),
            "fim": sum(self.tokenizer.fim_prefix_id in row for row in rows),
            "faults": [draw.slot for draw, equal in zip(draws, same, strict=True) if not equal and not draw.fim_rate],
            "hosts_agree": all(np.array_equal(part["inputs"], part_of) for part, part_of in zip(
                parts, (batch["inputs"][:share], batch["inputs"][-share:]), strict=True)),
            "ms": clock.wall * 1e3,
        }

    def phase(self, placed: PhasePlan) -> dict[str, Any]:
        """What every source gives to a phase, beside its share and what there is of it."""
        before, after = self.batches.counts(placed.start), self.batches.counts(placed.end)
        sequences = placed.steps * placed.phase.global_batch_size
        total = sum(map(Fraction, placed.phase.mix.values()))
        readings = self.batches.readings[placed.index]
        sources = {}
        for name, share in placed.phase.mix.items():
            given = after[name] - before[name]
            sources[name] = {"given": given, "quota": placed.quotas[name],
                             "wanted": float(Fraction(share) / total * sequences),
                             "rows": readings[name].rows.num_rows, "epochs": given / readings[name].rows.num_rows}
        return {"name": placed.phase.name, "steps": placed.steps, "sequences": sequences, "sources": sources,
                "first": self.look(placed.start), "last": self.look(placed.end - 1)}

    def seek(self) -> list[float]:
        """Milliseconds to the rows of one host at steps all over the run."""
        steps = np.random.default_rng(1).integers(0, len(self.batches), SEEKS)
        host = Batches(self.config, self.stores, Part(HOSTS, (1,), (1,)).slots)
        times = []
        for step in steps.tolist():
            draws = self.batches.draws(step)
            share = len(draws) // HOSTS
            self.fill(draws[share : 2 * share])
            with clocked() as clock:
                host[step]
            times.append(clock.wall * 1e3)
        return sorted(times)


def dry_run(root: Path, config: Config, shards: dict[str, int]) -> dict[str, Any]:
    """The whole dry run as plain JSON data."""
    run = DryRun(root, config, shards)
    phases = [run.phase(placed) for placed in run.batches.plan.phases]
    times = run.seek()
    return {
        "stores": len(run.sizes), "shards": sum(map(len, run.sizes.values())),
        "tokens": {name: sum(sizes.values()) for name, sizes in run.sizes.items()}, "bytes": run.claimed,
        "making_s": run.making.wall, "opening_s": run.opening.wall, "opening_cpu_s": run.opening.cpu,
        "first_batch_ms": phases[0]["first"]["ms"], "seek_ms": {"median": times[len(times) // 2], "worst": times[-1]},
        "memory_mb": {"before": run.before, "peak": memory_mb("VmHWM")}, "phases": phases,
    }


def render(found: dict[str, Any]) -> str:
    lines = [
        f"{found['stores']} stores of {found['shards']:,} shards, {sum(found['tokens'].values()) / 1e9:,.1f}B tokens, "
        f"{found['bytes'] / 1e12:.2f} TB of sparse files made in {found['making_s']:.1f} s",
        f"opened in {found['opening_s']:.2f} s ({found['opening_cpu_s']:.2f} CPU-s); whole first batch "
        f"{found['first_batch_ms']:.0f} ms; seek to one host's rows of {HOSTS}: median "
        f"{found['seek_ms']['median']:.1f} ms, worst of {SEEKS} {found['seek_ms']['worst']:.1f} ms",
        f"memory {found['memory_mb']['before']:.0f} MB before opening, peak {found['memory_mb']['peak']:.0f} MB",
    ]
    for phase in found["phases"]:
        lines += ["", f"{phase['name']}: {phase['steps']:,} steps, {phase['sequences']:,} sequences",
                  f"  {'source':<14}{'given':>14}{'share x all':>18}{'quota':>14}{'rows there':>14}{'epochs':>9}"
                  f"{'first':>7}{'last':>6}"]
        for name, source in phase["sources"].items():
            lines.append(
                f"  {name:<14}{source['given']:>14,}{source['wanted']:>18,.2f}{source['quota']:>14,}"
                f"{source['rows']:>14,}{source['epochs']:>9.4f}{phase['first']['sources'].get(name, 0):>7}"
                f"{phase['last']['sources'].get(name, 0):>6}")
        for place in ("first", "last"):
            batch = phase[place]
            verdict = f"{len(batch['faults'])} rows wrong" if batch["faults"] else "every other row as written"
            hosts = "agree" if batch["hosts_agree"] else "DIFFER"
            lines.append(
                f"  {place} batch: step {batch['step']:,}, hash {batch['hash']}, {batch['fim']} rows with FIM, "
                         f"{verdict}, hosts {hosts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="for the sparse files, removed afterwards; the default is the system's")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        found = dry_run(Path(root), crystal_7b.get_config(), SHARDS)
    print(json.dumps(found, indent=1) if args.json else render(found))


if __name__ == "__main__":
    main()
