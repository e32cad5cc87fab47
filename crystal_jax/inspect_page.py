"""How `inspect` shows its answers to a person: aligned lines, the answer first, control characters made visible.

Invariant: nothing is computed here but sums of what is shown, and no character of a document reaches the terminal that
could move its cursor.
"""

from collections.abc import Iterable, Sequence
from typing import Any

NAME = 44
"""Characters of a document's id in a list; of a longer one the end is shown."""
SHOWN = {"\n": "↵", "\t": "⇥"}


def render_step(found: dict[str, Any]) -> str:
    """What `describe_step` gave: one line for each document with its text below; a single sequence's text as it is."""
    alone = len(found["sequences"]) == 1 < found["global_batch_size"]
    head = [f"step {found['step']:,} of {found['steps']:,}: {found['phase']}, its step {found['phase_step']:,}; "
            f"lr {found['lr']:.6g}; {found['global_batch_size']:,} sequences of {found['sequence_length']:,} tokens",
            f"batch {found['batch_hash']}: {_hash_known(found)}"]
    if found["log"]:
        head.append(_loss(found["log"]))
    blocks = ["\n".join(head)] if alone else ["\n".join(head), "\n".join(_source_table(found))]
    parts = [(sequence, part) for sequence in found["sequences"] for part in sequence["parts"]]
    lines = iter(_table("<<<<", [_part(part, None if alone else NAME) for _, part in parts]))
    for sequence in found["sequences"]:
        block = [f"slot {sequence['slot']}  {sequence['source']}  epoch {sequence['epoch']}  row {sequence['row']:,}"]
        for part in sequence["parts"]:
            block.append(f"  {next(lines)}")
            if alone:
                block += [f"      | {line}" for line in visible(part["text"]).replace("↵", "↵\n").split("\n")]
            elif part["text"]:
                more = "…" if len(part["text"]) == found["text_chars"] else ""
                block.append(f"      {visible(part['text'])}{more}")
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)


def _hash_known(found: dict[str, Any]) -> str:
    known = found["batch_hash_in_log"]
    if found["reached"] is None:
        return "no run has seen it yet"
    if known == found["step"]:
        return "the log has the same"
    reached = "not in the log" if found["reached"] >= found["step"] else "not reached yet"
    return f"{reached}; " + ("nor is any other" if known is None else (
        f"that of step {known:,}, the nearest in the log, is the same there"))


def _loss(line: dict[str, Any]) -> str:
    """Of the log line that the step is part of."""
    shown = [f"loss {line['loss']:.4f}"] if "loss" in line else ["no update was taken"]
    shown += [f"{name} {loss:.4f}" for name, loss in line.get("loss_per_source", {}).items()]
    shown += [f"gradient norm {line['grad_norm']:.3g}"] if "grad_norm" in line else []
    return f"log at step {line['step']:,}: {', '.join(shown)}"


def _source_table(found: dict[str, Any]) -> list[str]:
    rows = [("source", "sequences", "share", "recipe", "documents", "epochs", "FIM")]
    for source in found["sources"]:
        epochs = source["epochs"]
        fim = " + ".join(f"{count:,} {order}" for order, count in source["fim"].items())
        rows.append((source["name"], f"{source['sequences']:,}", f"{source['share']:.2%}",
                     f"{source['recipe_share']:.2%}", f"{source['documents']:,}",
                     "-" if not epochs else f"{epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else f"{epochs[0]}",
                     fim or "-"))
    return _table("<>>>>><", rows)


def _part(part: dict[str, Any], width: int | None) -> tuple[str, ...]:
    name = visible(part["document"])
    if width is not None and len(name) > width:
        name = "…" + name[1 - width :]
    notes = [f"{fim['order']} {_span(fim['span'])}" for fim in part["fim"]]
    if part["in_sequence"][0] == part["in_sequence"][1]:
        notes.append("all pushed out by FIM")
    elif part["pushed_out"]:
        notes.append(f"{part['pushed_out']:,} bytes pushed out by FIM")
    place = f"shard {part['shard']} {_span(part['in_shard'])}"
    if width is None:
        place += f" of {visible(part['file'])}"
    return (_span(part["in_sequence"]), name, f"{_span(part['in_document'])} of {part['length']:,}",
            "  ".join([place, *notes]))


