"""TensorBoard: an evaluation as scalars, figures, images and text."""

from __future__ import annotations

from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from ares_lightning.evaluation.dashboards.results import Chart, Results
from ares_lightning.evaluation.report.figures import percent

Writer = Any
"""torch.utils.tensorboard.SummaryWriter, which is there only where TensorBoard is."""


def show_on_tensorboard(writer: Writer, results: Results) -> None:
    """Write an evaluation as events: numbers, curves as figures, images, tables and settings as text."""
    for name, value in results.scalars.items():
        writer.add_scalar(name, value)
    for name, chart in results.charts.items():
        writer.add_figure(name, _figure(chart))
    for place, panel in enumerate(results.panels):
        writer.add_image(f"eval/examples/{place}", panel.pixels, dataformats="HWC")
    captions = [f"{place}. {panel.caption}" for place, panel in enumerate(results.panels)]
    if captions:
        writer.add_text("eval/examples", "  \n".join(captions))
    for name, table in results.tables.items():
        writer.add_text(name, _markdown(table))
    settings = yaml.safe_dump(dict(results.config), sort_keys=False)
    writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()))
    writer.flush()


def _figure(chart: Chart) -> Figure:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for line in chart.lines:
        look: dict[str, Any] = {"color": line.style.colour, "linestyle": line.style.dash}
        label = line.label.replace("$", r"\$")  # no mathematics in a name
        axes.plot(line.x, percent(line.value), marker="o", markersize=3.5, label=label, **look)
    axes.set(title=chart.title, xlabel=chart.x_name, ylabel="accuracy (%)", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|").replace("\n", " ")
