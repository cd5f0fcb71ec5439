"""Cross-entropy on clean and on adversarial images (Goodfellow et al. 2015, arXiv 1412.6572, section 6: half each).

python train.py --config-dir examples/conf adv=mixture
python train.py --config-dir examples/conf adv=mixture adv.clean_weight=0.2 adv.steps=10 trick=[ema]
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ares_lightning.training.objectives import AdversarialTraining, InnerAttack, Logs
from ares_lightning.training.objectives.objective import accuracy


class Mixture(AdversarialTraining):
    """`w · CE(f(x), y) + (1 − w) · CE(f(x'), y)` with w the `clean_weight`: (2k + 6) F a step with PGD-k."""

    def __init__(self, inner: InnerAttack, *, clean_weight: float = 0.5) -> None:
        super().__init__(inner)
        if not 0 <= clean_weight <= 1:
            raise ValueError(f"clean_weight={clean_weight}: expected a number from 0 to 1")
        self.clean_weight = clean_weight

    def loss(
        self, net: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Return the loss, and the accuracies on both batches."""
        clean, moved = net(images), net(adversarial)
        loss = self.clean_weight * F.cross_entropy(clean, labels)
        loss = loss + (1 - self.clean_weight) * F.cross_entropy(moved, labels)
        return loss, {"clean_acc": accuracy(clean, labels), "robust_acc": accuracy(moved, labels)}
