"""Cross-entropy on clean or on adversarial images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.training.objectives.objective import InnerAttack, Logs, Objective, accuracy


class StandardTraining(Objective):
    """Cross-entropy on clean images: 3 F a step."""

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the mean cross-entropy, and the accuracy on the batch."""
        logits = net(images)
        return F.cross_entropy(logits, labels), {"clean_acc": accuracy(logits, labels)}


class AdversarialTraining(Objective):
    """Cross-entropy on adversarial examples: (2k + 3) F a step with PGD-k, (2k + 4) F with APGD-k.

    inner: the attack. FGSM from a random start is PGD of one step (Wong et al. 2020, arXiv 2001.03994).
    hard_labels: the attack sees the likeliest class of a smoothed or mixed label, the loss the label itself
        (Debenedetti et al. 2023, arXiv 2209.07399, their code).

    Madry et al. 2018, arXiv 1706.06083, equation 2.1.

    Raises ValueError naming the setting.
    """

    def __init__(self, inner: InnerAttack, *, hard_labels: bool = False) -> None:
        if type(hard_labels) is not bool:
            raise ValueError(f"hard_labels={hard_labels}: expected true or false")
        self.inner, self.hard_labels = inner, hard_labels

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
        if self.hard_labels and labels.ndim == 2:
            labels = labels.argmax(1)
        return self.inner.craft(net, images, labels, epoch=epoch, sample_ids=sample_ids)

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the mean cross-entropy on the adversarial batch, and the accuracy on it."""
        logits = net(adversarial)
        return F.cross_entropy(logits, labels), {"robust_acc": accuracy(logits, labels)}
