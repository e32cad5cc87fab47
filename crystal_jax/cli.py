"""The command line: a table of commands, and how each ends.

Exit codes: 0 done, 1 a user's mistake (one line), 3 preempted and saved, 4 can't be helped by a restart; anything else
means restart. Only the module of the command that is asked for is imported.
"""

import _thread
import argparse
import atexit
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from crystal_jax.config import nearest
from crystal_jax.errors import INTERRUPTED, UserError, explain

COMMANDS = {
    "prepare": ("crystal_jax.data.prepare", "raw documents to a token store"),
    "tokenizer": ("crystal_jax.data.tokenizer_training", "train a tokenizer of one's own"),
    "verify": ("crystal_jax.data.verify", "re-read a token store against its manifest"),
    "store": ("crystal_jax.data.tfds_export", "a token store as a TFDS dataset"),
    "recipe": ("crystal_jax.recipe", "show the plan of a config"),
    "train": ("crystal_jax.train", "train, or continue a run"),
    "inspect": ("crystal_jax.inspect", "what a step saw, which steps saw a document, what was consumed"),
    "replay": ("crystal_jax.replay", "make steps of a run again and compare them bit for bit"),
    "coord_check": ("crystal_jax.coord_check", "activation sizes against width: is the parametrisation right?"),
    "plan": ("crystal_jax.plan", "compile a config for a TPU slice without one: memory, speed, cost"),
    "report": ("crystal_jax.report", "pictures and a page from a run's metrics"),
    "score": ("crystal_jax.score", "log-probabilities of given tokens"),
    "generate": ("crystal_jax.generate", "complete text or code, fill in the middle"),
    "evaluate": ("crystal_jax.evaluation.command", "losses, benchmarks, code and infilling, over a run's checkpoints"),
    "execute": ("crystal_jax.execute", "score generated code in a sandbox"),
    "convert": ("crystal_jax.convert.command", "PyTorch checkpoints in and out"),
}


class Parser(argparse.ArgumentParser):
    """Its mistakes are the user's: one line and exit code 1."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{'' if message.endswith('?') else ';'} see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Before argparse, which would name a required flag that is missing rather than the mistyped one."""
        for arg in args if args and not self._subparsers else ():
            flag = arg.partition("=")[0]
            if arg == "--":
                break
            override = flag.startswith("--config.") and "--config" in self._option_string_actions
            # With a space it is a value, to argparse too: --prompt '--a b'.
            if flag.startswith("--") and " " not in flag and flag not in self._option_string_actions and not override:
                self.error(f"unknown flag {flag}{nearest(flag, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)


def start() -> NoReturn:
    """`main` as a process of its own."""
    if sys.argv[1:2] == ["train"]:
        use_huge_pages()
    ended: list[int] = []
    atexit.register(_leave, ended)  # before JAX is imported, so that it comes last
    ended.append(main())
    sys.exit(ended[0])


def use_huge_pages() -> None:
    """On a CPU, XLA has a step's buffers from malloc anew each time; their pages are made when they are first written.

    Malloc reads how large they are from the environment that a process begins with, so this one begins again.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave(ended: list[int]) -> None:
    """After Ctrl-C XLA may still compile in a thread of its own; taking its client down under it, as the interpreter's
    end does, is a segmentation fault.
    """
    if INTERRUPTED in ended:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(INTERRUPTED)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    # Orbax and the clients of gs:// log there what they also raise, and warn of metadata that no one needs.
    for logger in ("absl", "asyncio", "gcsfs", "google.auth"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    _use_no_missing_tpu()
    try:
        return _run(argv, name)
    except (Exception, KeyboardInterrupt) as error:
        return explain(name, error)


def _run(argv: list[str], name: str) -> int:
    parser = Parser(prog="crystal-jax", description="Pretrain language-and-code models in phases.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for known, (module, about) in COMMANDS.items():
        command = commands.add_parser(known, help=about, description=about, allow_abbrev=False)
        if known == name:
            importlib.import_module(module).add_arguments(command)
    if argv and not name and not argv[0].startswith("-"):
        parser.error(f"unknown command {argv[0]}{nearest(argv[0], COMMANDS)}")
    args, rest = parser.parse_known_args(argv)
    overrides = [arg for arg in rest if arg.startswith("--config.") and getattr(args, "config", None)]
    if unknown := [arg for arg in rest if arg not in overrides]:
        commands.choices[name].error(f"unrecognized arguments: {' '.join(unknown)}")
    if isinstance(getattr(args, "config", None), str):
        from crystal_jax.config_file import load_config

        args.config = load_config(args.config, overrides)
    return importlib.import_module(COMMANDS[name][0]).main(args) or 0


def _use_no_missing_tpu() -> None:
    """Where libtpu is installed for `plan` alone, it would complain at length that there is no TPU."""
    devices = [path for kind in ("accel", "vfio", "nvidia", "kfd") for path in Path("/dev").glob(f"{kind}*")]
    if not devices and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _unraisable(event: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C in the middle of a garbage collection, where JAX has a callback, would be lost: it comes again.

    After an error, TensorStore's other reads and writes complain that Orbax's event loop is gone: no one needs that.
    """
    if isinstance(event.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        again.start()
    elif "Event loop is closed" not in str(event.exc_value):
        sys.__unraisablehook__(event)
