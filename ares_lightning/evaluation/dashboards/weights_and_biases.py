"""Weights & Biases: what metrics are plotted over, and an evaluation as charts, tables, images and artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import wandb

from ares_lightning.evaluation.dashboards.results import Results

Run = Any
"""wandb.Run, which has no type hints of use here."""


def declare_metrics(run: Run) -> None:
    """Say that what a training logs is plotted over epochs, and that of accuracies the best one counts."""
    run.define_metric("epoch", hidden=True)
    run.define_metric("trainer/global_step", hidden=True)
    for name in ("train/*", "val/*"):
        run.define_metric(name, step_metric="epoch")
    for name in ("val/clean_acc", "val/robust_acc", "periodic/*"):
        run.define_metric(name, step_metric="epoch", summary="max")


def show_on_wandb(run: Run, results: Results) -> None:
    """Log an evaluation: numbers in the summary of the run, charts, tables, images, the report, and artifacts.

    The config's `logger.artifacts` says whether files are kept.
    """
    shown: dict[str, Any] = {
        name: wandb.plot.line_series(
            [line.x for line in chart.lines],
            [line.value for line in chart.lines],
            keys=[line.label for line in chart.lines],
            title=chart.title,
            xname=chart.x_name,
            split_table=True,
        )
        for name, chart in results.charts.items()
    }
    if results.accuracies:
        bars = _table(pd.DataFrame(results.accuracies.items(), columns=["evaluation", "accuracy"]))
        shown["eval/accuracies"] = wandb.plot.bar(
            bars, "evaluation", "accuracy", title="Accuracies", split_table=True
        )
    shown |= {name: _table(table) for name, table in results.tables.items()}
    if results.panels:
        shown["eval/examples"] = [wandb.Image(panel.pixels, caption=panel.caption) for panel in results.panels]
    for report in results.files["report"]:
        shown["eval/report"] = wandb.Html(report, inject=False)
    run.log(shown)
    run.summary.update(results.scalars)
    run.config.update({"evaluation": dict(results.facts)}, allow_val_change=True)
    if results.config["logger"].get("artifacts"):
        _keep_files(run, results)


def _table(table: pd.DataFrame) -> wandb.Table:
    """Return a table whose empty cells are None, which mixes with text as well as with numbers."""
    rows: Any = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    return wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)


def _keep_files(run: Run, results: Results) -> None:
    """Log checkpoints, each a version of one model, verdicts and report; they are read where they lie."""
    kinds = results.files
    for checkpoint in kinds["model"]:
        _log(run, "model", [checkpoint], aliases=[checkpoint.stem])
    for kind in ("verdicts", "report"):
        _log(run, kind, kinds[kind])


def _log(run: Run, kind: str, files: list[Path], **options: Any) -> None:
    if files:
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        for file in files:
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        run.log_artifact(artifact, **options)
