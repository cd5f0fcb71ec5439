"""What an evaluation has found, on the dashboards of Weights & Biases and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from ares_lightning.evaluation.dashboards.results import read_results
from ares_lightning.evaluation.dashboards.tensorboard import show_on_tensorboard
from ares_lightning.evaluation.dashboards.weights_and_biases import declare_metrics, show_on_wandb

__all__ = ["declare_metrics", "log_evaluation"]


def log_evaluation(loggers: Sequence[Logger], run_dir: Path) -> None:
    """Show the evaluation in `run_dir`, which is complete, on the dashboards of these loggers.

    To be called in one process. All that is shown is read from files of the run folder; docs/dashboards.md lists
    their names. Raises ValueError naming a file that is not what an evaluation writes.
    """
    if not loggers:
        return
    results = read_results(run_dir)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            show_on_wandb(logger.experiment, results)
        elif isinstance(logger, TensorBoardLogger):
            show_on_tensorboard(logger.experiment, results)
