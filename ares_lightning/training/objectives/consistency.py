"""Consistency regularisation: two augmented views of an image are to be attacked into the same prediction."""

from __future__ import annotations

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


class Consistency(AdversarialTraining):
    """Cross-entropy on the adversarial examples of two views, plus the divergence between their predictions.

    `mean CE + consistency · mean JS(p₁ ‖ p₂)` with p of the logits divided by the temperature. A batch holds the
    two views of an image one after the other; (2k + 3) F a view.

    consistency: 1. temperature: 0.5 (both: the paper, section 4.1).

    Tack et al. 2022, arXiv 2103.04623, equation 6.
    """

    num_views = 2

    def __init__(self, inner: InnerAttack, *, consistency: float = 1.0, temperature: float = 0.5) -> None:
        super().__init__(inner)
        self.consistency = check_number("consistency", consistency)
        self.temperature = check_number("temperature", temperature, LEAST_TEMPERATURE)

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
        """Return the last iterates of both views, whose noise differs."""
        adversarial = torch.empty_like(images)
        for view in range(self.num_views):
            rows = slice(view, None, self.num_views)
            ids = None if sample_ids is None else sample_ids[rows]
            adversarial[rows] = self.inner.craft(
                net, images[rows], labels[rows], epoch=epoch, sample_ids=ids, view=view
            )
        return adversarial

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss, the accuracy on the adversarial batch, and the divergence."""
        logits = net(adversarial)
        log_p = log_probabilities(logits / self.temperature)
        first, second = log_p[0::2], log_p[1::2]
        middle = ((first.exp() + second.exp()) / 2).clamp(min=torch.finfo(log_p.dtype).tiny).log()
        gap = (divergence(first, middle) + divergence(second, middle)).mean() / 2
        logs = {"robust_acc": accuracy(logits, labels), "js": gap.detach()}
        return F.cross_entropy(logits, labels) + self.consistency * gap, logs
