"""Which form of attention is the faster to differentiate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def split_attention(net: nn.Module) -> None:
    """Let timm's attention layers work by plain matrix products instead of torch's fused kernel.

    For the CPU under bf16: the backward of the fused kernel leaves the processor's bf16 units unused.
    benchmarks/training.py trains ViTs so.
    """
    modules: Iterable[Any] = net.modules()
    for module in modules:
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
