"""What a run folder has for a dashboard: numbers, charts, tables and images, each under the name it has there."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ares_lightning.evaluation.report.classes import class_rows
from ares_lightning.evaluation.report.examples import class_names, panel
from ares_lightning.evaluation.report.figures import Line
from ares_lightning.evaluation.report.lines import budget_curves, low_pass_curves, query_curves, step_curves
from ares_lightning.evaluation.report.rows import NORMS, Row
from ares_lightning.evaluation.report.run import Run, read_runs
from ares_lightning.evaluation.report.sets import corruption_tables
from ares_lightning.evaluation.report.style import Style

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

NUM_PANELS = 8
_LEAST_WIDTH = 96
"""Pixels of an image that is shown; smaller ones are magnified by a whole number."""
_GAP = 4
"""White pixels between the images of a panel."""


@dataclass(frozen=True)
class Chart:
    """Accuracies (fractions) over `x_name`."""

    title: str
    x_name: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Panel:
    """A clean image, the perturbation, amplified around grey, and the adversarial image, side by side [H, W, 3]."""

    pixels: Pixels
    caption: str


@dataclass(frozen=True)
class Results:
    """What a run folder has to show, by name.

    config: the settings; facts: what the evaluation ran on and with; accuracies: clean and robust ones, by what
    measured them; files: those to be kept, by kind.
    """

    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    scalars: dict[str, float]
    accuracies: dict[str, float]
    charts: dict[str, Chart]
    tables: dict[str, pd.DataFrame]
    panels: list[Panel]
    files: dict[str, list[Path]]


def read_results(folder: Path) -> Results:
    """Read the run folder of an evaluation; raises ValueError naming a file that is not what one writes."""
    (run,) = read_runs([folder])
    numbers = dict(_numbers(run))
    scalars: dict[str, float] = {}
    for name, row in numbers.items():
        scalars |= {name: row.value, f"{name}_low": row.low, f"{name}_high": row.high, f"{name}_n": row.n}
    if run.checks:
        scalars |= {f"eval/sanity/{verdict}": len(run.verdicts(verdict)) for verdict in ("fail", "warn", "pass")}
    return Results(
        config=run.config or {},
        facts=run.about.get("run", {}),
        scalars=scalars,
        accuracies={
            name.removeprefix("eval/").removesuffix(f"/{row.metric}"): row.value
            for name, row in numbers.items()
            if row.metric in ("clean_accuracy", "robust_accuracy")
        },
        charts={name: chart for name, chart in _charts(run).items() if chart.lines},
        tables=dict(_tables(run)),
        panels=list(_panels(run)),
        files=_files(run.folder),
    )


def _numbers(run: Run) -> Iterator[tuple[str, Row]]:
    """Yield the rows that are single numbers, not points of a line, by name."""
    budgets: dict[Any, set[float | None]] = {}
    for row in run.rows:
        budgets.setdefault(_asked(row), set()).add(row.eps)
    for row in run.rows:
        is_point = len(budgets[_asked(row)]) > 1 or row.queries is not None or row.radius is not None
        if is_point or run.is_cell(row):
            continue
        attack = row.attack if row.metric in ("robust_accuracy_after", "transfer_accuracy") else None
        of_set = None if row.set == run.main else row.set
        parts = ("eval", row.evaluator, of_set, row.source, row.model, attack, row.metric)
        yield "/".join(part for part in parts if part), row


def _asked(row: Row) -> Row:
    """Return what the points of a curve over budgets have in common."""
    return replace(row, value=0.0, n=0, low=0.0, high=0.0, eps=None)


def _charts(run: Run) -> dict[str, Chart]:
    charts = {
        f"eval/robust_accuracy/{norm}": Chart(f"Robust accuracy, {NORMS.get(norm, norm)}", "eps", lines)
        for norm, lines in budget_curves([run]).items()
    }
    charts["eval/queries"] = Chart("Accuracy over queries", "queries", query_curves([run]))
    charts["eval/steps"] = Chart("Accuracy over the steps of an attack", "steps", step_curves([run]))
    charts["eval/frequency"] = Chart("Accuracy on low frequencies", "radius (pixels)", low_pass_curves([run]))
    for family, corruptions in corruption_tables(run).items():
        lines = [
            Line(name, Style.of(place), list(map(float, cells)), [row.value for row in cells.values()], [])
            for place, (name, cells) in enumerate(corruptions.items())
        ]
        charts[f"eval/corruptions/{family}"] = Chart(f"Corruptions of {family}", "severity", lines)
    return charts


def _tables(run: Run) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "eval/summary", pd.DataFrame(map(asdict, run.rows))
    if run.checks:
        yield "eval/sanity", pd.DataFrame(map(asdict, run.checks)).drop(columns="check")
    if run.worst_case is not None:
        rows = class_rows(run.worst_case, class_names(run))
        yield (
            "eval/classes",
            pd.DataFrame(
                [
                    {
                        "label": row.label,
                        "class": row.name,
                        "n": row.robust.n,
                        "clean": row.clean.value,
                        "robust": row.robust.value,
                        "robust_low": row.robust.low,
                        "robust_high": row.robust.high,
                        "most_taken_for": row.taken_for and row.taken_for[0],
                    }
                    for row in rows
                ]
            ),
        )


def _panels(run: Run) -> Iterator[Panel]:
    shown = panel(run, NUM_PANELS)
    for card in shown.get("cards", ()):
        told = f"{card['label_name']}: predicted {card['before_name']}, attacked {card['after_name']}"
        pixels = _side_by_side([card["clean"], card["change"], card["adversarial"]])
        yield Panel(pixels, f"{told} ({card['sample_name']}; {shown['about']})")


def _side_by_side(sources: Sequence[str]) -> Pixels:
    """Return images, given as the page has them, as one, the small ones magnified."""
    shown: list[Pixels] = []
    for source in sources:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
        times = -(-_LEAST_WIDTH // image.width)
        pixels = np.asarray(image).repeat(times, axis=0).repeat(times, axis=1)
        shown += [np.full((len(pixels), _GAP, 3), 255, np.uint8), pixels]
    return np.concatenate(shown[1:], axis=1)


def _files(folder: Path) -> dict[str, list[Path]]:
    checkpoints = [folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
    return {
        "model": [path for path in checkpoints if path.exists()],
        "verdicts": sorted((folder / "verdicts").glob("part-*.parquet")),
        "report": [path for path in [folder / "report.html"] if path.exists()],
    }
