"""Averages of the weights over the training: EMA and SWA."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from timm.utils import ModelEmaV3
from torch import nn

from ares_lightning.attacks.attack import check_count, check_number

AVERAGED = "state_dict_ema"
"""The entry of a checkpoint with the averaged weights, named as those in `state_dict`; `weights=ema` takes it."""


class WeightAverage(Callback):
    """Keeps an average of the network beside it; validation and, by default, evaluation look at the average.

    Checkpoints hold both. Running statistics of norms are averaged along; of several processes those of the first
    count, as in DDP.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: ModelEmaV3 | None = None
        self._raw: nn.Module | None = None
        self._saved: dict[str, Any] = {}
        self._steps_before = 0
        self.num_updates = 0

    @property
    def average(self) -> ModelEmaV3:
        """The average, once the training has begun."""
        assert self._average is not None
        return self._average

    @abstractmethod
    def update(self, trainer: L.Trainer, net: nn.Module) -> bool:
        """Take the weights into the average after a step, if it is time; return whether it was."""

    def make_average(self, net: nn.Module) -> ModelEmaV3:
        """Return a copy of the network to average into."""
        return ModelEmaV3(net, decay=self._decay)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the network, or take the average up from the checkpoint that the training goes on from."""
        net: Any = pl_module.net
        self._average = self.make_average(net)
        if self._saved:
            self._average.module.load_state_dict({key.removeprefix("net."): v for key, v in self._saved.items()})
        self._saved = {}
        if getattr(pl_module, "compiles", False):
            self._average.module.compile()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count steps from here, where those of a training that goes on are known."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after every optimizer step, however many batches it took."""
        if trainer.global_step == self._steps_before:
            return
        self._steps_before = trainer.global_step
        net: Any = pl_module.net
        self.num_updates += self.update(trainer, net)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the network's place, with the statistics of the first process."""
        if not self.num_updates:
            return
        module: Any = pl_module
        if trainer.world_size > 1:
            for buffer in self.average.module.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._raw, module.net = module.net, self.average.module

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the network back."""
        if self._raw is not None:
            module: Any = pl_module
            module.net, self._raw = self._raw, None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the network back where the validation was broken off."""
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the averaged weights beside the raw ones."""
        if self.num_updates:
            weights = self.average.module.state_dict()
            checkpoint[AVERAGED] = {f"net.{name}": value for name, value in weights.items()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the averaged weights until the network is on its device."""
        self._saved = checkpoint.get(AVERAGED, {})

    def state_dict(self) -> dict[str, Any]:
        """Return how often the average was updated."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_updates = state_dict["num_updates"]


class EMA(WeightAverage):
    """Exponential moving average: after every step, `average ← decay · average + (1 − decay) · weights`.

    decay: 0.9998 (ARES, arXiv 2302.14301). warmup: the decay after t updates is at most 1 − (1 + t)^(−2/3), so that
        short trainings forget their beginning too (timm's ModelEmaV3, after Katherine Crowson).
    """

    def __init__(self, decay: float = 0.9998, warmup: bool = True) -> None:
        if check_number("decay", decay) >= 1:
            raise ValueError(f"decay={decay}: expected a number from 0 to below 1")
        if type(warmup) is not bool:
            raise ValueError(f"warmup={warmup}: expected true or false")
        super().__init__(decay)
        self._warmup = warmup

    def make_average(self, net: nn.Module) -> ModelEmaV3:
        """Return a copy of the network to average into."""
        return ModelEmaV3(net, decay=self._decay, use_warmup=self._warmup)

    def update(self, trainer: L.Trainer, net: nn.Module) -> bool:
        """Take the weights in after every step."""
        self.average.update(net, step=self.num_updates + 1 if self._warmup else None)  # timm copies at step 1
        return True


class SWA(WeightAverage):
    """Stochastic weight averaging: the plain mean of the weights at the ends of the epochs from one on.

    start_epoch: the first that counts, from 0 (Chen et al. 2021, "Robust overfitting may be mitigated by properly
        learned smoothening": 55 of 200).

    Izmailov et al. 2018, arXiv 1803.05407, algorithm 1, without its own schedule.
    """

    def __init__(self, start_epoch: int) -> None:
        super().__init__(0.0)
        if start_epoch != 0:
            check_count("start_epoch", start_epoch)
        self._start_epoch = start_epoch

    def update(self, trainer: L.Trainer, net: nn.Module) -> bool:
        """Take the weights in after the last step of an epoch."""
        if not trainer.is_last_batch or trainer.current_epoch < self._start_epoch:
            return False
        self.average.decay = self.num_updates / (self.num_updates + 1)
        self.average.update(net)
        return True


def networks(trainer: L.Trainer, module: L.LightningModule) -> dict[str, nn.Module]:
    """Return the network that is trained as `raw` and, where there is one, its average as `ema`."""
    net: Any = module.net
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAverage) and callback.num_updates:
            raw = net if callback._raw is None else callback._raw
            return {"raw": raw, "ema": callback.average.module}
    return {"raw": net}
