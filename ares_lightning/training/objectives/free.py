"""Free adversarial training: one backward gives the weights' gradient and the perturbation's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ares_lightning.attacks.attack import check_count
from ares_lightning.training.objectives.adversarial import AdversarialTraining
from ares_lightning.training.objectives.objective import InnerAttack


class FreeTraining(AdversarialTraining):
    """Cross-entropy on clamp(x + δ), each batch several times in a row; its backward also moves δ: 3 F a step.

    `δ ← clip(δ + eps · sign ∇CE, ±eps)`. δ begins at zero and stays, row by row, for the next replay, the next
    batch and the next epoch.

    inner: of its attack, which is L-inf, the budget and its warm-up count. replays: 4 (the paper's m for ImageNet).

    Shafahi et al. 2019, arXiv 1904.12843, algorithm 1.
    """

    def __init__(self, inner: InnerAttack, *, replays: int = 4) -> None:
        super().__init__(inner)
        check_count("replays", replays)
        if inner.attack.norm != "linf":
            raise ValueError(f"norm={inner.attack.norm}: free knows linf")
        self.replays = replays
        self._delta: Tensor | None = None

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
        """Return clamp(images + δ), through which the loss's backward reaches and moves δ."""
        eps, num_images = self.inner.at(epoch).threat.eps, len(images)
        if self._delta is None or self._delta.shape[1:] != images.shape[1:] or len(self._delta) < num_images:
            self._delta = torch.zeros_like(images)
        whole = self._delta = self._delta.to(images)
        delta = whole[:num_images].clone().requires_grad_()

        def move(gradient: Tensor) -> None:
            whole[:num_images] = (delta.detach() + eps * gradient.sign()).clamp_(-eps, eps)

        hooks: Any = delta
        hooks.register_hook(move)
        return (images + delta).clamp(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return δ, of this process's rows."""
        return {} if self._delta is None else {"delta": self._delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from δ."""
        self._delta = state.get("delta")
