"""What the verdicts of several attacks say about each other, sample by sample."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from ares_lightning.attacks import Threat, list_attacks
from ares_lightning.evaluation.sanity.attacks import WHOLE_BOX
from ares_lightning.evaluation.sanity.rule import FAIL, NOT_ASKED, PASS, Check, count_of, exceeds

CARLINI = "Carlini et al. 2019, arXiv 1902.06705"
AUTOATTACK = "Croce & Hein 2020, arXiv 2003.01690"
INDICATORS = "Indicators of Attack Failure, Pintor et al. 2022, arXiv 2106.09947"

SAME = 0.002
"""Share of samples by which a weaker question may win: the alpha of AutoAttack's flags, .2 points."""
HEURISTIC = 0.01
"""The same where neither of two searches contains the other, as PGD at two budgets."""
STRENGTHS: tuple[tuple[str, ...], ...] = (
    ("fgsm",),
    ("bim", "pgd"),
    ("apgd_ce",),
)
"""Attacks from weak to strong; an ensemble is as strong as its strongest."""
SEARCHES = (HEURISTIC, 0.02)
"""Share of samples tolerated that an attack of STRENGTHS breaks and the next stronger do not; the second is wider,
for APGD was seen to miss up to 1.6 % of what PGD breaks on an undefended network of few steps of training."""
EFFORTS = ("steps", "restarts", "queries", "draws", "num_targets")
"""Settings of attacks of which more is more."""
EPS_SLACK = 1 + 1e-9

_KINDS = {info.name: info.kind for info in list_attacks()}
_RANKS = {name: rank for rank, names in enumerate(STRENGTHS) for name in names}


@dataclass(frozen=True, eq=False)
class Run:
    """One attack at one budget: `broken`, bool by sample id, of the samples that are classified rightly at first.

    attacks: its name, of an ensemble its members'. settings: those of the attack but for norm and budget, by name;
    empty where they are not known.
    """

    evaluator: str
    attacks: frozenset[str]
    settings: Mapping[str, str]
    norm: str
    eps: float
    broken: pd.Series[bool]

    @property
    def rank(self) -> int:
        """Its place in STRENGTHS, -1 for what has none."""
        return max(_RANKS.get(name, -1) for name in self.attacks)

    def is_of(self, *kinds: str) -> bool:
        """Return whether its strongest kind of attack is among these."""
        found = {_KINDS.get(name, "") for name in self.attacks}
        return ("white-box" in found and "white-box" in kinds) or (
            "white-box" not in found and bool(found & {*kinds})
        )


def runs_of(rows: pd.DataFrame, about: Mapping[str, Any]) -> list[Run]:
    """Return the untargeted attacks of verdict rows, which are of one model and one set."""
    known = {entry["fingerprint"]: _settings(str(entry["settings"])) for entry in about.get("evaluators", [])}
    attacked = rows[rows["norm"].notna() & (rows["eps"] > 0) & rows["target"].isna()]
    attacked = attacked[attacked["clean_prediction"] == attacked["label"]]
    runs = []
    for (fingerprint, eps), group in attacked.groupby(["evaluator_fingerprint", "eps"], sort=False):
        first = group.iloc[0]
        broken = group.groupby("sample_id")["broken"].any()
        runs.append(
            Run(
                evaluator=first["evaluator"],
                attacks=frozenset(group["attack"]),
                settings=known.get(fingerprint, {}),
                norm=first["norm"],
                eps=float(eps),  # type: ignore[arg-type]
                broken=broken,
            )
        )
    return runs


def _settings(text: str) -> dict[str, str]:
    pairs = re.findall(r"(\w+)=('[^']*'|\([^)]*\)|[^,()]+)", text)
    return {key: value for key, value in pairs if key not in ("norm", "eps")}


def _union(runs: Iterable[Run]) -> pd.Series[bool]:
    """Return by sample id whether any of the runs breaks it, for the samples that all of them were asked about."""
    table = pd.concat([run.broken for run in runs], axis=1, join="inner")
    return table.any(axis=1)


def _lost(weaker: Sequence[Run], stronger: Sequence[Run]) -> tuple[int, int]:
    """Return how many samples the weaker break that the stronger do not, and of how many both were asked."""
    table = pd.concat([_union(weaker), _union(stronger)], axis=1, join="inner")
    return int((table[0] & ~table[1]).sum()), len(table)


