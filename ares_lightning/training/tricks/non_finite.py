"""The guard that ends a training whose loss is no number any more."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ares_lightning.attacks.attack import check_count

NONE = torch.iinfo(torch.int64).max


REMEDY = "lower optim.lr, or set optim.clip_grad_norm=1 or trainer.precision=32-true"


class NonFiniteError(RuntimeError):
    """Loss or logits are not finite; the message is one line with the step and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; {REMEDY}")


class NonFiniteGuard(Callback):
    """Names the first step whose loss is infinite or NaN, on any process, and raises NonFiniteError.

    The step is noted on the device without a wait; it is read every so many steps, before every checkpoint, so that
    none is written after it, before a validation and after every epoch.

    every_n_steps: 50.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_count("every_n_steps", every_n_steps)
        self._every_n_steps = every_n_steps
        self._first: Tensor | None = None
        self._step = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count, from 1, the step that the batch belongs to."""
        self._step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step; look every so often."""
        loss = outputs["loss"].detach()
        if self._first is None:
            self._first = torch.full((), NONE, device=loss.device)
        step = torch.where(loss.isfinite(), NONE, self._step)
        self._first = torch.minimum(self._first, step)
        if (batch_idx + 1) % self._every_n_steps == 0:
            self._look(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look before the network is asked."""
        self._look(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the end of an epoch that no validation follows."""
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look before a checkpoint is written."""
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        if self._first is None:
            return
        reduced: Any = trainer.strategy.reduce(self._first, reduce_op="min")
        first = int(reduced)
        if first != NONE:
            raise NonFiniteError(f"train/loss is not finite at step {first}, epoch {trainer.current_epoch}")
