"""Adversarial weight perturbation: the loss is minimised where the weights are worst nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ares_lightning.attacks.attack import check_number
from ares_lightning.attacks.guard import still_statistics

TINY = 1e-20
"""What keeps the division by a gradient of zero defined (the authors' code)."""


class AWP(Callback):
    """Moves every weight tensor, for the loss and its backward, along the gradient of the objective's own loss.

    `w ← w + gamma · ‖w‖ · g / ‖g‖` for each tensor of at least two dimensions, after the images are crafted and
    before the loss on them; g is the mean over all processes. About 3 F a step more. The weights are back before
    the optimizer steps, so that its weight decay acts on the weights themselves.

    gamma: 0.01 (0.005 with TRADES; both the authors' code). start_epoch: the first in which it acts, from 0 (10 in
        the authors' TRADES).

    Wu et al. 2020, arXiv 2004.05884, algorithm 1.
    """

    def __init__(self, gamma: float = 0.01, start_epoch: int = 0) -> None:
        self._gamma = check_number("gamma", gamma)
        self._start_epoch = check_number("start_epoch", start_epoch)
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the module call between crafting and the loss."""
        module: Any = pl_module
        net: nn.Module = module.net

        def perturb(loss: Callable[[], Tensor]) -> None:
            if trainer.current_epoch >= self._start_epoch:
                self._perturb(net, loss)

        module.perturb_weights = perturb

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        with torch.no_grad():
            for weight, before in self._before:
                weight.copy_(before)
        self._before = []
        torch.clear_autocast_cache()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the weights back where a step was broken off."""
        self.on_after_backward(trainer, pl_module)

    def _perturb(self, net: nn.Module, loss: Callable[[], Tensor]) -> None:
        weights = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
        with still_statistics(net.modules()):
            gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        pairs = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
        directions = _mean_over_processes([gradient for _, gradient in pairs])
        with torch.no_grad():
            for (weight, _), direction in zip(pairs, directions, strict=True):
                self._before.append((weight, weight.clone()))
                weight.add_(direction * (self._gamma * weight.norm() / (direction.norm() + TINY)))
        torch.clear_autocast_cache()


def _mean_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Return the means over the processes, if there are several, by one collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not tensors:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
