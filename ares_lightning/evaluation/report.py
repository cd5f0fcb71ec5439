"""The report: one self-contained page, and a figure, over the runs below some folders.

python -m ares_lightning.evaluation.report runs/a runs/b --output report.html --figure curves.png
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from ares_lightning.attacks.threat import parse_budget
from ares_lightning.evaluation.figures import NORMS, Line, Style, curves_html, curves_png, eps_text, training_html
from ares_lightning.evaluation.metrics import WORST_CASE

_MEASURES = {"clean accuracy": "val/clean_acc", "robust accuracy": "val/robust_acc"}


@dataclass(frozen=True)
class Row:
    """A row of summary.json: an accuracy (fraction) of `n` samples with its 95 % interval."""

    evaluator: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    set: str | None = None
    subset: str | None = None
    attack: str | None = None
    norm: str | None = None
    eps: float | None = None
    seed: int | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for number in (self.value, self.n, self.low, self.high, self.eps or 0):
            if not isinstance(number, int | float):
                raise TypeError(f"{number!r} is not a number")

    @property
    def ball(self) -> str | None:
        """The norm in words."""
        return self.norm and NORMS.get(self.norm, self.norm)

    @property
    def budget(self) -> str | None:
        """The budget in words."""
        return None if self.eps is None else eps_text(self.norm, self.eps)

    @property
    def cell(self) -> tuple[str, str, str] | None:
        """Set, corruption and severity, where the row is about one of them."""
        parts = (self.set or "").rsplit("/", 2)
        return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None

    @property
    def threat(self) -> str:
        """The threat model in words."""
        return f"{self.ball}, eps {self.budget}"


@dataclass
class Run:
    """What a run folder says of itself.

    settings: its config as text; about: which images it was asked about; label: is unique in a report.
    """

    folder: Path
    rows: list[Row]
    settings: str
    config: Any
    about: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    style: Style = field(default_factory=lambda: Style.of(0))

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key of the config, None where it is missing."""
        node = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    @property
    def robust(self) -> Row | None:
        """The headline: the worst case over all attacks, else the lowest robust accuracy at the threat model."""
        norm, eps = self.setting("threat.norm"), self.setting("threat.eps")
        budget = -1.0 if eps is None else parse_budget(eps, f"{self.folder / 'config.yaml'}: threat.eps")
        rows = [row for row in self.rows if row.metric == "robust_accuracy" and row.norm and row.eps is not None]
        worst = [row for row in rows if row.evaluator == WORST_CASE]
        at_threat = [row for row in rows if row.norm == norm and isclose(row.eps or 0, budget, rel_tol=1e-6)]
        best = [row for row in worst if row in at_threat] or worst or at_threat
        return min(best, key=lambda row: row.value, default=None)

    @property
    def clean(self) -> Row | None:
        """The clean accuracy, on the set of the headline where there is one, else on the data's own."""
        rows = [row for row in self.rows if row.metric == "clean_accuracy"]
        wanted = self.robust.set if self.robust else self.setting("data.name")
        return next((row for row in rows if row.set == wanted), rows[0] if rows else None)

    @property
    def listed(self) -> list[Row]:
        """The rows but those of single corruptions, which `corruptions` has."""
        return [row for row in self.rows if not self._is_cell(row)]

    @property
    def corruptions(self) -> dict[str, dict[str, dict[str, Row]]]:
        """Rows by set of corruptions, corruption and severity."""
        tables: dict[str, dict[str, dict[str, Row]]] = {}
        for row in self.rows:
            if row.cell is not None and self._is_cell(row):
                family, name, severity = row.cell
                tables.setdefault(family, {}).setdefault(name, {})[severity] = row
        return tables

    def _is_cell(self, row: Row) -> bool:
        """Whether a row is one of those that a table of corruptions is made of."""
        main = next((each["set"] for each in self.about.get("sets", [])), None)
        return row.cell is not None and row.metric == "clean_accuracy" and row.set != main

    @property
    def asked(self) -> list[dict[str, Any]]:
        """What is known of each set asked about; those of single corruptions are told of once."""
        sets: dict[tuple[str, str], dict[str, Any]] = {}
        for each in self.about.get("sets", []):
            family = each["set"].rsplit("/", 2)[0]
            sets.setdefault((family, each["preparation"]), {**each, "set": family})
        return list(sets.values())


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run folders (those with a summary.json) at or below the paths, sorted.

    Raises ValueError for a path that does not exist, where no run is found, and for a broken summary.json.
    """
    places = [Path(path) for path in paths]
    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: does not exist")
    runs = sorted({file.resolve().parent for place in places for file in place.rglob("summary.json")})
    if not runs:
        raise ValueError(f"{', '.join(map(str, places))}: no run here or below (looked for summary.json)")
    for run in runs:
        _read_summary(run / "summary.json")
    return runs


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the page that shows these run folders to `output`, as a whole or not at all, and return `output`.

    The page holds all it needs, plotly.js included; the same runs give the same bytes.
    Raises ValueError naming the file of a run that cannot be read, OSError where `output` cannot be written.
    """
    shown = _read_runs(runs)
    curves = {norm: Markup(curves_html(norm, lines)) for norm, lines in _curves(shown).items()}
    history = _history(shown)
    num_examples = max(2, min(8, 24 // len(shown)))
    examples = [(run, panel) for run in shown if (panel := _examples(run, num_examples))]
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    html = page.render(
        title=f"Robustness of {shown[0].label if len(shown) == 1 else f'{len(shown)} runs'}",
        runs=shown,
        curves={NORMS.get(norm, norm): chart for norm, chart in curves.items()},
        examples=examples,
        training=Markup(training_html(history)) if history else "",
        charts=bool(curves or history),
        plotly_js=Markup(get_plotlyjs()),
    )
    return _write(output, html.encode())


def write_figure(runs: Sequence[Path], output: Path) -> Path:
    """Write the robustness curves of these run folders as a PNG to `output` and return `output`.

    Raises ValueError where no run has a curve, and as `write_report` does.
    """
    return _write(output, curves_png(_curves(_read_runs(runs))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the command line asks for; return the exit code, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        "python -m ares_lightning.evaluation.report", description="Show runs on one page."
    )
    parser.add_argument("paths", nargs="+", help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the runs' common folder)")
    parser.add_argument("--figure", type=Path, help="also write the robustness curves, as a PNG")
    options = parser.parse_args(arguments)
    try:
        runs = find_runs(options.paths)
        print(write_report(runs, options.output or Path(os.path.commonpath(runs)) / "report.html"))
        if options.figure:
            print(write_figure(runs, options.figure))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, rank them by threat model and robust accuracy, and give each a style and a label."""

    def rank(run: Run) -> tuple[str, float, float]:
        row = run.robust
        return (row.norm or "", row.eps or 0, -row.value) if row else ("~", 0, 0)

    runs = sorted((_read_run(Path(folder).resolve()) for folder in folders), key=rank)
    above = Path(os.path.commonpath([run.folder for run in runs]))
    names = [str(run.setting("name") or run.folder.name) for run in runs]
    with_id = [f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)]
    for place, run in enumerate(runs):
        run.style = Style.of(place)
        if names.count(names[place]) == 1:
            run.label = names[place]
        elif with_id.count(with_id[place]) == 1:
            run.label = with_id[place]
        else:
            run.label = f"{names[place]} ({run.folder.relative_to(above)})"
    return runs


def _read_run(folder: Path) -> Run:
    file = folder / "config.yaml"
    try:
        settings = file.read_text(encoding="utf-8") if file.exists() else ""
        config = yaml.safe_load(settings)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not readable YAML") from error
    return Run(folder, _read_summary(folder / "summary.json"), settings, config, _read_about(folder / "about.json"))


def _read_about(file: Path) -> dict[str, Any]:
    """Read `about.json`; a run folder that was put together by hand may lack it."""
    try:
        about = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if any({"set", "n", "names_hash", "preparation"} - each.keys() for each in about.get("sets", [])):
            raise KeyError("sets")
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: is not what an evaluation writes ({error})") from error
    return about if isinstance(about, dict) else {}


def _read_summary(file: Path) -> list[Row]:
    known = {column.name for column in fields(Row)}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [Row(**{key: value for key, value in row.items() if key in known}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: is not a summary, a JSON list of rows ({error})") from error


def _curves(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Return, by norm, what one evaluator measured with one attack on one set at two or more budgets."""
    curves: dict[str, list[Line]] = {}
    for run in runs:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in sorted(run.rows, key=lambda row: row.eps or 0):
            if row.metric == "robust_accuracy" and row.norm and row.eps is not None:
                groups.setdefault((row.norm, row.evaluator, row.attack, row.set, row.subset), []).append(row)
        groups = {key: rows for key, rows in groups.items() if len({row.eps for row in rows}) > 1}
        per_norm = Counter(norm for norm, *_ in groups)
        for (norm, *source), rows in groups.items():
            label = (
                run.label
                if per_norm[norm] == 1
                else f"{run.label}: {', '.join(str(part) for part in source if part)}"
            )
            line = Line(
                label,
                run.style,
                x=[row.eps or 0 for row in rows],
                value=[row.value for row in rows],
                low=[row.low for row in rows],
                high=[row.high for row in rows],
                notes=[f"{row.threat}: {row.value:.2%} [{row.low:.2%}, {row.high:.2%}], n {row.n}" for row in rows],
            )
            curves.setdefault(norm, []).append(line)
    return curves


def _history(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Return, by measure, accuracy on held-out images over the epochs."""
    history: dict[str, list[Line]] = {}
    for file, run in [(run.folder / "metrics.csv", run) for run in runs]:
        try:
            frame = pd.read_csv(file) if file.exists() else pd.DataFrame()
            for measure, column in _MEASURES.items():
                if {"epoch", column} <= set(frame):
                    values = frame[["epoch", column]].astype(float).dropna().groupby("epoch")[column].last()
                    notes = [f"epoch {epoch:g}: {value:.2%}" for epoch, value in values.items()]
                    line = Line(run.label, run.style, values.index.tolist(), values.tolist(), notes)
                    history.setdefault(measure, []).append(line)
        except ValueError as error:
            raise ValueError(f"{file}: is not a readable table of metrics ({error})") from error
    return history


def _examples(run: Run, most: int) -> dict[str, Any]:
    """Return the panel of the first `most` examples that a run kept, empty where it kept none."""
    file = run.folder / "examples.npz"
    if not file.exists():
        return {}
    try:
        with np.load(file, allow_pickle=False) as content:
            kept = {key: content[key] for key in content.files}
        clean, adversarial = kept["clean"][:most].astype(float), kept["adversarial"][:most].astype(float)
        change = adversarial - clean
        factor = 0.5 / max(float(abs(change).max(initial=0)), 1e-6)
        names = dict(enumerate(kept["classes"].tolist()))
        keys = {"label": "label", "before": "clean_prediction", "after": "adversarial_prediction"}
        cards = []
        for at in range(len(clean)):
            card = {key: int(kept[column][at]) for key, column in keys.items()}
            named = {f"{key}_name": names.get(index, index) for key, index in card.items()}
            images = {"clean": clean[at], "change": 0.5 + factor * change[at], "adversarial": adversarial[at]}
            sources = {key: _image(pixels) for key, pixels in images.items()}
            cards.append({**card, **named, **sources, "sample_name": kept["sample_name"][at]})
        norm, eps = str(kept["norm"]), float(kept["eps"])
        about = f"{kept['attack']}, {NORMS.get(norm, norm)}, eps {eps_text(norm, eps)}"
        about += f"; {len(cards)} of {len(kept['clean'])} kept; perturbation amplified {factor:.3g} times"
        return {"about": about, "factor": f"{factor:.3g}", "small": clean.shape[-1] < 100, "cards": cards}
    except (LookupError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: is not a readable file of examples ({error})") from error


def _image(pixels: np.ndarray[Any, Any]) -> str:
    """Return the image [C, H, W], clipped to [0, 1], as the source of an <img>."""
    levels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _write(output: Path, content: bytes) -> Path:
    """Put the file there as a whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return output


if __name__ == "__main__":
    sys.exit(main())
