"""The metrics file of a run, which a resumed training goes on with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger


class MetricsFile(CSVLogger):
    """Writes `metrics.csv` into the run folder; unlike Lightning's logger it keeps the rows of a stopped run."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="")
        self._file = run_dir / "metrics.csv"

    @property
    def experiment(self) -> Any:
        """Return the writer; when it is made, the rows so far become its first."""
        if self._experiment is None and self._file.exists():
            with self._file.open(newline="") as file:
                rows = list(csv.DictReader(file))
            writer: Any = super().experiment
            writer.metrics = rows
            writer.save()
        return super().experiment
