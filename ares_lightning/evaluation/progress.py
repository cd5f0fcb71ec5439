"""The one bar of an evaluation: samples decided over all processes, accuracy so far, time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ares_lightning.evaluation.evaluators import Evaluator, Verdicts
from ares_lightning.evaluation.workers import Workers

SPEED_SECONDS = 600.0
"""The time left follows from the speed over so many seconds."""


class EvaluationProgress:
    """Counts what all processes have decided; the leader shows it.

    total: samples, each as often as it is asked about. A sample is decided once it is broken, or has withstood the
    last part of the question. The accuracy is that of the question at hand among the samples met so far, at the
    budget at hand.
    """

    def __init__(self, total: int, workers: Workers, show: bool = True) -> None:
        self._workers = workers
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("decided{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            speed_estimate_period=SPEED_SECONDS,
            disable=not (show and workers.leads),
        )
        self._task = self._bar.add_task("", total=total, accuracy="")
        self._before = 0
        self._name, self._run = "", f"{workers.num_meetings}"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.console.print(line, highlight=False)

    def begin(self, evaluator: Evaluator, of_set: str, rows: pa.Table) -> None:
        """Turn to a question, some of whose rows are known to the leader."""
        self._name = f"{evaluator.name} {of_set}"
        met = pc.count_distinct(rows["sample_id"]).as_py()
        broken = pc.count_distinct(rows.filter(rows["broken"])["sample_id"]).as_py()
        is_whole = len(evaluator.stages) == 1
        self._count(met if is_whole else broken, met, broken)

    def advance(self, evaluator: Evaluator, stage_number: int, answers: Sequence[Verdicts]) -> None:
        """Count what a pack of samples has shown."""
        last = len(evaluator.stages) - 1
        outcome = answers[0 if last else -1].outcome
        broken = int(outcome.broken.sum())
        is_decided = stage_number == last
        self._count(
            len(outcome.broken) if is_decided else broken, 0 if stage_number else len(outcome.broken), broken
        )

    def end(self, num_samples: int) -> None:
        """Turn away from a question that `num_samples` were asked, images that cannot be used among them."""
        self._before += num_samples
        self._bar.update(self._task, completed=self._before)

    def _count(self, decided: int, met: int, broken: int) -> None:
        name, counts = self._name, {"decided": decided, "met": met, "broken": broken}
        decided, met, broken = (
            self._workers.add(f"{self._run} {name} {kind}", count) for kind, count in counts.items()
        )
        accuracy = f", accuracy {1 - broken / met:.1%}" if met else ""
        self._bar.update(self._task, description=name, completed=self._before + decided, accuracy=accuracy)
