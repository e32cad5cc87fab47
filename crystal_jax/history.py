"""Reading metrics.jsonl back: the one place that knows which of its lines still count.

The file is append-only, so a run that was resumed from an earlier step has written some steps twice. Invariant: in
what `read_metrics` returns, each (kind, step) occurs once, as it was written last, and training steps only go up.
"""

import json
import math
import os
from typing import Any

from etils import epath

from crystal_jax.errors import UserError

Line = dict[str, Any]


def read_metrics(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of a metrics.jsonl that count, in the order in which they were written.

    A "train" line takes back all that was written before it about later steps, since the run has gone back behind
    them; any line takes back an earlier one of its kind and step. "start" lines, one per process, all stay.

    Raises:
      UserError: no such file, or a damaged line that no interruption explains, by its number.
    """
    kept: list[Line] = []
    seen: set[tuple[str, int]] = set()
    first_later_step = math.inf
    for line in reversed(_parse(epath.Path(path))):
        kind, step = line["kind"], line["step"]
        if kind != "start":
            if (kind, step) in seen or step > first_later_step:
                continue
            seen.add((kind, step))
            if kind == "train":
                first_later_step = step
        kept.append(line)
    return kept[::-1]


def of_kind(lines: list[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _parse(path: epath.Path) -> list[Line]:
    """Every whole line. A killed process may leave half a line: the file's last, or one just before a "start"."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; the metrics of a run are in RUN/metrics.jsonl") from None
    texts = data.split(b"\n")
    parsed = [_parse_line(text) for text in texts]
    for number, (text, line) in enumerate(zip(texts, parsed, strict=True), 1):
        if line is None and text.strip():
            following = next((later for later in parsed[number:] if later is not None), {"kind": "start"})
            if following["kind"] != "start":
                raise UserError(f"{path}: line {number} is damaged: {text[:40].decode(errors='replace')!r}; "
                                "each line must be a JSON object with kind and step")
    return [line for line in parsed if line is not None]


def _parse_line(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    complete = isinstance(line, dict) and isinstance(line.get("kind"), str) and type(line.get("step")) is int
    return line if complete else None
