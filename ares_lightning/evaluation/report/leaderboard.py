"""The leaderboard: one entry a model and threat model, ranked by the lowest robust accuracy that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ares_lightning.evaluation.metrics import wilson_interval
from ares_lightning.evaluation.report.page import render, write
from ares_lightning.evaluation.report.rows import NORMS, Row, eps_text
from ares_lightning.evaluation.report.run import Run, read_runs
from ares_lightning.evaluation.report.worst_case import Bools


@dataclass(frozen=True)
class Entry:
    """A model within a threat model on a set: accuracies are fractions with their 95 % intervals.

    robust, low, high, n: the lowest known robust accuracy, over all runs of the model; united: it is that of the
    per-sample worst case over several runs. attacks: evaluators whose attacks are in it. failed, warned, passed:
    titles of the sanity checks by the worst that a run says of them.
    """

    model: str
    architecture: str | None
    training: str | None
    num_parameters: int | None
    set: str
    norm: str
    eps: float
    robust: float
    low: float
    high: float
    n: int
    clean: Row | None
    attacks: tuple[str, ...]
    failed: tuple[str, ...]
    warned: tuple[str, ...]
    passed: tuple[str, ...]
    runs: tuple[str, ...]
    united: bool
    fingerprint: str | None

    @property
    def threat(self) -> str:
        """The threat model in words."""
        return f"{NORMS.get(self.norm, self.norm)}, eps {eps_text(self.norm, self.eps)}"

    @property
    def suites(self) -> tuple[str, ...]:
        """The evaluators whose attacks are in it, those of the sanity suite as one."""
        return _sorted("sanity" if name.startswith("sanity_") else name for name in self.attacks)

    @property
    def checked(self) -> bool:
        """Whether any sanity check was made."""
        return bool(self.failed or self.warned or self.passed)

    @property
    def group(self) -> str:
        """Set and threat model; only numbers of one group compare."""
        return f"{self.set}, {self.threat}"


def entries(runs: Sequence[Run]) -> list[Entry]:
    """Return the entries, those of the largest group first and in each the most robust, then the most accurate.

    Runs with the same model fingerprint, set and threat model are one entry: where all of them have their verdicts
    on the same samples, a sample counts as robust if it withstood the attacks of every run; else the lowest of
    their accuracies counts. Runs without a headline have no place here.
    """
    of_model: dict[object, list[Run]] = {}
    for run in runs:
        if run.question is not None:
            of_model.setdefault((run.fact("run.model_fingerprint") or run.folder, run.question), []).append(run)
    found = [_entry(of_one) for of_one in of_model.values()]
    names = Counter((entry.group, entry.model) for entry in found)
    found = [
        replace(entry, model=entry.runs[0]) if names[entry.group, entry.model] > 1 else entry for entry in found
    ]
    sizes = Counter(entry.group for entry in found)

    def rank(entry: Entry) -> tuple[int, str, float, float, str]:
        clean = entry.clean.value if entry.clean else 0
        return (-sizes[entry.group], entry.group, -entry.robust, -clean, entry.model)

    return sorted(found, key=rank)


def write_leaderboard(runs: Sequence[Path], output: Path) -> Path:
    """Write the page that ranks the models of these run folders to `output` and return `output`.

    Raises ValueError where no run has a robust accuracy, and as `write_report` does.
    """
    ranked = ranking(runs)
    groups = list(dict.fromkeys(entry.group for entry in ranked))
    page = render("leaderboard.html", charts=False, title="Leaderboard", entries=ranked, groups=groups)
    return write(output, page.encode())


def ranking(runs: Sequence[Path]) -> list[Entry]:
    """Return the entries of these run folders; raise ValueError where there is none."""
    ranked = entries(read_runs(runs))
    if not ranked:
        raise ValueError("no run has a robust accuracy; evaluate with an attack, such as eval=autoattack")
    return ranked


def _entry(runs: Sequence[Run]) -> Entry:
    """Return the entry of the runs of one model within one threat model, the lowest accuracy first."""
    ordered = sorted(runs, key=lambda run: (run.robust.value if run.robust else 0.0, run.label))
    first = ordered[0]
    row = first.robust
    if row is None or row.norm is None or row.eps is None:
        raise AssertionError("runs without a headline were left out")
    value, low, high, n = row.value, row.low, row.high, row.n
    united = _union(ordered)
    if united is not None and len(ordered) > 1:
        n = len(united)
        value = 1 - float(united.sum()) / n
        low, high = wilson_interval(n - int(united.sum()), n)
    attacks = _sorted(name for run in ordered for name in _attacks(run, row))
    failed, warned, passed = (
        {check.title for run in ordered for check in run.verdicts(verdict)} for verdict in ("fail", "warn", "pass")
    )
    return Entry(
        model=first.name,
        architecture=first.architecture,
        training=first.training,
        num_parameters=first.num_parameters,
        set=row.set or "",
        norm=row.norm,
        eps=row.eps,
        robust=value,
        low=low,
        high=high,
        n=n,
        clean=next((run.clean for run in ordered if run.clean), None),
        attacks=attacks,
        failed=_sorted(failed),
        warned=_sorted(warned - failed),
        passed=_sorted(passed - warned - failed),
        runs=_sorted(run.label for run in ordered),
        united=united is not None and len(ordered) > 1,
        fingerprint=first.fact("run.model_fingerprint"),
    )


def _union(runs: Sequence[Run]) -> Bools | None:
    """Return which samples some run broke, None where the verdicts of one are missing or on other samples."""
    cases = [run.worst_case for run in runs]
    known = [worst for worst in cases if worst is not None]
    if not known or len(known) < len(cases):
        return None
    if not all(np.array_equal(known[0].samples, worst.samples) for worst in known[1:]):
        return None
    broken: Bools = np.any([worst.broken for worst in known], axis=0)
    return broken


def _attacks(run: Run, headline: Row) -> tuple[str, ...]:
    """Return the evaluators whose attacks are in a headline."""
    if run.worst_case is not None:
        return run.worst_case.evaluators
    return tuple(
        row.evaluator
        for row in run.own
        if row.metric == "robust_accuracy" and row.norm == headline.norm and row.set == headline.set and row.attack
    )


def _sorted(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(words)))
