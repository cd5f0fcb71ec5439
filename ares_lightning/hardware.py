"""What accelerators can do by their data sheets, and how much of it networks get."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ares_lightning.counting import Operation

REACHED = {"rate": 0.7, "bandwidth": 0.7, "launch": 2.4e-5}
"""Shares of a data sheet's matrix rate and memory bandwidth that the operations of a network reach in eager mode,
and the seconds that the smallest takes: fitted to six training steps on an H100 by `python benchmarks/scaling.py
hardware` (docs/scaling.md)."""


@dataclass(frozen=True)
class Hardware:
    """An accelerator: dense FLOP/s by precision, bytes of memory, bytes/s of that memory and, one way, of the link
    to the others of its node. A GB of memory on a data sheet is 2**30 bytes."""

    name: str
    bf16: float
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    link: float

    def seconds(self, operations: Iterable[Operation], *, rate: float, bandwidth: float, launch: float) -> float:
        """Return the time of operations one after the other, each limited by the rate, the memory or its launch.

        rate, bandwidth: the shares of the data sheet's that are reached. launch: seconds.
        """
        rates = {"bf16": rate * self.bf16, "tf32": rate * self.tf32, "fp32": rate * self.fp32}
        moved = bandwidth * self.bandwidth
        return sum(max(each.flops / rates[each.kind], each.bytes / moved, launch) for each in operations)


_T, _G = 1e12, 1e9
HARDWARE = {
    name: Hardware(name, bf16 * _T, tf32 * _T, fp32 * _T, memory * 2**30, bandwidth * _G, link * _G)
    for name, bf16, tf32, fp32, memory, bandwidth, link in (
        # NVIDIA A100 data sheet: SXM4, 80 GB; NVLink 600 GB/s both ways
        ("a100", 312, 156, 19.5, 80, 2039, 300),
        # NVIDIA H100 data sheet: SXM5, half of what it states with sparsity; NVLink 900 GB/s both ways
        ("h100", 989.4, 494.7, 66.9, 80, 3350, 450),
        # NVIDIA H200 data sheet: SXM5
        ("h200", 989.4, 494.7, 66.9, 141, 4800, 450),
        # NVIDIA L40S data sheet: PCIe 4.0, 64 GB/s both ways
        ("l40s", 362.05, 183, 91.6, 48, 864, 32),
        # NVIDIA Ada architecture whitepaper, GeForce RTX 4090, bf16 accumulated in float32; PCIe 4.0
        ("rtx4090", 165.2, 82.6, 82.6, 24, 1008, 32),
    )
}
"""By the name that `plan` takes."""
