"""Optimizers and schedules, through timm's factories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """How the weights are updated.

    name: any optimizer that timm knows; lr: at the end of the warm-up, for the batch size in use.
    weight_decay: not applied to biases and norms. momentum: of SGD and its kin; None leaves it out.
    warmup_epochs: linear from warmup_lr to lr (a fraction of an epoch is allowed), then a cosine to min_lr.
    clip_grad_norm: largest norm of the whole gradient; None for no clipping.
    """

    name: str
    lr: float
    weight_decay: float
    momentum: float | None = None
    warmup_epochs: float = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    clip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.name not in list_optimizers():
            raise ValueError(f"name={self.name}: timm has no such optimizer; see timm.optim.list_optimizers()")
        for key in ("lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "momentum", "clip_grad_norm"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool | str) or not value >= 0):
                raise ValueError(f"{key}={value}: expected a number of at least 0")

    def optimizer(self, net: nn.Module) -> Optimizer:
        """Return the optimizer of a network."""
        momentum: dict[str, Any] = {} if self.momentum is None else {"momentum": self.momentum}
        optimizer: Optimizer = create_optimizer_v2(
            net, self.name, lr=self.lr, weight_decay=self.weight_decay, **momentum
        )
        return optimizer

    def scheduler(self, optimizer: Optimizer, steps: int, epochs: int) -> Scheduler:
        """Return a warm-up and cosine schedule over `steps` optimizer steps in `epochs` epochs."""
        warmup_steps = min(round(self.warmup_epochs * steps / epochs), steps - 1)
        scheduler: Scheduler = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=steps,
            warmup_epochs=warmup_steps,
            warmup_lr=self.warmup_lr,
            min_lr=self.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,
        )[0]
        return scheduler
