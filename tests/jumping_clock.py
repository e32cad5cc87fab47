"""`crystal-jax` on a machine whose clock jumps: python tests/jumping_clock.py SECONDS,SECONDS,... ARGS.

The clock is off by each number in turn, for some readings each, and stays off by the last one. What isn't Python reads
the machine's own clock.
"""

import itertools
import sys
import time

READINGS = 20
"""Between two jumps."""


def jump(offsets: list[int]) -> None:
    turn = itertools.count()
    seconds, nanoseconds = time.time, time.time_ns

    def off() -> int:
        return offsets[min(next(turn) // READINGS, len(offsets) - 1)]

    time.time = lambda: seconds() + off()
    time.time_ns = lambda: nanoseconds() + off() * 10**9


if __name__ == "__main__":
    jump([int(number) for number in sys.argv.pop(1).split(",")])
    from crystal_jax.cli import main

    sys.exit(main())
