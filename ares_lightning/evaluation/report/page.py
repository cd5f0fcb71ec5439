"""The page: one self-contained file over any number of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ares_lightning.atomic import replacing
from ares_lightning.evaluation.report import classes, lines, sets
from ares_lightning.evaluation.report.analysis import analysis
from ares_lightning.evaluation.report.examples import class_names, panel
from ares_lightning.evaluation.report.figures import Chart, Line, curve_chart, line_chart
from ares_lightning.evaluation.report.pairs import pairs
from ares_lightning.evaluation.report.rows import NORMS
from ares_lightning.evaluation.report.run import VERDICTS, Run, read_runs

NUM_EXAMPLES, LEAST_EXAMPLES, MOST_EXAMPLES = 24, 2, 8
"""Examples on a page, and of a run at least and at most."""
MOST_OPEN, MOST_LISTED = 3, 12
"""Runs whose details are unfolded on a page of several, and beyond which what is long is folded or scrolled."""


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the page that shows these run folders to `output`, as a whole or not at all, and return `output`.

    The page holds all it needs, plotly.js included; the same runs give the same bytes.
    Raises ValueError naming the file of a run that cannot be read, WriteError where `output` cannot be written.
    """
    shown = read_runs(runs)
    content = _content(shown)
    charts = _has_chart(content)
    title = f"Robustness of {shown[0].label if len(shown) == 1 else f'{len(shown)} runs'}"
    return write(output, render("report.html", title=title, charts=charts, runs=shown, **content).encode())


def write_figure(runs: Sequence[Path], output: Path) -> Path:
    """Write the robustness curves of these run folders as a PNG to `output` and return `output`.

    Where several evaluators measured curves in a norm, those of the one that most runs were put to are drawn.
    Raises ValueError where no run has a curve, and as `write_report` does.
    """
    from ares_lightning.evaluation.report.picture import curves_png  # pages need no matplotlib

    curves = lines.budget_curves(read_runs(runs))
    first = {norm: [line for line in drawn if line.choice == drawn[0].choice] for norm, drawn in curves.items()}
    return write(output, curves_png(first))


def render(template: str, charts: bool, **content: Any) -> str:
    """Return a page from a template, with the script of plotly on it where it has charts."""
    folder = FileSystemLoader(Path(__file__).with_name("templates"))
    pages = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    script = Markup(get_plotlyjs()) if charts else ""
    return pages.get_template(template).render(plotly_js=script, **content)


def write(output: Path, content: bytes) -> Path:
    """Put the file there as a whole or not at all, and return its path; raises WriteError."""
    with replacing(output) as file:
        file.write(content)
    return output


def _content(runs: list[Run]) -> dict[str, Any]:
    """Return what the template shows, section by section."""
    with_examples = runs[: NUM_EXAMPLES // LEAST_EXAMPLES]
    num_examples = min(MOST_EXAMPLES, NUM_EXAMPLES // len(with_examples))
    panels = [(run, panel(run, num_examples)) for run in with_examples]
    training = lines.history(runs)
    tables = [(run, sets.corruption_tables(run)) for run in runs]
    families = dict.fromkeys(family for _, of_run in tables for family in of_run)
    corruptions = {family: [(run, of_run) for run, of_run in tables if family in of_run] for family in families}
    return {
        "verdicts": VERDICTS,
        "checks": _checks_by_title(runs),
        "most_open": MOST_OPEN,
        "most_listed": MOST_LISTED,
        "curves": {
            NORMS.get(norm, norm): curve_chart(norm, drawn) for norm, drawn in lines.budget_curves(runs).items()
        },
        "steps": _chart("steps", lines.step_curves(runs), "steps of the attack"),
        "queries": _chart("queries", lines.query_curves(runs), "queries of a sample", log=True),
        "low_pass": _chart("low-pass", lines.low_pass_curves(runs), "radius (pixels)"),
        "analysis": analysis(runs),
        "pairs": pairs(runs),
        "members": sets.members(runs),
        "by_class": _by_class(runs),
        "transfer": sets.transfer_chart(runs),
        "ood": sets.ood_chart(runs),
        "corruptions": [
            (family, sets.corruption_chart(family, of_family), [(run, each[family]) for run, each in of_family])
            for family, of_family in corruptions.items()
        ],
        "examples": [(run, cards) for run, cards in panels if cards],
        "num_with_examples": len(with_examples),
        "training": line_chart("training", training, "epoch") if training else None,
    }


def _chart(name: str, drawn: list[Line], x_title: str, log: bool = False) -> Chart | None:
    return line_chart(name, {"accuracy": drawn}, x_title, log=log) if drawn else None


def _by_class(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return accuracy by class and confusions of the runs that compare, None where none has its verdicts."""
    compared = classes.comparable(runs)
    if not compared:
        return None
    names = next(filter(None, map(class_names, compared)), {})
    rows = {run.label: classes.class_rows(run.worst_case, names) for run in compared if run.worst_case}
    others = [{row.label: row for row in rows[run.label]} for run in compared[1:]]
    listed = {
        run.label: classes.confusions(run.worst_case, names)[: classes.NUM_CONFUSIONS]
        for run in compared
        if run.worst_case
    }
    heat_map = classes.confusion_chart(compared, names)
    return {
        "runs": compared,
        "chart": classes.class_chart(rows[compared[0].label]) if len(compared) == 1 else None,
        "many": len(rows[compared[0].label]) > classes.MOST_CLASSES,
        "rows": [(row, [other[row.label] for other in others]) for row in rows[compared[0].label]],
        "confusion_chart": heat_map,
        "confusions": None if heat_map else listed,
    }


def _checks_by_title(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """Return, by check and verdict, the labels of the runs."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for check in run.checks:
            found.setdefault(check.title, {}).setdefault(check.verdict, []).append(run.label)
    worst = {title: min(map(VERDICTS.index, of_check)) for title, of_check in found.items()}
    return {title: found[title] for title in sorted(found, key=lambda title: worst[title])}


def _has_chart(content: Any) -> bool:
    """Whether there is a chart somewhere in the content."""
    if isinstance(content, Mapping):
        return any(map(_has_chart, content.values()))
    if isinstance(content, list | tuple):
        return any(map(_has_chart, content))
    return isinstance(content, Chart)
