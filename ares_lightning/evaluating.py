"""What both programs do with an evaluation: run it on all processes, say what came out, write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ares_lightning.build import ConfigError
from ares_lightning.data import ImageError, RobustDataModule
from ares_lightning.evaluation.curves import Curve
from ares_lightning.evaluation.report import write_report
from ares_lightning.evaluation.robustbench import RobustBenchEvaluator, write_record
from ares_lightning.evaluation.run import Evaluation, Failure
from ares_lightning.evaluation.sanity import Check, SanityAttack
from ares_lightning.evaluation.workers import Workers

LISTED = ("clean_accuracy", "robust_accuracy", "targeted_robust_accuracy", "mean_accuracy", "mce", "relative_mce")
"""Metrics that are printed; the others are in the report."""


class EvaluatorFailedError(Exception):
    """Evaluators failed while others went on; the message is one line."""


@dataclass(frozen=True)
class Evaluated:
    """The headline numbers by `<evaluator>/<metric>`, and the questions that failed."""

    metrics: dict[str, float]
    failed: Sequence[Failure]

    def check(self) -> None:
        """Raise EvaluatorFailedError where an evaluator has failed."""
        if self.failed:
            each = "; ".join(f"eval.{one.evaluator} on {one.set}: {one.error}" for one in self.failed)
            raise EvaluatorFailedError(
                f"{len(self.failed)} of the evaluators failed, the others are in the report; {each}"
            )


def run_evaluation(
    evaluation: Evaluation,
    data: RobustDataModule,
    net: torch.nn.Module,
    run_dir: Path,
    device: torch.device,
    workers: Workers,
) -> Evaluated:
    """Run an evaluation in all its processes; the first prints the results and writes `report.html`.

    Raises ConfigError for what is wrong with the settings.
    """
    if workers.leads:
        _say_what_is_asked(evaluation)
    try:
        results = evaluation.run(net, run_dir, device, workers, data.skipped)
    except ImageError:
        raise
    except ValueError as error:
        if evaluation.raises:
            raise
        raise ConfigError(str(error)) from error
    if not workers.leads:
        return Evaluated({}, ())
    report = write_report([run_dir], run_dir / "report.html")
    if results.skipped:
        print(f"skipped: {len(results.skipped)} images that cannot be used, listed in {run_dir / 'about.json'}")
    metrics = _say_results(evaluation, results.summary)
    _say_sanity(results.checks)
    if any(isinstance(evaluator, RobustBenchEvaluator) for evaluator in evaluation.evaluators):
        print(write_record(run_dir))
    print(f"report: {report}")
    return Evaluated(metrics, results.failed)


def _say_what_is_asked(evaluation: Evaluation) -> None:
    covered, classes = len(set(evaluation.dataset.labels.tolist())), len(evaluation.dataset.classes)
    if evaluation.subset and covered < classes:
        print(f"subset={evaluation.subset}: holds {covered} of {classes} classes; random:n@seed draws from all")
    if evaluation.not_found:
        print(f"not found: {', '.join(evaluation.not_found)}")


def _say_results(evaluation: Evaluation, summary: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Print the rows but those of curves, single corruptions and sanity attacks; return them by name."""
    curves = {evaluator.name for evaluator in evaluation.evaluators if isinstance(evaluator, Curve)}
    checking = {evaluator.name for evaluator in evaluation.evaluators if isinstance(evaluator, SanityAttack)}
    of_sets = {evaluator.name for evaluator in evaluation.evaluators if evaluator.own_sets}
    metrics = {}
    for row in summary:
        is_cell = row["set"].count("/") == 2
        if row["evaluator"] in curves | checking or is_cell or row["metric"] not in LISTED:
            continue
        eps = "any budget" if row["eps"] is None else f"{row['eps']:.4g}"
        budget = "" if row["norm"] is None else f" ({row['norm']} {eps})"
        name = f"{row['evaluator']}/{row['set']}" if row["evaluator"] in of_sets else row["evaluator"]
        print(
            f"{name:>12}: {row['metric'].replace('_', ' ')}{budget} {row['value']:.1%} "
            f"[{row['low']:.1%}, {row['high']:.1%}], n = {row['n']}"
        )
        metrics[f"{name}/{row['metric']}"] = row["value"]
    return metrics


def _say_sanity(checks: Sequence[Check]) -> None:
    """Print how many checks passed, and what the others found."""
    asked = [check for check in checks if check.verdict != "not asked"]
    amiss = [check for check in asked if check.verdict != "pass"]
    passed, not_asked = len(asked) - len(amiss), len(checks) - len(asked)
    print(f"{'sanity':>12}: {passed} of {len(asked)} checks passed, {not_asked} not asked")
    for check in amiss:
        print(f"{check.verdict:>12}: {check.title}. {check.evidence}")
