"""Where the tasks of `prepare` run: processes of this machine, or Apache Beam.

Invariant: a runner only decides where `prepare_input` runs. Returning means that every task has its record; a process
that is started here ends with the one that started it.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shlex
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import PurePath
from typing import Any

from etils import epath
from tqdm import tqdm

from crystal_jax import files
from crystal_jax.data.tasks import PROGRESS, Task, prepare_input, record
from crystal_jax.errors import UserError, counted, install

POLL_SECONDS = 0.5
AHEAD = 4
"""Tasks per worker that the pool has, of which a worker has one: it never waits for the next."""
EXPANSION = {".zst": 3.5, ".gz": 3.0, ".parquet": 2.5}
"""Bytes of text in a byte of such a file, for the first estimate of the time left: SlimPajama's ratio, gzip's on text,
StarCoder's. The inputs that are done correct it."""
BAR = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt}, ETA {remaining}{postfix}"
FAILED = ".failed"
"""Ends the name of the record of an input that Beam couldn't prepare."""
TASKS = ".tasks"
"""Ends the name of the list of a run's tasks, which begins with its hash."""


def run_local(tasks: list[Task], workers: int) -> None:
    """Prepares each task's input in a pool of `workers` processes, with a progress bar on stderr.

    Raises:
      UserError: the first one of a task, or a worker was killed; the other workers are ended at once.
    """
    context = multiprocessing.get_context("spawn")
    done: Any = context.Array("Q", 2)  # bytes of text, tokens
    ours, theirs = context.Pipe()
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (done, theirs))
    try:
        with _bar(tasks) as bar:
            _feed(pool, tasks, workers, done, bar)
    except BrokenProcessPool as error:
        raise UserError(f"{tasks[0].folder}: a worker was killed, perhaps for lack of memory; run the same command "
                        "again, with fewer --workers") from error
    finally:
        ours.close()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started inside never see Ctrl-C, which goes to the whole group; here it counts afterwards."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a process inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _bar(tasks: list[Task]) -> Iterator["tqdm[Any]"]:
    name = PurePath(tasks[0].folder).name
    with tqdm(total=round(sum(map(_expected, tasks))), unit="B", unit_scale=True, desc=name, mininterval=1,
              bar_format=BAR) as bar:
        yield bar


def _expected(task: Task) -> float:
    return task.item.bytes * EXPANSION.get(PurePath(task.item.files[0][1]).suffix if task.item.files else "", 1.0)


def _feed(pool: ProcessPoolExecutor, tasks: list[Task], workers: int, done: Any, bar: "tqdm[Any]") -> None:
    """Gives the pool all tasks and moves the bar until they have ended; raises what the first that failed raised.

    It has a few per worker at a time: `wait` looks at every future each time, 0.26 s with 59,166 of them.
    """
    text = expected = 0.0
    whole = sum(map(_expected, tasks))
    left = iter(tasks)
    waiting: dict[Future[int], Task] = {}
    ended = 0
    while ended < len(tasks):
        with _without_ctrl_c():  # the pool may start a process
            for task in itertools.islice(left, AHEAD * workers - len(waiting)):
                waiting[pool.submit(_prepare_in_worker, task)] = task
        finished = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done
        for future in finished:
            text += future.result()
            expected += _expected(waiting.pop(future))
            ended += 1
        if expected:
            bar.total = max(round(whole * text / expected), done[0])
        bar.set_postfix(tokens=f"{done[1]:,}", inputs_left=len(tasks) - ended, refresh=False)
        bar.update(done[0] - bar.n)


_done: Any = None
"""In a worker: bytes of text and tokens of all workers together."""


def _start_worker(done: Any, parent: Connection) -> None:
    global _done
    _done = done
    os.environ["RAYON_NUM_THREADS"] = "1"  # a process per input is the parallelism
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """An orphan would write on for hours beside the command that was started again."""
    multiprocessing.connection.wait([parent])
    os._exit(1)


def _prepare_in_worker(task: Task) -> int:
    return prepare_input(task, _count)


def _count(size: int, tokens: int) -> None:
    with _done.get_lock():
        _done[0] += size
        _done[1] += tokens


def check_beam() -> None:
    """Raises UserError where apache-beam isn't installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(f"--runner: beam needs the package apache-beam; {install('data')}")


def run_beam(tasks: list[Task], options: str) -> None:
    """Prepares each task's input on Apache Beam, whose `options` are those of its own command line.

    The workers must be able to read the input and the tokenizer, and to write the output, by the same paths. An input
    that is damaged doesn't stop the others.

    Raises:
      UserError: inputs that are damaged, the first one by name.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    for failure in _failures(tasks):  # of an earlier run
        failure.unlink()
    # In a file, since Dataflow takes pipelines of up to 10 MB: 3,000 inputs of 16 files.
    data = pickle.dumps(tasks)
    listed = record(tasks[0].folder, hashlib.sha256(data).hexdigest()[:16]).with_suffix(TASKS)
    files.write_bytes(listed, data)
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        # Reshuffle, so that a runner doesn't fuse the list with the work and give it all to one worker.
        numbers = pipeline | beam.Create(range(len(tasks))) | beam.Reshuffle()
        _ = numbers | beam.Map(_attempt, os.fspath(listed))
    errors = [files.read_json(failure)["error"] for failure in _failures(tasks)]
    if errors:
        others = counted(len(errors) - 1, "more input")
        raise UserError(errors[0] + (f" (and {others}; see *{FAILED}.json in {PROGRESS}/)" if errors[1:] else ""))


def _failures(tasks: list[Task]) -> list[epath.Path]:
    present = files.list_files(files.as_path(tasks[0].folder) / PROGRESS)
    paths = [record(task.folder, f"{task.name}{FAILED}") for task in tasks]
    return [path for path in paths if path.name in present]


def _attempt(number: int, listed: str) -> None:
    """Leaves a user's mistake to be found: a runner would try again and again, and then show a traceback."""
    task = _read_tasks(listed)[number]
    try:
        prepare_input(task)
    except UserError as error:
        files.write_json(record(task.folder, f"{task.name}{FAILED}"), {"error": str(error)})


@functools.lru_cache(maxsize=1)
def _read_tasks(listed: str) -> list[Task]:
    """Once per process."""
    tasks: list[Task] = pickle.loads(files.read_bytes(listed))
    return tasks
