"""Three shards of one source, each a process, begin and end at the same time: python tests/shard_race.py FOLDER TURNS.

Exits with 1 where one of them failed or the store isn't finished with the bytes of a run without shards.
"""

import multiprocessing
import os
import sys
from pathlib import Path

from kill_sweep import forked
from preparing import files_of, make, write_raw, write_tokenizer

from crystal_jax.data import prepare, tasks
from crystal_jax.data.tokenizer import Tokenizer

SHARDS = 3


def main() -> None:
    folder, turns = Path(sys.argv[1]), int(sys.argv[2])
    raw = write_raw(folder / "raw", inputs=SHARDS, documents=4, chars=30)
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    prepare.RUNNERS["local"] = lambda found, _: [tasks.prepare_input(task) for task in found]
    # What only costs time here: waiting for the disk, and proving the engine anew in each fork.
    os.fsync = lambda handle: None
    tasks._make_encoder(str(tokenizer), Tokenizer.load(tokenizer).fingerprint, "reference")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assert forked(lambda: make(raw, tokenizer, folder / "whole", engine="reference")) == 0
    expected = files_of(folder / "whole")
    context = multiprocessing.get_context("fork")

    def shard(index: int, output: Path) -> None:
        barrier.wait()
        make(raw, tokenizer, output, engine="reference", shard=(index, SHARDS))

    for turn in range(turns):
        barrier = context.Barrier(SHARDS)
        started = [context.Process(target=shard, args=(index, folder / str(turn))) for index in range(SHARDS)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0] * SHARDS, f"turn {turn}"
        assert files_of(folder / str(turn)) == expected, f"turn {turn}"


if __name__ == "__main__":
    main()
