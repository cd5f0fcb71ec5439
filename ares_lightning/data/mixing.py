"""What is done to a training batch on the device: mixup, cutmix and random erasing, keyed like all else."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ares_lightning.data.keyed import keyed_random

ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
"""Shares of the area and aspects of what is erased (timm, after Zhong et al. 2020, arXiv 1708.04896, section
4.1)."""
ERASING_TRIES = 10


@dataclass(frozen=True)
class BatchAugmentation:
    """Mixes images and labels of a batch, and erases rectangles.

    mixup: alpha of the Beta distribution that the share of the other image is drawn from, 0 for none (Zhang et al.
        2018, arXiv 1710.09412). cutmix: the same for the area of a pasted rectangle (Yun et al. 2019, arXiv
        1905.04899). With both, each step takes one of them, cutmix with probability switch_prob (as in timm).
    erasing: share of the images of which a rectangle is replaced by uniform noise; copies of an image in one batch
        are erased differently.
    copies: rows that show the same image one after the other. Neighbours are mixed: in groups of 2 · copies rows
        the halves are each other's partners, so that it does not matter how many processes share a batch, if their
        shares are whole groups. A row without a partner, at the end of a batch that is not, stays as it is.
    seed: mixing is keyed by (seed, step), erasing by (seed, epoch, sample id, how many of it came before in the
        batch).

    Raises ValueError naming the key, its value and the remedy.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    erasing: float = 0.0
    copies: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("mixup", "cutmix", "erasing", "switch_prob"):
            if isinstance(getattr(self, key), bool) or not isinstance(getattr(self, key), int | float):
                raise ValueError(f"{key}={getattr(self, key)}: expected a number")
        for key in ("mixup", "cutmix"):
            value = getattr(self, key)
            if isinstance(value, bool | str) or not 0 <= value < math.inf:
                raise ValueError(f"{key}={value}: expected a number, 0 or more")
        for key in ("switch_prob", "erasing"):
            value = getattr(self, key)
            if isinstance(value, bool | str) or not 0 <= value <= 1:
                raise ValueError(f"{key}={value}: expected a number from 0 to 1")

    @property
    def mixes(self) -> bool:
        """Whether labels become soft."""
        return self.mixup > 0 or self.cutmix > 0

    def mix(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix images [N, C, H, W] and soft labels [N, classes] with those of their partners."""
        if not self.mixes:
            return images, labels
        rng = keyed_random("mix", self.seed, step)
        pastes = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch_prob)
        alpha = self.cutmix if pastes else self.mixup
        share = rng.betavariate(alpha, alpha)
        partners = self._partners(len(images), images.device)
        others, other_labels = images[partners], labels[partners]
        if not pastes:
            return torch.lerp(images, others, share), torch.lerp(labels, other_labels, share)
        height, width = images.shape[-2:]
        top, left, bottom, right = _pasted(height, width, share, rng)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        area = (bottom - top) * (right - left) / (height * width)
        return mixed, torch.lerp(labels, other_labels, area)

    def _partners(self, size: int, device: torch.device) -> Tensor:
        """Return the row that each of `size` rows is mixed with, itself where it has no partner, int64 [size]."""
        rows = torch.arange(size, device=device)
        is_first_half = rows % (2 * self.copies) < self.copies
        partners = torch.where(is_first_half, rows + self.copies, rows - self.copies)
        return torch.where(partners < size, partners, rows)

    def erase(self, images: Tensor, sample_ids: Tensor, epoch: int) -> Tensor:
        """Replace a rectangle of some of the images [N, C, H, W] by noise; the images given stay as they are."""
        if not self.erasing:
            return images
        images = images.clone()
        height, width = images.shape[-2:]
        came_before: Counter[int] = Counter()
        for place, sample_id in enumerate(sample_ids.tolist()):
            rng = keyed_random("erase", self.seed, epoch, sample_id, came_before[sample_id])
            came_before[sample_id] += 1
            if rng.random() >= self.erasing:
                continue
            top, left, bottom, right = _erased(height, width, rng)
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            noise = torch.rand(images.shape[1], bottom - top, right - left, generator=generator)
            images[place, :, top:bottom, left:right] = noise.to(images, non_blocking=True)
        return images


def _pasted(height: int, width: int, area: float, rng: random.Random) -> tuple[int, int, int, int]:
    """Return top, left, bottom, right of a rectangle of this share of the area around a random point, cut at the
    edge."""
    half_height, half_width = round(height * math.sqrt(area)) // 2, round(width * math.sqrt(area)) // 2
    y, x = rng.randrange(height), rng.randrange(width)
    return max(y - half_height, 0), max(x - half_width, 0), min(y + half_height, height), min(x + half_width, width)


def _erased(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Return top, left, bottom, right of the first rectangle drawn that fits, an empty one after ten that do
    not."""
    for _ in range(ERASING_TRIES):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(rng.uniform(*map(math.log, ERASED_ASPECT)))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < tall < height and 0 < wide < width:
            top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
            return top, left, top + tall, left + wide
    return 0, 0, 0, 0
