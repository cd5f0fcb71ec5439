"""Corruption errors in units of AlexNet's (Hendrycks & Dietterich 2019, arXiv 1903.12261, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ares_lightning.data.alexnet import CLEAN_ERROR, ON_IMAGENET_3DCC, ON_IMAGENET_C
from ares_lightning.data.corruptions import COMMON, EXTRA, SEVERITIES
from ares_lightning.evaluation.metrics import wilson_interval

COMMON_ERRORS = {name: ON_IMAGENET_C[name] for name in COMMON}
"""AlexNet's errors on the fifteen corruptions that the mean is over."""

REFERENCES = {"imagenet_c": COMMON_ERRORS, "imagenet_3dcc": ON_IMAGENET_3DCC}
"""AlexNet's errors by set. RobustBench has no clean error beside those of 3DCC, hence no relative mCE."""


def corruption_errors(
    errors: Mapping[str, float], reference: Mapping[str, float] = COMMON_ERRORS
) -> dict[str, float]:
    """Return CE of each corruption in percent: its error over AlexNet's.

    errors: error (fraction) by corruption, mean over the five severities. Those that `reference` lacks do not
    count. Raises ValueError where one of `reference` is missing.
    """
    missing = [name for name in reference if name not in errors]
    if missing:
        raise ValueError(
            f"errors: {len(missing)} of {len(reference)} corruptions are missing: {', '.join(missing)}"
        )
    return {name: 100 * (errors[name] / unit) for name, unit in reference.items()}


def mean_corruption_error(errors: Mapping[str, float], reference: Mapping[str, float] = COMMON_ERRORS) -> float:
    """Return mCE in percent, the mean of `corruption_errors`; AlexNet has 100."""
    ratios = corruption_errors(errors, reference).values()
    return sum(ratios) / len(ratios)


def relative_mean_corruption_error(
    errors: Mapping[str, float],
    clean_error: float,
    reference: Mapping[str, float] = COMMON_ERRORS,
    clean_reference: float = CLEAN_ERROR,
) -> float:
    """Return the relative mCE in percent: as mCE, but of what the corruptions add to the error on clean images."""
    added = {name: error - clean_error for name, error in errors.items()}
    return mean_corruption_error(added, {name: unit - clean_reference for name, unit in reference.items()})


def corruption_rows(evaluator: str, verdicts: pd.DataFrame, subset: str | None) -> list[dict[str, Any]]:
    """Return the summary rows over all corruptions of each set of them, from one evaluator's verdicts.

    `mean_accuracy` is over all corruptions that were asked about but the four extra ones; `mce` and `relative_mce`,
    as fractions, are there for ImageNet-C, and `mce` for ImageNet-3DCC, where all corruptions and severities were.
    The intervals take an image to be right under all its corruptions or under none, and the clean images to be
    others: they are rather too wide than too narrow. n is the number of images.
    subset: of the images, for the record.
    """
    parts = verdicts["set"].str.rsplit("/", n=2, expand=True)
    if parts.shape[1] < 3:
        return []
    cells = verdicts.assign(family=parts[0], corruption=parts[1], severity=parts[2]).dropna(subset="severity")
    clean = verdicts[verdicts["set"] == "imagenet"]["broken"]
    rows = []
    for family, own in cells.groupby("family", sort=False):
        of_cell = own.groupby(["corruption", "severity"], sort=False)["broken"].mean().unstack()
        of_corruption = {str(name): float(error) for name, error in of_cell.mean(axis=1).items()}
        n = int(own["sample_id"].nunique())
        common = {
            "evaluator": evaluator,
            "set": str(family),
            "subset": subset,
            "attack": "none",
            "attack_fingerprint": None,
            "norm": None,
            "eps": 0.0,
            "seed": int(own["seed"].iloc[0]),
            "precision": own["precision"].iloc[0],
            "n": n,
        }
        counted = [error for name, error in of_corruption.items() if name not in EXTRA] or [*of_corruption.values()]
        accuracy = 1 - sum(counted) / len(counted)
        low, high = wilson_interval(accuracy * n, n)
        rows.append({**common, "metric": "mean_accuracy", "value": accuracy, "low": low, "high": high})
        reference = REFERENCES.get(str(family), {})
        asked = set(own[["corruption", "severity"]].itertuples(index=False, name=None))
        wanted = {(name, str(severity)) for name in reference for severity in SEVERITIES}
        if not reference or not wanted <= asked:
            continue
        mce = mean_corruption_error(of_corruption, reference) / 100
        scale = _scale(reference, 0.0)
        low, high = (scale * bound for bound in wilson_interval(mce / scale * n, n))
        rows.append({**common, "metric": "mce", "value": mce, "low": low, "high": high})
        if reference is COMMON_ERRORS and len(clean):
            clean_error, scale = float(clean.mean()), _scale(reference, CLEAN_ERROR)
            relative = relative_mean_corruption_error(of_corruption, clean_error) / 100
            least, most = wilson_interval(min(max(relative / scale + clean_error, 0.0), 1.0) * n, n)
            clean_least, clean_most = wilson_interval(float(clean.sum()), len(clean))
            low, high = scale * (least - clean_most), scale * (most - clean_least)
            rows.append({**common, "metric": "relative_mce", "value": relative, "low": low, "high": high})
    return rows


def _scale(reference: Mapping[str, float], less: float) -> float:
    """Return the mean corruption error of a classifier that is always wrong, as a fraction."""
    return sum(1 / (unit - less) for unit in reference.values()) / len(reference)
