"""Single-step training: N-FGSM, which begins outside of the ball, and FGSM with aligned gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.attacks.attack import check_number
from ares_lightning.attacks.guard import guarded, still_statistics
from ares_lightning.attacks.noise import sample_noise
from ares_lightning.training.objectives.adversarial import AdversarialTraining
from ares_lightning.training.objectives.objective import InnerAttack, Logs, epoch_seed, ids_of, input_gradient


class NFGSM(AdversarialTraining):
    """Cross-entropy on one L-inf step from strong noise that is not clipped to the ball: 5 F a step.

    `x' = clamp(clamp(x + η) + eps · sign ∇CE)` with η uniform in ±noise · eps; x' may lie (1 + noise) eps away.

    inner: of its attack, which is L-inf, the budget and warm-up count. noise: 2 (the paper, section 5).

    de Jorge et al. 2022, arXiv 2202.01181, algorithm 1.
    """

    def __init__(self, inner: InnerAttack, *, noise: float = 2.0) -> None:
        super().__init__(inner)
        self.noise = check_number("noise", noise)
        if inner.attack.norm != "linf":
            raise ValueError(f"norm={inner.attack.norm}: n_fgsm knows linf")

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
        """Return the images after noise and one step."""
        eps, key = self.inner.at(epoch).threat.eps, (epoch_seed(self.inner.seed, epoch), "n_fgsm")
        noise = sample_noise("uniform", key, ids_of(images, sample_ids), tuple(images.shape[1:]), images)
        noisy = (images + noise.mul_(self.noise * eps)).clamp_(0, 1)
        with guarded(net, images.device, (*key, step), self.inner.mode):
            gradient = input_gradient(net, noisy, labels)
        return (noisy + eps * gradient.sign()).clamp_(0, 1)


class GradAlign(AdversarialTraining):
    """Cross-entropy on FGSM examples, and a term that keeps the input gradient alike all over the ball.

    `mean CE(f(x'), y) + gradalign · (1 − mean cos(∇CE(x), ∇CE(x + u)))` with u uniform in ±eps; the first gradient
    is that of the FGSM step and constant, the second is differentiated, through the network in training mode. About
    11 F a step.

    gradalign: 0.2, the paper's at 8/255 for CIFAR-10; it grows with the budget, to 2.0 at 16/255.

    Andriushchenko & Flammarion 2020, arXiv 2007.02617, equation 5.
    """

    differentiates_twice = True

    def __init__(self, inner: InnerAttack, *, gradalign: float = 0.2) -> None:
        super().__init__(inner)
        self.gradalign = check_number("gradalign", gradalign)
        if inner.attack.norm != "linf":
            raise ValueError(f"norm={inner.attack.norm}: gradalign knows linf")
        self._gradient: Tensor | None = None
        self._beside: Tensor | None = None

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
        """Return the FGSM examples; their gradient and the points x + u are kept for the loss."""
        eps, key = self.inner.at(epoch).threat.eps, (epoch_seed(self.inner.seed, epoch), "gradalign")
        noise = sample_noise("uniform", key, ids_of(images, sample_ids), tuple(images.shape[1:]), images)
        self._beside = images + noise.mul_(eps)
        with guarded(net, images.device, (*key, step), self.inner.mode):
            self._gradient = input_gradient(net, images, labels)
        return (images + eps * self._gradient.sign()).clamp_(0, 1)

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss, the accuracy on the adversarial batch, and the mean cosine."""
        assert self._gradient is not None
        assert self._beside is not None
        loss, logs = super().loss(net, images, adversarial, labels, step)
        with still_statistics(net.modules()):
            other = input_gradient(net, self._beside, labels, create_graph=True)
        tiny = torch.finfo(other.dtype).tiny  # the gradients of images that the network is sure of count as well
        cosine = F.cosine_similarity(self._gradient.flatten(1), other.flatten(1), dim=1, eps=tiny)
        counts = (self._gradient.flatten(1) != 0).any(1) & (other.detach().flatten(1) != 0).any(1)
        mean = (cosine * counts).sum() / counts.sum().clamp(min=1)
        return loss + self.gradalign * (1 - mean), {**logs, "gradient_cosine": mean.detach()}
