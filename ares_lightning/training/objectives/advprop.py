"""AdvProp: adversarial examples as augmentation, with batch norms of their own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.training.objectives.adversarial import AdversarialTraining
from ares_lightning.training.objectives.auxiliary import AuxiliaryNorms, through
from ares_lightning.training.objectives.objective import InnerAttack, Logs, accuracy


class AdvProp(AdversarialTraining):
    """Cross-entropy on clean images through the network's norms, plus on adversarial ones through others.

    (2k + 6) F a step.

    norms: the batch norms that adversarial images pass, when they are crafted and when they are learnt from; None
        for the same ones.

    Xie et al. 2020, arXiv 1911.09665, equation 3 and algorithm 1; the two terms are added, as in ARES.
    """

    def __init__(self, inner: InnerAttack, *, norms: AuxiliaryNorms | None = None) -> None:
        super().__init__(inner)
        self.auxiliary = norms

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
        """Return the iterates against the network with the adversarial norms."""
        with through(self.auxiliary):
            return super().craft(net, images, labels, step, epoch=epoch, sample_ids=sample_ids)

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the sum of the two mean cross-entropies, and both accuracies."""
        clean = net(images)
        with through(self.auxiliary):
            moved = net(adversarial)
        logs = {"clean_acc": accuracy(clean, labels), "robust_acc": accuracy(moved, labels)}
        return F.cross_entropy(clean, labels) + F.cross_entropy(moved, labels), logs
