"""What follows from the verdicts: the rows of summary.json, accuracies with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from ares_lightning.attacks import Threat
from ares_lightning.evaluation.asking import Question
from ares_lightning.evaluation.evaluators import Evaluator
from ares_lightning.evaluation.metrics import SAME_BUDGET, WORST_CASE, wilson_interval


def summarise(
    answered: Sequence[tuple[Question, pa.Table]], model: str, threat: Threat, main: str, subset: str | None
) -> list[dict[str, Any]]:
    """Return one row an accuracy: of every question at every budget, then the per-sample worst case.

    answered: questions with their verdict rows; model: the fingerprint of the one that the worst case is about;
    main: the set of the worst case; subset: how its images were chosen.

    A sample is robust where no row at the budget shows it broken; misclassified clean images are not. Where a
    targeted attack aimed at one class a sample, robust means that this class was not reached; the metric is
    `targeted_robust_accuracy`. `eps` None is no budget. Of an ensemble, `robust_accuracy_after` is what each member
    has left. The worst case, evaluator `worst_case`, is the number to report; see `within_threat`.
    """
    rows: list[dict[str, Any]] = []
    frames: dict[int, tuple[Evaluator, list[pd.DataFrame]]] = {}
    within = []
    for question, table in answered:
        evaluator, verdicts = question.evaluator, table.to_pandas()
        frames.setdefault(id(evaluator), (evaluator, []))[1].append(verdicts)
        rows += _accuracies(evaluator, verdicts, evaluator.subset if evaluator.own_sets else subset)
        own = verdicts[verdicts["model_fingerprint"] == model]
        if question.dataset.name == main:
            within.append(own)
    for evaluator, parts in frames.values():
        rows += evaluator.further_rows(pd.concat(parts))
    here = within_threat(pd.concat(within), threat) if within else pd.DataFrame()
    if len(here):
        robust = ~here.groupby("sample_id")["broken"].any()
        rows.append(accuracy_row(WORST_CASE, "robust_accuracy", robust, here, subset, None, threat.eps))
    return [{"source": None, "model": None, "queries": None, **row} for row in rows]


def within_threat(verdicts: pd.DataFrame, threat: Threat) -> pd.DataFrame:
    """Return the verdict rows that the worst case at a threat model follows from.

    They are those of its norm within its budget, of any evaluator, on the samples that an attack without a target
    was given the whole budget for: what withstands a part of it, or one class, is not known to withstand it.
    """
    within = verdicts[(verdicts["norm"] == threat.norm) & (verdicts["eps"] <= threat.eps * (1 + SAME_BUDGET))]
    is_whole = within["target"].isna() & (within["eps"] >= threat.eps * (1 - SAME_BUDGET))
    return within[within["sample_id"].isin(within.loc[is_whole, "sample_id"])]


def _accuracies(evaluator: Evaluator, verdicts: pd.DataFrame, subset: str | None) -> Iterator[dict[str, Any]]:
    """Yield the accuracy at each set and budget, and what each member of an ensemble has left."""
    judged = verdicts[verdicts["source_fingerprint"].isna()]
    attack = getattr(evaluator, "attack", None)
    groups: dict[Any, pd.DataFrame] = dict(iter(judged.groupby(["set", "eps"], sort=False)))
    places = {name: place for place, name in enumerate(judged["set"].unique())}
    for key in sorted(groups, key=lambda key: (places[key[0]], key[1])):
        group, eps = groups[key], float(key[1])
        name = group["attack"].iloc[0] if attack is None else attack.name
        metric = "clean_accuracy" if name == "none" else "robust_accuracy"
        if group["target"].notna().any():
            metric = "targeted_robust_accuracy"
        robust = ~group.groupby("sample_id")["broken"].any()
        yield accuracy_row(evaluator.name, metric, robust, group, subset, name, eps)
        members = [stage.key[0] for stage in evaluator.stages if stage.key and stage.key[1] == eps]
        before = group.loc[
            group["broken"] & ~group["attack"].isin(members), "sample_id"
        ]  # of a curve's clean images
        left = pd.Series(~robust.index.isin(before), index=robust.index)
        for member in members if len(members) > 1 else ():
            own = group[group["attack"] == member]
            left &= ~left.index.isin(own.loc[own["broken"], "sample_id"])
            yield accuracy_row(evaluator.name, "robust_accuracy_after", left, group, subset, member, eps)


def accuracy_row(
    evaluator: str,
    metric: str,
    right: pd.Series[bool],
    group: pd.DataFrame,
    subset: str | None,
    attack: str | None,
    eps: float,
) -> dict[str, Any]:
    """Return the row of an accuracy: of samples that are `right`, which the verdict rows `group` are about."""
    n, successes = len(right), int(right.sum())
    fingerprint = None if attack is None else group["attack_fingerprint"].iloc[0]
    norm = group["norm"].iloc[0]
    low, high = wilson_interval(successes, n)
    return {
        "evaluator": evaluator,
        "metric": metric,
        "value": successes / n,
        "n": n,
        "low": low,
        "high": high,
        "set": group["set"].iloc[0],
        "subset": subset,
        "attack": attack,
        "attack_fingerprint": fingerprint if isinstance(fingerprint, str) else None,
        "norm": norm if isinstance(norm, str) else None,
        "eps": float(eps) if math.isfinite(eps) else None,
        "seed": int(group["seed"].iloc[0]),
        "precision": group["precision"].iloc[0],
    }
