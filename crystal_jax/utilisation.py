"""What training asks of its devices, and how much of them it uses: FLOPs by stated formulas, peak rates, memory.

Invariant: a share of a peak is stated only where the peak is known; an unknown device has a rate and no share.
"""

from dataclasses import dataclass
from typing import Any

import jax

from crystal_jax.config import ModelConfig
from crystal_jax.generations import by_device_kind
from crystal_jax.recipe import parameter_count

GPU_TFLOPS = {"NVIDIA A100": 312.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA H100": 989.0, "NVIDIA H200": 989.0}
"""Dense bfloat16, by NVIDIA's data sheets of the SXM parts; the first that a device's name begins with."""
MEMORY = {"arguments": "argument_size_in_bytes", "outputs": "output_size_in_bytes", "aliased": "alias_size_in_bytes",
          "temporaries": "temp_size_in_bytes", "code": "generated_code_size_in_bytes"}


def flops_per_token(model: ModelConfig, sequence_length: int) -> dict[str, float]:
    """FLOPs of the forward and backward pass that a token needs, by formula.

    A matrix of P numbers costs a token a multiplication and an addition for each: 2P forward and, for the gradients of
    its input and of itself, 4P backward: 6N in all. N are all parameters but the tables that are only looked up: an
    untied embedding and learned positions. In a layer each of the S queries of width D meets S keys (2SD) and sums S
    values (2SD), again three times that with the backward pass: 12·L·D·S. "palm" is the sum of both, the convention of
    the PaLM paper (appendix B) and of most published MFU. "causal" counts the half of the scores that a causal mask
    leaves: 6N + 6·L·D·S. What is computed twice, or only to fill up a shape, counts in neither.
    """
    choices = model.choices
    looked_up = (not choices.tied) * model.vocab_size + (choices.positions == "learned") * model.max_length
    matrices = 6.0 * (parameter_count(model) - looked_up * model.embed_dim)
    scores = 12.0 * model.num_layers * model.embed_dim * sequence_length
    return {"palm": matrices + scores, "causal": matrices + scores / 2}


def peak_tflops(kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s of one JAX device of that kind; None if it isn't known."""
    if generation := by_device_kind(kind):
        return generation.tflops / generation.devices_per_chip
    return next((peak for name, peak in GPU_TFLOPS.items() if kind.startswith(name)), None)


@dataclass(frozen=True)
class Utilisation:
    """Turns tokens per second into what they ask of each device."""

    flops_per_token: dict[str, float]
    devices: int
    peak_tflops: float | None
    """Of one device; bfloat16, whatever the run computes in."""

    @classmethod
    def of(cls, model: ModelConfig, sequence_length: int) -> "Utilisation":
        """That of the devices of this run."""
        devices = jax.devices()
        return cls(flops_per_token(model, sequence_length), len(devices), peak_tflops(devices[0].device_kind))

    def at(self, tokens_per_second: float) -> dict[str, float]:
        """{"tflops_per_device"} and, where the peak is known, {"mfu"}: by the formula "palm"."""
        tflops = tokens_per_second * self.flops_per_token["palm"] / self.devices / 1e12
        return {"tflops_per_device": tflops, **({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {})}


def program_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one device, by the compiler's own account; `total` counts donated arguments once."""
    analysis = compiled.memory_analysis()
    found = {name: int(getattr(analysis, field)) for name, field in MEMORY.items()} if analysis else {}
    return {**found, "total": sum(found.values()) - 2 * found["aliased"]} if found else {}


def device_memory() -> dict[str, Any]:
    """Bytes of the fullest device of this process, as the backend counts them; nothing where it doesn't (CPUs)."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    fullest: dict[str, int] = max(stats, key=lambda found: found.get("peak_bytes_in_use", 0), default={})
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {name: int(fullest[field]) for name, field in names.items() if field in fullest}
