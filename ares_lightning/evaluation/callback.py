"""The evaluators during a training: every few epochs, on held-out images, of averaged and raw weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from ares_lightning.attacks.attack import check_count
from ares_lightning.evaluation.metrics import WORST_CASE
from ares_lightning.evaluation.run import Evaluation
from ares_lightning.evaluation.workers import Workers

PREFIX = "periodic"
"""What the names of the logged metrics begin with: `periodic/<evaluator>/<ema|raw>/<metric>`."""


class PeriodicEvaluation(Callback):
    """Asks the questions of an evaluation at the end of every few epochs, after the validation, in all processes.

    evaluation: of held-out images; its accuracies at no budget and at the threat model are logged.
    folder: where the verdicts lie, in `epoch-NNNN-<ema|raw>/verdicts`, so that a training that goes on asks nothing
    again. every_n_epochs: how often. networks: what there is to ask, by name. weights: which of them are asked.

    The networks are copied, so that the training notices nothing.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        folder: Path,
        *,
        every_n_epochs: int,
        networks: Callable[[L.Trainer, L.LightningModule], Mapping[str, nn.Module]],
        weights: Sequence[str] = ("ema", "raw"),
    ) -> None:
        check_count("every_n_epochs", every_n_epochs)
        self.evaluation, self.folder, self.every_n_epochs = evaluation, folder, every_n_epochs
        self._networks, self._weights = networks, tuple(weights)
        self._workers: Workers | None = None

    @property
    def metrics(self) -> list[str]:
        """The names that may be logged."""
        evaluators = self.evaluation.evaluators
        attacks = [each.name for each in evaluators if each.attack_fingerprint is not None]
        others = [each.name for each in evaluators if each.attack_fingerprint is None]
        kinds = [("robust_accuracy", [*attacks, WORST_CASE] if attacks else []), ("clean_accuracy", others)]
        return [
            f"{PREFIX}/{name}/{which}/{kind}" for kind, each in kinds for name in each for which in self._weights
        ]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have all processes name the folder of rank 0."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the values of earlier epochs, which are no values of this one."""
        for name in [name for name in trainer.callback_metrics if name.startswith(f"{PREFIX}/")]:
            del trainer.callback_metrics[name]

    @torch.inference_mode(False)
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask, if it is time, and log what comes out."""
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self._workers = workers = self._workers or Workers.current()
        for which, net in self._networks(trainer, pl_module).items():
            if which not in self._weights:
                continue
            own = copy.deepcopy(net)
            if workers.world_size > 1:  # batch norms of the processes have seen different images
                for buffer in own.buffers():
                    torch.distributed.broadcast(buffer, 0)
            run_dir = self.folder / f"epoch-{trainer.current_epoch:04d}-{which}"
            results, *_ = self.evaluation.ask(own, run_dir, pl_module.device, workers, show=False)
            for failure in results.failed if workers.leads else ():
                print(f"eval.{failure.evaluator} failed in epoch {trainer.current_epoch}: {failure.error}")
            pl_module.log_dict(workers.share(self._logged(which, results.summary)))

    def _logged(self, which: str, summary: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the accuracies on the set itself, without a budget and at the threat model, by their names."""
        threat, main = self.evaluation.threat, self.evaluation.dataset.name
        return {
            f"{PREFIX}/{row['evaluator']}/{which}/{row['metric']}": row["value"]
            for row in summary
            if row["set"] == main
            and row["metric"] in ("clean_accuracy", "robust_accuracy")
            and (row["norm"] is None or (row["norm"], row["eps"]) == (threat.norm, threat.eps))
        }