def render_document(found: dict[str, Any]) -> str:
    """What `describe_document` gave: for each place of the document the answer, then each sequence that saw it."""
    blocks = [f"document {visible(found['document'])}"]
    for place in found["found"]:
        names = ", ".join(place["sources"])
        block = [f"{names}: {place['store']}, {place['split']}/{place['shard']}, tokens {_span(place['in_shard'])} "
                 f"({place['length']:,}), from {visible(place['file'])}", f"  {_answer(place, found)}"]
        if place["visits"]:
            block += ["", *(f"  {line}" for line in _visit_table(place["visits"]))]
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)


def _visit_table(visits: list[dict[str, Any]]) -> list[str]:
    rows = [("step", "phase", "slot", "source", "epoch", "of the document", "in the sequence", "predicted", "", "FIM")]
    for visit in visits:
        fim = " ".join(f"{one['order']} {_span(one['span'])}" for one in visit["fim"]) or "-"
        if visit["pushed_out"]:
            fim += f"; {visit['pushed_out']:,} bytes pushed out"
        rows.append((f"{visit['step']:,}", visit["phase"], f"{visit['slot']:,}", visit["source"], f"{visit['epoch']}",
                     _span(visit["in_document"]), _span(visit["in_sequence"]), f"{visit['predicted']:,}",
                     "" if visit["done"] else "later", fim))
    return _table("><><>>>><<", rows)


def _answer(place: dict[str, Any], found: dict[str, Any]) -> str:
    if place["split"] == "heldout":
        return "held out: no step trains on it"
    if not place["in_a_subset"]:
        return "in no part of the store that the recipe reads: no step trains on it"
    done = [visit["step"] for visit in place["visits"] if visit["done"]]
    later = [visit["step"] for visit in place["visits"] if not visit["done"]]
    until = f"up to step {found['until']:,} ({found['until_is']})" if found["until_is"] != "asked for" else (
        f"up to step {found['until']:,}")
    if done:
        where = f"from step {done[0]:,} to step {done[-1]:,}" if done[0] < done[-1] else f"at step {done[0]:,}"
        return (f"trained on {until}: {place['tokens_seen']:,} of its {place['length']:,} tokens, in {len(done):,} "
                f"sequence{'s' * (len(done) > 1)}, {where}{f'; {len(later):,} more come later' if later else ''}")
    return f"not trained on {until}; " + (f"first at step {later[0]:,}" if later else "nor at any later step")


def render_counts(found: dict[str, Any]) -> str:
    """What `describe_counts` gave: a table for each phase that has begun, and one of them all."""
    blocks = [f"{found['run']}: {found['step']:,} of {found['steps']:,} steps, {found['tokens']:,} tokens"]
    for phase in found["phases"]:
        ends = "" if phase["last_step"] == phase["end_step"] else f"; it ends at {phase['end_step']:,}"
        title = f"{phase['name']}  steps {phase['first_step']:,} to {phase['last_step']:,}{ends}"
        if passed := [f"{source['passed_over']:,} of {source['name']}" for source in phase["sources"]
                      if source["passed_over"]]:
            title += f"; passed over before it: {', '.join(passed)}"
        rows = [("source", "sequences", "tokens", "share", "recipe", "off", "epochs")]
        rows += [(source["name"], f"{source['sequences']:,}", f"{source['tokens']:,}", f"{source['share']:.4%}",
                  f"{source['recipe_share']:.4%}", f"{source['off']:+.1f}",
                  "?" if source["epochs"] is None else f"{source['epochs']:.4f}") for source in phase["sources"]]
        blocks.append("\n".join([title, *(f"  {line}" for line in _table("<>>>>>>", rows))]))
    whole = [("source", "sequences", "tokens", "share")]
    whole += [(source["name"], f"{source['sequences']:,}", f"{source['tokens']:,}", f"{source['share']:.4%}")
              for source in found["sources"]]
    blocks.append("\n".join(["all phases", *(f"  {line}" for line in _table("<>>>", whole))]))
    blocks.append("off: sequences more than share times all; epochs: of what the phase reads, since it was first read")
    return "\n\n".join(blocks)


def visible(text: str) -> str:
    """Text on one line: ↵ for a newline, ⇥ for a tab, an escape for what has no picture."""
    return "".join(SHOWN.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in text)


def _span(span: Sequence[int]) -> str:
    return f"[{span[0]:,}:{span[1]:,}]"


def _table(aligned: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with columns two apart, each aligned by its sign in `aligned`."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(row, aligned, widths, strict=True)).rstrip()
            for row in rows]
