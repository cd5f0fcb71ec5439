"""The progress bar of a training: images a second beside clean and robust accuracy."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {"val/clean_acc": "clean", "val/robust_acc": "robust"}


class TrainingProgress(RichProgressBar):
    """Lightning's rich progress bar with the images a second of the current epoch, over all processes."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._num_images = 0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting."""
        super().on_train_epoch_start(trainer, pl_module)
        self._num_images, self._start = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        self._num_images += len(batch[0]) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what the bar shows beside the batches."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items = {_SHORT.get(name, name): value for name, value in items.items() if name != "v_num"}
        seconds = time.monotonic() - self._start
        if self._num_images and seconds > 0:
            items["images/s"] = f"{self._num_images / seconds:.0f}"
        return items
