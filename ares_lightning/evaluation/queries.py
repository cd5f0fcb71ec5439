"""Attacks that see the answers to their queries alone, and accuracy over the number of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from ares_lightning.evaluation.evaluators import AttackEvaluator
from ares_lightning.evaluation.summary import accuracy_row

KINDS = ("score-based", "decision-based")
"""The kinds of attacks that go by queries."""
POINTS = (1, 2, 5)
"""Numbers of queries within a power of ten."""


def query_numbers(most: int) -> tuple[int, ...]:
    """Return the numbers of queries of a curve: 0, then 1, 2, 5, 10 … below `most`, and `most`."""
    numbers = (point * 10**power for power in range(len(str(most))) for point in POINTS)
    return (0, *(number for number in numbers if number < most), most)


@dataclass(frozen=True)
class QueryEvaluator(AttackEvaluator):
    """Does an attack break the sample by queries, and by how many?

    The accuracies over the number of queries follow from one run with the largest (as
    `attacks.query.accuracy_over_queries` has it), which needs a budget: without one no sample is ever done.
    """

    def further_rows(self, verdicts: pd.DataFrame) -> list[dict[str, Any]]:
        """Return `accuracy_over_queries` at numbers of queries from 0 to what a sample takes at most.

        Targeted attacks and those without a budget have none.
        """
        queries = getattr(self.attack, "queries", None)
        if self.targets is not None or self.attack.eps is None or queries is None:
            return []
        most = max(int(verdicts["forwards"].max()), queries * self.attack.eot)
        broken, spent = verdicts["broken"], verdicts["forwards"]
        shared = (verdicts, self.subset, self.attack.name, self.attack.threat.eps)
        return [
            {
                **accuracy_row(self.name, "accuracy_over_queries", ~(broken & (spent <= number)), *shared),
                "queries": number,
            }
            for number in query_numbers(most)
        ]
