"""Which samples, in which order, on which rank, and how they become a batch."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ares_lightning.data.datasets import ImageSet
from ares_lightning.data.keyed import keyed_permutation

# images uint8 [N, C, H, W], labels int64 [N], sample_ids int64 [N]
Batch = tuple[Tensor, Tensor, Tensor]


def collate(samples: list[tuple[Tensor, int, int]]) -> Batch:
    """Stack samples into (images uint8 [N, C, H, W], labels int64 [N], sample ids int64 [N])."""
    images, labels, sample_ids = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(sample_ids)


class ShardedSampler(DistributedSampler[tuple[int, int]]):
    """One rank's share of the positions 0…size−1, each as (position, epoch).

    Shuffled (training): the order depends on (seed, epoch) only, every rank gets size // world_size samples,
    and the tail that does not divide is left out. Not shuffled (evaluation): each sample exactly once over
    all ranks, whose shares may differ by one. The epoch travels with the position because persistent workers
    never see `set_epoch`. It is a DistributedSampler because Lightning replaces any other one.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        super().__init__(range(size), world_size, rank, shuffle, seed, drop_last=shuffle)  # type: ignore[arg-type]
        self.size = size

    def _positions(self) -> range:
        kept = self.size - self.size % self.num_replicas if self.shuffle else self.size
        return range(self.rank, kept, self.num_replicas)

    def __len__(self) -> int:
        return len(self._positions())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shard = list(self._positions())
        if self.shuffle:
            shard = keyed_permutation(self.size, "shuffle", self.seed, self.epoch)[shard].tolist()
        return ((position, self.epoch) for position in shard)


def select_subset(dataset: ImageSet, spec: str | None) -> ImageSet:
    """Take the part of a set that `subset=…` names; the sample ids stay what they were.

    `None` is all of it, `first:n` the first n in canonical order, `random:n@seed` n drawn without
    replacement, in canonical order; a larger n with the same seed keeps those of a smaller one.
    Raises ValueError naming the value and the known forms.
    """
    if spec is None:
        return dataset
    form = re.fullmatch(r"first:(?P<first>\d+)|random:(?P<random>\d+)@(?P<seed>\d+)", spec)
    count = int(form["first"] or form["random"]) if form else 0
    if not form or not 0 < count <= len(dataset):
        raise ValueError(
            f"subset={spec}: must be null (all), first:n or random:n@seed with n from 1 to {len(dataset)}, "
            f"the number of images"
        )
    if form["first"]:
        return dataset.take(range(count))
    return dataset.take(keyed_permutation(len(dataset), "subset", int(form["seed"]))[:count].sort().values)
