"""Two models on the same images: how many only one of them withstands, and whether that may be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import bdtr

from ares_lightning.evaluation.report.run import Run


@dataclass(frozen=True)
class Pair:
    """A paired comparison of robust accuracy.

    n: images that both were asked about; only_first, only_second: withstood by one of the two alone; p: of the
    exact McNemar test; alike: whether the same evaluators attacked both.
    """

    first: Run
    second: Run
    n: int
    only_first: int
    only_second: int
    p: float
    alike: bool

    @property
    def difference(self) -> float:
        """Robust accuracy of the first less that of the second, on these images."""
        return (self.only_first - self.only_second) / self.n


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p value of the exact McNemar test: were the discordant samples dealt by a fair coin?

    McNemar 1947 with the binomial distribution instead of its normal approximation.
    """
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Return every two runs that were attacked on common images within the same threat model."""
    compared = []
    for first, second in combinations(runs, 2):
        one, other = first.worst_case, second.worst_case
        if one is None or other is None or first.question != second.question:
            continue
        if np.array_equal(one.samples, other.samples):
            here = there = np.arange(len(one.samples))
        else:
            _, here, there = np.intersect1d(one.samples, other.samples, assume_unique=True, return_indices=True)
        if not len(here) or not np.array_equal(one.labels[here], other.labels[there]):
            continue
        withstood, also = ~one.broken[here], ~other.broken[there]
        only_first, only_second = int((withstood & ~also).sum()), int((also & ~withstood).sum())
        p = mcnemar(only_first, only_second)
        alike = one.evaluators == other.evaluators
        compared.append(Pair(first, second, len(here), only_first, only_second, p, alike))
    return compared
