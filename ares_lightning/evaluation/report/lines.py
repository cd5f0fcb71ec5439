"""What is drawn as a line: accuracy over budgets, steps, queries, low-pass radii and the epochs of a training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ares_lightning.evaluation.report.figures import Line
from ares_lightning.evaluation.report.rows import Row
from ares_lightning.evaluation.report.run import Run
from ares_lightning.evaluation.report.style import Style

_MEASURES = {"clean accuracy": "val/clean_acc", "robust accuracy": "val/robust_acc"}


@dataclass(frozen=True)
class _Track:
    """Rows of one run that differ in x alone; source: what measured them."""

    run: Run
    source: str
    x: list[float]
    rows: list[Row]


def budget_curves(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Return, by norm, what one evaluator measured with one attack on one set at two or more budgets."""
    rows_of = [
        (run, [row for row in run.own if row.metric == "robust_accuracy" and row.norm and row.eps is not None])
        for run in runs
    ]
    norms = dict.fromkeys(row.norm for _, rows in rows_of for row in rows if row.norm)
    curves = {}
    for norm in norms:
        tracks = [
            track
            for run, rows in rows_of
            for track in _tracks(run, [row for row in rows if row.norm == norm], lambda row: row.eps or 0.0)
        ]
        if tracks:
            curves[norm] = _lines(tracks, lambda row: f"{row.threat}: {row.shown}")
    return curves


def query_curves(runs: Sequence[Run]) -> list[Line]:
    """Return accuracy over the queries that an attack may ask of a sample."""
    tracks = []
    for run in runs:
        rows = [row for row in run.own if row.metric == "accuracy_over_queries" and row.queries]
        tracks += _tracks(run, rows, lambda row: float(row.queries or 0))
    return _lines(tracks, lambda row: f"{row.threat}, {row.queries:,} queries: {row.shown}")


def low_pass_curves(runs: Sequence[Run]) -> list[Line]:
    """Return clean accuracy on images of which the low frequencies are left, over the radius of the filter."""
    tracks = []
    for run in runs:
        rows = [row for row in run.own if row.metric == "clean_accuracy" and row.radius is not None]
        tracks += _tracks(run, rows, lambda row: row.radius or 0.0)
    return _lines(tracks, lambda row: f"radius {row.radius:g}: {row.shown}")


def step_curves(runs: Sequence[Run]) -> list[Line]:
    """Return accuracy over the steps of an attack, where evaluators of a run differ in them.

    The steps are read from the evaluators' settings in about.json; evaluators of several budgets are curves of
    their own and do not count.
    """
    tracks = []
    for run in runs:
        steps = {
            str(each["name"]): int(found[1])
            for each in run.about.get("evaluators", [])
            if (found := re.search(r"\bsteps=(\d+)\b", str(each.get("settings"))))
        }
        rows = [row for row in run.own if row.metric == "robust_accuracy" and row.norm and row.evaluator in steps]
        budgets = {row.evaluator: {other.eps for other in rows if other.evaluator == row.evaluator} for row in rows}
        rows = [row for row in rows if len(budgets[row.evaluator]) == 1]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in sorted(rows, key=lambda row: steps[row.evaluator]):
            groups.setdefault((row.attack, row.threat, row.set), []).append(row)
        for (attack, threat, _), own in groups.items():
            x = [float(steps[row.evaluator]) for row in own]
            if len(set(x)) > 1:
                tracks.append(_Track(run, f"{attack}, {threat}", x, own))
    return _lines(tracks, lambda row: f"{row.evaluator}, {row.threat}: {row.shown}")


def history(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Return, by measure, accuracy on held-out images over the epochs."""
    lines: dict[str, list[Line]] = {}
    for file, run in [(run.folder / "metrics.csv", run) for run in runs]:
        try:
            frame = pd.read_csv(file) if file.exists() else pd.DataFrame()
            for measure, column in _MEASURES.items():
                if {"epoch", column} <= set(frame):
                    values = frame[["epoch", column]].astype(float).dropna().groupby("epoch")[column].last()
                    notes = [f"epoch {epoch:g}: {value:.2%}" for epoch, value in values.items()]
                    line = Line(run.label, run.style, values.index.tolist(), values.tolist(), notes)
                    lines.setdefault(measure, []).append(line)
        except ValueError as error:
            raise ValueError(f"{file}: is not a readable table of metrics ({error})") from error
    return lines


def _tracks(run: Run, rows: Sequence[Row], x: Callable[[Row], float]) -> list[_Track]:
    """Return what each evaluator measured with one attack on one family of sets, where there are two points."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=x):
        family = (row.set or "").rsplit("/", 2)[0] if row.radius is not None else row.set
        attack = row.attack if row.attack not in (row.evaluator, "none") else None
        parts = (row.evaluator, attack, family if family != run.main else None, row.subset)
        groups.setdefault(tuple(str(part or "") for part in parts), []).append(row)
    tracks = {key: _Track(run, "", [x(row) for row in own], own) for key, own in groups.items()}
    tracks = {key: track for key, track in tracks.items() if len(set(track.x)) > 1}
    told = [key[:3] for key in tracks]  # which images is said where nothing else tells two apart
    return [
        _Track(run, ", ".join(filter(None, key if told.count(key[:3]) > 1 else key[:3])), track.x, track.rows)
        for key, track in tracks.items()
    ]


def _lines(tracks: Sequence[_Track], note: Callable[[Row], str]) -> list[Line]:
    """Return the tracks as lines: by what measured them where there is one run, else by run and one source at a
    time, first that of most runs."""
    if len({track.run.main for track in tracks}) > 1:
        tracks = [replace(track, source=f"{track.source} on {track.run.main}") for track in tracks]
    sources = Counter(track.source for track in tracks)
    alone = len({track.run.label for track in tracks}) == 1
    lines = []
    for place, track in enumerate(sorted(tracks, key=lambda track: -sources[track.source])):
        several = len(sources) > 1
        lines.append(
            Line(
                track.source if alone and several else track.run.label,
                Style.of(place) if alone else track.run.style,
                x=track.x,
                value=[row.value for row in track.rows],
                low=[row.low for row in track.rows],
                high=[row.high for row in track.rows],
                notes=[note(row) for row in track.rows],
                choice=track.source if several and not alone else None,
            )
        )
    return lines
