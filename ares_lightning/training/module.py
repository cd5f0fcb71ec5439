"""The LightningModule: one training step is an attack on the bare network and an update on what it made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from ares_lightning.attacks import Attack
from ares_lightning.data import BatchAugmentation
from ares_lightning.training.attention import split_attention
from ares_lightning.training.objectives import Logs, Objective
from ares_lightning.training.optim import OptimSettings
from ares_lightning.training.tricks.non_finite import NonFiniteError

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
    compile: whether the network is compiled, in place.
    config: the resolved config, plain containers only; it is written into every checkpoint.

    `perturb_weights`, where a trick sets it, is called between crafting and the loss with a function that computes
    the loss; the trick undoes what it did once the backward is through.

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
        compile: bool = False,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.net = net
        self.objective = objective
        self.auxiliary = objective.auxiliary
        self.optim = optim
        self.val_attack = val_attack
        self.label_smoothing = label_smoothing
        self.augmentation = augmentation or BatchAugmentation(seed=seed)
        self.seed = seed
        self.compiles = compile
        self.config = config
        self.num_classes = num_classes
        self.clean_acc = MeanMetric()
        self.robust_acc = MeanMetric()
        self.perturb_weights: Callable[[Callable[[], Tensor]], None] | None = None

    def setup(self, stage: str) -> None:
        """Compile the network, if wanted, in place: its names and what is saved stay as they are."""
        if self.compiles and stage == "fit":
            self.net.compile()

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
        images, labels = self.augmented(images, labels, sample_ids)
        step, objective = self.global_step, self.objective
        adversarial = objective.craft(
            self.net, images, labels, step, epoch=self.current_epoch, sample_ids=sample_ids
        )
        if self.perturb_weights is not None:
            self.perturb_weights(lambda: objective.loss(self.net, images, adversarial, labels, step)[0])
        return objective.loss(self.net, images, adversarial, labels, step)

    def augmented(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images erased and mixed, and their labels, soft ones [N, classes] where they have to be."""
        images = self.augmentation.erase(images, sample_ids, self.current_epoch)
        if not (self.label_smoothing or self.augmentation.mixes):
            return images, labels
        one_hot = F.one_hot(labels, self.num_classes).to(images.dtype)
        soft = one_hot * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return self.augmentation.mix(images, soft, self.global_step // self.objective.replays)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count clean and robust accuracy in one attack call."""
        images, labels, sample_ids = batch
        try:
            outcome = self.val_attack(self.net, to_pixels(images), labels, sample_ids=sample_ids, seed=self.seed)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            raise NonFiniteError(f"the network gives no finite logits after step {self.global_step}") from error
        self.clean_acc(outcome.clean_prediction == labels)
        self.robust_acc(~outcome.broken)
        metrics = {"val/clean_acc": self.clean_acc, "val/robust_acc": self.robust_acc}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, stepped after each update."""
        epochs = self.trainer.max_epochs or 1
        steps = self.steps_by_epoch(epochs)
        optim = self.optim.scaled(self._images_per_step())
        optimizer = optim.optimizer(self.net, self.auxiliary)
        schedule = optim.schedule_of(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _images_per_step(self) -> int:
        """Return the images of an update in the first epoch, over all processes and accumulated batches."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batches: int = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return int(data.batch_size_at(0)) * batches

    def steps_by_epoch(self, epochs: int) -> list[float]:
        """Return how many updates are made in each of the epochs."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "varies", False):
            accumulated = self.trainer.accumulate_grad_batches
            limit = self.trainer.limit_train_batches
            batches = [limited(data.steps_per_epoch(epoch), limit) for epoch in range(epochs)]
            return [-(-number // accumulated) for number in batches]
        return [int(self.trainer.estimated_stepping_batches) / epochs] * epochs

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each unit's gradient by its weight (AGC), or the norm of the whole gradient."""
        if self.optim.agc is not None:
            head = {id(parameter) for parameter in self.optim.head(self.net)}
            clip: Any = adaptive_clip_grad
            clip([p for p in self.net.parameters() if id(p) not in head], self.optim.agc)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the config along, so that a checkpoint alone says what it is, and what the objective carries."""
        checkpoint["config"] = self.config
        checkpoint["images_per_step"] = self._images_per_step()
        state = self.objective.state_dict()
        if state and self.trainer.world_size > 1:
            gathered: Any = self.all_gather(state)
            state = {name: value.flatten(0, 1) for name, value in gathered.items()}
        if state:
            checkpoint["objective"] = {name: value.cpu() for name, value in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the objective what it carried for the rows of this process.

        Raises ValueError where an update takes another number of images, by which the schedule counts.
        """
        now, before = self._images_per_step(), checkpoint["images_per_step"]
        if now != before:
            raise ValueError(
                f"data.batch_size: the checkpoint was made with {before} images a step over all processes, now it "
                f"is {now}; keep their number to go on, or begin anew with model.weights=<checkpoint>"
            )
        state = checkpoint.get("objective", {})
        rank, ranks = self.global_rank, self.trainer.world_size
        self.objective.load_state_dict({name: value.chunk(ranks)[rank] for name, value in state.items()})


def limited(batches: int, limit: int | float | None) -> int:
    """Return how many of an epoch's batches the Trainer takes, given its limit_train_batches."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))


def to_pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 images to [0, 1] on their device."""
    return images.to(dtype).div_(255)
