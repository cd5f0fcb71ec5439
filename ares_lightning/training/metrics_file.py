"""The metrics file of a run: one row an epoch, which a resumed training goes on with."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ares_lightning.atomic import replacing


class MetricsFile(Checkpoint):
    """Writes what was logged in an epoch to `path`, before the checkpoint that ends the epoch.

    So no epoch is lost whenever the training is killed; one that is gone through again replaces its row. An epoch
    without validation has no values of one. It is a Checkpoint because those come after all other callbacks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._has_validated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the rows of the epochs that are done."""
        if trainer.is_global_zero and self.path.exists():
            with self.path.open(newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that there are new values."""
        self._has_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row; every process takes part in the means."""
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        for name, value in sorted(trainer.callback_metrics.items()):
            if self._has_validated or not name.startswith("val/"):
                row[name] = value.item()
        self._has_validated = False
        if trainer.is_global_zero:
            self._rows.append(row)
            self._write()

    def _write(self) -> None:
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(self._rows)
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())
