"""Trains a few steps in every process of torchrun, and prints what rank 0's profiler saw of the collectives."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from ares_lightning import build
from ares_lightning.launch import CONFIG_DIR
from ares_lightning.training.preemption import StopSignals

STEPS_UNSEEN = 2


class Collectives(Callback):
    """Profiles the training steps after the first ones, in which DDP arranges its buckets."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == STEPS_UNSEEN:
            self.profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            self.profile.stop()

    def counts(self) -> dict[str, int]:
        names = Counter(event.name for event in self.profile.events())
        return {name: number for name, number in names.items() if name.startswith(("gloo:", "c10d::"))}


def main(run_dir: str, overrides: list[str]) -> None:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", [*overrides, f"run_dir={run_dir}", "callbacks.progress=false"])
    L.seed_everything(cfg.seed, verbose=False)
    data = build.build_data(cfg, training=True)
    module = build.build_module(cfg, build.build_classifier(cfg, data.num_classes), data)
    collectives = Collectives()
    trainer = build.build_trainer(cfg, Path(run_dir), StopSignals())
    trainer.callbacks.append(collectives)
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        print(json.dumps(collectives.counts()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
