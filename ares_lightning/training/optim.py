"""How the weights are updated: timm's optimizers, and the learning rate over the epochs."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ares_lightning.models import Classifier

SCHEDULES = ("cosine", "step", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """How the weights are updated. All times are in epochs.

    name: any optimizer that timm knows.
    lr: at the end of the warm-up, for the batch in use, or, where `base_batch` is given, for a batch of so many
        images over all processes and accumulated steps: it is then scaled in proportion (Goyal et al. 2017, arXiv
        1706.02677, section 2.1).
    weight_decay: not applied to biases and norms, unless decay_norms. momentum, betas: None takes the optimizer's
        own.
    layer_decay: factor by which the rate falls from each block to the one before it (Clark et al. 2020, arXiv
        2003.10555; Bao et al. 2022, arXiv 2106.08254).
    schedule: of the rate after the warm-up: `cosine` to min_lr; `step`, times decay_rate at each of the milestones;
        `linear` between the points {epoch: multiple of lr}; `constant`.
    warmup_epochs: linear from warmup_lr (a fraction of an epoch is allowed). warmup_lr and min_lr are not scaled.
    warmup_prefix: the cosine begins at the end of the warm-up (Singh et al. 2023, arXiv 2303.01870, their code)
        rather than with it, as timm has it and ARES with timm.
    cooldown_epochs: at the end, at the last rate.
    clip_grad_norm: largest norm of the whole gradient. agc: largest norm of the gradient of each unit as a share of
        that of its weights, the last layer left out (Brock et al. 2021, arXiv 2102.06171, section 4.1). None: no
        clipping.

    Raises ValueError naming the setting.
    """

    name: str
    lr: float
    weight_decay: float
    base_batch: int | None = None
    decay_norms: bool = False
    momentum: float | None = None
    betas: Sequence[float] | None = None
    layer_decay: float | None = None
    schedule: str = "cosine"
    warmup_epochs: float = 0
    warmup_lr: float = 0.0
    warmup_prefix: bool = False
    min_lr: float = 0.0
    cooldown_epochs: float = 0
    milestones: Sequence[float] = ()
    decay_rate: float = 0.1
    points: Mapping[float, float] | None = None
    clip_grad_norm: float | None = None
    agc: float | None = None

    def __post_init__(self) -> None:
        if self.name not in list_optimizers():
            raise ValueError(f"name={self.name}: timm has no such optimizer; see timm.optim.list_optimizers()")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule}: expected one of {', '.join(SCHEDULES)}")
        numbers = ("lr", "weight_decay", "base_batch", "momentum", "layer_decay", "warmup_epochs", "warmup_lr")
        for key in (*numbers, "min_lr", "cooldown_epochs", "decay_rate", "clip_grad_norm", "agc"):
            value = getattr(self, key)
            if value is not None and not _is_number(value):
                raise ValueError(f"{key}={value}: expected a number of at least 0")
        if self.base_batch == 0:
            raise ValueError("base_batch=0: expected a number of images, or null for a rate that is not scaled")
        if self.clip_grad_norm is not None and self.agc is not None:
            raise ValueError(
                f"agc={self.agc}: contradicts clip_grad_norm={self.clip_grad_norm}; set one of them null"
            )
        if self.betas is not None and not (_is_list(self.betas) and len(self.betas) == 2):
            raise ValueError(f"betas={self.betas}: expected null or two numbers")
        if not _is_list(self.milestones):
            raise ValueError(f"milestones={self.milestones}: expected a list of epochs")
        if self.points is not None and not isinstance(self.points, Mapping):
            raise ValueError(f"points={self.points}: expected {{epoch: multiple of lr}}")
        if not all(map(_is_number, self.milestones)) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones}: expected rising epochs")
        if type(self.warmup_prefix) is not bool:
            raise ValueError(f"warmup_prefix={self.warmup_prefix}: expected true or false")
        if self.warmup_prefix and self.schedule != "cosine":
            raise ValueError(f"warmup_prefix=true: goes with schedule=cosine, this is schedule={self.schedule}")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("milestones=[]: schedule=step needs the epochs at which the rate falls")
        points = self.points or {}
        if not all(map(_is_number, [*points, *points.values()])) or list(points) != sorted(points):
            raise ValueError(f"points={points}: expected {{epoch: multiple of lr}}, epochs rising")
        if (self.schedule == "linear") != bool(points):
            raise ValueError(f"points={self.points}: go with schedule=linear, this is schedule={self.schedule}")

    def scaled(self, batch: int) -> OptimSettings:
        """Return the settings with the rate for a step of `batch` images over all processes, and no base_batch."""
        if self.base_batch is None:
            return self
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return OptimSettings(**{**values, "lr": self.lr * batch / self.base_batch, "base_batch": None})

    def optimizer(self, net: nn.Module, auxiliary: nn.Module | None = None) -> Optimizer:
        """Return the optimizer of a network and of what is trained beside it."""
        settings = {"momentum": self.momentum, "betas": self.betas and tuple(self.betas)}
        given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
        optimizer: Optimizer = create_optimizer_v2(
            _trunk(net),
            self.name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            filter_bias_and_bn=not self.decay_norms,
            layer_decay=self.layer_decay,
            **given,
        )
        if auxiliary is not None:
            optimizer.add_param_group({"params": list(auxiliary.parameters()), "weight_decay": 0.0})
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        return optimizer

    def head(self, net: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters of the last layer."""
        return list(_trunk(net).parameters())[-2:]

    def schedule_factor(self, epochs: float) -> Callable[[float], float]:
        """Return the function from the epoch, with its fraction, to the multiple of lr, over so many epochs."""
        warmup = min(self.warmup_epochs, epochs)
        begin = warmup if self.warmup_prefix else 0.0
        span = (max(epochs - self.cooldown_epochs, warmup) - begin) or 1

        def factor(epoch: float) -> float:
            if epoch < warmup:
                start = self.warmup_lr / self.lr if self.lr else 0.0
                return start + (1 - start) * epoch / warmup
            if self.schedule == "step":
                return float(self.decay_rate ** bisect.bisect_right(self.milestones, epoch))
            if self.points:
                return float(np.interp(epoch, list(self.points), list(self.points.values())))
            if self.schedule == "constant":
                return 1.0
            least = self.min_lr / self.lr if self.lr else 0.0
            return least + (1 - least) * (1 + math.cos(math.pi * min((epoch - begin) / span, 1))) / 2

        return factor

    def schedule_of(self, optimizer: Optimizer, steps: Sequence[float]) -> LambdaLR:
        """Return the schedule, stepped after each update, for epochs of so many updates each."""
        ends = list(itertools.accumulate(steps, initial=0.0))
        factor = self.schedule_factor(len(steps))
        return LambdaLR(optimizer, lambda step: factor(float(np.interp(step, ends, range(len(ends))))))


def _trunk(net: nn.Module) -> nn.Module:
    """Return the architecture itself, which knows its blocks and what is not to be decayed."""
    return net.backbone if isinstance(net, Classifier) else net


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
