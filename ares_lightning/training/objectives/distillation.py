"""Robust distillation: a student learns what a robust teacher says of the clean image."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.attacks.attack import check_number
from ares_lightning.training.objectives.adversarial import AdversarialTraining
from ares_lightning.training.objectives.objective import (
    LEAST_TEMPERATURE,
    InnerAttack,
    Logs,
    accuracy,
    divergence,
    log_probabilities,
)
from ares_lightning.training.objectives.trades import divergence_from


class Distillation(AdversarialTraining):
    """What has a teacher, which stays as it is, in eval mode and outside of what is trained and saved.

    teacher: from pixels in [0, 1] to logits.
    """

    def __init__(self, inner: InnerAttack, teacher: nn.Module) -> None:
        super().__init__(inner)
        self.teacher = teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        """Return the teacher's logits."""
        logits: Tensor = self.teacher.to(images.device)(images)
        return logits


class ARD(Distillation):
    """Adversarially robust distillation: (2k + 3) F a step of the student, or (2k + 6) F, and 1 F of the teacher.

    `alpha · T² · mean KL(t(x) ‖ s(x')) + (1 − alpha) · mean CE(s(x), y)` with both softened by the temperature T.

    temperature: 30. alpha: 1 (both: the authors' code, which divides the divergence by the number of classes too).

    Goldblum et al. 2020, arXiv 1905.09747, equation 3.
    """

    def __init__(
        self, inner: InnerAttack, teacher: nn.Module, *, temperature: float = 30.0, alpha: float = 1.0
    ) -> None:
        super().__init__(inner, teacher)
        self.temperature = check_number("temperature", temperature, LEAST_TEMPERATURE)
        self.alpha = check_number("alpha", alpha)
        if self.alpha > 1:
            raise ValueError(f"alpha={alpha}: expected a number from 0 to 1")

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss, and the accuracy on the adversarial batch."""
        moved = net(adversarial)
        target = log_probabilities(self.taught(images) / self.temperature)
        gap = divergence(target, log_probabilities(moved / self.temperature)).mean()
        loss = self.alpha * self.temperature**2 * gap
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * F.cross_entropy(net(images), labels)
        return loss, {"robust_acc": accuracy(moved, labels), "kl": gap.detach()}


class RSLAD(Distillation):
    """Robust soft label distillation: the teacher's word replaces the label everywhere.

    `5/6 · mean KL(t(x) ‖ s(x')) + 1/6 · mean KL(t(x) ‖ s(x))`; x' raises the first. (2k + 6) F a step of the
    student and 1 F of the teacher.

    Zi et al. 2021, arXiv 2108.07969, equation 6; the authors' code divides by the number of classes too.
    """

    ADVERSARIAL_SHARE: ClassVar[float] = 5 / 6

    def __init__(self, inner: InnerAttack, teacher: nn.Module) -> None:
        super().__init__(inner, teacher)
        self._target: Tensor | None = None

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
        """Return the iterates that raise the divergence from the teacher, whose word is kept for the loss."""
        self._target = log_probabilities(self.taught(images))
        return self.inner.craft(
            net, images, self._target.exp(), epoch=epoch, sample_ids=sample_ids, loss=divergence_from
        )

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss and both accuracies."""
        target = self._target
        assert target is not None
        clean, moved = net(images), net(adversarial)
        gaps = [divergence(target, log_probabilities(logits)).mean() for logits in (moved, clean)]
        logs = {"clean_acc": accuracy(clean, labels), "robust_acc": accuracy(moved, labels), "kl": gaps[0].detach()}
        return self.ADVERSARIAL_SHARE * gaps[0] + (1 - self.ADVERSARIAL_SHARE) * gaps[1], logs
