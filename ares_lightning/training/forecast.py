"""One line, soon after a training has begun, on how fast it is, what a step costs, and how long it will take."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ares_lightning.training.cost import StepCost

WARMUP_STEPS, MEASURED_STEPS = 3, 10
"""Steps before the clock is started, in which memory is claimed and code compiled, and steps that it runs for."""
GIB = 2**30


class Forecast(Callback):
    """Says images a second, the cost of a step in forwards, peak memory and the time left, once steps run evenly.

    cost: of a step of the training, counted beforehand; None where it could not be.
    """

    def __init__(self, cost: StepCost | None) -> None:
        self._cost = cost
        self._steps = self._num_images = 0
        self._start = self._seconds = 0.0
        self._said = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a step."""
        if not self._said:
            self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it; speak after the last step that is measured."""
        if self._said:
            return
        self._steps += 1
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if self._steps <= WARMUP_STEPS:
            return
        self._seconds += time.monotonic() - self._start
        self._num_images += len(batch[0]) * trainer.world_size
        if self._steps == WARMUP_STEPS + MEASURED_STEPS:
            self._said = True
            trainer.print(self._line(trainer, pl_module))

    def _line(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        measured = self._seconds / MEASURED_STEPS
        module: Any = pl_module
        total = sum(module.steps_by_epoch(trainer.max_epochs))  # of epochs that may differ in length
        batches = total * trainer.accumulate_grad_batches - trainer.fit_loop.epoch_loop.total_batch_idx - 1
        parts = [
            f"{self._num_images / self._seconds:.0f} images/s",
            *([] if self._cost is None else [f"a step costs {self._cost}"]),
            f"peak memory {_peak_memory(pl_module.device) / GIB:.1f} GiB",
            f"{_duration(batches * measured)} of steps left at this pace, validation comes on top",
        ]
        return "training: " + ", ".join(parts)


def _peak_memory(device: torch.device) -> int:
    """Return the bytes that tensors have taken at most on a GPU, and the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{hours} h" if hours < 72 else f"{hours / 24:.1f} days"
