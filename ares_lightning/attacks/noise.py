"""Random numbers that belong to a sample, whatever batch, process or order it is met in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

LEAST_NUMBERS = 2**20
"""Fewer are drawn by one thread sooner (5 ms for these) than several are started (2 ms)."""
LEAST_THREADS, MOST_THREADS = 4, 8
"""64 x 3 x 224 x 224 on 16 cores: 38 ms by one thread and by two, 20 by 4, 11 by 8, 8 by 16."""


def sample_noise(
    kind: str, key: tuple[object, ...], sample_ids: Sequence[int], shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """Draw a tensor [N, *shape] of `like`'s dtype and device, each row from (key, sample id) alone.

    `kind` is "uniform" in [-1, 1) or "normal". The rows are drawn on the CPU by generators that are re-seeded for
    each, many numbers in as many threads as torch may use, and travel to the device in one copy that nobody waits
    for; no global random state is touched.
    """
    prefix = hashlib.blake2b(repr(key).encode(), digest_size=8)
    rows = torch.empty(len(sample_ids), *shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
    num_threads = min(torch.get_num_threads(), MOST_THREADS)
    if rows.numel() < LEAST_NUMBERS or num_threads < LEAST_THREADS:
        num_threads = 1

    def draw(first: int) -> None:
        generator = torch.Generator()
        for row, sample_id in zip(rows[first::num_threads], sample_ids[first::num_threads], strict=True):
            digest = prefix.copy()
            digest.update(b"/%d" % sample_id)
            generator.manual_seed(int.from_bytes(digest.digest(), "little"))
            if kind == "uniform":
                row.uniform_(-1, 1, generator=generator)
            else:
                row.normal_(generator=generator)

    if num_threads == 1:
        draw(0)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(draw, range(num_threads)))
    return rows.to(like.device, non_blocking=True)
