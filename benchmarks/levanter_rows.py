"""Levanter's token cache and mixture on the rows that benchmarks/loader.py reads; run by it with Levanter's own Python.

    PYTHON -m benchmarks.levanter_rows FOLDER BATCH

Imports nothing of ours but the clock. Random rows of 2048 from three sources, shuffled, in blocks of 2048.
"""

import asyncio
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from levanter.data.mixture import MixtureDataset
from levanter.data.text import TokenSeqDataset
from levanter.store.cache import CacheLedger, SerialCacheWriter, TreeCache

from benchmarks.measure import Loader, measure_loader

LENGTH, WEIGHTS = 2048, {"a": 0.6, "b": 0.3, "c": 0.1}
DOCUMENT = 1 << 20
EXEMPLAR = {"input_ids": np.zeros(0, np.int32)}


def write(cache: Path, tokens: Path) -> None:
    if (cache / "ledger.json").exists():
        return
    flat = np.fromfile(tokens, "<u2").astype(np.int32)
    with SerialCacheWriter(str(cache), EXEMPLAR) as writer:
        for start in range(0, len(flat), DOCUMENT):
            writer.write_batch([{"input_ids": flat[start : start + DOCUMENT]}])


def main() -> None:
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    cache = folder / "levanter"
    write(cache, folder / "flat.tokens")
    loop = asyncio.new_event_loop()

    def open_loader() -> Loader:
        # TreeCache.load with the ledger given: its own reading of it differs between releases.
        ledger = CacheLedger.load(str(cache))
        key = jax.random.PRNGKey(0)
        sources = {name: TokenSeqDataset(TreeCache(str(cache), EXEMPLAR, ledger, None), LENGTH).shuffle(key)
                   for name in WEIGHTS}
        mixture = MixtureDataset(sources, WEIGHTS, 2048, key=key)

        def get(step: int) -> np.ndarray:
            rows = loop.run_until_complete(mixture.get_batch(range(step * batch, (step + 1) * batch)))
            return np.stack(rows)

        return Loader(get, lambda step: map(get, itertools.count(step)))

    with jax.default_device(jax.devices("cpu")[0]):
        print(json.dumps(measure_loader(open_loader, batch, steps=20_000)))


if __name__ == "__main__":
    main()
