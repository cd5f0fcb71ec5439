"""A look, after every epoch, for the collapse that single-step training may suffer."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ares_lightning.attacks import Attack
from ares_lightning.attacks.attack import check_number

ACTIONS = ("warn", "stop", "fall_back")


class OverfittingProbe(Callback):
    """Attacks the last training batch of every epoch; warns where its accuracy falls far below the epoch before's.

    attack: PGD-5 with steps of eps / 4, a stronger one than is trained with.
    drop: 0.2, the fall of the accuracy that counts. action: after the warning `stop` ends the training, `fall_back`
        ends it with the weights of the epoch before, `warn` goes on.

    Wong et al. 2020, arXiv 2001.03994, section 5.3 and the authors' code (`--early-stop`).
    """

    def __init__(self, attack: Attack, *, drop: float = 0.2, action: str = "stop", seed: int = 0) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action={action}: expected one of {', '.join(ACTIONS)}")
        self._attack, self._drop, self._action, self._seed = attack, check_number("drop", drop), action, seed
        self._before: float | None = None
        self._weights: dict[str, Tensor] = {}
        self._stopped = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stand by the decision to stop where the training is taken up again."""
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe after the last batch of an epoch."""
        if not trainer.is_last_batch:
            return
        module: Any = pl_module
        now = self._accuracy(trainer, module, batch)
        pl_module.log("train/probe_acc", now)
        before, self._before = self._before, now
        if before is None or now >= before - self._drop:
            if self._action == "fall_back":
                self._weights = copy.deepcopy(module.net.state_dict())
            return
        remedy = {
            "warn": "going on",
            "stop": "stopping",
            "fall_back": "stopping with the weights of the epoch before",
        }
        trainer.print(
            f"overfitting probe: after epoch {trainer.current_epoch} {self._attack.name} leaves {now:.1%} of a "
            f"training batch, {before:.1%} an epoch before: catastrophic overfitting; {remedy[self._action]}"
        )
        self._stopped = self._action != "warn"
        trainer.should_stop = trainer.should_stop or self._stopped
        if self._action == "fall_back":
            module.net.load_state_dict(self._weights)

    def _accuracy(self, trainer: L.Trainer, module: Any, batch: Any) -> float:
        images, labels, sample_ids = batch
        outcome = self._attack(module.net, images.float().div(255), labels, sample_ids=sample_ids, seed=self._seed)
        mean: Any = trainer.strategy.reduce((~outcome.broken).float().mean(), reduce_op="mean")
        return float(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return the last accuracy, the weights to fall back to, and whether the training was stopped."""
        return {"before": self._before, "weights": self._weights, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up."""
        self._before, self._weights = state_dict["before"], state_dict["weights"]
        self._stopped = state_dict["stopped"]
