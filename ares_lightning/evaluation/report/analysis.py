"""What ARES-Bench asks of many models: how robustness goes with size, clean and shifted accuracy, and training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from ares_lightning.evaluation.report.figures import Chart, Point, scatter_chart
from ares_lightning.evaluation.report.run import Run
from ares_lightning.evaluation.report.sets import ood_rows


def analysis(runs: Sequence[Run]) -> dict[str, Chart]:
    """Return, by what robust accuracy is held against, a scatter plot of the models (arXiv 2302.14301).

    One point a run; what fewer than two runs know is left out. Out-of-distribution accuracy is the mean over sets,
    of those runs that were asked about the same ones.
    """
    robust = [run for run in runs if run.robust]
    sets = Counter(_sets(run) for run in robust if ood_rows(run))
    same_sets = sets.most_common(1)[0][0] if sets else ()

    def shifted(run: Run) -> float | None:
        rows = ood_rows(run) if sets and _sets(run) == same_sets else []
        return 100 * sum(row.value for row in rows) / len(rows) if rows else None

    def clean(run: Run) -> float | None:
        return 100 * run.clean.value if run.clean else None

    def size(run: Run) -> float | None:
        return run.num_parameters / 1e6 if run.num_parameters else None

    num_sets = f"{len(same_sets)} set{'s' * (len(same_sets) != 1)}"
    kinds: dict[str, tuple[str, str, Callable[[Run], float | str | None], bool]] = {
        "parameters": ("size", "parameters (million)", size, True),
        "clean accuracy": ("clean", "clean accuracy (%)", clean, False),
        "out-of-distribution accuracy": ("shifted", f"mean accuracy on {num_sets} (%)", shifted, False),
        "training": ("training", "training", lambda run: run.training, False),
    }
    charts = {}
    for title, (name, x_title, measure, log) in kinds.items():
        points = [
            Point(run.training or "not known", x, run.robust.value, _note(run, x_title, x), _question(run))
            for run in robust
            if (x := measure(run)) is not None and run.robust
        ]
        if len(points) > 1:
            charts[title] = scatter_chart(f"analysis-{name}", points, x_title, log)
    return charts


def _sets(run: Run) -> tuple[str | None, ...]:
    return tuple(sorted((row.set for row in ood_rows(run)), key=str))


def _question(run: Run) -> str:
    return f"{run.robust.set}, {run.robust.threat}" if run.robust else ""


def _note(run: Run, x_title: str, x: float | str) -> str:
    value = x if isinstance(x, str) else f"{x:.4g}"
    robust = run.robust.shown if run.robust else ""
    return f"<b>{escape(run.label)}</b><br>robust: {robust}<br>{escape(x_title)}: {escape(value)}"
