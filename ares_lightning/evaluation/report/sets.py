"""Other sets and other models: out-of-distribution sets, corruptions, transfer matrices, members of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ares_lightning.evaluation.report.figures import Bar, Chart, Heat, bar_chart, heat_chart
from ares_lightning.evaluation.report.rows import Row
from ares_lightning.evaluation.report.run import Run

MOST_BARS = 6
"""Runs beyond which sets are shown as a heat map."""

Corruptions = dict[str, dict[str, dict[str, Row]]]
"""Rows by set of corruptions, corruption and severity."""


@dataclass(frozen=True)
class Member:
    """An attack of an ensemble: the accuracy left after it, and what it took away (fraction, None: unknown)."""

    run: Run
    row: Row
    broke: float | None


def ood_rows(run: Run) -> list[Row]:
    """Return the accuracies on sets other than the run's own, a family of corruptions by its mean."""
    plain = [
        row
        for row in run.own
        if row.set not in (None, run.main) and row.radius is None and not run.is_cell(row)
        if row.metric in ("clean_accuracy", "mean_accuracy")
    ]
    return list({row.set: row for row in reversed(plain)}.values())[::-1]


def ood_chart(runs: Sequence[Run]) -> Chart | None:
    """Return accuracy by set, the run's own first, None where no run was asked about others."""
    asked = [(run, rows) for run in runs if (rows := ood_rows(run))]
    if not asked:
        return None
    with_own = [(run, [run.clean, *rows]) for run, rows in asked]
    bars = [
        Bar(run.label, run.style, row.set or "", row.value, row.low, row.high, row.shown)
        for run, rows in with_own
        for row in rows
        if row is not None
    ]
    if len(asked) <= MOST_BARS:
        return bar_chart("ood", bars)
    known = {(bar.label, bar.set): bar for bar in bars}
    labels, sets = [run.label for run, _ in asked], list(dict.fromkeys(bar.set for bar in bars))
    return heat_chart("ood", [_heat(labels, sets, known)], "", "")


def corruption_tables(run: Run) -> Corruptions:
    """Return the rows of single corruptions."""
    tables: Corruptions = {}
    for row in run.own:
        if row.cell is not None and run.is_cell(row):
            family, name, severity = row.cell
            tables.setdefault(family, {}).setdefault(name, {})[severity] = row
    return tables


def corruption_chart(family: str, runs: Sequence[tuple[Run, Corruptions]]) -> Chart | None:
    """Return the accuracy of each run under each corruption, mean over severities; None for a single run."""
    if len(runs) < 2:
        return None
    columns = list(dict.fromkeys(name for _, tables in runs for name in tables[family]))
    known = {}
    for run, tables in runs:
        for name, cells in tables[family].items():
            value = sum(row.value for row in cells.values()) / len(cells)
            note = f"mean of {len(cells)} severities {value:.2%}"
            known[run.label, name] = Bar(run.label, run.style, name, value, value, value, note)
    labels = [run.label for run, _ in runs]
    name = "corruptions-" + "".join(letter for letter in family if letter.isalnum())
    return heat_chart(name, [_heat(labels, columns, known)], "", "")


def transfer_chart(runs: Sequence[Run]) -> Chart | None:
    """Return accuracy by the model crafted on and the model judged, one attack at a time; None without any."""
    known: dict[str, dict[tuple[str, str], Row]] = {}
    for run in runs:
        itself = (None, run.fact(f"models.{run.fact('run.model_fingerprint')}"))
        for row in run.rows:
            if row.metric == "transfer_accuracy":
                source, model = (run.label if name in itself else name for name in (row.source, row.model))
                pair = str(source), str(model)
                known.setdefault(f"{row.attack}, {row.threat}", {}).setdefault(pair, row)
    if not known:
        return None
    pairs = [pair for of_attack in known.values() for pair in of_attack]
    models = list(dict.fromkeys(model for _, model in pairs))
    named = {source for source, _ in pairs}
    sources = [model for model in models if model in named] + sorted(named - set(models))
    heats = []
    for attack, rows in known.items():
        found = [[rows.get((source, model)) for model in models] for source in sources]
        shares = [[None if row is None else row.value for row in line] for line in found]
        notes = [
            [
                "" if row is None else f"crafted on {source}, judged by {model}: {row.shown}"
                for model, row in zip(models, line, strict=True)
            ]
            for source, line in zip(sources, found, strict=True)
        ]
        heats.append(Heat(sources, models, shares, notes, attack))
    return heat_chart("transfer", heats, "crafted on", "judged")


def members(runs: Sequence[Run]) -> list[Member]:
    """Return the attacks of ensembles, in their order."""
    found = []
    for run in runs:
        left: dict[tuple[object, ...], float] = {}
        for row in run.own:
            if row.metric == "robust_accuracy_after":
                key = (row.evaluator, row.set, row.norm, row.eps)
                if key not in left and run.clean is not None and run.clean.set == row.set:
                    left[key] = run.clean.value
                found.append(Member(run, row, left[key] - row.value if key in left else None))
                left[key] = row.value
    return found


def _heat(rows: list[str], columns: list[str], known: dict[tuple[str, str], Bar]) -> Heat:
    found = [[known.get((row, column)) for column in columns] for row in rows]
    shares = [[None if bar is None else bar.value for bar in line] for line in found]
    notes = [["" if bar is None else f"{bar.label}, {bar.set}: {bar.note}" for bar in line] for line in found]
    return Heat(rows, columns, shares, notes)
