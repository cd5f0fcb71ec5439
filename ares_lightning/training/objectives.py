"""What training minimises. An objective knows no Lightning, so that it can be read and tested alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.attacks import Attack

Logs = dict[str, Tensor]


class Objective(ABC):
    """Two calls a step: make the adversarial batch, then the loss on it; weight perturbations act in between."""

    def craft(
        self,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        step: int,
        *,
        epoch: int = 0,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the images to train on, [N, C, H, W]; here the clean ones.

        net: the bare network; images: float in [0, 1]; labels: int64 [N] or soft [N, classes]; step: of the
        optimizer; epoch and sample_ids (int64 [N], default 0 … N−1): noise is keyed by them.
        """
        return images

    @abstractmethod
    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss to minimise and what else is worth logging, by name."""


class StandardTraining(Objective):
    """Cross-entropy on clean images: 3 F a step."""

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the mean cross-entropy, and the accuracy on the batch."""
        return _cross_entropy(net, images, labels, "clean_acc")


class AdversarialTraining(Objective):
    """Cross-entropy on adversarial examples: (2k + 3) F a step with a k-step attack.

    attack: crafts the batch in eval mode with frozen parameters; seed: of its noise, which for a sample is keyed
    by (seed, epoch, sample id).

    Madry et al. 2018, arXiv 1706.06083, equation 2.1.
    """

    def __init__(self, attack: Attack, seed: int = 0) -> None:
        self.attack = attack
        self.seed = seed

    def craft(
        self,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        step: int,
        *,
        epoch: int = 0,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the attack's last iterates."""
        return self.attack.craft(net, images, labels, sample_ids=sample_ids, seed=_epoch_seed(self.seed, epoch))

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the mean cross-entropy on the adversarial batch, and the accuracy on it."""
        return _cross_entropy(net, adversarial, labels, "robust_acc")


EPOCHS_PER_SEED = 1_000_000


def _epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed of its own for every (seed, epoch)."""
    return seed * EPOCHS_PER_SEED + epoch


def _cross_entropy(net: nn.Module, images: Tensor, labels: Tensor, accuracy: str) -> tuple[Tensor, Logs]:
    logits = net(images)
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    return F.cross_entropy(logits, labels), {accuracy: (logits.detach().argmax(1) == classes).float().mean()}
