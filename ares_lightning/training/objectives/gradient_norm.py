"""Robust training without an attack: the norm of the input gradient is penalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ares_lightning.attacks import Threat
from ares_lightning.attacks.attack import check_number
from ares_lightning.attacks.threat import DUAL_ORDER
from ares_lightning.training.objectives.objective import Logs, Objective, accuracy


class GradientNorm(Objective):
    """Cross-entropy on clean images, plus what a linear network would lose to the adversary.

    `ce_weight · mean CE + penalty · r · eps · mean ‖∇CE(x)‖_q`, where q is the dual of the threat model's norm and
    r rises from 0 to 1 over the first epochs. The penalty is differentiated: about 6 F a step.

    The network is in training mode, as everywhere here; the authors' code trains it in eval mode throughout.

    ce_weight: 0.8. penalty: 1.2. ramp_epochs: 5, in steps of one epoch. (All: the authors' code.)

    Rodríguez-Muñoz et al. 2024, arXiv 2409.20139, equation 4.
    """

    differentiates_twice = True

    def __init__(
        self, threat: Threat, *, ce_weight: float = 0.8, penalty: float = 1.2, ramp_epochs: float = 5.0
    ) -> None:
        self.threat = threat
        self.ce_weight, self.penalty = check_number("ce_weight", ce_weight), check_number("penalty", penalty)
        self.ramp_epochs = check_number("ramp_epochs", ramp_epochs)
        self._ramp = 1.0

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
        """Return the clean images; the epoch sets the weight of the penalty."""
        self._ramp = min(epoch / self.ramp_epochs, 1.0) if self.ramp_epochs else 1.0
        return images

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss, the accuracy, and the mean norm of the gradient."""
        points = images.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits = net(points)
            losses = F.cross_entropy(logits, labels, reduction="none")
            (gradient,) = torch.autograd.grad(losses.sum(), points, create_graph=True)
        norm = torch.linalg.vector_norm(gradient.flatten(1), ord=DUAL_ORDER[self.threat.norm], dim=1).mean()
        logs = {"clean_acc": accuracy(logits, labels), "gradient_norm": norm.detach()}
        return self.ce_weight * losses.mean() + self.penalty * self._ramp * self.threat.eps * norm, logs
