"""Accuracy by class and confusion under attack, from the per-sample worst case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ares_lightning.evaluation.metrics import wilson_interval
from ares_lightning.evaluation.report.figures import Chart, Heat, heat_chart, interval_chart
from ares_lightning.evaluation.report.run import Run
from ares_lightning.evaluation.report.worst_case import WorstCase

MOST_CLASSES = 30
"""Classes beyond which the figure shows the worst and best only, and confusions are listed rather than drawn."""
MOST_RUNS = 8
"""Runs, the most robust first, whose classes are shown side by side."""
NUM_EXTREMES = 12
NUM_CONFUSIONS = 25
NO_CLASS = -1
"""The prediction where a logit was not finite."""

Names = Mapping[int, str]


@dataclass(frozen=True)
class Share:
    """An accuracy (fraction) of n samples with its 95 % interval."""

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, successes: int, n: int) -> Share:
        """Return the share of successes."""
        return cls(successes / n, n, *wilson_interval(successes, n))

    @property
    def shown(self) -> str:
        """The share with its interval, in percent."""
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}], n {self.n}"


@dataclass(frozen=True)
class ClassRow:
    """A class: its accuracies, and what its broken samples were most often taken for (class, count)."""

    label: int
    name: str
    robust: Share
    clean: Share
    taken_for: tuple[str, int] | None


@dataclass(frozen=True)
class Confusion:
    """Samples of a class that the worst case takes for another: how many, and of how many."""

    label: str
    prediction: str
    count: int
    n: int


def comparable(runs: Sequence[Run]) -> list[Run]:
    """Return those runs that know their worst case by sample and answer the same question about the same classes as
    the first of them, at most MOST_RUNS."""
    known = [run for run in runs if run.worst_case is not None]
    same = [
        run
        for run in known
        if run.question == known[0].question and np.array_equal(_labels(run), _labels(known[0]))
    ]
    return same[:MOST_RUNS]


def class_rows(worst: WorstCase, names: Names) -> list[ClassRow]:
    """Return the classes that there are samples of, the least robust first; of equal ones those surest to be weak
    come first and those surest to be robust last."""
    labels, place = np.unique(worst.labels, return_inverse=True)
    n = np.bincount(place)
    robust = np.bincount(place, ~worst.broken).astype(int)
    clean = np.bincount(place, worst.right).astype(int)
    most: dict[str, tuple[str, int]] = {}
    for confusion in confusions(worst, names):
        most.setdefault(confusion.label, (confusion.prediction, confusion.count))
    rows = []
    for at, label in enumerate(labels.tolist()):
        name, count = class_name(label, names), int(n[at])
        shares = Share.of(int(robust[at]), count), Share.of(int(clean[at]), count)
        rows.append(ClassRow(label, name, *shares, most.get(name)))
    return sorted(rows, key=lambda row: (row.robust.value, row.robust.high, row.robust.low))


def class_chart(rows: Sequence[ClassRow]) -> Chart:
    """Return robust and clean accuracy by class, of many classes the worst and best only."""
    shown = list(rows) if len(rows) <= MOST_CLASSES else [*rows[:NUM_EXTREMES], *rows[-NUM_EXTREMES:]]
    return interval_chart(
        "classes",
        [
            (
                row.name,
                [
                    (share.value, share.low, share.high, f"{word}: {share.shown}")
                    for word, share in (("robust", row.robust), ("clean", row.clean))
                ],
            )
            for row in shown
        ],
    )


def confusions(worst: WorstCase, names: Names) -> list[Confusion]:
    """Return what broken samples were taken for, the most frequent first."""
    wrong = worst.broken
    found, counts = np.unique(np.stack([worst.labels[wrong], worst.prediction[wrong]]), axis=1, return_counts=True)
    labels, n = np.unique(worst.labels, return_counts=True)
    of_label = dict(zip(labels.tolist(), n.tolist(), strict=True))
    listed = [
        Confusion(class_name(label, names), class_name(prediction, names), count, of_label[label])
        for label, prediction, count in zip(*found.tolist(), counts.tolist(), strict=True)
        if label != prediction
    ]
    return sorted(listed, key=lambda each: -each.count)


def confusion_chart(runs: Sequence[Run], names: Names) -> Chart | None:
    """Return labels by predictions under attack, None where there are too many classes; one run at a time."""
    cases = [(run, run.worst_case) for run in runs if run.worst_case is not None]
    if not cases:
        return None
    labels = np.unique(np.concatenate([worst.labels for _, worst in cases]))
    classes = np.unique(np.concatenate([labels, *(worst.prediction for _, worst in cases)]))
    if len(classes) > MOST_CLASSES:
        return None
    rows, columns = ([class_name(index, names) for index in each.tolist()] for each in (labels, classes))
    heats = []
    for run, worst in cases:
        counts = np.zeros((len(labels), len(classes)), int)
        np.add.at(counts, (np.searchsorted(labels, worst.labels), np.searchsorted(classes, worst.prediction)), 1)
        n = counts.sum(1, keepdims=True)
        shares = np.where(n > 0, counts / np.maximum(n, 1), 0)
        notes = [
            [f"{rows[i]} taken for {columns[j]}: {counts[i, j]} of {n[i, 0]}" for j in range(len(columns))]
            for i in range(len(rows))
        ]
        heats.append(Heat(rows, columns, shares.tolist(), notes, run.label))
    return heat_chart("confusion", heats, "label", "prediction under attack")


def class_name(index: int, names: Names) -> str:
    """Return what a class is called: its name, else its number."""
    return "no class (not finite)" if index == NO_CLASS else str(names.get(index, index))


def _labels(run: Run) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.unique(run.worst_case.labels) if run.worst_case else np.zeros(0, np.int64)
