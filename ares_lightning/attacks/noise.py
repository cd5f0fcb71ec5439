"""Random numbers that belong to a sample, whatever batch, process or order it is met in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_noise(
    kind: str, key: tuple[object, ...], sample_ids: Sequence[int], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """Draw a tensor [N, *shape] of `like`'s dtype and device, each row from (key, sample id) alone.

    `kind` is "uniform" in [-1, 1) or "normal". The rows are drawn on the CPU by one generator that is
    re-seeded for each, and travel to the device in one copy that nobody waits for; no global random state is
    touched.
    """
    prefix = hashlib.blake2b(repr(key).encode(), digest_size=8)
    rows = torch.empty(len(sample_ids), *shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
    generator = torch.Generator()
    for row, sample_id in zip(rows, sample_ids, strict=True):
        digest = prefix.copy()
        digest.update(b"/%d" % sample_id)
        generator.manual_seed(int.from_bytes(digest.digest(), "little"))
        if kind == "uniform":
            row.uniform_(-1, 1, generator=generator)
        else:
            row.normal_(generator=generator)
    return rows.to(like.device, non_blocking=True)
