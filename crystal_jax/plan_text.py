"""What `plan` found, as aligned text at most 120 columns wide.

Invariant: it shows the same dict that `--json` prints, and says of each time that it is a prediction.
"""

from typing import Any

from crystal_jax.cost import GIB
from crystal_jax.recipe import human

MEANINGS = {
    "parameters": "float32 master weights", "moments": "Adam's", "inputs": "the batch",
    "gradients": "and weights in the compute dtype, at the fullest moment",
    "activations": "saved for the backward pass, a layer each", "temporaries": "of the layer and the loss at hand",
    "unused": "between arrays", "code": "the program itself",
}


def render(found: dict[str, Any]) -> str:
    """One plan."""
    return "\n\n".join("\n".join(block) for block in (
        _head(found), _memory(found["memory"]), _work(found), _collectives(found), _time(found), _recipe(found)))


def _head(found: dict[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    batch, training = found["batch"], found["training"]
    slices = f"{found['slices']} slices of " if found["slices"] > 1 else ""
    more = f", computed as {batch['computed']:,}" if batch["computed"] > batch["sequences"] else ""
    return [
        f"{found['name']} on {slices}{found['topology']}: {found['chips']:,} chips, flags {found['flags']}, compiled "
        f"by libtpu {found['libtpu']} in {found['compile_seconds']:.0f} s",
        f"mesh {mesh}, remat {training['remat']}, attention {training['attention']}, accumulate "
        f"{training['accumulate']}, {training['dtype']}",
        f"batch {batch['sequences']:,} sequences = {batch['tokens']:,} tokens, {batch['sequences_per_chip']:g} "
        f"sequences a chip{more}",
    ]


def _memory(memory: dict[str, Any]) -> list[str]:
    verdict = f"fits: {memory['left'] / GIB:.2f} GiB are left" if memory["fits"] else "does NOT fit"
    lines = [f"memory {verdict} of {memory['usable'] / GIB:.2f} GiB a device; the program takes "
             f"{memory['used'] / GIB:.2f}"]
    return lines + [f"  {part:<13}{size / GIB:>8.2f} GiB  {MEANINGS[part]}" for part, size in memory["parts"].items()]


def _work(found: dict[str, Any]) -> list[str]:
    flops = found["flops"]
    return [
        f"work of a device and step: {human(flops['program'], 'FLOP')}, {human(flops['kernels'], 'FLOP')} of them in "
        "attention kernels",
        f"  {flops['program'] / flops['palm']:.3f} times the {human(flops['palm'], 'FLOP')} of the formula 6N + 12 L D "
        f"S ({human(flops['causal'], 'FLOP')} with causal scores)",
        f"  {human(found['bytes'], 'B')} to and from memory",
    ]


def _collectives(found: dict[str, Any]) -> list[str]:
    row = "  {:<20}{:<14}{:>8}{:>9}{:>13}{:>12}{:>11}{:>11}".format
    lines = ["collectives of a device and step, in GB (1e9 bytes) and predicted seconds",
             row("", "axis", "devices", "GB", "synchronous", "no product", "seconds", "waiting")]
    for item in found["collectives"]:
        if item["gb"] >= 0.0005:
            lines.append(row(item["kind"], item["axis"], item["devices"], f"{item['gb']:.3f}",
                             f"{item['synchronous_gb']:.3f}", f"{item['bare_gb']:.3f}", f"{item['seconds']:.4f}",
                             f"{item['exposed_seconds']:.4f}"))
    sums = {name: sum(item[name] for item in found["collectives"])
            for name in ("gb", "synchronous_gb", "bare_gb", "seconds", "exposed_seconds")}
    lines.append(row("all", "", "", f"{sums['gb']:.3f}", f"{sums['synchronous_gb']:.3f}", f"{sums['bare_gb']:.3f}",
                     f"{sums['seconds']:.4f}", f"{sums['exposed_seconds']:.4f}"))
    lines.append("  no product: begun early, but no matrix product lies between its start and its end")
    return lines


def _time(found: dict[str, Any]) -> list[str]:
    step, assumed = found["step"], found["assumed"]
    source = "the compiler's own cycles" if assumed["from_cycles"] else (
        f"{assumed['matrix']:.0%} of the peak in products and {assumed['memory']:.0%} of the memory's rate")
    return [
        f"predicted, not measured: {step['seconds']:.3f} s a step, MFU {step['mfu']:.1%}, "
        f"{step['tokens_per_second_per_chip']:,.0f} tokens/s a chip",
        f"  {step['computing']:.3f} s computing + {step['kernels']:.3f} s attention kernels + {step['exposed']:.3f} s "
        "waiting for collectives",
        f"  assumed: {source}; kernels at {assumed['kernel']:.0%} of the peak;",
        f"  links at {assumed['network']:.0%} of theirs, one collective after the other; input never late; no "
        "evaluations, checkpoints, restarts",
    ]


def _recipe(found: dict[str, Any]) -> list[str]:
    recipe = found["recipe"]
    lines = [f"the whole recipe, {human(recipe['tokens'], digits=4)} tokens: {recipe['days']:.1f} days without "
             "interruptions"]
    for name, about in (("on_demand", "on demand"), ("spot", "spot")):
        price = recipe["dollars"][name]
        text = "price unknown" if price is None else " to ".join(f"${value:,.0f}" for value in dict.fromkeys(price))
        lines.append(f"  {about:<10}{text}")
    return [*lines, "  list prices of August 2026; spot moves from zone to zone"]


def render_sweep(rows: list[dict[str, Any]]) -> str:
    """The table of a sweep."""
    row = "{:>4}  {:>5}{:>6}{:>8}  {:<13}{:>9}{:>9}{:>8}{:>10}{:>10}".format
    lines = [row("", "data", "fsdp", "tensor", "remat", "GiB", "step s", "MFU", "sync GB", "waiting s")]
    for index, item in enumerate(rows):
        mesh = item["mesh"]
        head = (index + 1, mesh["data"], mesh["fsdp"], mesh["tensor"], item["remat"])
        if "refused" in item:
            text = row("-", *head[1:], *[""] * 5).rstrip()
            lines.append(f"{text}  {item['refused']}")
            continue
        sync = sum(part["synchronous_gb"] for part in item["collectives"])
        lines.append(row(*head, f"{item['memory']['used'] / GIB:.2f}", f"{item['step']['seconds']:.3f}",
                         f"{item['step']['mfu']:.1%}", f"{sync:.2f}", f"{item['step']['exposed']:.3f}"))
    first = next((item for item in rows if "refused" not in item), None)
    if first is None:
        return "\n".join([*lines, "nothing fits: take a larger slice"])
    return "\n".join([*lines, "times are predictions from rates (see `plan` without --sweep for the compiler's cycles)",
                      f"the first: {' '.join(first['given']) or 'the config as it is'}"])
