"""What follows from the verdicts: accuracies with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ares_lightning.attacks import Threat

WORST_CASE = "worst_case"


def wilson_interval(successes: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default (Wilson 1927, equation 1)."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(
    verdicts: pd.DataFrame,
    order: Sequence[tuple[str, str]],
    threat: Threat,
    main: str,
    subsets: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    """Return one row an accuracy: of every evaluator, set and budget, then the per-sample worst case.

    order: evaluators and sets, in the order of the rows; main: the set of the worst case; subsets: how the images
    of a set were chosen, by its name.

    Misclassified clean images count as not robust. Where a targeted attack aimed at one class a sample, robust
    means that this class was not reached; the metric is `targeted_robust_accuracy`. `eps` None is no budget. The
    worst case, evaluator `worst_case`, is over every adversarial example of the threat model's norm that was
    found within its budget by any evaluator; it is the number to report, and is left out where no attack but
    targeted ones was run.
    """
    rows = []
    place = {question: number for number, question in enumerate(order)}
    keys = ["evaluator", "set", "attack", "eps"]
    groups: dict[Any, pd.DataFrame] = dict(iter(verdicts.groupby(keys, sort=False)))
    for key in sorted(groups, key=lambda key: (place[key[:2]], key[3])):
        (evaluator, of_set, attack, eps), group = key, groups[key]
        metric = "clean_accuracy" if attack == "none" else "robust_accuracy"
        if group["target"].notna().any():
            metric = "targeted_robust_accuracy"
        rows.append(_row(evaluator, metric, ~group["broken"], group, subsets.get(of_set), attack, eps))
    here = verdicts[verdicts["set"] == main]
    within = here[(here["norm"] == threat.norm) & (here["eps"] <= threat.eps * (1 + 1e-9))]
    untargeted = within[within["target"].isna()]
    if len(untargeted[untargeted["eps"] > 0]) or (threat.eps == 0 and len(untargeted)):
        robust = ~within.groupby("sample_id")["broken"].any()
        rows.append(_row(WORST_CASE, "robust_accuracy", robust, within, subsets.get(main), None, threat.eps))
    return rows


def _row(
    evaluator: str,
    metric: str,
    right: pd.Series[bool],
    group: pd.DataFrame,
    subset: str | None,
    attack: str | None,
    eps: float,
) -> dict[str, Any]:
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
