"""Random numbers that belong to a key, on every machine and in every process; no global state is touched."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def keyed_random(*key: int | str) -> random.Random:
    """Return a generator seeded by the key alone (`random.Random` hashes a string with SHA-512)."""
    return random.Random("/".join(map(str, key)))


def keyed_permutation(size: int, *key: int | str) -> Tensor:
    """Return a permutation of 0…size−1, int64 [size], that depends on the key alone.

    NumPy keeps the stream of RandomState frozen, so splits and subsets outlive its releases.
    """
    generator = np.random.RandomState(keyed_random(*key).getrandbits(32))
    return torch.from_numpy(generator.permutation(size)).long()


def stratified_split(labels: Tensor, count: int, *key: int | str) -> tuple[Tensor, Tensor]:
    """Draw `count` positions of `labels` [N], from each class in proportion to its size.

    Returns (drawn [count], rest [N−count]), both ascending. The classes' shares are those of Sainte-Laguë:
    the r-th sample of a class of n stands at (r + 1/2) / n, and the first `count` are taken.
    """
    order = keyed_permutation(len(labels), *key)
    shuffled = labels[order]
    counts = shuffled.bincount()
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty(len(labels), dtype=torch.float64)
    rank = torch.arange(len(labels)) - first
    place[shuffled.argsort(stable=True)] = (rank.double() + 0.5) / counts.repeat_interleave(counts)
    by_place = order[place.argsort(stable=True)]
    return by_place[:count].sort().values, by_place[count:].sort().values
