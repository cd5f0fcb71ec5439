"""Whether the rows and the record of an evaluation bear out what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ares_lightning.attacks import Threat
from ares_lightning.evaluation.metrics import WORST_CASE
from ares_lightning.evaluation.sanity.attack_checks import CARLINI, SAME
from ares_lightning.evaluation.sanity.rule import (
    FAIL,
    NOT_ASKED,
    PASS,
    WARN,
    Check,
    count_of,
    exceeds,
    largest_distance,
)
from ares_lightning.evaluation.summary import within_threat

AA_11 = "github.com/fra31/auto-attack#45"


def record_checks(
    rows: pd.DataFrame,
    summary: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    threat: Threat,
    several_labels: bool,
) -> list[Check]:
    """Return what verdict rows of one model and one set say about the summary and the record."""
    return [
        _budgets_kept(rows),
        _rows_consistent(rows, several_labels),
        _headline(rows, summary, threat),
        _all_ran(about),
        _provenance(rows, summary, about),
    ]


def _budgets_kept(rows: pd.DataFrame) -> Check:
    title = "Adversarial examples stay within their budget"
    bounded = rows[rows["norm"].notna() & rows["broken"] & rows["eps"].between(0, float("inf"), inclusive="left")]
    if bounded.empty:
        return Check("budgets_kept", title, NOT_ASKED, "No adversarial example has a budget.", None, CARLINI)
    beyond = 0
    for _, group in bounded.groupby(["norm", "eps"]):
        norm, eps = group["norm"].iloc[0], float(group["eps"].iloc[0])
        beyond += int((~(group["distance"] <= largest_distance(norm, eps))).sum())
    evidence = (
        f"Further from the clean image than eps and rounding allow: {count_of(beyond, len(bounded))} examples."
    )
    remedy = "The attack is at fault, or the table was changed: run it again." if beyond else None
    return Check("budgets_kept", title, FAIL if beyond else PASS, evidence, remedy, CARLINI)


def _rows_consistent(rows: pd.DataFrame, several_labels: bool) -> Check:
    key, title = "verdicts_consistent", "Verdicts agree with predictions, and clean predictions with each other"
    if rows.empty:
        return Check(key, title, NOT_ASKED, "There are no verdicts.", None, CARLINI)
    untargeted = rows["target"].isna()
    wrong = (rows["adversarial_prediction"] != rows["label"]).where(
        untargeted, rows["adversarial_prediction"] == rows["target"]
    )
    other_label = several_labels & rows["norm"].isna()  # a prediction beside the label may be right
    astray = int(((wrong != rows["broken"]) & ~(other_label & wrong)).sum())
    answers = rows.groupby("sample_id")["clean_prediction"].nunique()
    varied = int((answers > 1).sum())
    evidence = (
        f"Verdicts against their own prediction: {count_of(astray, len(rows))}; samples whose clean prediction is "
        f"not the same in all rows: {count_of(varied, len(answers))}."
    )
    bad = astray > 0 or exceeds(varied, len(answers), SAME)
    remedy = (
        "The model does not answer the same twice: see deterministic and independent_of_batch." if bad else None
    )
    return Check(key, title, FAIL if bad else PASS, evidence, remedy, CARLINI)


def _headline(rows: pd.DataFrame, summary: Sequence[Mapping[str, Any]], threat: Threat) -> Check:
    key, title = "headline_is_worst_case", "The headline is the worst case of each sample over all that was run"
    headline = next((row for row in summary if row["evaluator"] == WORST_CASE), None)
    if headline is None:
        evidence = "There is no headline: no attack within the threat model was run."
        return Check(key, title, NOT_ASKED, evidence, None, AA_11)
    within = within_threat(rows, threat)
    robust = ~within.groupby("sample_id")["broken"].any()
    n, value = len(robust), float(robust.mean())
    evidence = (
        f"Reported {headline['value']:.2%} of {headline['n']}; recounted from the rows {value:.2%} of {n}, over "
        f"{within['evaluator'].nunique()} evaluators."
    )
    same = headline["n"] == n and abs(headline["value"] - value) < 0.5 / max(n, 1)
    remedy = None if same else "Report the recounted figure: summary and rows are not of the same run."
    return Check(key, title, PASS if same else FAIL, evidence, remedy, AA_11)


def _all_ran(about: Mapping[str, Any]) -> Check:
    failed = about.get("failed", [])
    told = "; ".join(f"{entry['evaluator']}: {entry['error']}" for entry in failed[:3])
    evidence = f"{len(failed)} failed: {told}." if failed else "Nothing that was asked failed."
    remedy = "See to what the errors say and run the same command again." if failed else None
    return Check("all_ran", "Everything asked was answered", FAIL if failed else PASS, evidence, remedy, CARLINI)


def _provenance(rows: pd.DataFrame, summary: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Check:
    sets, run = about.get("sets", []), about.get("run", {})
    facts = {
        "number of images": all(entry.get("n") for entry in sets) and bool(sets),
        "hash of the images' names": all(entry.get("names_hash") for entry in sets) and bool(sets),
        "preprocessing": all("preparation" in entry for entry in sets) and bool(sets),
        "seed": all(row.get("seed") is not None for row in summary) and bool(summary),
        "precision": all(row.get("precision") for row in summary) and bool(summary),
        "versions": bool(run.get("versions")),
        "verdicts of single samples": not rows.empty,
    }
    missing = [name for name, is_there in facts.items() if not is_there]
    n = ", ".join(f"{entry.get('set')} {entry.get('n')}" for entry in sets[:3])
    evidence = f"Missing: {', '.join(missing)}." if missing else f"All recorded ({n} images; {len(rows)} verdicts)."
    return Check(
        "provenance",
        "The record says on what, with what and how it was measured",
        WARN if missing else PASS,
        evidence,
        "Run it again with this version, which records them." if missing else None,
        CARLINI,
    )
