"""How many samples may speak against an evaluation before chance is no excuse, and the shape of a check."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import binom

from ares_lightning.attacks.threat import SLACK

PASS, WARN, FAIL, NOT_ASKED = "pass", "warn", "fail", "not asked"
SIGNIFICANCE = 0.01
"""More samples than are tolerated count only where chance would show as many in one evaluation of a hundred."""
LINF_SLACK = 6e-8
"""By how much rounding may take an image in float32 past its L-inf budget: half the distance of floats below 1."""


@dataclass(frozen=True)
class Check:
    """One reason to believe an evaluation, or not to.

    check: its key. title: the claim. verdict: `pass`, `warn`, `fail` or `not asked`. evidence: the numbers, in a
    sentence or two. remedy: what to do, None where nothing is. source: who asks for it.
    """

    check: str
    title: str
    verdict: str
    evidence: str
    remedy: str | None
    source: str


def exceeds(count: int, n: int, tolerated: float) -> bool:
    """Return whether `count` of n samples is more than a share `tolerated` explains.

    That is where as many or more have a probability below SIGNIFICANCE if each sample counts with probability
    `tolerated` (exact one-sided binomial test).
    """
    return count > 0 and float(binom.sf(count - 1, n, tolerated)) < SIGNIFICANCE


def largest_distance(norm: str, eps: float, dtype: torch.dtype = torch.float32) -> float:
    """Return how far from the clean image an adversarial example may lie, rounding included."""
    return eps + LINF_SLACK if norm == "linf" else eps * (1 + SLACK[dtype])


def count_of(count: int, n: int) -> str:
    """Return `count of n (share)`."""
    return f"{count} of {n} ({count / n:.1%})" if n else "0 of 0"
