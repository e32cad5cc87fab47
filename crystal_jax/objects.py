"""Objects on gs:// that several processes may want to change: each change names the generation that it changes.

Its invariant: a change is made once and whole, or not at all. A request that storage has carried out, but whose answer
was lost, is sent again by the clients and refused then; what lies there tells that from another process's change.
"""

import threading
import time
from typing import Any

from crystal_jax import files

MISSING = b"\x02"
"""TensorStore's generation of an object that isn't there."""
SECONDS_BETWEEN = 1.0
"""GCS takes one change of an object a second; more are slowed down."""


class Changed(Exception):
    """Another process has changed, made or removed the object."""


def read(path: files.Location) -> tuple[bytes, bytes]:
    """(contents, generation); (b"", MISSING) of an object that isn't there."""
    store, key = files.kvstore(path)
    found = store.read(key).result()
    return found.value, found.stamp.generation


def change(path: files.Location, data: bytes | None, generation: bytes) -> bytes:
    """Writes `data`, or removes the object for None, if it still has this generation; returns its new one.

    `data` must differ from what any other process would write.

    Raises:
      Changed: it has another generation.
    """
    store, key = files.kvstore(path)
    made = store.write(key, data, if_equal=generation).result().generation
    if made:
        return made
    found, now = read(path)
    if data is None and now == MISSING:
        return now
    if data is not None and now != MISSING and found == data:
        return now
    raise Changed(f"{path}: another process has written to it")


class Appender:
    """Appends lines to an object in the background, all that wait in one change: storage joins what is there and them.

    So an append costs two requests however long the object is. A line counts once `flush` has returned.
    """

    def __init__(self, path: files.Location):
        self._path, self._part = files.as_path(path), files.as_path(path).with_name(".metrics.part")
        self._size, self._generation = self._found()
        self._lines: list[bytes] = []  # not yet there
        self._error: BaseException | None = None
        self._closing = self._awaited = False
        self._changed = threading.Condition()
        if self._size and files.read_ranges(self._path, [self._size - 1], [1]) != [b"\n"]:
            self._lines.append(b"\n")  # half a line, copied here from a disk: the next is one of its own
        self._thread = threading.Thread(target=self._work, name="appender", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Takes a line.

        Raises:
          Exception: what went wrong with an earlier one.
        """
        with self._changed:
            self._raise()
            self._lines.append(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all lines are there.

        Raises:
          Exception: what went wrong.
        """
        with self._changed:
            self._awaited = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error or not self._lines)
            self._awaited = False
            self._raise()

    def close(self) -> None:
        """`flush`, and the end of the thread."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _work(self) -> None:
        began = -SECONDS_BETWEEN
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing)
                if not self._lines:
                    break
                # Lines of the next second go together, unless someone waits for them.
                self._changed.wait_for(lambda: self._closing or self._awaited,
                                       began + SECONDS_BETWEEN - time.monotonic())
                count, data = len(self._lines), b"".join(self._lines)
            began = time.monotonic()
            try:
                self._append(data)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                del self._lines[:count]
                self._changed.notify_all()
        files.remove(self._part)

    def _append(self, data: bytes) -> None:
        if self._generation == "0":
            change(self._path, data, MISSING)
            self._size, self._generation = self._found()
            return
        files.write_bytes(self._part, data)
        source = [{"name": files.split(path)[1]} for path in (self._path, self._part)]
        try:
            made = _request("POST", self._path, "/compose", ifGenerationMatch=self._generation,
                            json={"sourceObjects": source, "destination": {}})
            self._size, self._generation = int(made["size"]), made["generation"]
        except FileExistsError:  # the answer 412
            size, generation = self._found()
            if size != self._size + len(data) or files.read_ranges(self._path, [self._size], [len(data)]) != [data]:
                raise Changed(f"{self._path}: another process has written to it") from None
            self._size, self._generation = size, generation

    def _found(self) -> tuple[int, str]:
        """(bytes, generation); (0, "0") of an object that isn't there."""
        try:
            found = _request("GET", self._path)
        except FileNotFoundError:
            return 0, "0"
        return int(found["size"]), found["generation"]


def _request(method: str, path: files.Location, action: str = "", **options: Any) -> dict[str, Any]:
    """Of the JSON API, about one object."""
    return files.gcsfs().call(method, "b/{}/o/{}" + action, *files.split(path), json_out=True, **options)
