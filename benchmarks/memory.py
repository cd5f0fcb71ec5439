"""The memory that a piece of work takes beyond what was held before it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

MEBIBYTE = 2**20


class PeakMemory:
    """The growth of memory during a run, over what was held before: of a CUDA device, else of the process on Linux.

    The kernel's high-water mark of the process is set back before each run, after freed memory has been returned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.kind = "torch.cuda.max_memory_allocated, growth over the start of the run"
        elif sys.platform == "linux":
            self.kind = "peak resident memory of the process (VmHWM, set back), growth over the start of the run"
        else:
            self.kind = "not measured on this system"

    def start(self) -> None:
        """Remember what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._held = _resident("VmRSS")

    def growth(self) -> float | None:
        """Return the growth since the start, MiB; None where it cannot be told."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self._held) / MEBIBYTE
        return (_resident("VmHWM") - self._held) / MEBIBYTE if sys.platform == "linux" else None


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