def _at_budgets(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    """Yield the runs of each norm and budget, with these as text."""
    keys = dict.fromkeys((run.norm, run.eps) for run in runs)
    for norm, eps in keys:
        yield f"{norm} {eps:.4g}", [run for run in runs if (run.norm, run.eps) == (norm, eps)]


@dataclass(frozen=True)
class _Finding:
    """How many of n samples a weaker question broke and a stronger one did not."""

    text: str
    count: int
    n: int
    tolerated: float

    @property
    def counts(self) -> bool:
        """Whether that is too many."""
        return exceeds(self.count, self.n, self.tolerated)


def _verdict(check: str, title: str, findings: Sequence[_Finding], remedy: str, source: str) -> Check:
    """Return the verdict on comparisons of samples; those about no sample do not count."""
    findings = [finding for finding in findings if finding.n]
    if not findings:
        return Check(check, title, NOT_ASKED, "No two questions that could be compared.", None, source)
    bad = [finding for finding in findings if finding.counts]
    shown = bad or [max(findings, key=lambda finding: finding.count / finding.n)]
    told = "; ".join(f"{found.text}: {count_of(found.count, found.n)}" for found in shown[:3])
    allowed = f"{shown[0].tolerated:.1%} tolerated"
    evidence = f"{told} ({allowed}, {len(findings)} comparisons)."
    return Check(check, title, FAIL if bad else PASS, evidence, remedy if bad else None, source)


def attack_checks(rows: pd.DataFrame, about: Mapping[str, Any], threat: Threat) -> list[Check]:
    """Return what verdict rows of one model and one set say about the attacks that they are of."""
    is_transfer = rows["source_fingerprint"].notna()
    runs = runs_of(rows[~is_transfer], about)
    transfers = runs_of(rows[is_transfer], about)
    white = [run for run in runs if run.is_of("white-box")]
    return [
        _stronger_break_more(runs),
        _more_budget_breaks_more(runs),
        _more_effort_breaks_more(runs),
        _converged(runs),
        _whole_box(runs),
        _not_stronger(
            "black_box_not_stronger",
            "Attacks that see no gradients are not stronger than those that do",
            [run for run in runs if run.is_of("score-based", "decision-based")],
            white,
            "Gradients mislead the attacks: put the score-based attack's result first, attack a differentiable "
            "stand-in of what hides the gradients (BPDA), and use other losses and more restarts.",
            f"{AUTOATTACK}; {CARLINI}",
            _last_of_ensemble(rows),
        ),
        _not_stronger(
            "transfer_not_stronger",
            "Adversarial examples of other models are not stronger than the model's own",
            transfers,
            white,
            "Gradients of the model mislead the attacks on it: count the transferred examples in the worst case, "
            "and attack by BPDA.",
            CARLINI,
        ),
        _not_stronger(
            "noise_not_stronger",
            "Random noise is not stronger than an attack",
            [run for run in runs if run.attacks == {"noise"}],
            white,
            "The attack is broken or the gradients are: check its step size and loss, then the gradients.",
            CARLINI,
        ),
    ]


def _stronger_break_more(runs: Sequence[Run]) -> Check:
    findings = []
    for budget, here in _at_budgets(runs):
        ranks = sorted({run.rank for run in here if run.rank >= 0})
        for low, high in pairwise(ranks):
            stronger = [run for run in here if run.rank == high]
            for run in here:
                if run.rank == low:
                    text = f"broken by {run.evaluator} and not by {_names(stronger)} at {budget}"
                    findings.append(_Finding(text, *_lost([run], stronger), SEARCHES[low]))
    return _verdict(
        "stronger_attacks_break_more",
        "Iterative attacks break what single steps break, and adaptive ones what iterative ones do",
        findings,
        "The stronger attack fails at its job: raise its steps and restarts, or suspect the gradients.",
        CARLINI,
    )


def _more_budget_breaks_more(runs: Sequence[Run]) -> Check:
    findings = []
    for same in _alike(runs, ()):
        budgets = sorted({run.eps for run in same})
        neighbours = (
            (a, b) for low, high in pairwise(budgets) for a in same for b in same if (a.eps, b.eps) == (low, high)
        )
        for smaller, larger in neighbours:
            text = f"broken by {smaller.evaluator} at {smaller.eps:.4g} and not at {larger.eps:.4g}"
            findings.append(_Finding(text, *_lost([smaller], [larger]), HEURISTIC))
    return _verdict(
        "monotone_in_budget",
        "A larger budget breaks what a smaller one breaks",
        findings,
        "The attack does not use its budget: check its step size, or suspect the gradients.",
        CARLINI,
    )


def _more_effort_breaks_more(runs: Sequence[Run]) -> Check:
    findings = []
    for _, here in _at_budgets(runs):
        for less, more in _pairs_of_effort(here):
            text = f"broken by {less.evaluator} and not by {more.evaluator}"
            findings.append(_Finding(text, *_lost([less], [more]), HEURISTIC))
    return _verdict(
        "monotone_in_effort",
        "More steps, restarts or queries break what fewer break",
        findings,
        "The model or the attack does not do the same twice: see whether the model is deterministic.",
        CARLINI,
    )


def _converged(runs: Sequence[Run]) -> Check:
    findings = []
    for budget, here in _at_budgets(runs):
        pairs = [
            (less, more)
            for less, more in _pairs_of_effort(here)
            if _effort(more, "steps") >= 2 * _effort(less, "steps") > 0
        ]
        if pairs:
            less, more = max(pairs, key=lambda pair: (_effort(pair[1], "steps"), _effort(pair[0], "steps")))
            text = f"broken by {more.evaluator} and not by {less.evaluator} at {budget}"
            findings.append(_Finding(text, *_lost([more], [less]), HEURISTIC))
    return _verdict(
        "converged",
        "Twice as many steps break no more",
        findings,
        "Give the attack more steps, until twice as many change nothing.",
        f"{CARLINI}; {INDICATORS}",
    )


def _whole_box(runs: Sequence[Run]) -> Check:
    boundless = [run for run in runs if run.evaluator.endswith(WHOLE_BOX) or (run.norm == "linf" and run.eps >= 1)]
    findings = []
    for budget, here in _at_budgets(boundless):
        broken = _union(here)
        text = f"not broken at {budget}, which holds every image"
        findings.append(_Finding(text, int((~broken).sum()), len(broken), HEURISTIC))
    return _verdict(
        "unbounded_attack_breaks_all",
        "Without a bound nothing withstands",
        findings,
        "Within that budget lie images of other classes, and the attack does not find them: its gradients fail it.",
        f"{CARLINI}; {INDICATORS}",
    )


def _not_stronger(
    check: str,
    title: str,
    weaker: Sequence[Run],
    white: Sequence[Run],
    remedy: str,
    source: str,
    further: Sequence[_Finding] = (),
) -> Check:
    """Compare what each of `weaker` breaks with what all white-box attacks within its budget break together."""
    findings = list(further)
    for run in weaker:
        same = [other for other in white if other.norm == run.norm and other.eps <= run.eps * EPS_SLACK]
        if any(other.eps * EPS_SLACK >= run.eps for other in same):
            text = f"broken by {run.evaluator} and by no white-box attack within {run.norm} {run.eps:.4g}"
            findings.append(_Finding(text, *_lost([run], same), SAME))
    return _verdict(check, title, findings, remedy, source)


def _last_of_ensemble(rows: pd.DataFrame) -> list[_Finding]:
    """Return what Square, in an ensemble after the white-box attacks, breaks of what they left."""
    findings = []
    asked = rows[rows["norm"].notna() & (rows["clean_prediction"] == rows["label"])]
    for (name, _, eps), group in asked.groupby(["evaluator", "evaluator_fingerprint", "eps"], sort=False):
        if group["attack"].nunique() > 1 and (group["attack"] == "square").any():
            broken = group[group["broken"]]
            is_square = broken["attack"] == "square"
            alone = len({*broken["sample_id"][is_square]} - {*broken["sample_id"][~is_square]})
            text = f"broken by Square alone within {name} at {eps:.4g}"
            findings.append(_Finding(text, alone, group["sample_id"].nunique(), SAME))
    return findings


def _alike(runs: Sequence[Run], but_for: Sequence[str]) -> list[list[Run]]:
    """Return the runs grouped by norm, attack and settings, some left out; where unknown, by evaluator."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        settings = tuple(sorted((key, value) for key, value in run.settings.items() if key not in but_for))
        key = (run.norm, run.attacks if len(run.attacks) == 1 else "ensemble", settings or run.evaluator)
        groups.setdefault(key, []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def _pairs_of_effort(runs: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """Yield pairs of runs at one budget that differ in effort alone, the lesser first."""
    for same in _alike([run for run in runs if run.settings], EFFORTS):
        for less in same:
            for more in same:
                efforts = [(_effort(less, key), _effort(more, key)) for key in EFFORTS]
                if all(a <= b for a, b in efforts) and any(a < b for a, b in efforts):
                    yield less, more


def _effort(run: Run, key: str) -> float:
    value = run.settings.get(key, "0")
    return float(value) if value.isdigit() else 0.0


def _names(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(run.evaluator for run in runs))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
