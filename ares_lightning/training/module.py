"""The LightningModule: one training step is an attack on the bare network and an update on what it made."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ares_lightning.attacks import Attack
from ares_lightning.data import BatchAugmentation
from ares_lightning.training.attention import split_attention
from ares_lightning.training.objectives import Logs, Objective
from ares_lightning.training.optim import OptimSettings

MONITORED = ("val/robust_acc", "val/clean_acc")

Batch = tuple[Tensor, Tensor, Tensor]


class RobustTraining(L.LightningModule):
    """Trains `net` with an objective and measures clean and robust accuracy on the held-out split.

    net: from pixels in [0, 1] to logits; num_classes: of the logits.
    objective: makes the images to train on and the loss.
    optim: how the weights are updated.
    val_attack: the attack whose verdicts on the held-out images give `val/robust_acc`; `seed`: of its noise.
    label_smoothing: share of the label spread over all classes, in the attack and in the loss alike.
    augmentation: what is done to a batch on its device before the attack sees it.
    config: the resolved config, plain containers only; it is written into every checkpoint.

    Batches are `(images uint8 [N, C, H, W], labels int64 [N], sample_ids int64 [N])`.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        num_classes: int,
        objective: Objective,
        optim: OptimSettings,
        val_attack: Attack,
        label_smoothing: float = 0.0,
        augmentation: BatchAugmentation | None = None,
        seed: int = 0,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.net = net
        self.objective = objective
        self.optim = optim
        self.val_attack = val_attack
        self.label_smoothing = label_smoothing
        self.augmentation = augmentation or BatchAugmentation(seed=seed)
        self.seed = seed
        self.config = config
        self.num_classes = num_classes
        self.clean_acc = MeanMetric()
        self.robust_acc = MeanMetric()

    def on_fit_start(self) -> None:
        """Choose the form of attention that is the faster to train here."""
        if self.device.type == "cpu" and self.trainer.precision == "bf16-mixed":
            split_attention(self.net)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Craft on the network as it is, then return the loss on what was crafted."""
        images, labels, sample_ids = batch
        loss, logs = self.loss(to_pixels(images), labels, sample_ids)
        logs = {f"train/{name}": value for name, value in {"loss": loss.detach(), **logs}.items()}
        self.log_dict(logs, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def loss(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> tuple[Tensor, Logs]:
        """Return the objective's loss and logs on images [N, C, H, W] in [0, 1]."""
        images = self.augmentation.erase(images, sample_ids, self.current_epoch)
        if self.label_smoothing or self.augmentation.mixes:
            one_hot = F.one_hot(labels, self.num_classes).to(images.dtype)
            labels = one_hot * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
            images, labels = self.augmentation.mix(images, labels, self.global_step)
        adversarial = self.objective.craft(
            self.net, images, labels, self.global_step, epoch=self.current_epoch, sample_ids=sample_ids
        )
        return self.objective.loss(self.net, images, adversarial, labels, self.global_step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count clean and robust accuracy in one attack call."""
        images, labels, sample_ids = batch
        outcome = self.val_attack(self.net, to_pixels(images), labels, sample_ids=sample_ids, seed=self.seed)
        self.clean_acc(outcome.clean_prediction == labels)
        self.robust_acc(~outcome.broken)
        metrics = {"val/clean_acc": self.clean_acc, "val/robust_acc": self.robust_acc}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> Any:
        """Return timm's optimizer and its schedule, stepped after each update."""
        optimizer = self.optim.optimizer(self.net)
        steps, epochs = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs or 1
        scheduler = self.optim.scheduler(optimizer, steps, epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's schedule, which counts updates itself."""
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the config along, so that a checkpoint alone says what it is."""
        checkpoint["config"] = self.config


def to_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 images to [0, 1] on their device."""
    return images.to(dtype).div_(255)
