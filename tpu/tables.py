"""Tables for the scripts: queued resources with their age and price, heartbeats.

    tables.py resources FILE.json ...    what `gcloud compute tpus queued-resources list --format=json` printed
    tables.py expired FILE.json ...      ZONE NAME of those past crystal-expires, one to a line
    tables.py heartbeats                 heartbeats on stdin, one to a line

Its invariant: only what carries our label crystal-run counts as ours.
"""

import datetime
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COSTING = ("ACTIVE", "SUSPENDING")
"""States in which the hosts exist and are paid for."""


def ours(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """name, zone, state, type, slices, age in hours, and the labels, of each resource of ours."""
    for file in files:
        for found in json.loads(Path(file).read_text() or "[]"):
            spec = found.get("tpu", {}).get("nodeSpec", [{}])[0]
            node = spec.get("node", {})
            labels = node.get("labels", {})
            if "crystal-run" not in labels:
                continue
            _, _, _, zone, _, name = found["name"].split("/")
            # gcloud prints nanoseconds, of which Python reads six digits.
            created = datetime.datetime.fromisoformat(found["createTime"][:19] + "+00:00")
            yield {"name": name, "zone": zone, "state": found["state"]["state"],
                   "type": node.get("acceleratorType", ""), "labels": labels,
                   "slices": spec.get("multisliceParams", {}).get("nodeCount", 1),
                   "hours": (time.time() - created.timestamp()) / 3600}


def dollars(found: dict[str, Any]) -> str:
    """So far, an estimate: list prices, and hosts that have existed since the request; a waiting one costs nothing."""
    from crystal_jax.errors import UserError
    from crystal_jax.generations import find_slice

    if found["state"] not in COSTING:
        return "0"
    try:
        prices = find_slice(found["type"]).dollars_per_hour(found["labels"].get("crystal-capacity") == "spot")
    except UserError:
        prices = None
    return f"<= {prices[1] * found['slices'] * found['hours']:,.0f}" if prices else "?"


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_resources(files: Sequence[str]) -> None:
    rows = [(found["name"], found["zone"], f"{found['slices']} x {found['type']}", found["state"],
             f"{found['hours']:.1f} h", dollars(found), found["labels"].get("crystal-owner", "?"),
             "over" if is_expired(found) else "") for found in ours(files)]
    print_table(("RUN", "ZONE", "SLICES", "STATE", "AGE", "ESTIMATED $", "OWNER", "LIMIT"), rows)


def is_expired(found: dict[str, Any]) -> bool:
    expires = found["labels"].get("crystal-expires", "")
    return expires.isdigit() and int(expires) < time.time()


def print_heartbeats() -> None:
    beats = [json.loads(line) for line in sys.stdin if line.strip()]
    rows = [(beat["host"], beat["incarnation"], beat["state"], beat["step"] if beat["step"] >= 0 else "",
             f"{time.time() - beat['time']:.0f} s ago", len(beat["crashes"]), beat["why"])
            for beat in sorted(beats, key=lambda beat: beat["host"])]
    print_table(("HOST", "INCARNATION", "STATE", "STEP", "SEEN", "CRASHES", ""), rows)


def main(argv: Sequence[str]) -> None:
    command, *files = argv
    if command == "resources":
        print_resources(files)
    elif command == "heartbeats":
        print_heartbeats()
    else:
        for found in ours(files):
            if is_expired(found):
                print(found["zone"], found["name"])


if __name__ == "__main__":
    main(sys.argv[1:])
