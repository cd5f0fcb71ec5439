"""Real trainings on the digits, a few small steps long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor, nn

from ares_lightning import build
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training import RobustTraining

SHORT = (
    *("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1"),
    *("model.settings.width=8", "data.batch_size=16", "data.eval_batch_size=32", "adv.val_steps=1"),
    *("callbacks.progress=false", "eval=[]"),
)


class Watch(Callback):
    """Looks on; runs before the callbacks of the config."""


@dataclass
class Run:
    """What a training leaves behind."""

    trainer: L.Trainer
    module: RobustTraining
    folder: Path

    @property
    def end(self) -> Path:
        """The checkpoint of the end of the training."""
        return self.folder / "end.ckpt"

    def checkpoint(self, path: Path | None = None) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(path or self.end, weights_only=True)
        return loaded


def config(*overrides: str) -> DictConfig:
    model = [override for override in SHORT if "width" not in override]
    short = model if any(o.startswith("model=") for o in overrides) else SHORT
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", [*short, *overrides])


class InDouble(nn.Module):
    """A network that computes in float64, so that two ways to train it can be told from rounding."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.double())


def fit(
    folder: Path,
    *overrides: str,
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
    in_double: bool = False,
) -> Run:
    """Train as `train.py` does with these overrides, up to the evaluation."""
    cfg = config(*overrides)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build.build_data(cfg, training=True)
    module = build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    if in_double:
        module.net = InDouble(module.net)
    trainer = build.build_trainer(cfg, folder)
    trainer.callbacks[:0] = callbacks
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    run = Run(trainer, module, folder)
    if trainer.world_size == 1:
        trainer.save_checkpoint(run.end)
    return run


def weights(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}
