"""Kills `prepare` at its changes of files in turn, and lets it go on: python tests/kill_sweep.py FOLDER STEP.

The stop is exact: an audit hook of the interpreter counts what opens a file for writing, renames or removes one in
the output folder, and sends SIGKILL to its own process at the n-th. Each STEP-th is taken, and each of a JSON file;
prints the names of the files that were about to change. Each run is a fork, so that hundreds of them take seconds.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preparing import files_of, in_parts, make, write_raw, write_tokenizer

from crystal_jax.data import prepare, tasks
from crystal_jax.data.tokenizer import Tokenizer

CHANGES = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "open": 0}
"""Event to which of its arguments is the path that changes."""
NEVER = 0


def forked(work: Callable[[], Any]) -> int:
    """Runs it in a process of its own; returns how that ended, as a shell counts."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(folder: Path, number: int, log: int) -> None:
    """From now on, this process dies at the number-th change below a folder; `log` is told the file's name."""
    root = os.fspath(folder)
    seen = itertools.count(1)  # whose next number no two threads get

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(arguments[CHANGES[event]])
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # of a folder that is being removed
        if path.startswith(root) or inside:
            os.write(log, f"{os.path.basename(path)}\n".encode())
            if next(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def changes(log: int) -> list[str]:
    return os.read(log, 1 << 20).decode().split()


def main() -> None:
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    source = in_parts(write_raw(folder / "raw", inputs=2, documents=4, chars=30))
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    prepare.RUNNERS["local"] = lambda found, _: [tasks.prepare_input(task) for task in found]
    # What costs time and no kill can tell: waiting for the disk, and proving the engine anew in each fork.
    os.fsync = lambda handle: None
    tasks._make_encoder(str(tokenizer), Tokenizer.load(tokenizer).fingerprint, "reference")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    read, write = os.pipe()

    def run(output: Path, kill: int) -> int:
        def work() -> None:
            kill_at(output, kill, write)
            make(source, tokenizer, output, engine="reference")

        return forked(work)

    assert run(folder / "whole", NEVER) == 0
    expected = files_of(folder / "whole")
    names = changes(read)
    chosen = [number for number, name in enumerate(names, start=1) if number % step == 0 or ".json" in name]
    for number in chosen:
        output = folder / str(number)
        assert run(output, number) == -signal.SIGKILL
        assert run(output, NEVER) == 0
        assert files_of(output) == expected, f"other bytes after kill {number}, before {names[number - 1]}"
        changes(read)
    print(*[names[number - 1] for number in chosen])


if __name__ == "__main__":
    main()
