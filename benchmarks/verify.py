"""How fast `verify` reads a store, next to sha256 alone, in GB per second of one core.

    python -m benchmarks.verify [--megabytes=512]

It should be 1 GB/s or more: bytes are hashed, and tokens scanned for control ids, block by block in the core's cache.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crystal_jax.data import store
from crystal_jax.data.verify import verify

SHARDS = 4
REPEATS = 5
READ = 1 << 20
VOCABULARY = 32032
SPECIAL = [0, 1, 2, *range(32000, 32022)]  # Crystal's


def make_store(path: Path, size: int) -> None:
    """A store of about `size` bytes of tokens; documents of 100 to 2000 tokens, 1000 on average as in SlimPajama."""
    rng = np.random.default_rng(0)
    documents = [np.concatenate([[1], rng.integers(3, 32000, length), [2]]) for length in rng.integers(98, 1998, 500)]
    shards = []
    for split in store.SPLITS:
        (path / split).mkdir(parents=True)
    for index in range(SHARDS):
        with store.ShardWriter(path / "train", f"{index:05d}", store.tokens_dtype(VOCABULARY)) as writer:
            for number in range(size // SHARDS // 2100):
                source = f"chunk1/example_train_{index}.jsonl.zst"
                writer.add(documents[number * 7 % 500], {"id": f"{source}:{number}", "source": source})
            shards.append({"ordinal": index, **writer.close()})
    totals = {field: sum(shard[field] for shard in shards) for field in ("tokens", "documents")}
    tokenizer = {"fingerprint": "", "vocab_size": VOCABULARY, "bos_id": 1, "eos_id": 2, "special_ids": SPECIAL}
    store.write_manifest(path, {
        "format": store.FORMAT, "name": "benchmark", "tokenizer": tokenizer, "control_ids": [],
        "splits": {"train": {**totals, "shards": shards}, "heldout": {"tokens": 0, "documents": 0, "shards": []}}})


def best(work: Callable[[], object], size: int) -> tuple[float, float]:
    """(GB/s of wall time, GB/s of CPU time), the best of some repeats."""
    rates = []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        rates.append((size / (time.perf_counter() - wall) / 1e9, size / (time.process_time() - cpu) / 1e9))
    return max(wall for wall, _ in rates), max(cpu for _, cpu in rates)


def hash_all(paths: list[Path]) -> None:
    buffer = memoryview(bytearray(READ))
    for path in paths:
        value = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                value.update(buffer[:size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    megabytes = parser.parse_args().megabytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        start = time.perf_counter()
        make_store(path, megabytes << 20)
        paths = sorted(path.glob("*/*"))
        size = sum(file.stat().st_size for file in paths)
        rate = size / 1e6 / (time.perf_counter() - start)
        print(f"{size / 1e6:.0f} MB, written at {rate:.0f} MB/s, {os.cpu_count()} cores")
        assert verify(path) == []
        for name, work in (("sha256 alone", lambda: hash_all(paths)), ("verify", lambda: verify(path))):
            wall, cpu = best(work, size)
            print(f"{name:14} {wall:5.2f} GB/s, {cpu:5.2f} GB per CPU second")


if __name__ == "__main__":
    main()
