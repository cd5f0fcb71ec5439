"""The verdict on an evaluation: every check that can be made of what was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from ares_lightning.attacks import Threat
from ares_lightning.evaluation.sanity.attack_checks import attack_checks
from ares_lightning.evaluation.sanity.model_checks import model_checks
from ares_lightning.evaluation.sanity.probes import Probes
from ares_lightning.evaluation.sanity.record_checks import record_checks
from ares_lightning.evaluation.sanity.rule import Check


def run_checks(
    rows: pd.DataFrame,
    summary: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    threat: Threat,
    main: str,
    probes: Probes | None = None,
    eot: int = 1,
    several_labels: bool = False,
) -> list[Check]:
    """Return all checks, those that nothing was asked for as `not asked`.

    rows: verdicts of the model in question, as in `verdicts.SCHEMA`; summary, about: what `summary.json` and
    `about.json` hold; main: the set of the threat model's headline; probes: measurements on the model; eot: draws
    of a model that is declared as randomised; several_labels: samples have more than one right class.
    """
    rows = rows[rows["set"] == main]
    return [
        *model_checks(probes, eot),
        *attack_checks(rows, about, threat),
        *record_checks(rows, summary, about, threat, several_labels),
    ]


def sanity_report(checks: Sequence[Check], model_fingerprint: str, probes: Probes | None) -> dict[str, Any]:
    """Return what `sanity.json` holds."""
    return {
        "model_fingerprint": model_fingerprint,
        "checks": [asdict(check) for check in checks],
        "probes": None if probes is None else asdict(probes),
    }
