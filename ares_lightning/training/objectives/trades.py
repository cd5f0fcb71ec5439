"""TRADES and MART: a clean and an adversarial term, held together by a divergence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.attacks.attack import check_number
from ares_lightning.attacks.guard import guarded
from ares_lightning.training.objectives.adversarial import AdversarialTraining
from ares_lightning.training.objectives.auxiliary import AuxiliaryNorms, through
from ares_lightning.training.objectives.objective import (
    InnerAttack,
    Logs,
    accuracy,
    class_labels,
    divergence,
    log_probabilities,
)


class TRADES(AdversarialTraining):
    """Cross-entropy on clean images and β times how far adversarial ones move the prediction: (2k + 7) F a step.

    `mean CE(f(x), y) + beta · mean KL(p(x) ‖ p(x'))`, both differentiated; x' raises that divergence from the
    prediction for x in eval mode, from beside the clean image.

    The authors' code passes the clean images twice, which shows in the running statistics of batch norms alone.

    beta: 6 (the paper, section 5.2.2). norms: where given, batch norms that the adversarial images pass instead.

    Zhang et al. 2019, arXiv 1901.08573, equation 5 and algorithm 1.
    """

    def __init__(self, inner: InnerAttack, *, beta: float = 6.0, norms: AuxiliaryNorms | None = None) -> None:
        super().__init__(inner)
        self.beta, self.auxiliary = check_number("beta", beta), norms

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
        """Return the iterates that raise the divergence from the clean prediction."""
        with guarded(net, images.device, ("trades", step)):
            clean = log_probabilities(net(images)).exp()
        with through(self.auxiliary):
            return self.inner.craft(net, images, clean, epoch=epoch, sample_ids=sample_ids, loss=divergence_from)

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss, both accuracies, and the divergence."""
        clean = net(images)
        with through(self.auxiliary):
            moved = net(adversarial)
        gap = divergence(log_probabilities(clean), log_probabilities(moved)).mean()
        logs = {"clean_acc": accuracy(clean, labels), "robust_acc": accuracy(moved, labels), "kl": gap.detach()}
        return F.cross_entropy(clean, labels) + self.beta * gap, logs


def divergence_from(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return KL(p ‖ softmax(logits)) for given p [N, classes], up to what does not depend on the logits, [N]."""
    return -(probabilities * log_probabilities(logits)).sum(1)


BOOST, WEIGHT, TINY = 1.0001, 1.0000001, 1e-12
"""What keeps the logarithms and weights of MART above 0 (the authors' implementation)."""


class MART(AdversarialTraining):
    """Boosted cross-entropy on adversarial images, and β times a divergence that weighs misclassified ones more.

    `mean [CE(f(x'), y) − log(1 − max_{k ≠ y} p_k(x'))] + beta · mean KL(p(x) ‖ p(x')) (1 − p_y(x))`; (2k + 6) F a
    step. Class labels only.

    beta: 5 (the authors' script for ResNet-18; 6 in that for WRN-34-10).

    Wang et al. 2020, "Improving adversarial robustness requires revisiting misclassified examples", equation 12.
    """

    wants_class_labels = True

    def __init__(self, inner: InnerAttack, *, beta: float = 5.0, norms: AuxiliaryNorms | None = None) -> None:
        super().__init__(inner)
        self.beta, self.auxiliary = check_number("beta", beta), norms

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
        with through(self.auxiliary):
            return super().craft(
                net, images, class_labels("mart", labels), step, epoch=epoch, sample_ids=sample_ids
            )

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss and both accuracies."""
        clean = net(images)
        with through(self.auxiliary):
            moved = net(adversarial)
        log_clean, log_moved = log_probabilities(clean), log_probabilities(moved)
        own = labels[:, None]
        likeliest_other = log_moved.exp().scatter(1, own, 0).amax(1)
        boosted = F.cross_entropy(moved, labels) - (BOOST - likeliest_other + TINY).log().mean()
        weights = WEIGHT - log_clean.exp().gather(1, own).squeeze(1)
        gap = (divergence(log_clean, log_moved) * weights).mean()
        logs = {"clean_acc": accuracy(clean, labels), "robust_acc": accuracy(moved, labels)}
        return boosted + self.beta * gap, logs
